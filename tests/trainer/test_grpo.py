"""The trainer: every loss, every correction, and normalisation that does not depend on how rows are cut."""

import ast
import dataclasses
import inspect
import math
import textwrap

import pytest
import torch
from espalier.trainer.batch import Batch, Row, collate, micro_batches, minibatches
from espalier.trainer.errors import UserError
from espalier.trainer.grpo.config import CISPO_HIGH, LOSS_TYPES
from espalier.trainer.grpo.trainer import OnlineGRPOTrainer, Window, build
from espalier.trainer.model import logit_rules
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, Gemma2Config, GraniteConfig
from trl import GRPOTrainer
from updates import Fixed, changed, config_of, gradient, make

CORRECTIONS = ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
CPU = torch.device("cpu")


def level(loss):
    return "sequence" if loss == "luspo" else "token"


def on_policy(trainer, rows):
    """The rows with the log-probabilities that the trainer's policy gives them."""
    with torch.no_grad():
        logps, _ = trainer._score(trainer.model, collate(rows, 0, CPU))
    return [
        dataclasses.replace(row, logprobs=(0.0, *(float(v) for v in logps[i, : len(row.tokens) - 1])))
        for i, row in enumerate(rows)
    ]


def test_the_list_of_losses_is_that_of_trl():
    """Read from the branches of TRL's own source, so that a loss added there is noticed here."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss)))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "self.loss_type":
            found |= {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
    assert found == set(LOSS_TYPES)


@pytest.mark.parametrize("loss", LOSS_TYPES)
@pytest.mark.parametrize("extra", [{}, {"beta": 0.1, "entropy_bonus": 0.05}], ids=["plain", "kl+entropy"])
def test_every_loss_learns_and_does_not_depend_on_the_cut(base, make_rows, tmp_path, loss, extra):
    """Whole, in uneven micro-batches, or with rows that have nothing under the loss: one loss, one gradient."""
    rows = make_rows(10)
    options = {"loss": loss, "importance_sampling_level": level(loss), **extra}
    trainer = make(base, tmp_path, micro_batch=64, **options)
    value, whole = gradient(trainer, rows)
    assert math.isfinite(value)
    assert torch.isfinite(whole).all()
    assert whole.abs().max() > 0
    assert whole.numel() > 1000

    filler = Row((5, 6, 7), (False, False, False), (0.0, 0.0, 0.0), 1.0, "filler", "filler")
    trained = sum(row.trained for row in rows)
    cuts = {
        "uneven": [rows[:1], rows[1:4], rows[4:]],
        "filler": [[*rows[:6], filler, filler], rows[6:], [filler]],
    }
    for name, cut in cuts.items():
        window = Window([collate(part, 0, CPU) for part in cut], trained, len(rows), True, True, Batch(1, ()))
        cut_value, cut_grad = gradient(trainer, window=window)
        assert changed(cut_grad, whole) < 1e-5, name
        assert cut_value == pytest.approx(value, rel=1e-5, abs=1e-7), name


def forked(rows):
    """The first two rows as one trajectory, the others as they are."""
    whole = rows[0].trained + rows[1].trained
    parts = [
        dataclasses.replace(row, trajectory="forked", advantage=0.7, share=row.trained / whole) for row in rows[:2]
    ]
    return [*parts, *rows[2:]]


@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_a_forked_trajectory_counts_once(base, make_rows, tmp_path, loss):
    """A mean over sequences sees one sequence with all its tokens; where tokens count alike, they still do."""
    trainer = make(base, tmp_path, loss=loss, importance_sampling_level=level(loss))
    rows = forked(make_rows(4))
    tokens = [row.trained for row in rows]
    alone = [gradient(trainer, [dataclasses.replace(row, share=1.0)])[1] for row in rows]
    _, together = gradient(trainer, rows)
    if loss in ("grpo", "sapo"):
        fork = (tokens[0] * alone[0] + tokens[1] * alone[1]) / (tokens[0] + tokens[1])
        expected = (fork + alone[2] + alone[3]) / 3
    elif loss in ("luspo", "dr_grpo"):
        expected = sum(alone) / 3
    else:
        expected = sum(n * g for n, g in zip(tokens, alone, strict=True)) / sum(tokens)
    assert changed(together, expected) < 1e-5
    if loss == "grpo":
        _, by_row = gradient(trainer, [dataclasses.replace(row, share=1.0) for row in rows])
        assert changed(by_row, expected) > 1e-2, "control: counted by row, the fork weighs more"


@pytest.mark.parametrize("loss", ["grpo", "bnpo"])
def test_control_without_the_weights_the_cut_changes_the_gradient(base, make_rows, tmp_path, loss, monkeypatch):
    rows = make_rows(10)
    trainer = make(base, tmp_path, micro_batch=64, loss=loss)
    _, whole = gradient(trainer, rows)
    monkeypatch.setattr(OnlineGRPOTrainer, "_weight", lambda self, tokens, rows, window: 1 / len(window.micro))
    cut = [rows[:1], rows[1:4], rows[4:]]
    micro, tokens = [collate(p, 0, CPU) for p in cut], sum(r.trained for r in rows)
    window = Window(micro, tokens, len(rows), True, True, Batch(1, ()))
    _, cut = gradient(trainer, window=window)
    assert changed(cut, whole) > 1e-3


@pytest.mark.parametrize("extra", [{"beta": 0.1}, {"entropy_bonus": 0.05}])
def test_kl_and_entropy_reach_the_gradient(base, make_rows, tmp_path, extra):
    rows = make_rows(6)
    _, without = gradient(make(base, tmp_path), rows)
    _, with_it = gradient(make(base, tmp_path, **extra), rows)
    assert changed(with_it, without) > 1e-4


def test_the_reference_is_the_base_without_the_adapter(base, make_rows, tmp_path):
    trainer = make(base, tmp_path, beta=0.1)
    micro = collate(make_rows(3), 0, CPU)
    reference = trainer._reference(trainer.model, micro)
    with torch.no_grad():
        adapted, _ = trainer._score(trainer.model, micro)
        with trainer.adapter.disable_adapter():
            plain, _ = trainer._score(trainer.model, micro)
    assert torch.equal(reference, plain)
    assert not torch.allclose(reference, adapted)


@pytest.mark.parametrize("loss", LOSS_TYPES)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_recorded_logprobs_reach_the_gradient(base, make_rows, tmp_path, loss, correction):
    """Zeroing or shifting what the sampler recorded changes the gradient, for every loss under every correction."""
    options = {"loss": loss, "off_policy_correction": correction}
    if loss == "vespo" and correction.startswith("sequence"):
        pytest.skip("refused when it is parsed")
    trainer = make(base, tmp_path, **options)
    rows = on_policy(trainer, make_rows(8))  # close to the policy, or the masks would drop every row to begin with
    _, right = gradient(trainer, rows)
    shifted = [
        dataclasses.replace(r, logprobs=tuple(0.3 * i % 0.7 + v for i, v in enumerate(r.logprobs))) for r in rows
    ]
    zeroed = [dataclasses.replace(r, logprobs=tuple(0.0 for _ in r.logprobs)) for r in rows]
    for altered in (shifted, zeroed):
        _, wrong = gradient(trainer, altered)
        assert changed(wrong, right) > 1e-3, "the recorded log-probabilities are ignored"


def test_off_policy_sequence_mask_reads_the_recorded_logprobs(base, make_rows, tmp_path):
    trainer = make(base, tmp_path, off_policy_mask_threshold=0.2, off_policy_correction="none")
    rows = [dataclasses.replace(row, advantage=-1.0) for row in on_policy(trainer, make_rows(8))]
    _, right = gradient(trainer, rows)
    far = [dataclasses.replace(r, logprobs=tuple(v + 0.5 for v in r.logprobs)) for r in rows]
    _, masked = gradient(trainer, far)
    assert right.abs().max() > 0
    assert masked.abs().max() == 0


def test_floor_and_cap_are_used(base, make_rows, tmp_path):
    trainer = make(base, tmp_path, off_policy_cap=1.5)
    rows = on_policy(trainer, make_rows(6))
    near = [dataclasses.replace(r, logprobs=tuple(v - 0.1 for v in r.logprobs)) for r in rows]
    far = [dataclasses.replace(r, logprobs=tuple(v - 9.0 for v in r.logprobs)) for r in rows]
    (_, base_grad), (_, near_grad), (_, far_grad) = (gradient(trainer, r) for r in (rows, near, far))
    assert changed(near_grad, base_grad * math.exp(0.1)) < 1e-3
    assert changed(far_grad, base_grad * 1.5) < 1e-4


def test_minibatches_are_corrected_to_the_policy_they_began_with(base, make_rows, tmp_path):
    """With several updates a batch, the second is clipped against the policy before the first."""
    rows = make_rows(12)
    trainer = make(base, tmp_path, minibatches=3, groups=3)
    windows = trainer.windows_of(Batch(1, tuple(rows)))
    assert len(windows) == 3
    assert [window.last for window in windows] == [False, False, True]
    assert sum(window.rows for window in windows) == 12
    for window in windows:
        for micro in window.micro:
            with torch.no_grad():
                logps, _ = trainer._score(trainer.model, micro)
            assert torch.allclose(micro["old_per_token_logps"], logps, atol=1e-6)


def test_temperature_divides_the_logits(base, make_rows, tmp_path):
    rows = make_rows(3)
    micro = collate(rows, 0, CPU)
    trainer = make(base, tmp_path, sampling={"temperature": 0.7})
    with torch.no_grad():
        logps, entropies = trainer._score(trainer.model, micro)
        for i, row in enumerate(rows):
            logits = trainer.adapter(torch.tensor([row.tokens])).logits[0, :-1] / 0.7
            expected = torch.log_softmax(logits, -1)
            for t, token in enumerate(row.tokens[1:]):
                if row.mask[t + 1]:
                    assert float(logps[i, t]) == pytest.approx(float(expected[t, token]), abs=1e-5)
                    entropy = -(expected[t].exp() * expected[t]).sum()
                    assert float(entropies[i, t]) == pytest.approx(float(entropy), abs=1e-5)
                else:
                    assert logps[i, t] == 0


def test_our_forward_equals_trls(base, make_rows, tmp_path):
    """Without attention mask and over sampled positions only, yet the numbers of TRL's own forward."""
    trainer = make(base, tmp_path)
    micro = collate(make_rows(5), 0, CPU)
    tokens = torch.cat([micro["prompt_ids"], micro["completion_ids"]], 1)
    real = torch.cat([micro["prompt_mask"], micro["completion_mask"]], 1)
    with torch.no_grad():
        ours, our_entropies = trainer._score(trainer.model, micro)
        theirs, entropies, _ = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, trainer.model, tokens, real, tokens.size(1) - 1, compute_entropy=True
        )
    mask = micro["tool_mask"].bool()
    assert torch.allclose(ours[mask], theirs[mask], atol=1e-5)
    assert torch.allclose(our_entropies[mask], entropies[mask], atol=1e-5)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def base_of(config, tokenizer_of, folder):
    """A random base of another architecture, with the tokenizer of `tokenizer_of`."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


GEMMA = Gemma2Config(**SMALL, final_logit_softcapping=1.5, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
SHAPED = {
    "gemma2": (GEMMA, (1.5, 1.0)),
    "granite": (GraniteConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logits_scaling=4.0), (None, 0.25)),
    "cohere": (CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logit_scale=0.125), (None, 0.125)),
}


@pytest.mark.parametrize("kind", SHAPED)
def test_capped_and_scaled_logits_are_those_of_the_model_itself(base, make_rows, tmp_path, kind, monkeypatch):
    config, rules = SHAPED[kind]
    folder = base_of(config, base, tmp_path / "base")
    trainer = make(folder, tmp_path / "out", policy={"attention": "eager"})
    rows = make_rows(3)
    micro = collate(rows, 0, CPU)
    mask = micro["tool_mask"].bool()
    with torch.no_grad():
        logps, _ = trainer._score(trainer.model, micro)
        logits = trainer.adapter(torch.cat([micro["prompt_ids"], micro["completion_ids"]], 1)).logits[:, :-1]
        expected = torch.log_softmax(logits, -1).gather(-1, micro["completion_ids"][..., None])[..., 0]
        assert torch.allclose(logps[mask], expected[mask], atol=1e-5)
        assert logit_rules(trainer.adapter.get_base_model().config) == rules
        monkeypatch.setattr("espalier.trainer.grpo.trainer.logit_rules", lambda config: (None, 1.0))
        plain, _ = trainer._score(trainer.model, micro)
        assert not torch.allclose(plain[mask], expected[mask], atol=1e-2), "control: without them the numbers differ"


def test_capped_attention_is_refused_where_it_would_be_ignored(base, tmp_path):
    folder = base_of(GEMMA, base, tmp_path / "base")
    with pytest.raises(UserError, match=r'attn_logit_softcapping = 2\.0.*set policy\.attention = "eager"'):
        make(folder, tmp_path / "out")


def test_a_run_of_updates_reports_and_stops(base, make_rows, tmp_path):
    """Two batches of two updates each, through Hugging Face's own loop; the listener is told once a batch."""
    seen = []

    def finished(batch, numbers):
        seen.append((batch.step, dict(numbers)))
        return batch.step >= 2

    rows = make_rows(8)
    trainer = make(base, tmp_path, rows, finished, steps=5, minibatches=2, loss="dapo", beta=0.01)
    before = [p.clone() for p in trainer.adapter.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in trainer.adapter.parameters() if p.requires_grad]
    assert [step for step, _ in seen] == [1, 2]
    for _, numbers in seen:
        assert numbers["trained_tokens"] == sum(row.trained for row in rows)
        assert {"loss", "grad_norm", "entropy", "kl", "kl_reference", "learning_rate", "logprob_gap"} <= set(numbers)
        assert all(math.isfinite(v) for v in numbers.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trainer.state.global_step == 4
    assert not list(tmp_path.glob("checkpoint-*")), "nothing is saved behind our back"


def test_a_batch_without_rows_makes_no_update(base, tmp_path):
    seen = []
    trainer = make(base, tmp_path, [], lambda batch, numbers: seen.append(numbers), steps=2)
    before = [p.clone() for p in trainer.adapter.parameters()]
    trainer.train()
    assert seen == [{}, {}]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.adapter.parameters(), strict=True))


