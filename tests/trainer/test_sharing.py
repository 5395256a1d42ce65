"""The trainer on trees: every loss has the gradient of the flat path, and what cannot run as a tree runs flat and says
so.
"""

import dataclasses
import gc
import math

import pytest
import torch
from espalier.trainer.batch import Batch, Row, collate
from espalier.trainer.grpo.config import LOSS_TYPES
from espalier.trainer.tree import models, sharing
from espalier.trainer.tree.attention import Layout
from espalier.trainer.tree.core import grow
from espalier.trainer.tree.models import Unsuitable, enable, lay_out, no_mask, why_flat
from espalier.trainer.tree.packing import unique_tokens
from peft import LoraConfig, get_peft_model
from random_rows import branching_rows, make_rows
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from updates import changed, gradient, make

EXACT = 1e-5
CPU = torch.device("cpu")
ROWS = tuple(branching_rows(14, seed=3))


def both(base, folder, rows=ROWS, **options):
    """Loss and gradient of the flat path and of the tree."""
    flat = make(base, folder / "flat", shared_prefix="flat", **options)
    tree = make(base, folder / "tree", shared_prefix="tree", **options)
    found = gradient(flat, rows), gradient(tree, rows)
    assert flat.sharing.state == 'flat: trainer.shared_prefix = "flat"'
    assert tree.sharing.compared and tree.sharing.state == "tree"
    return found


