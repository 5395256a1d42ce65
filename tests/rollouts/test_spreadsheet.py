"""End to end on the real thing: generated workbooks, real engines, the runner; the scripted expert is the sampler."""

import json

import adding
import pytest
from espalier.configs.schema import EnvSection
from espalier.envs.spreadsheet.expert import expert
from espalier.envs.spreadsheet.families import generate
from espalier.rollouts.envpool import ThreadEnvPool
from espalier.rollouts.runner import GroupSpec, RolloutRunner, env_factory
from espalier.rollouts.samplers.base import SamplingParams
from espalier.rollouts.samplers.scripted import ScriptedSampler, say
from espalier.rollouts.store import TrajectoryStore
from espalier.rollouts.types import EndReason, PolicyVersion

FAMILIES = 10


@pytest.fixture(scope="module")
def tasks():
    found = {}
    index = 0
    while len(found) < FAMILIES and index < 80:
        task = generate(11, index, "test")
        found.setdefault(task.family, task)
        index += 1
    return list(found.values())


def written(action):
    """An action as Qwen3 writes it."""
    calls = [adding.call(c.name, **c.arguments) for c in action.tool_calls]
    return "\n".join(([action.text] if action.text else []) + calls)


def runner(renderer, tasks, script, folder, store=None):
    sampler = ScriptedSampler(script, stop=renderer.stop_ids[0])
    section = EnvSection(terse=True)
    return sampler, RolloutRunner(
        sampler=sampler,
        renderer=renderer,
        pool=ThreadEnvPool(env_factory(section, tasks=tasks), deadline_s=10, terse=True),
        episode=adding.budget(max_prompt_tokens=6000, max_tokens=12000, max_turn_tokens=2000, max_seconds=120.0),
        run="run",
        seed=1,
        concurrency=4,
        store=store,
        env_id=section.id,
    )


async def test_the_expert_solves_every_family(plain, tasks, tmp_path):
    actions = {f"g{i}": expert(task) for i, task in enumerate(tasks)}

    def script(request, turn):
        return say(plain.encode, written(actions[request.session.split("/")[0]][turn]))

    store = TrajectoryStore(tmp_path)
    sampler, rollouts = runner(plain, tasks, script, tmp_path, store)
    await sampler.publish(PolicyVersion(0, "digest", tmp_path, "base"))
    specs = [GroupSpec(f"g{i}", task, 2) for i, task in enumerate(tasks)]
    groups = await rollouts.run_groups(specs, SamplingParams(), 0)
    await rollouts.close()
    assert {t.family for g in groups for t in g.trajectories} == {task.family for task in tasks}
    assert [(g.id, g.rewards, g.failures) for g in groups] == [(s.id, (1.0, 1.0), ()) for s in specs]
    for group in groups:
        one, two = group.trajectories
        assert one.end is EndReason.DONE and one.info["tool_errors"] == 0 and one.info["soft"] == 1.0
        assert (one.sequences, one.seed) == (two.sequences, two.seed), "the same start and the same actions"
        assert store.group(group.id) == group
        json.dumps(one.info)
    store.close()


async def test_doing_nothing_and_nonsense_are_answered_and_scored_zero(plain, tasks, tmp_path):
    lines = ["<tool_call>\n{broken\n</tool_call>", adding.call("no_such_tool", n=1), "I give up."]
    sampler, rollouts = runner(plain, tasks, lambda request, turn: say(plain.encode, lines[turn]), tmp_path)
    await sampler.publish(PolicyVersion(0, "digest", tmp_path, "base"))
    (group,) = await rollouts.run_groups([GroupSpec("g", tasks[0], 1)], SamplingParams(), 0)
    await rollouts.close()
    (trajectory,) = group.trajectories
    assert trajectory.reward == 0.0 and trajectory.info["tool_errors"] == 2 and trajectory.info["calls"] == 2
    assert all('{"error":' in result for turn in trajectory.turns[:2] for result in turn.results)