def test_nothing_but_the_adapter_learns(base, make_rows, tmp_path):
    trainer = make(base, tmp_path, make_rows(4), steps=2)
    frozen = {n: p.clone() for n, p in trainer.adapter.named_parameters() if "lora_" not in n}
    trainer.train()
    assert all("lora_" in n for n, p in trainer.adapter.named_parameters() if p.requires_grad)
    assert all(torch.equal(frozen[n], p) for n, p in trainer.adapter.named_parameters() if n in frozen)


def test_gradient_checkpointing_changes_nothing(base, make_rows, tmp_path):
    rows = make_rows(4)
    _, plain = gradient(make(base, tmp_path), rows)
    trainer = make(base, tmp_path, policy={"gradient_checkpointing": True})
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, recomputed = gradient(trainer, rows)
    assert trainer.adapter.get_base_model().is_gradient_checkpointing
    assert changed(recomputed, plain) < 1e-5


def test_bfloat16_base_keeps_the_adapter_in_float32(base, make_rows, tmp_path):
    trainer = make(base, tmp_path, make_rows(4), policy={"dtype": "bfloat16"})
    trainer.train()
    dtypes = {n: p.dtype for n, p in trainer.adapter.named_parameters()}
    assert {d for n, d in dtypes.items() if "lora_" in n} == {torch.float32}
    assert {d for n, d in dtypes.items() if "proj.base_layer" in n} == {torch.bfloat16}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without CUDA")
