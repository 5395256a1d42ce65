"""`espalier bench graph --quick` runs from end to end, and its figures are those that the issue names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = {
    "dedup_frozenlake", "dedup_taxi", "dedup_cliffwalking", "dedup_epochs_min", "executed_over_distinct_max",
    "dedup_spreadsheet", "live_env_share", "identical",
}  # fmt: skip


@pytest.mark.long
def test_a_quick_run_gives_the_figures_and_no_episode_differs(tmp_path):
    command = [sys.executable, "-P", "-m", "espalier.trainer.cli", "bench", "graph", "--quick", "--json", "found.json"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "found.json").read_text())["figures"]
    assert set(figures) >= NAMED
    assert figures["identical"] == 1 and figures["mismatches"] == 0
    assert figures["dedup_frozenlake"] > 2 and figures["live_env_share"] <= 0.25


def test_its_parts_measure_a_little(monkeypatch):
    """The same code on one small environment, quickly."""
    import asyncio

    for folder in ("results", "results/graph"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    import importlib.util

    spec = importlib.util.spec_from_file_location("graph_measure", ROOT / "results" / "graph" / "measure.py")
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)
    run = asyncio.run(measure.toy("taxi", 3.0, 1, 2))
    assert run["identical"] and run["dedup"] > 2 and run["executed_over_distinct"] < 1.2 and run["live_most"] <= 4
    figures = measure.reckon(
        [run, {**run, "name": "frozenlake"}], {"seconds_off": 1.0, "seconds_on": 1.0, "seconds_on_next_epoch": 1.0}
    )
    assert figures["dedup_taxi"] == run["dedup"] and figures["identical"] is True
