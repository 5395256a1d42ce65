"""Evaluation: what is counted, what is said, and that nothing measured becomes training data."""

import json
import os
import shutil
from pathlib import Path

import pytest
import toy
from espalier.configs.schema import EnvSection, RunConfig
from espalier.envs.core import EnvFailure, Observation, Task
from espalier.rollouts.envpool import ThreadEnvPool
from espalier.rollouts.graph.identity import identity
from espalier.rollouts.recipe import env_recipe
from espalier.rollouts.render import make_renderer
from espalier.rollouts.runner import RolloutRunner
from espalier.rollouts.samplers.scripted import Fail, Say, ScriptedSampler
from espalier.rollouts.store import TrajectoryStore
from espalier.rollouts.types import PolicyVersion
from espalier.trainer.errors import UserError
from espalier.trainer.evaluate import _engines, do_nothing, evaluate, evaluate_tasks, find_policy
from espalier.trainer.statistics import wilson
from espalier.trainer.tasks import environment_options

TASKS = [Task(f"t{i}", "", "ab"[i % 2]) for i in range(8)]


class Marked(toy.Letters):
    """Right is "yes"; a task may break, have no verdict, or have a prompt that no context holds."""

    def reset(self, *, seed=None, options=None):
        self.task = options["task"]
        text = "x" * 5000 if self.task.instruction == "long" else self.task.id
        return Observation(({"role": "user", "content": text},)), {"task": self.task}

    def step(self, action):
        if self.task.instruction == "broken":
            raise EnvFailure("engine_crashed", "gone")
        if self.task.instruction == "unclear":
            return Observation(), float("nan"), True, False, {"ungraded": "engines disagree"}
        right = "yes" in action.text
        return Observation(), float(right), True, False, {"tool_errors": 0, "soft": 1.0 if right else 0.5}


async def measured(base, tasks, says, tmp_path=None, overflow="drop", **more):
    """Evaluate with a sampler that answers `says(task id, number of the sample)`."""
    renderer = make_renderer(base, thinking=False)
    store = None if tmp_path is None else TrajectoryStore(tmp_path)

    def script(request, turn):
        _, _, task, number = request.session.split("/")
        said = says(task, int(number))
        return said if isinstance(said, Fail) else Say(renderer.encode(said))

    sampler = ScriptedSampler(script, stop=renderer.stop_ids[0])
    await sampler.publish(PolicyVersion(3, "digest", base, "base"))
    runner = RolloutRunner(
        sampler=sampler,
        renderer=renderer,
        pool=ThreadEnvPool(Marked, deadline_s=toy_config(base).episode.step_seconds),
        episode=toy_config(base).episode.model_copy(update={"on_overflow": overflow}),
        run="run",
        seed=1,
        concurrency=4,
        store=store,
    )
    try:
        result = await evaluate_tasks(runner, tasks, 3, step=7, **{"greedy": False, **more})
    finally:
        await runner.close()
    if store is not None:
        assert store.ids() == [] and store.group_ids() == []
        store.close()
    return result, sampler


def toy_config(base, **more):
    return RunConfig.model_validate(
        {
            "policy": {"base": str(base), "device": "cpu"},
            "env": {"id": toy.ENV_ID},
            "episode": {"max_prompt_tokens": 900, "max_tokens": 1000, "max_turn_tokens": 8, "on_overflow": "drop"},
            "sampler": {"slots": 4, "threads": 1},
            "eval": {"tasks": 6},
            **more,
        }
    )


async def test_rates_intervals_and_families(toy_base, tmp_path):
    result, sampler = await measured(
        toy_base, TASKS, lambda task, n: "yes" if task in ("t0", "t2", "t4", "t1") else "no", tmp_path
    )
    assert (result.n, result.asked, result.pass1, result.soft) == (8, 8, 0.5, 0.75)
    assert (result.low, result.high) == wilson(4, 8)
    assert {f: (s.n, s.pass1) for f, s in result.by_family.items()} == {"a": (4, 0.75), "b": (4, 0.25)}
    assert {r.params.temperature for r in sampler.requests} == {1.0}
    event = result.event()
    assert json.loads(json.dumps(event)) == event
    wanted = {"kind": "eval", "step": 7, "version": 3, "mode": "sampled", "n": 8, "pass1": 0.5}
    assert wanted.items() <= event.items()
    assert event["by_family"]["a"] == {"n": 4, "pass1": 0.75, "soft": 0.875}


async def test_greedy_is_greedy(toy_base):
    result, sampler = await measured(toy_base, TASKS[:2], lambda task, n: "yes", greedy=True)
    assert result.mode == "greedy" and {r.params.temperature for r in sampler.requests} == {0.0}
    with pytest.raises(ValueError, match="greedy"):
        await measured(toy_base, TASKS[:1], lambda task, n: "yes", greedy=True, samples=2)


async def test_failures_of_ours_leave_the_denominator_and_are_counted(toy_base):
    tasks = [Task("fine", ""), Task("bad", "broken"), Task("grey", "unclear"), Task("big", "long"), Task("lost", "")]
    says = lambda task, n: Fail("gone") if task == "lost" else "yes"  # noqa: E731
    result, _ = await measured(toy_base, tasks, says)
    assert result.failures == {"env": 1, "overflow": 1, "sampler": 1, "ungraded": 1}
    assert (result.asked, result.n, result.pass1) == (5, 2, 0.5), "only the prompt that does not fit counts as a miss"


