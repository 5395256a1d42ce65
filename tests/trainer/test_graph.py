"""The graph and the sampler: sampled actions are never deduplicated, and the sampler cannot tell if there is a graph.

Promise 5 with the embedded sampler: whole trajectories, token ids and log-probabilities too, are the same.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from espalier.configs.load import load
from espalier.rollouts import envprocess
from espalier.rollouts.graph import pool, store
from espalier.rollouts.graph.core import GraphCounts
from espalier.rollouts.graph.pool import GraphPool
from espalier.rollouts.graph.store import SpaceRow
from espalier.rollouts.runner import GroupSpec
from espalier.rollouts.samplers.base import SamplingParams
from espalier.trainer import rollout_side
from espalier.trainer import tasks as tasklists
from espalier.trainer.policy import PolicyStore, resolve_base
from espalier.trainer.rollout_side import RolloutSide
from espalier.trainer.sampling import make_pool, make_runner, make_sampler


class Listened:
    """A sampler that writes down what it is asked."""

    def __init__(self, sampler):
        self.sampler, self.requests = sampler, []

    def __getattr__(self, name):
        return getattr(self.sampler, name)

    async def sample(self, request):
        self.requests.append(request)
        return await self.sampler.sample(request)


def timeless(groups):
    return [
        replace(
            group,
            trajectories=tuple(
                replace(t, turns=tuple(replace(turn, seconds_sampling=0, seconds_env=0) for turn in t.turns))
                for t in group.trajectories
            ),
        )
        for group in groups
    ]


async def episodes(config, tasks, version, base):
    sampler, envs = Listened(make_sampler(config, base)), make_pool(config, tasks)
    runner = make_runner(config, base, sampler, envs)
    await sampler.publish(version)
    specs = [GroupSpec(f"g{n}", task, 6) for n, task in enumerate(tasks)]
    groups = await runner.run_groups(specs, SamplingParams(), 0)
    if isinstance(envs, GraphPool):
        await envs.settled()
    await runner.close()
    await sampler.close()
    asked = sorted((r.session, r.key, r.prompt, r.max_tokens, r.stop) for r in sampler.requests)
    return timeless(groups), asked, envs


@pytest.mark.parametrize("processes", [0, 1])
async def test_trajectories_and_draws_of_the_embedded_sampler_do_not_depend_on_the_graph(tmp_path, processes):
    """I1 and I4 end to end, on spreadsheets with the shipped policy."""
    words = [
        "--out",
        str(tmp_path),
        "--env.task_count",
        "8",
        "--env.processes",
        str(processes),
        "--sampler.slots",
        "12",
    ]
    on = load("spreadsheet-tiny", [*words, "--graph.verify_share", "1.0", "--graph.live", "3"])
    off = load("spreadsheet-tiny", [*words, "--graph.enabled", "false"])
    base = resolve_base("tiny")
    version = PolicyStore(tmp_path / "policies", base).base_version
    tasks = tasklists.load(on.env, "train", 0, 8)[:2]
    without, asked_without, _ = await episodes(off, tasks, version, base)
    with_graph, asked, envs = await episodes(on, tasks, version, base)
    assert with_graph == without and asked == asked_without
    assert sum(len(group.trajectories) for group in without) == 12
    counts = envs.counts
    assert counts.hits + counts.coalesced > counts.executed and counts.mismatches == 0 and counts.live_most <= 3
    keys = [key for _, key, *_ in asked]
    assert len(set(keys)) == len(keys), "every turn draws by a key of its own"


async def test_a_row_of_metrics_says_once_what_is_wrong_with_the_file(tmp_path):
    config = load("spreadsheet-tiny", ["--out", str(tmp_path), "--env.task_count", "8"])
    (tmp_path / config.name).mkdir()
    made = make_pool(config, tasklists.load(config.env, "train", 0, 8))
    side = SimpleNamespace(_graph=made, _counted=GraphCounts(), _counted_file=(0, 0))
    assert "notes" not in RolloutSide.graph_figures(side)["graph"]
    made.graph.store.put_space(SpaceRow(b"s", "env", "task", 2**70))
    made.graph.store.flush()
    made.graph.say("another")
    (other, trouble) = RolloutSide.graph_figures(side)["graph"]["notes"]
    assert other == "another" and "nothing more is stored" in trouble
    made.graph.store.corrupted += 2
    told = [RolloutSide.graph_figures(side)["graph"] for _ in range(2)]
    assert [row["corrupted"] for row in told] == [2, 0] and all("notes" not in row for row in told)
    await made.close()


def test_the_graph_is_closed_within_the_time_that_a_run_gives_it():
    """A check that hangs, and a file that another process holds, must not fail a run that has trained to its end."""
    workers = 2 * envprocess.CLOSE_SECONDS + envprocess.LAST_WORDS_SECONDS
    assert pool.CLOSE_SECONDS + workers + store.FLUSH_SECONDS < rollout_side.SLACK_SECONDS


@pytest.mark.parametrize("processes", [0, 1])
async def test_trees_of_spreadsheets_do_not_depend_on_the_graph(tmp_path, processes):
    """The same with branches: in the graph, or from snapshots, in this process or in another."""
    words = ["--out", str(tmp_path), "--env.task_count", "8", "--env.processes", str(processes)]
    words += ["--sampler.slots", "12", "--branching.roots", "2", "--branching.rounds", "2", "--branching.at", "entropy"]
    on, off = load("spreadsheet-tiny", words), load("spreadsheet-tiny", [*words, "--graph.enabled", "false"])
    base = resolve_base("tiny")
    version = PolicyStore(tmp_path / "policies", base).base_version
    tasks = tasklists.load(on.env, "train", 0, 8)[:2]
    without, asked_without, _ = await episodes(off, tasks, version, base)
    with_graph, asked, envs = await episodes(on, tasks, version, base)
    assert with_graph == without and asked == asked_without
    everything = [t for group in without for t in group.trajectories]
    assert len(everything) == 12 and sum(t.parent is not None for t in everything) >= 4
    assert envs.counts.replayed == envs.counts.mismatches == 0
    own = sum(t.own_turns for t in everything) + sum(t.parent is None for t in everything)
    assert envs.counts.requested <= own, "nothing was asked for again (a turn that was cut is not asked for at all)"