@pytest.mark.parametrize("loss", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_loss_has_the_gradient_of_the_flat_path(base, tmp_path, loss, level):
    """With KL to the base, entropy, weights of the recorded log-probabilities, and rows of unequal weight."""
    if (loss, level) == ("vespo", "sequence"):
        pytest.skip("refused when it is parsed")
    options = {"importance_sampling_level": level, "off_policy_correction": f"{level}_truncate"}
    half = dataclasses.replace(ROWS[0], share=0.5), dataclasses.replace(ROWS[1], share=0.5, trajectory="t0")
    rows = [*half, *ROWS[2:]]
    (value, flat), (tree_value, tree) = both(base, tmp_path, rows, loss=loss, beta=0.1, entropy_bonus=0.05, **options)
    assert flat.abs().max() > 0
    assert changed(tree, flat) <= EXACT
    assert tree_value == pytest.approx(value, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": {"gradient_checkpointing": True}},
        {"off_policy_correction": "none"},
        {"off_policy_correction": "sequence_mask", "off_policy_cap": 1e9},
        {"off_policy_mask_threshold": 0.3, "off_policy_correction": "none"},
        {"minibatches": 2},
        {"micro_batch": 1},
        {"sampling": {"temperature": 0.7}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_so_it_has_with_every_option(base, tmp_path, options):
    (value, flat), (tree_value, tree) = both(base, tmp_path, **options)
    assert flat.abs().max() > 0
    assert changed(tree, flat) <= EXACT
    assert tree_value == pytest.approx(value, rel=1e-5, abs=1e-7)


def test_checkpointing_recomputes_trees(base, tmp_path):
    trainer = make(base, tmp_path, policy={"gradient_checkpointing": True})
    _, plain = gradient(make(base, tmp_path / "plain"), ROWS)
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, recomputed = gradient(trainer, ROWS)
    assert trainer.sharing.state == "tree"
    assert changed(recomputed, plain) <= EXACT


def test_the_comparison_runs_as_training_does(base, tmp_path):
    """In its mode, activations recomputed: what is compared is what will be trained, in the memory that this takes."""
    trainer = make(base, tmp_path, policy={"gradient_checkpointing": True})
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    backbone = trainer.adapter.get_base_model().base_model
    passes, layers = [], []
    backbone.register_forward_pre_hook(lambda *_: passes.append(1))
    backbone.layers[0].mlp.register_forward_pre_hook(lambda module, *_: layers.append(module.training))
    trainer.model.eval()  # as it stands when the first batch comes
    trainer.windows_of(Batch(1, ROWS))
    assert trainer.sharing.compared
    assert all(layers)
    assert len(layers) == 2 * len(passes), "forward, and again in backward"
    assert not trainer.model.training, "the mode is left as it was"


@pytest.mark.parametrize("micro_batch", [2, 3])
def test_the_comparison_takes_no_more_memory_than_training(base, tmp_path, micro_batch):
    trainer = make(base, tmp_path, micro_batch=micro_batch)
    shapes = []
    backbone = trainer.adapter.get_base_model().base_model
    backbone.register_forward_pre_hook(lambda m, a, kw: shapes.append(kw["input_ids"].shape), with_kwargs=True)
    window = trainer.windows_of(Batch(1, ROWS))[0]
    assert all("tree" in micro for micro in window.micro)
    longest = max(len(row.tokens) for row in ROWS)
    assert trainer.sharing.compared
    for rows, width in shapes:
        assert rows * width <= micro_batch * longest


def test_rows_that_share_little_within_micro_batches_run_flat(base, tmp_path):
    """Half of each row is shared, but two rows together are more than a micro-batch holds."""
    mask, logprobs = (False,) * 12 + (True,) * 12, (0.0,) * 12 + (-4.0,) * 12
    rows = [Row((2,) * 12 + tuple(range(3 + 8 * i, 15 + 8 * i)), mask, logprobs, 1.0, f"t{i}", "g") for i in range(5)]
    alone, together = (make(base, tmp_path / str(n), micro_batch=n) for n in (1, 4))
    assert not any("tree" in micro for micro in alone.windows_of(Batch(1, tuple(rows)))[0].micro)
    assert not alone.sharing.compared
    assert all("tree" in micro for micro in together.windows_of(Batch(1, tuple(rows)))[0].micro)


def test_what_attention_prepares_ends_with_the_pass(base, tmp_path):
    """Masks of all micro-batches of a batch together would be as large as the batch."""
    trainer = make(base, tmp_path, minibatches=2)
    before = layouts()  # of other tests
    windows = trainer.windows_of(Batch(1, ROWS))  # runs every micro-batch once, for the log-probabilities before
    assert all("old_per_token_logps" in micro and "tree" in micro for window in windows for micro in window.micro)
    assert layouts() <= before


def layouts():
    gc.collect()
    return {id(found) for found in gc.get_objects() if type(found) is Layout}


def test_a_run_says_what_it_computed(base, tmp_path):
    seen = []
    trainer = make(base, tmp_path, ROWS, lambda batch, numbers: seen.append(dict(numbers)), steps=2, beta=0.01)
    trainer.windows_of(Batch(1, ROWS))  # compares
    passes = []
    backbone = trainer.adapter.get_base_model().base_model
    backbone.register_forward_pre_hook(lambda m, a, kw: passes.append(kw["input_ids"].numel()), with_kwargs=True)
    trainer.train()
    unique = unique_tokens(ROWS)
    for numbers in seen:
        assert numbers["tokens_total"] == sum(len(row.tokens) - 1 for row in ROWS)
        assert numbers["tokens_unique"] == unique
        assert numbers["tokens_processed"] <= 1.1 * unique
        assert numbers["trained_tokens"] == sum(row.trained for row in ROWS)
        assert all(math.isfinite(value) for value in numbers.values())
    assert len(seen) == 2
    assert 0 < trainer.sharing.error <= EXACT
    # policy and reference in each step
    assert sum(passes) == 2 * 2 * seen[0]["tokens_processed"]


def test_without_shared_tokens_the_flat_path_is_taken(base, tmp_path):
    rows = [dataclasses.replace(row, tokens=(2 + i, *row.tokens[1:])) for i, row in enumerate(make_rows(10))]
    trainer = make(base, tmp_path)
    window = trainer.windows_of(Batch(1, tuple(rows)))[0]
    assert not any("tree" in micro for micro in window.micro)
    assert trainer.sharing.error is None, "nothing was compared for it"
    assert trainer.sharing.state == "flat: rows share too little (1.00 times)"
    assert any("tree" in micro for micro in trainer.windows_of(Batch(2, ROWS))[0].micro)
    assert trainer.sharing.state == "tree"


def test_filler_rows_cost_nothing(base, tmp_path):
    """Beside the rows of another process there may be nothing to train: the gradient is there, and zero."""
    trainer = make(base, tmp_path)
    trainer.windows_of(Batch(1, ROWS))  # compares
    parts = [trainer.micro(list(ROWS), rank, 3) for rank in range(3)]
    assert all("tree" in m for part in parts for m in part)
    assert len({tuple(m["advantages"].numel() for m in part) for part in parts}) == 1
    assert sum(int(m["tool_mask"].sum()) for part in parts for m in part) == sum(row.trained for row in ROWS)
    blank = [dataclasses.replace(row, mask=(False,) * len(row.tokens)) for row in ROWS[:2]]
    logps, _ = trainer._score(trainer.model, trainer._collate(blank, True))
    logps.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in trainer.adapter.parameters() if p.requires_grad)


# ---- architectures

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
SHAPES = {
    "qwen2": Qwen2Config(**SMALL),
    "qwen2-windows": Qwen2Config(**SMALL, **WINDOWED),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "qwen3-windows": Qwen3Config(**SMALL, head_dim=8, **WINDOWED),
    "llama": LlamaConfig(**SMALL),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=6, layer_types=WINDOWED["layer_types"]),
    "qwen3-moe": Qwen3MoeConfig(
        **SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    ),
}


def tuned(config, **lora):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **lora)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def row_by_row(model, rows):
    """Log-probabilities of the trained tokens, one whole row at a time."""
    found = []
    for row in rows:
        table = torch.log_softmax(model(input_ids=torch.tensor([row.tokens])).logits[0, :-1], -1)
        every = table.gather(1, torch.tensor(row.tokens[1:])[:, None])[:, 0]
        found.append(every[torch.tensor(row.mask[1:])])
    return torch.cat(found)