def test_what_the_machine_cannot_do_is_said(base, tmp_path):
    with pytest.raises(UserError, match=r"4bit.*CUDA.*bitsandbytes"):
        build(
            config_of(base, policy={"quantization": "4bit", "device": "auto"}),
            base,
            output=tmp_path,
            source=Fixed([]),
            finished=lambda *_: False,
        )
    with pytest.raises(UserError, match=r"policy\.device"):
        make(base, tmp_path, policy={"device": "cuda"})


def test_cispo_has_its_own_upper_clip(base, tmp_path):
    assert make(base, tmp_path, loss="cispo").epsilon_high == CISPO_HIGH
    assert make(base, tmp_path, loss="cispo", epsilon_high=2.0).epsilon_high == 2.0
    assert make(base, tmp_path, loss="grpo").epsilon_high == 0.2


def test_micro_batches_are_of_similar_length(make_rows):
    rows = make_rows(50)
    cut = micro_batches(rows, 8)
    assert sorted(r.trajectory for part in cut for r in part) == sorted(r.trajectory for r in rows)
    padded = sum(max(len(r.tokens) for r in part) * len(part) for part in cut)
    unsorted = sum(max(len(r.tokens) for r in rows[i : i + 8]) * 8 for i in range(0, 48, 8))
    assert padded < unsorted
    assert micro_batches(list(reversed(rows)), 8) == cut, "the order of arrival does not matter"


