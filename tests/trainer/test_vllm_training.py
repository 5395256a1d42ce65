"""A whole run with the real vLLM as its sampler: every version is served, and what the sampler says is what the trainer
computes; an engine that is killed in the middle costs episodes, not the run."""

import json
import signal
import threading
import time

import psutil
import pytest
import toy
from espalier.configs.load import load
from espalier.rollouts.store import TrajectoryStore
from espalier.trainer.loop import train
from espalier.trainer.rounds import SyncSource

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm sets it up in an environment of its own")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def rows(folder, kind):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


@pytest.mark.parametrize("kind", ["vllm", "vllm-server"])
def test_a_run_learns_with_vllm_and_its_log_probabilities_are_the_trainers(toy_base, tmp_path, kind):
    sampler = {"kind": kind, "slots": 16, "threads": 1, "eager": True, "max_versions": 3}
    result = train(toy.run_config(toy_base, tmp_path, sampler=sampler, trainer={"steps": 3}))
    steps = rows(tmp_path / "toy", "train")
    assert result["steps"] == 3 and [row["sampled_by"] for row in steps] == [0, 1, 2]
    assert all(row["failures"] == {} for row in steps)
    assert all(row["logprob_gap"] < 1e-4 for row in steps)
    store = TrajectoryStore(tmp_path / "toy" / "trajectories", readonly=True)
    used = {s.version for g in store.groups() for t in g.trajectories for q in t.sequences for s in q.spans}
    assert {0, 1, 2} <= used
    store.close()


@pytest.mark.long
def test_an_engine_killed_in_the_middle_costs_no_run(toy_base, tmp_path):
    """Killed once while it samples: the engine is started again, every episode ends once, training goes on."""
    killed = []

    def kill(row):
        if row["kind"] == "train" and row["step"] == 1 and not killed:

            def soon():
                time.sleep(0.2)
                found = [p for p in psutil.Process().children(recursive=True) if "VLLM" in p.name()]
                killed.extend(found)
                for process in found:
                    process.kill()

            threading.Thread(target=soon).start()

    config = toy.run_config(
        toy_base,
        tmp_path,
        sampler={"kind": "vllm", "slots": 8, "threads": 1, "eager": True},
        trainer={"steps": 3},
        episode={"turn_seconds": 200.0, "max_seconds": 400.0},
        eval={"tasks": 4, "every": 0},
    )
    result = train(config, on_event=kill)
    assert killed, "the fault was met"
    assert result["steps"] == 3
    for row in rows(tmp_path / "toy", "train"):
        assert row["episodes"] >= 16 and set(row["failures"]) <= {"sampler"}


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_hangs_while_the_trainer_works_costs_no_run(toy_base, tmp_path, monkeypatch, fault):
    """Between the last sample of a step and the version that this step trains."""
    monkeypatch.setattr("espalier.rollouts.samplers.vllm.PROBE_SECONDS", 3.0)
    hit = []

    class Source(SyncSource):
        def next(self, step):
            batch = super().next(step)
            if step == 1:
                hit.extend(p for p in psutil.Process().children(recursive=True) if "VLLM" in p.name())
                for process in hit:
                    process.send_signal(fault)
            return batch

    config = toy.run_config(
        toy_base,
        tmp_path,
        sampler={"kind": "vllm", "slots": 8, "threads": 1, "eager": True},
        trainer={"steps": 2},
        eval={"tasks": 4, "every": 0, "greedy": False},
    )
    result = train(config, make_source=Source)
    assert hit and not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in hit), "the fault was met"
    assert (result["steps"], result["version"]) == (2, 2)
    steps = rows(tmp_path / "toy", "train")
    assert [row["sampled_by"] for row in steps] == [0, 1]
    assert all(row["failures"] == {} and row["logprob_gap"] < 1e-4 for row in steps)


@pytest.mark.long
def test_the_shipped_config_runs_on_vllm(tmp_path):
    """The tiny spreadsheet policy: same config, another sampler."""
    overrides = ["--sampler.kind", "vllm", "--sampler.eager", "true", "--trainer.steps", "1", "--trainer.groups", "2"]
    overrides += ["--eval.tasks", "4", "--eval.every", "0", "--out", str(tmp_path)]
    result = train(load("spreadsheet-tiny", overrides))
    (step,) = rows(tmp_path / "spreadsheet-tiny", "train")
    assert result["steps"] == 1 and step["logprob_gap"] < 1e-4