def as_tree(model, packed, **changes):
    """The same from a tree; `changes` are of the call."""
    base = model.get_base_model()
    call = {
        "input_ids": packed.tokens[None],
        "position_ids": packed.positions[None],
        "attention_mask": no_mask(CPU),
        "use_cache": False,
        "tree": lay_out(packed, base.config),
    }
    hidden = base.base_model(**{k: v for k, v in {**call, **changes}.items() if v is not ...}).last_hidden_state[0]
    table = torch.log_softmax(base.lm_head(hidden), -1)
    return table[packed.predictors, packed.targets][packed.expand]


def gradients(model, logps):
    weights = torch.randn(logps.numel(), generator=torch.Generator().manual_seed(5))
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("kind", SHAPES)
def test_architectures_agree_with_rows_one_by_one(kind):
    model = tuned(SHAPES[kind])
    expected = row_by_row(model, ROWS)
    want = gradients(model, expected)
    assert why_flat(model.get_base_model()) is None
    enable(model.get_base_model())
    tree = grow(ROWS)
    found = as_tree(model, tree)
    assert torch.allclose(found, expected, atol=2e-5)
    assert changed(gradients(model, found), want) <= EXACT
    again = row_by_row(model, ROWS)
    assert torch.allclose(again, expected, atol=1e-6), "without a tree the model is what it was"


# ---- what goes wrong when it is done wrong (each is seen by the comparison)


def shifted(tree):
    """Each target predicted by the token before it in the packed order, not on its path."""
    starts = torch.tensor([node.start for node in tree.nodes()])
    wrong = tree.predictors.clone()
    behind = torch.isin(tree.predictors + 1, starts)
    wrong[behind] = (tree.predictors[behind] + 1).clamp(max=tree.unique - 1)
    return dataclasses.replace(tree, predictors=wrong)