def test_minibatches_keep_every_row_once_and_groups_whole(make_rows):
    rows = make_rows(42)
    parts = minibatches(rows, 3, seed=5)
    assert sorted(r.trajectory for p in parts for r in p) == sorted(r.trajectory for r in rows)
    assert all(
        len({i for i, p in enumerate(parts) if any(r.group == g for r in p)}) == 1 for g in {r.group for r in rows}
    )
    assert max(map(len, parts)) - min(map(len, parts)) <= 4
    assert parts == minibatches(rows, 3, seed=5)
    assert parts != minibatches(rows, 3, seed=6)
    assert len(minibatches(rows[:8], 3, seed=5)) == 2, "no more updates than groups"
    assert minibatches([], 3, seed=5) == minibatches([], 1, seed=5) == []


def test_a_shared_prompt_runs_once_and_changes_nothing(base, make_rows, tmp_path, monkeypatch):
    """Groups with a common prompt: the same loss and gradient as without sharing, from fewer tokens."""
    rows = []
    for g in range(3):
        prompt = make_rows(1, seed=g)[0].tokens * 6
        for i, row in enumerate(make_rows(4, seed=10 + g)):
            tokens, blank = (*prompt[:20], *row.tokens), (0.0,) * 20
            mask, logprobs = ((False,) * 20 + row.mask), (*blank, *row.logprobs)
            rows.append(Row(tokens, mask, logprobs, row.advantage, f"{g}/{i}", f"g{g}"))
    trainer = make(base, tmp_path, micro_batch=4, beta=0.01, entropy_bonus=0.01, shared_prefix="flat")
    seen = []

    def count(module, args, kwargs):
        seen.append(kwargs["input_ids"].numel())

    trainer.adapter.get_base_model().base_model.register_forward_pre_hook(count, with_kwargs=True)
    loss, shared = gradient(trainer, rows)
    assert len(trainer.windows_of(Batch(1, tuple(rows)))[0].micro) == 3
    few = sum(seen)
    seen.clear()
    monkeypatch.setattr(trainer, "_shares", False)
    plain_loss, plain = gradient(trainer, rows)
    assert changed(shared, plain) < 1e-5
    assert loss == pytest.approx(plain_loss, rel=1e-5, abs=1e-7)
    assert few < 0.75 * sum(seen)


def test_the_shared_prefix_holds_no_trained_token(base, make_rows, tmp_path):
    """Rows that agree in sampled tokens too: they stay apart, each with its own loss."""
    one = Row((*range(2, 22), 30, 31), (False,) * 20 + (True, True), (0.0,) * 20 + (-3.0, -3.0), 1.0, "a", "g")
    two = dataclasses.replace(one, advantage=-0.5, trajectory="b")
    trainer = make(base, tmp_path)
    _, both = gradient(trainer, [one, two])
    _, first = gradient(trainer, [one])
    _, second = gradient(trainer, [two])
    assert changed(both, (first + second) / 2) < 1e-5
    short = Row((*range(2, 22), 30), (False,) * 20 + (True,), (0.0,) * 20 + (-3.0,), 1.0, "c", "g")
    other = dataclasses.replace(short, tokens=(*range(2, 22), 33), trajectory="d", advantage=-1.0)
    value, grad = gradient(trainer, [short, other])
    assert math.isfinite(value)
    assert grad.abs().max() > 0