@pytest.mark.parametrize(("overflow", "soft"), [("drop", 0.5), ("failure", 0.5), ("grade", 0.75)])
async def test_a_truncated_episode_is_a_miss_even_where_training_drops_it(toy_base, overflow, soft):
    says = lambda task, n: "yes " if task == "t0" else "no " * 50  # noqa: E731
    result, _ = await measured(toy_base, TASKS[:2], says, overflow=overflow)
    assert (result.n, result.pass1, result.truncated, result.failures) == (2, 0.5, 0.5, {})
    assert result.soft == soft, "only grade asks for a verdict on what there is"


async def test_many_samples_give_pass_at_k_and_do_not_shrink_the_interval(toy_base):
    result, _ = await measured(toy_base, TASKS[:2], lambda task, n: "yes" if n == 0 else "no", samples=4)
    assert result.pass1 == 0.25 and result.pass_at == {1: 0.25, 2: 0.5, 4: 1.0}
    assert (result.low, result.high) == wilson(0.5, 2)


async def test_what_doing_nothing_scores():
    found = await do_nothing(Marked, [*TASKS, Task("grey", "unclear"), Task("bad", "broken")], seed=0, deadline_s=20)
    assert (found.n, found.hard, found.soft, found.ungraded) == (8, 0.0, 0.5, 2)


def test_a_report_names_what_its_figures_depend_on(toy_base, tmp_path):
    config = toy_config(toy_base, out=tmp_path)
    report = evaluate(config, samples=2)
    body = json.loads(json.dumps(report.to_json()))
    assert [r["mode"] for r in body["results"]] == ["sampled", "greedy"]
    assert body["tasks"] == 6 and body["protocol"] == "solution_once_apply_3" and len(body["sha256"]) == 64
    assert body["policy"]["version"] == 0 and set(body["results"][0]["pass_at"]) == {"1", "2"}
    text = report.text()
    for said in (body["sha256"][:16], "pass@2", "hard", "soft", "nothing", "6 of 6 tasks"):
        assert said in text
    assert not (tmp_path / "run").exists(), "measuring leaves the run's folder alone"
    assert evaluate(config, samples=2).results[0].pass1 == report.results[0].pass1


@pytest.mark.parametrize("policy", ["7", "nowhere", "-1"])
def test_a_policy_that_is_not_there_is_one_sentence(toy_base, tmp_path, policy):
    with pytest.raises(UserError, match=policy):
        find_policy(toy_config(toy_base, out=tmp_path), toy_base, policy)


def test_other_mistakes_are_one_sentence(toy_base, tmp_path):
    config = toy_config(toy_base, out=tmp_path)
    for arguments, said in [
        ({"samples": 0}, "at least 1"),
        ({"protocol": "best_of_all"}, "best_of_all"),
        ({"tasks": str(tmp_path)}, "makes its own tasks"),
    ]:
        with pytest.raises(UserError, match=said):
            evaluate(config, **arguments)
    with pytest.raises(UserError, match=r"env\.id"):
        evaluate(toy_config(toy_base, out=tmp_path, env={"id": "espalier/Nothing-v0"}))
    bare = tmp_path / "bare"
    shutil.copytree(toy_base, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        evaluate(toy_config(bare, out=tmp_path))
    sheets = toy_config(toy_base, out=tmp_path, env={"id": "espalier/Spreadsheet-v0"})
    with pytest.raises(UserError, match="nothing at"):
        evaluate(sheets, tasks=str(tmp_path / "nothing"))


def test_the_engines_named_are_those_that_are_asked(monkeypatch, tmp_path):
    section = EnvSection(kwargs={"stop_at_failure": True})
    program = tmp_path / "soffice"
    program.write_text("#!/bin/sh\necho LibreOffice 25.2.3.2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    asked = _engines(RunConfig(env=section))
    assert list(asked) == ["ironcalc", "formualizer", "libreoffice"] and asked["libreoffice"] == "25.2.3.2"
    with_it = environment_options(section, [])
    monkeypatch.setenv("PATH", "/nowhere")
    without = environment_options(section, [])
    assert (with_it["referee"], without["referee"]) == ("libreoffice 25.2.3.2", "none")
    names = [identity(env_recipe(section, **options), terse=False) for options in (with_it, without)]
    assert names[0] != names[1]  # the operation graph never takes the one's outcomes for the other's
    assert list(_engines(RunConfig(env=EnvSection(kwargs={"crosscheck": None})))) == ["ironcalc"]
    with pytest.raises(UserError, match=r"env\.kwargs\.referee: LibreOffice is not installed"):
        environment_options(EnvSection(kwargs={"referee": "libreoffice"}), [])


@pytest.mark.parametrize(
    "protocol", ["solution_once_apply_3", pytest.param("agent_per_workbook", marks=pytest.mark.long)]
)
def test_on_real_tasks(toy_base, tmp_path, protocol):
    """A policy that knows nothing scores what doing nothing scores; data, what is left out and engines are named."""
    data = os.environ.get("ESPALIER_BENCH_DATA")
    if not data:
        pytest.skip("ESPALIER_BENCH_DATA is not set: the real tasks are not here")
    config = toy_config(
        toy_base,
        out=tmp_path,
        env={"id": "espalier/Spreadsheet-v0", "terse": True, "tools": ["submit"]},
        episode={"max_prompt_tokens": 3000, "max_tokens": 3100, "max_turn_tokens": 4, "max_turns": 1},
        eval={"greedy": False},
    )
    report = evaluate(config, tasks=str(Path(data) / "spreadsheetbench-20"), protocol=protocol)
    (result,) = report.results
    assert report.tasks + len(report.dropped) >= 20 and report.cases > report.tasks
    assert "ironcalc" in report.engines
    assert result.asked == report.tasks and result.n > 0
    assert result.pass1 <= report.do_nothing.hard + 1e-9 <= report.do_nothing.soft + 1e-9