MISTAKES = {
    "positions counted in packed order": lambda model, tree: as_tree(
        model, dataclasses.replace(tree, positions=torch.arange(tree.unique))
    ),
    "targets shifted in packed order": lambda model, tree: as_tree(model, shifted(tree)),
    "subtrees one token too long": lambda model, tree: as_tree(
        model, dataclasses.replace(tree, ends=(tree.ends + 1).clamp(max=tree.unique))
    ),
    "no mask and no tree, so that positions are read as packed sequences": lambda model, tree: as_tree(
        model, tree, attention_mask=..., tree=...
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_control_mistakes_are_far_outside_the_limit(mistake):
    model = tuned(SHAPES["qwen3"])
    want = gradients(model, row_by_row(model, ROWS))
    enable(model.get_base_model())
    off = changed(gradients(model, MISTAKES[mistake](model, grow(ROWS))), want)
    assert not off <= 100 * sharing.LIMITS[torch.float32], mistake  # no number at all is a mistake, too


def test_control_a_bool_mask_for_eager_attention_is_wrong_in_silence():
    """Why trees are not built on it: the mask is added to the scores."""
    model = tuned(SHAPES["qwen3"])
    want = gradients(model, row_by_row(model, ROWS))
    tree = grow(ROWS)
    model.get_base_model().set_attn_implementation("eager")
    assert "eager" in why_flat(model.get_base_model())
    keys = torch.arange(tree.unique)
    seen = (keys[None] <= keys[:, None]) & (keys[:, None] < tree.ends[None])
    off = changed(gradients(model, as_tree(model, tree, attention_mask=seen[None, None], tree=...)), want)
    assert off > 100 * sharing.LIMITS[torch.float32]


def test_control_summed_advantages_are_not_the_loss_of_the_rows():
    """min(r A, clip(r) A) is not additive over rows of advantages of both signs: scalars are expanded, not summed."""
    row = ROWS[0]
    ratio, advantages = torch.tensor(1.5), torch.tensor([2.0, -1.0])
    flat = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
    summed = torch.minimum(ratio * advantages.sum(), ratio.clamp(0.8, 1.2) * advantages.sum())
    assert abs(float(flat - summed)) > 0.1
    tree = grow([row, dataclasses.replace(row, advantage=-1.0)])
    assert tree.expand.numel() == 2 * tree.targets.numel(), "each row has its own loss"


def test_a_tree_that_a_model_does_not_hand_down_is_an_error():
    model = tuned(SHAPES["qwen3"])
    enable(model.get_base_model())
    with pytest.raises(Unsuitable, match="hand the tree down"):
        as_tree(model, grow(ROWS), tree=...)


@pytest.mark.parametrize("extra", [{"softcap": 2.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}, {"is_causal": False}])
def test_attention_that_a_tree_has_not_is_an_error(extra):
    tree = grow(ROWS)
    q = torch.zeros(1, 4, tree.unique, 8)
    with pytest.raises(Unsuitable):
        models._registered(torch.nn.Module(), q, q, q, None, tree=lay_out(tree, SHAPES["llama"]), **extra)


# ---- falling back


WRONG = {
    "positions": lambda rows, share=True: dataclasses.replace(t := grow(rows, share), positions=torch.arange(t.unique)),
    "error": lambda rows, share=True: 1 / 0,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_failed_comparison_falls_back_and_says_so(base, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(sharing, "grow", WRONG[wrong])
    seen = []
    trainer = make(base, tmp_path, ROWS, lambda batch, numbers: seen.append(dict(numbers)), steps=2)
    trainer.train()
    assert trainer.sharing.compared
    if wrong == "positions":
        assert trainer.sharing.state.startswith("flat: tiles: its gradient is off by")
        assert trainer.sharing.error > trainer.sharing.limit
    else:
        assert trainer.sharing.state == "flat: tiles: ZeroDivisionError: division by zero"
    assert seen[1]["tokens_processed"] > seen[1]["tokens_unique"]
    assert trainer.adapter.get_base_model().config._attn_implementation == "sdpa"
    flat = make(base, tmp_path / "flat", shared_prefix="flat")
    fallen = make(base, tmp_path / "fallen")
    assert changed(gradient(fallen, ROWS)[1], gradient(flat, ROWS)[1]) == 0
    assert fallen.sharing.compared


@pytest.mark.parametrize("backends", [("flex",), ("flex", "tiles")])
def test_the_first_way_to_attend_that_passes_is_taken(base, tmp_path, monkeypatch, backends):
    """FlexAttention has no backward pass on the CPU, which makes it one that fails here."""
    monkeypatch.setattr(sharing, "BACKENDS", {"cpu": backends})
    trainer = make(base, tmp_path)
    _, found = gradient(trainer, ROWS)
    _, flat = gradient(make(base, tmp_path / "flat", shared_prefix="flat"), ROWS)
    assert changed(found, flat) <= EXACT
    assert len(trainer.sharing.failed) == 1
    assert trainer.sharing.failed[0].startswith("flex: NotImplementedError: FlexAttention does not support backward")
    if backends == ("flex",):
        assert trainer.sharing.state == f"flat: {trainer.sharing.failed[0]}"
        assert trainer.sharing.error is None
    else:
        assert (trainer.sharing.state, trainer.sharing.backend) == ("tree", "tiles")
        assert trainer.sharing.error <= EXACT


def test_what_cannot_run_as_a_tree_says_why():
    def reason(config, lora=None, **options):
        return why_flat(tuned(config, **(lora or {})).get_base_model(), **options)

    assert "dropout" in reason(SHAPES["qwen3"], {"lora_dropout": 0.1})
    assert "attention dropout" in reason(Qwen3Config(**SMALL, attention_dropout=0.1))
    assert "router" in reason(SHAPES["qwen3-moe"], aux_loss=True)
    assert "caps" in reason(Gemma2Config(**SMALL, attn_logit_softcapping=2.0, head_dim=8))
    hybrid = Qwen3NextConfig(
        **SMALL, num_experts=2, num_experts_per_tok=1, layer_types=["linear_attention", "full_attention"]
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hybrid)
    assert "linear_attention" in why_flat(model)


STRETCHED = {
    "rope_theta": 1e4,
    "original_max_position_embeddings": 12,
    "factor": 4.0,
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}


def test_positions_that_depend_on_the_longest_row_run_flat():
    """Long RoPE turns positions by other angles once a pass has a long row: rows of one tree are not all as sampled."""
    model = tuned(LlamaConfig(**SMALL, rope_parameters=STRETCHED))
    assert "longest row" in why_flat(model.get_base_model())
    want = gradients(model, row_by_row(model, ROWS))
    enable(model.get_base_model())
    off = changed(gradients(model, as_tree(model, grow(ROWS))), want)
    assert off > 100 * sharing.LIMITS[torch.float32], "control: as a tree it would be wrong"
    per_layer = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}
    model.get_base_model().config.rope_parameters = per_layer
    assert "longest row" in why_flat(model.get_base_model())


def test_dropout_trains_flat(base, tmp_path):
    trainer = make(base, tmp_path, policy={"lora": {"rank": 4, "alpha": 16, "dropout": 0.1}})
    assert "dropout" in trainer.sharing.state
    assert not trainer.sharing.compared
    assert not any("tree" in m for m in trainer.windows_of(Batch(1, ROWS))[0].micro)


def test_the_gap_between_sampler_and_trainer_is_the_same(base, tmp_path):
    trainer = make(base, tmp_path)
    before = trainer.gap(list(ROWS))
    assert trainer.sharing.error is None, "nothing is compared where nothing is trained"
    gradient(trainer, ROWS)
    assert trainer.sharing.state == "tree"
    for name, value in trainer.gap(list(ROWS)).items():
        assert value == pytest.approx(before[name], abs=1e-5)


def test_saved_activations_shrink_with_the_tokens(base, tmp_path):
    """Sixteen leaves of a trunk of 60 tokens: what is kept for backward, against all rows packed and nothing shared."""
    trunk = make_rows(1, longest=60)[0]
    rows = [
        dataclasses.replace(
            row,
            tokens=trunk.tokens + row.tokens,
            mask=(False,) * len(trunk.tokens) + row.mask,
            logprobs=(0.0,) * len(trunk.tokens) + row.logprobs,
        )
        for row in make_rows(16, seed=1, longest=8)
    ]
    trainer = make(base, tmp_path)
    own = {p.untyped_storage().data_ptr() for p in trainer.adapter.parameters()}
    kept = {}

    def weigh(share):
        tree = grow(rows, share)
        micro = {**collate(rows, 0, CPU), "tree": tree}
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = trainer._score(trainer.model, micro)
        del result
        return sum(kept.values()), tree.unique

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node's own result would be a reference cycle, never freed

    (packed, all_tokens), (tree, unique) = weigh(False), weigh(True)
    assert all_tokens / unique > 2.5
    assert packed / tree > 0.85 * all_tokens / unique
