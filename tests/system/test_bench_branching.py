"""`espalier bench branching --quick` runs from end to end, and its ratios are what its curves say."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def measure(monkeypatch):
    for folder in ("results", "results/branching"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.delitem(sys.modules, "page", raising=False)
    spec = importlib.util.spec_from_file_location("branching_measure", ROOT / "results" / "branching" / "measure.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("page", None)


def rows(tokens, turns, branching=None):
    plain = {"episodes": 8, "groups_used": 3, "groups_no_signal": 1, "seconds_rollout": 1.0, "seconds_train": 2.0}
    return [{**plain, "sampled_tokens": tokens, "turns": turns, "branching": branching} for _ in range(2)]


def curve(most, *found):
    return [(most * i / (len(found) - 1), value) for i, value in enumerate(found)]


def both(tokens, turns, *found):
    return {"sampled_tokens": curve(tokens, *found), "turns": curve(turns, *found)}


def test_the_worse_budget_counts_and_the_target_is_the_middle(measure):
    found = {
        0: {"independent": both(1000, 100, 0.2, 0.4, 0.6), "branching": both(800, 50, 0.2, 0.4, 0.8)},
        1: {"independent": both(1000, 100, 0.2, 0.2, 0.6), "branching": both(800, 50, 0.2, 0.4, 0.6)},
        2: {"independent": both(1000, 100, 0.2, 0.3, 0.1), "branching": both(800, 50, 0.2, 0.4, 0.6)},
    }
    reached = measure.targets(found)
    assert set(reached) == {0, 1}, "where the weaker one got no better than the base there is no target"
    assert reached[0]["target"] == pytest.approx(0.4)
    assert reached[0]["sampled_tokens"] == {"independent": 500, "branching": 400}
    grown = {"trees": 4, "branches": 4, "tokens_saved": 10, "turns_saved": 4}
    arms = {("independent", s): rows(500, 50) for s in found} | {("branching", s): rows(400, 25, grown) for s in found}
    figures = measure.count(found, arms, reached)
    assert figures["token_ratio"] == pytest.approx((0.8 + 400 / 750) / 2)
    assert figures["budget_ratio"] == figures["token_ratio"] > figures["turn_ratio"]
    assert figures["branch_share"] == 0.5 and figures["sampled_tokens_branching"] == 800
    page = measure.report(figures, found, reached)
    assert "0.67 times the budget" in page and "met" in page
    assert "budget_ratio" not in measure.count(found, arms, {})
    assert "there is no target" in measure.report(measure.count(found, arms, {}), found, {})


def test_the_page_has_its_plot(measure, tmp_path):
    found = {0: {"independent": both(1000, 100, 0.2, 0.4, 0.6), "branching": both(800, 50, 0.2, 0.4, 0.8)}}
    measure.plot(found, measure.targets(found), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.long
def test_a_quick_run_gives_the_figures(tmp_path):
    command = [sys.executable, "-P", "-m", "espalier.trainer.cli", "bench", "branching", "--quick", "--json", "found"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "found").read_text())["figures"]
    assert {"pass1_independent", "pass1_branching", "sampled_tokens_branching", "branch_share"} <= set(figures)
    assert figures["branch_share"] > 0
