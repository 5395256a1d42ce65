"""A run folder made of real parts: real tasks played in the real environment, stored in the real store."""

import json
import shutil
from pathlib import Path

import pytest
from espalier.configs.load import load
from espalier.rollouts.store import TrajectoryStore
from espalier.rollouts.types import EndReason, Group, TokenSequence, TokenSpan, Trajectory, Turn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture
def bench_alone(tmp_path):
    """`bench_alone(NAME)`: a folder with that benchmark and what benchmarks share, for its process to run in."""

    def copy(name):
        shutil.copytree(ROOT / "results" / name, tmp_path / "results" / name)
        for shared in (ROOT / "results").glob("_*.py"):
            shutil.copy(shared, tmp_path / "results")
        return tmp_path

    return copy


def train_row(step, **more):
    return {
        "kind": "train",
        "step": step,
        "version": step,
        "time": 0.0,
        "seconds_rollout": 2.0,
        "seconds_train": 3.0,
        "reward_mean": 0.3 + step / 100,
        "loss": 0.1,
        "grad_norm": 0.2,
        "entropy": 0.5,
        "kl": 0.01,
        "groups_used": 30,
        "groups_no_signal": 2,
        "episodes": 256,
        "failures": {},
        "truncated": 1,
        "sampled_tokens": 9000,
        "trained_tokens": 9000,
        "tok_s": 4500.0,
        "prompt_tokens_mean": 140.0,
        "episode_tokens_mean": 280.0,
        "turns_mean": 2.0,
        "invalid_call_share": 0.1,
        "reward_by_family": {},
        **more,
    }


def eval_row(step, version, mode, pass1, n=400, **more):
    family = {"total": {"n": n, "pass1": pass1}}
    row = {"kind": "eval", "step": step, "version": version, "mode": mode, "n": n, "pass1": pass1}
    return {**row, "low": max(0, pass1 - 0.05), "high": min(1, pass1 + 0.05), "by_family": family, **more}


ROWS = [
    {"kind": "phase", "phase": "evaluating the base"},
    eval_row(0, 0, "sampled", 0.34),
    eval_row(0, 0, "greedy", 0.5),
    train_row(1, failures={"ungraded": 2}),
    train_row(2, failures={"ungraded": 1, "env": 1}),
    eval_row(2, 2, "sampled", 0.83),
    eval_row(2, 2, "greedy", 0.9),
]


def play(index, calls, *, version, reward, id, texts=()):
    """A real episode of training task `index`: what the environment answered, with made-up tokens around it."""
    from espalier.envs.core import Action, ToolCall
    from espalier.envs.spreadsheet.env import SpreadsheetEnv
    from espalier.envs.spreadsheet.families import generate

    task = generate(0, index, "train")
    env = SpreadsheetEnv([task], tools=["inspect_range", "write_range", "fill_formula", "submit"], terse=True)
    env.reset(seed=1, options={"task": task})
    turns, spans, at = [], [TokenSpan(0, 4, "prompt")], 4
    for number, (name, arguments) in enumerate(calls):
        call = ToolCall(name, arguments)
        observation, *_ = env.step(Action(tool_calls=(call,)))
        results = tuple(message["content"] for message in observation.messages)
        record = {"id": "", "name": name, "arguments": arguments}
        turns.append(Turn(0, len(spans), (texts or [""] * 9)[number], (record,), results))
        spans.append(TokenSpan(at, at + 2, "sampled", version))
        at += 2
        if number < len(calls) - 1:
            spans.append(TokenSpan(at, at + 1, "tool"))
            at += 1
    sampled = 2 * len(calls)
    sequence = TokenSequence(tuple(range(at)), tuple(spans), tuple(-0.25 * i for i in range(sampled)))
    group = id.rpartition("/")[0]
    made = ("espalier/Spreadsheet-v0", 1, (sequence,), tuple(turns), reward, EndReason.DONE, task.instruction)
    return Trajectory(id, group, task.id, task.family, *made)


@pytest.fixture
def make_run(tmp_path):
    """A factory of run folders: `make_run(rows=..., trajectories=...)` gives the folder."""

    def make(rows=ROWS, trajectories=(), name="tried", overrides=()):
        out = tmp_path / "runs"
        folder = out / name
        folder.mkdir(parents=True)
        tools = "inspect_range,write_range,fill_formula,submit"
        config = load("spreadsheet-tiny", ["--name", name, "--out", str(out), "--env.tools", tools, *overrides])
        (folder / "config.json").write_text(config.model_dump_json())
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if trajectories:
            (folder / "trajectories").mkdir()
            store = TrajectoryStore(folder / "trajectories")
            for trajectory in trajectories:
                store.append(Group(trajectory.group, trajectory.task, (trajectory,)))
            store.close()
        return folder

    return make


@pytest.fixture(scope="session")
def task():
    """The generated task that `episodes` are attempts at."""
    from espalier.envs.spreadsheet.families import generate

    return generate(0, 3, "train")


@pytest.fixture(scope="session")
def target(task):
    """The first answer cell: (sheet, row, column), from 1."""
    return min(task.cases[0].golden)


@pytest.fixture(scope="session")
def episodes(target):
    """An early failure and a late success at the same task, as if: the answer's first cell gets 1, or =600+66."""
    sheet, row, column = target
    cell = f"{chr(64 + column)}{row}"
    paste = {"range": cell, "data": 1, "sheet_name": sheet}
    early = play(3, [("write_range", paste), ("submit", {})], version=0, reward=0.0, id="g0/0")
    fill = {"start_cell": cell, "formula_template": "=600+66", "sheet_name": sheet}
    late = play(3, [("fill_formula", fill), ("submit", {})], version=2, reward=1.0, id="g1/0")
    return early, late


@pytest.fixture(name="rows")
def _rows():
    return list(ROWS)


@pytest.fixture(name="train_row")
def _train_row():
    return train_row


@pytest.fixture(name="eval_row")
def _eval_row():
    return eval_row
