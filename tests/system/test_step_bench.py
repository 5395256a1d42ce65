"""`bench step` runs end to end, and what it counts is what others count."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from espalier.trainer.batch import Row
from espalier.trainer.plan import memory, placement_in
from espalier.trainer.shapes import KNOWN, Shape, find_shape
from espalier.trainer.tree.core import grow
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "results" / "step"
PHASES = ("rollout", "turning", "train", "publish", "checkpoint")


@pytest.fixture(scope="module")
def modules():
    """The benchmark's own modules, and the tree benchmark's contenders."""
    found = {}
    before = list(sys.path)
    beside = ("base", "limits", "page", "workloads")
    sys.path[:0] = [str(ROOT / "results"), str(HERE), str(ROOT / "results" / "tree")]
    try:
        for name in ("base", "limits", "page", "measure", "contenders"):
            path = ROOT / "results" / ("tree" if name == "contenders" else "step") / f"{name}.py"
            spec = importlib.util.spec_from_file_location(f"step_{name}", path)
            found[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found[name])
    finally:
        sys.path[:] = before
        for name in beside:
            sys.modules.pop(name, None)
    return found


def test_operations_are_those_of_the_tree_benchmark_but_for_what_is_computed_again(modules):
    """Whose formula is compared with what torch counts; it has attention's and the vocabulary's second forward pass."""
    other, operations = modules["contenders"].TINY, modules["limits"].train_operations
    shape = Shape(
        other.hidden, other.layers, other.heads, other.key_heads, other.head, other.intermediate, other.vocabulary, True
    )
    tokens = tuple(range(1, 41))
    tree = grow([Row(tokens, (False,) * 30 + (True,) * 10, (0.0,) * 40, 1.0, "t", "g")], share=False)
    pairs, targets = int((tree.positions + 1).sum()), tree.targets.numel()
    adapter = modules["contenders"].RANK * other.layers * sum(a + b for a, b in other.linear())
    counted = operations(shape, adapter, tree.unique, pairs, targets, 1)
    again = 2 * other.layers * other.heads * other.head * pairs + 2 * other.hidden * other.vocabulary * targets
    assert counted + again == modules["contenders"].operations(tree, other)
    forward = operations(shape, adapter, tree.unique, pairs, targets, 2) - counted
    assert 2 * forward < counted < 3 * forward, (
        "the backward pass through a frozen base costs what a forward pass costs"
    )


def test_decoding_reads_the_weights_once_a_token_and_each_episode_s_own_keys_and_values(modules):
    shape = Shape(64, 2, 2, 1, 32, 128, 2048, True)
    weights = 4 * (shape.parameters() - 5 * 64 - 4 * 32)  # norms apart
    a_token = 4 * 2 * 2 * 32
    read = modules["limits"].decode_bytes(shape, "float32", [(10, 13), (20, 22)])
    assert read == 3 * weights + (10 + 11 + 12 + 20 + 21) * a_token


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_has_the_shape_and_only_known_tokens_can_be_sampled(modules, tmp_path, dtype):
    shape = modules["measure"].SMALLEST
    modules["base"].make_base(tmp_path, shape, dtype, "cpu")
    assert find_shape(str(tmp_path)) == shape
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == shape.parameters()
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    alive = tensors["model.embed_tokens.weight"].any(dim=1)
    assert 1000 < alive.sum() < 1201 and not alive[1201:].any() and not alive[[1024, 1026]].any()


@pytest.mark.parametrize("installed", [True, False])
def test_the_work_on_a_card_is_the_recipe_s_model_and_fits_80_gb(modules, monkeypatch, tmp_path, installed):
    measure = modules["measure"]
    monkeypatch.setattr(measure, "find_spec", lambda name: object() if installed else None)
    work = measure.work_on(measure._bench.Bench("step", False, None, None, tmp_path, "cuda"))
    config = work.config(tmp_path / "base", tmp_path)
    assert work.shape == KNOWN["Qwen/Qwen3-4B"] and work.shape.parameters() == 4_022_468_096
    assert (config.policy.dtype, config.sampler.dtype, config.policy.device) == ("bfloat16", "bfloat16", "cuda")
    assert config.policy.gradient_checkpointing and config.sampler.kind == ("vllm" if installed else "torch")
    placement = placement_in(config, work.shape, 1, 80e9, 1) if installed else None
    assert sum(part.bytes for part in memory(config, work.shape, 80e9, placement)) < 80e9


@pytest.mark.long
def test_a_quick_run_gives_every_figure(bench_alone):
    folder = bench_alone("step")
    command = [sys.executable, "-P", "-m", "espalier.trainer.cli", "bench", "step", "--quick", "--json", "out.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "out.json").read_text())
    figures, [run] = found["figures"], found["runs"]
    [step] = run["steps"]
    assert sum(figures[f"seconds_{name}"] for name in PHASES) <= figures["step_seconds"] + 1e-3
    assert 0 < figures["seconds_sampling"] <= figures["seconds_rollout"]
    assert all(figures[f"seconds_{name}"] > 0 for name in ("train", "publish", "checkpoint"))
    assert 0 < figures["flop_share_train"] <= 1 and 0 < figures["bandwidth_share_decode"] <= 1
    assert figures["memory_plan_ratio"] == pytest.approx(figures["peak_gb"] / figures["plan_gb"])
    assert step["episodes"] == figures["episodes"] == 4 and step["failures"] == {}
    assert step["groups_used"] == 2 and step["groups_no_signal"] == 0 and step["grad_norm"] > 0
    assert step["trained_tokens"] == step["sampled_tokens"] == 4 * 8, "every turn is as long as it may be, and trained"
    assert figures["trained_tok_s"] < figures["processed_tok_s"]
    assert not list((folder / "runs" / "bench" / "step").glob("*/")), "the base's weights are gone"
    assert str(folder) not in json.dumps(found)


def test_the_card_s_memory_is_watched_while_a_run_lasts(modules, monkeypatch):
    used = iter([3, 7, 5])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 - next(used, 5), 10))
    with modules["measure"]._device_peak("cuda") as seen:
        while len(seen) < 4:
            time.sleep(0.01)
    assert max(seen) == 7
    with modules["measure"]._device_peak("cpu") as seen:
        time.sleep(0.2)
    assert seen == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_page_says_what_ran_where(modules, tmp_path, device):
    names = ["step_seconds", "seconds_sampling", *(f"seconds_{name}" for name in PHASES)]
    figures = defaultdict(lambda: 2.0, dict(zip(names, (9.0, 2.0, 3.0, 0.5, 4.0, 0.5, 0.25), strict=True)))
    page = modules["page"]
    assert sum(page.parts(figures).values()) == pytest.approx(9.0), "the phases of a step add up to it"
    assert page.parts(figures)["environment"] == 1.0 and page.parts(figures)["other"] == 0.75
    page.plot(figures, [{**figures, "step": 2, "wall": 9.0}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    text = page.report(figures, {"plan_speed": "H100: fast", "cores_of_others": 0.2}, "vllm", device)
    assert ("the whole card" in text) == ("../../spreadsheet/report.md" in text) == (device == "cuda")
    assert ("nothing about a 4B step" in text) == (device == "cpu") and "sampler `vllm`" in text
