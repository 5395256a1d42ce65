"""Groups that grow as trees on random automata, with a policy that plays by its random keys; and hand-made trees."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import adding
import machine
from espalier.configs.schema import BranchingSection
from espalier.envs.core import Action, ToolCall
from espalier.rollouts.graph.core import OperationGraph
from espalier.rollouts.graph.pool import GraphPool
from espalier.rollouts.graph.statepool import ThreadStatePool
from espalier.rollouts.runner import GroupSpec, RolloutRunner
from espalier.rollouts.samplers.base import Sample, SampleRequest, SamplingParams
from espalier.rollouts.samplers.scripted import ScriptedSampler, say
from espalier.rollouts.snapshots import SnapshotPool
from espalier.rollouts.types import EndReason, Group, PolicyVersion, TokenSequence, TokenSpan, Trajectory, Turn

T1 = SamplingParams()


class Keyed(ScriptedSampler):
    """Moves, looks or submits by the key of the request alone; each token's log-probability is drawn from it too."""

    def __init__(self, renderer: Any, ending: float = 0.25) -> None:
        self.made: dict[tuple[str, int], Sample] = {}

        def script(request: SampleRequest, turn: int) -> Any:
            dice = random.Random(request.key)
            if dice.random() < ending:
                return say(renderer.encode, adding.call("submit"))
            if dice.random() < 0.2:
                return say(renderer.encode, adding.call("look"))
            return say(renderer.encode, adding.call("move", by=dice.randrange(3)))

        super().__init__(script, stop=renderer.stop_ids[0])

    async def sample(self, request: SampleRequest) -> Sample:
        sample = await super().sample(request)
        dice = random.Random(request.key + 1)
        made = replace(sample, logprobs=tuple(-dice.random() for _ in sample.tokens))
        self.made[request.session, request.key] = made
        return made


def pool_of(kind: Any, graph: bool, **options: Any) -> Any:
    """The environments as a run has them, with the operation graph or without."""
    states = ThreadStatePool(kind, deadline_s=20)
    if not graph:
        return SnapshotPool(states)
    options = {"verify_share": 0.0, "env_id": "machine", "identity": kind.__name__, **options}
    return GraphPool(states, OperationGraph(), **options)


class Grown:
    """A runner; `async with` publishes version 0 and closes everything."""

    def __init__(
        self, renderer: Any, pool: Any, *, concurrency: int = 8, store: Any = None, sampler: Any = None, **section: Any
    ) -> None:
        self.sampler = sampler or Keyed(renderer)
        self.pool = pool
        self.section = BranchingSection(**section)
        self.runner = RolloutRunner(
            sampler=self.sampler,
            renderer=renderer,
            pool=pool,
            episode=adding.budget(max_turns=6, max_prompt_tokens=1000, max_tokens=3000),
            run="run",
            seed=5,
            concurrency=concurrency,
            store=store,
            env_id="machine",
            branching=self.section,
        )

    async def __aenter__(self) -> Grown:
        await self.sampler.publish(PolicyVersion(0, "digest", Path("base"), "base"))
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.runner.close()
        await self.sampler.close()

    async def groups(self, size: int, count: int = 1, version: Any = 0, **more: Any) -> list[Group]:
        specs = [GroupSpec(f"g{n}", machine.task(f"w{n}"), size) for n in range(count)]
        found = await self.runner.run_groups(specs, T1, version, **more)
        counts = self.runner.counts
        assert counts.started == counts.trajectories + sum(counts.failures.values())
        assert not self.sampler.leased and not self.sampler.sessions
        return found


def timeless(groups: Sequence[Group]) -> list[Group]:
    """Groups without durations."""
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


def steps_done() -> int:
    """Turns that environments have carried out since the last reset of the count."""
    return machine.Machine.done["step"]


def played_alone(kind: Any, trajectory: Trajectory, task: Any) -> tuple[list[tuple[str, ...]], float]:
    """What a fresh environment answers to all turns of a trajectory."""
    kept = Counter(machine.Machine.done)
    env, reward, answers = kind(), 0.0, []
    env.reset(seed=trajectory.seed, options={"task": task})
    for turn in trajectory.turns:
        calls = tuple(ToolCall(c["name"], c["arguments"], "", c["id"]) for c in turn.calls)
        observation, gained, *_ = env.step(Action("", calls))
        reward += gained
        answers.append(tuple(str(m["content"]) for m in observation.messages))
    machine.Machine.done.clear()
    machine.Machine.done.update(kept)
    return answers, reward


def trajectory(
    id: str,
    reward: float,
    surprisals: Sequence[float],
    parent: Trajectory | None = None,
    left_at: int = 0,
    length: int = 2,
) -> Trajectory:
    """A hand-made one: each turn `length` tokens of that mean -log p, one tool token between; a branch has its parent's
    turns up to `left_at`, and `surprisals` are of its own.
    """
    every = [-x for x in surprisals]
    if parent is not None:
        every = [-p for p in per_turn(parent)[:left_at]] + every
    spans, turns, logprobs, at = [TokenSpan(0, 3, "prompt")], [], [], 3
    for number, logprob in enumerate(every):
        if number:
            spans.append(TokenSpan(at, at + 1, "tool"))
            at += 1
        turns.append(Turn(0, len(spans), "", (), ()))
        spans.append(TokenSpan(at, at + length, "sampled", 0, trained=number >= left_at))
        logprobs += [logprob] * length
        at += length
    tokens = tuple(range(1, at + 1))
    group = id.rpartition("/")[0]
    sequence = TokenSequence(tokens, tuple(spans), tuple(logprobs))
    more = {"parent": parent.id, "left_at": left_at} if parent is not None else {}
    return Trajectory(id, group, "task", "", "toy", 0, (sequence,), tuple(turns), reward, EndReason.DONE, **more)


def per_turn(made: Trajectory) -> list[float]:
    """-log p of each turn of a hand-made trajectory."""
    length = len(made.sequences[0].logprobs) // max(len(made.turns), 1)
    return [-made.sequences[0].logprobs[i * length] for i in range(len(made.turns))]
