"""The benchmarks' arms do what they say: a control that silently did nothing would flatter its contender."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from espalier.rollouts.samplers.base import SamplerError
from espalier.rollouts.samplers.torch import TorchSampler

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--trainer.groups", "4", "--env.task_count", "16", "--eval.tasks", "8", "--tracking.wandb", "off"]


@pytest.fixture(scope="module")
def arms():
    spec = importlib.util.spec_from_file_location("learning_arms", ROOT / "results" / "_arms.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rejection_sampling_samples_the_base_and_imitates_what_succeeded(arms, tmp_path):
    found = arms.carry_out("spreadsheet-tiny", "rejection", 0, tmp_path, SMALL, {"episodes": 32, "epochs": 1})
    assert found["episodes"] >= 32 and 0 < found["kept"] <= found["episodes"]
    assert found["sampled"]["n"] == found["greedy"]["n"] == 8
    assert sorted(p.name for p in (tmp_path / "rejection-0").glob("adapter-*")) == ["adapter-0", "adapter-1"]


def test_rejection_sampling_says_when_it_cannot(arms, tmp_path, monkeypatch):
    async def fail(self, request):
        raise SamplerError("nobody samples here")

    monkeypatch.setattr(TorchSampler, "sample", fail)
    with pytest.raises(RuntimeError, match=r"every episode failed: .*nobody samples here"):
        arms.carry_out("spreadsheet-tiny", "rejection", 0, tmp_path, SMALL, {"episodes": 32, "epochs": 1})


def test_another_configuration_is_another_arm(arms, tmp_path):
    """Else a figure would be of the configuration before."""

    class Named:
        device, arms = "cpu", tmp_path

        def arm(self, settings, run):
            return json.dumps(settings, sort_keys=True)

    found = {
        arms.run(Named(), config, "grpo", seed, SMALL + more, **options)
        for config in ("spreadsheet-tiny", "code-tiny")
        for seed in (0, 1)
        for more in ([], ["--sampling.temperature", "1.25"])
        for options in ({}, {"epochs": 1})
    }
    assert len(found) == 16
    assert str(tmp_path) not in "".join(found)


@pytest.mark.long
def test_the_asynchronous_benchmark_runs_end_to_end(tmp_path):
    """A smoke run on a few episodes: each figure is there."""
    command = [sys.executable, str(ROOT / "results" / "async" / "measure.py"), "--quick", "--json", tmp_path / "found"]
    path = {"PYTHONPATH": str(ROOT / "results"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "found").read_text())["figures"]
    assert {"staleness_max", "discarded_share", "pass1_sync", "pass1_async"} <= figures.keys()
    assert figures["discarded_share"] == 0
