import json
import shutil

import pytest
from espalier.configs.load import load
from espalier.configs.schema import LoraSection
from espalier.trainer.plan import CACHE_TOKENS, LOGIT_TILE, expected_speed, make_plan, memory, placement_in, plan_text
from espalier.trainer.shapes import KNOWN, find_model, find_shape, shape_of
from espalier.trainer.shipped import SHIPPED
from espalier.trainer.speed import find_card, sampled_limit, trained_limit

SIZES = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 96,
    "vocab_size": 500,
}


FAMILIES = {
    "Qwen3": {"attention_bias": True},
    "Qwen2": {"tie_word_embeddings": True},
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {},
    "Gemma": {},
    "Gemma2": {},
    "Gemma3": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    "Mixtral": {"num_local_experts": 4},
}
MIXED = {**FAMILIES["Qwen3Moe"], "num_hidden_layers": 7, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
MODELS = [*FAMILIES.items(), ("Qwen3", {"tie_word_embeddings": True}), ("Qwen3Moe", MIXED)]


def real(family, more):
    """A model of the family's own class without memory, and its config.json."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}{'TextConfig' if family == 'Gemma3' else 'Config'}")(
        **{name: value for name, value in {**SIZES, **more}.items() if name != "model_type"}
    )
    with torch.device("meta"):
        return getattr(transformers, f"{family}ForCausalLM")(config), json.loads(config.to_json_string(use_diff=False))


@pytest.mark.parametrize(("family", "more"), MODELS)
def test_parameters_are_those_of_the_real_model(family, more):
    model, said = real(family, more)
    assert shape_of(said).parameters() == sum(p.numel() for p in model.parameters())


def test_what_a_config_of_the_hub_leaves_out():
    """Gemma's ties its tables unsaid; Qwen3-MoE's names its experts otherwise than a newly written one."""
    gemma, mixture = (real(family, FAMILIES[family]) for family in ("Gemma", "Qwen3Moe"))
    said = {name: value for name, value in gemma[1].items() if name != "tie_word_embeddings"}
    assert shape_of(said).parameters() == sum(p.numel() for p in gemma[0].parameters())
    said = {name: value for name, value in mixture[1].items() if name != "num_local_experts"}
    assert shape_of({**said, "num_experts": 4}).parameters() == sum(p.numel() for p in mixture[0].parameters())
    with pytest.raises(KeyError):
        shape_of({**SIZES, "model_type": "falcon"})


@pytest.mark.parametrize(("family", "more"), MODELS)
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj"), ("gate_proj", "up_proj", "o_proj")])
def test_lora_parameters_are_pefts(family, more, targets):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    model, said = real(family, more)
    wanted = targets if isinstance(targets, str) else list(targets)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=wanted, task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert shape_of(said).lora_parameters(LoraSection(rank=8, target_modules=targets)) == trained


def test_a_mixture_counts_every_expert_in_memory_and_the_chosen_ones_in_speed():
    sizes = {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    }  # fmt: skip
    shape = shape_of(sizes)
    assert shape.parameters() / 1e9 == pytest.approx(30.5, abs=0.1)  # Qwen3-30B-A3B, as published
    assert shape.active_parameters() / 1e9 == pytest.approx(3.3, abs=0.1)
    base, *_ = memory(load("spreadsheet-qwen3-4b", []), shape)
    assert base.bytes > 2 * 30e9


def test_the_published_models_have_their_published_sizes():
    billions = {"Qwen/Qwen3-0.6B": 0.60, "Qwen/Qwen3-1.7B": 1.72, "Qwen/Qwen3-4B": 4.02, "Qwen/Qwen3-8B": 8.19}
    for name, size in billions.items():
        assert KNOWN[name].parameters() / 1e9 == pytest.approx(size, abs=0.01)


def test_the_tile_is_the_trainers():
    from espalier.trainer.grpo.trainer import VOCAB_TILE

    assert LOGIT_TILE == VOCAB_TILE


def test_the_kept_tokens_are_the_samplers():
    import inspect

    from espalier.rollouts.samplers.torch import TorchSampler

    assert inspect.signature(TorchSampler).parameters["cache_tokens"].default == CACHE_TOKENS


def test_the_shipped_4b_run_fits_an_80_gb_card_and_what_is_too_large_does_not():
    card = 80 * 2**30
    assert sum(on_card(load("spreadsheet-qwen3-4b"), card).values()) < card
    asynchronous = ["--schedule.kind", "async", "--schedule.max_staleness", "1", "--sampler.gpu_memory", "0.8"]
    assert sum(on_card(load("spreadsheet-qwen3-4b", asynchronous), card).values()) > card
    embedded = ["--sampler.kind", "torch", "--sampler.max_versions", "2", "--sampler.slots"]
    for slots, fits in (("4", True), ("16", False)):
        config = load("spreadsheet-qwen3-4b", [*embedded, slots])
        assert (sum(part.bytes for part in memory(config, KNOWN["Qwen/Qwen3-4B"], card)) < card) == fits


def on_card(config, room, visible=1):
    shape = KNOWN["Qwen/Qwen3-4B"]
    return {p.name: p.bytes for p in memory(config, shape, room, placement_in(config, shape, visible, room, 1))}


def part(config, name):
    shape = KNOWN["Qwen/Qwen3-4B"]
    return next(part.bytes for part in memory(config, shape) if part.name.startswith(name))


def test_each_part_moves_with_what_it_is_made_of():
    def more(*overrides):
        return load("spreadsheet-qwen3-4b", ["--sampler.kind", "torch", *overrides])

    config = more()
    slots = config.sampler.slots
    assert part(more("--sampler.slots", str(2 * slots)), "sampler's KV") == 2 * part(config, "sampler's KV")
    assert part(more("--policy.gradient_checkpointing", "false"), "activations") > 10 * part(config, "activations")
    assert part(more("--trainer.micro_batch", "2"), "logits") == 2 * part(config, "logits")
    assert part(more("--policy.quantization", "4bit"), "trainer's base") < 0.5 * part(config, "trainer's base")
    rank = config.policy.lora.rank
    assert part(more("--policy.lora.rank", str(2 * rank)), "LoRA") == 2 * part(config, "LoRA")


def test_vllm_takes_its_share_of_a_card_and_what_it_needs_on_the_cpu():
    shape, card = KNOWN["Qwen/Qwen3-4B"], 80e9
    config = load("spreadsheet-qwen3-4b")

    asked = load("spreadsheet-qwen3-4b", ["--sampler.gpu_memory", "0.5"])
    assert on_card(asked, card)["vLLM"] == 0.5 * card
    assert on_card(config, card, visible=2)["vLLM"] == 0.0, "it has a card of its own"
    on_cpu = {part.name: part.bytes for part in memory(config, shape)}
    assert on_cpu["vLLM's base"] == 2 * shape.parameters() and on_cpu["vLLM's KV cache"] == 2**30
    elsewhere = load("spreadsheet-qwen3-4b", ["--sampler.kind", "vllm-server", "--sampler.url", "http://host:8000"])
    assert on_card(elsewhere, card)["vLLM"] == 0.0


def model_folder(tmp_path, **index):
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "tie_word_embeddings": True}))
    if index:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tmp_path


def test_a_model_is_there_only_with_all_its_weights(tmp_path):
    folder = model_folder(tmp_path, a="one.safetensors", b="two.safetensors")
    (folder / "one.safetensors").write_bytes(b"x")
    assert find_model(str(folder)) is None
    (folder / "two.safetensors").write_bytes(b"x")
    assert find_model(str(folder)) == folder
    assert find_shape(str(folder)) == shape_of({**SIZES, "tie_word_embeddings": True})


def test_a_template_that_cannot_be_used_is_said_before_anything_starts(tmp_path):
    folder = model_folder(tmp_path)
    (folder / "model.safetensors").write_bytes(b"x")
    config = load("spreadsheet-tiny", ["--policy.base", str(folder)])
    missing = [one.what for one in make_plan(config).missing]
    assert any("chat template" in one and "tokenizer.json" in one for one in missing)


def test_nothing_is_missing_where_everything_is_there(tmp_path):
    folder = model_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SHIPPED["tiny"][0] / name, folder)
    (folder / "model.safetensors").write_bytes(b"x")
    config = load("spreadsheet-tiny", ["--policy.base", str(folder)])
    plan = make_plan(config)
    assert plan.missing == () and plan.total > 0
    assert "nothing is missing" in plan_text(config, plan)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["--policy.base", "Qwen/Qwen3-4B"], "hf download Qwen/Qwen3-4B"),
        (["--policy.base", "no such id!"], "no such id!"),
        (["--env.tasks", "/no/such/data"], "/no/such/data"),
        (["--policy.from_adapter", "/no/such/adapter"], "adapter"),
        (["--policy.base", "Qwen/Qwen3-14B", "--sampler.slots", "100000"], "memory"),
    ],
)
def test_what_is_missing_is_named_with_its_mend(overrides, word):
    config = load("spreadsheet-tiny", overrides)
    text = plan_text(config, make_plan(config))
    assert word in text and "->" in text


def test_the_speed_is_that_of_the_arithmetic():
    """A base of 15 GB on an H200: 3.1 ms a step, so at most 41,000 tokens a second for 128 episodes without a cache."""
    h200 = find_card("NVIDIA H200")
    assert sampled_limit(h200, 15e9, 0.0, 128) == pytest.approx(41_000, rel=0.01)
    assert sampled_limit(h200, 15e9, 1e9, 128) < 41_000 / 8
    assert trained_limit(h200, 7_000_000_000, recomputed=False) == pytest.approx(14_100, rel=0.01)
    assert trained_limit(h200, 7_000_000_000, recomputed=True) == pytest.approx(9_400, rel=0.01)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("the CPU", None),
    ],
)
def test_a_card_is_known_by_its_name(device, name):
    found = find_card(device)
    assert (found and found.name) == name


def test_the_plan_says_how_fast_it_can_be():
    config = load("spreadsheet-qwen3-4b")
    assert "at most" in expected_speed(config, KNOWN["Qwen/Qwen3-4B"], "NVIDIA H100 80GB HBM3")
    assert expected_speed(config, KNOWN["Qwen/Qwen3-4B"], "a card that nobody listed") == ""
    assert make_plan(load("spreadsheet-tiny")).speed == ""
