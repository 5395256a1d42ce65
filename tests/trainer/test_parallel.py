"""Several processes train one policy: the step is that of one process, they end together, and say so when they part."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peers
import pytest
import torch
import toy
from espalier.trainer.batch import Row, dealt
from espalier.trainer.grpo.config import LOSS_TYPES
from espalier.trainer.policy import PolicyStore
from hypothesis import given
from hypothesis import strategies as st

PEERS = Path(__file__).with_name("peers.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(command, **environment):
    """A command to its end, with the helpers of this folder on its path."""
    path = {"PYTHONPATH": str(PEERS.parent), "PYTHONSAFEPATH": "1"}
    own = {**os.environ, "OMP_NUM_THREADS": "1", **path, **environment}
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=400)


def start(*arguments, **environment):
    """Two processes of peers.py to their end: exit code and what they said."""
    done = run([*LAUNCH, str(PEERS), *map(str, arguments)], **environment)
    return done.returncode, done.stdout + done.stderr


def row(name, group, length=4):
    mask = (False, *[True] * (length - 1))
    return Row(tuple(range(2, 2 + length)), mask, tuple(-1.0 if m else 0.0 for m in mask), 1.0, name, group)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=7), st.integers(1, 4))
def test_every_row_goes_to_one_process_and_all_run_alike(sizes, count):
    parts = [[row(f"{i}-{j}", f"g{i}", 2 + j) for j in range(size)] for i, size in enumerate(sizes)]
    shares = [dealt(parts, rank, count) for rank in range(count)]
    trained = [r for share in shares for part in share for r in part if r.trained]
    assert sorted(r.trajectory for r in trained) == sorted(r.trajectory for part in parts for r in part)
    assert len({tuple(len(part) for part in share) for share in shares}) == 1


def test_two_processes_take_the_step_of_one(base, tmp_path):
    """With every loss, KL and entropy, from unequal shares of rows."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    peers.losses(base, tmp_path / "one")
    code, said = start("losses", base, tmp_path / "two")
    assert code == 0, said[-3000:]
    for loss in LOSS_TYPES:
        one, two = (torch.load(tmp_path / name / f"{loss}.pt") for name in ("one", "two"))
        for a, b in zip(one, two, strict=True):
            assert float((a - b).abs().max()) <= 1e-3 * float(a.abs().max()), loss  # Adam magnifies rounding
        alone, beside = (json.loads((tmp_path / name / f"{loss}.json").read_text()) for name in ("one", "two"))
        for a, b in zip(alone, beside, strict=True):
            assert a.keys() == b.keys()
            for key in ("loss", "grad_norm", "kl", "entropy", "logprob_gap", "logprob_gap_mean", "trained_tokens"):
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), (loss, key)
            assert (a["tokens_total"], a["tokens_unique"]) == (b["tokens_total"], b["tokens_unique"])
        for numbers in (alone, beside):
            assert numbers[1]["tokens_processed"] < numbers[1]["tokens_total"], "the second step ran as trees"


def test_a_process_that_parts_from_the_others_ends_the_run(base, tmp_path):
    code, said = start("drift", base, tmp_path)
    assert code != 0
    assert "after step 3 the processes hold different adapters" in said


def test_a_whole_run_from_the_command_line(toy_base, tmp_path):
    """As a user starts it. The first process alone writes the run and says what came of it, once."""
    config = toy.run_config(toy_base, tmp_path, trainer={"steps": 2, "micro_batch": 3}, env={"id": "toy:Letters-v0"})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    espalier = [sys.executable, "-m", "espalier.trainer.cli", "train", str(tmp_path / "config.json"), "--json"]
    done = run([*LAUNCH, "--no-python", *espalier])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["steps"] == 2
    assert set(found["after"]) == {"sampled", "greedy"}
    rows = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    assert rows[0]["processes"] == 2


@pytest.mark.long
def test_a_run_of_two_processes_is_killed_and_resumed(toy_base, tmp_path):
    """The first process's death ends the other; resumed by two it is as if nothing had happened, by one it goes on."""
    code, said = start("run", toy_base, tmp_path / "whole")
    assert code == 0, said[-3000:]
    first, second = (json.loads((tmp_path / "whole" / f"result-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    code, _ = start("run", toy_base, tmp_path / "cut", DIE="3")
    assert code != 0
    shutil.copytree(tmp_path / "cut", tmp_path / "alone")
    code, said = start("run", toy_base, tmp_path / "cut")
    assert code == 0, said[-3000:]
    digests = []
    for name in ("whole", "cut"):
        store = PolicyStore(tmp_path / name / "toy" / "policies", toy_base)
        digests.append(store.open(store.latest().number).digest)
    assert digests[0] == digests[1]
    done = run([sys.executable, str(PEERS), "run", str(toy_base), str(tmp_path / "alone")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "alone" / "result-0.json").read_text())["steps"] == 4
