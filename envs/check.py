"""The contract every environment must pass, as a function users run on theirs.

`check_agent_env(factory)` plays short episodes with sampled, mistaken and empty actions and collects what breaks the
contract of `AgentEnv`; it raises one `ContractViolation` that names every broken rule with a hint. It looks only
through the public interface, and it believes nothing that it can try out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import gymnasium

from .core import Action, AgentEnv, EnvFailure, Observation, Rollbackable, Snapshot, Task, ToolCall, capabilities
from .tools import MAX_CALL_CHARS

Env = gymnasium.Env[Observation, Action]
Factory = Callable[[], Env]
_Check = Callable[[Factory, "_Notes", int, int, int], None]

STRUCTURAL = frozenset(
    {"unknown_tool", "malformed_call", "unknown_field", "missing_field", "wrong_type", "not_allowed", "out_of_range"}
)
"""Error codes that a call drawn from the action space must never meet."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule, what was seen, and what to do."""

    rule: str
    seen: str
    hint: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.seen}. {self.hint}"


class ContractViolation(AssertionError):
    """An environment breaks the contract; `violations` lists every rule that was seen broken."""

    def __init__(self, violations: tuple[Violation, ...]) -> None:
        lines = "\n".join(f"  - {v}" for v in violations)
        super().__init__(f"the environment breaks its contract in {len(violations)} place(s):\n{lines}")
        self.violations = violations


@dataclass
class _Notes:
    """What was found so far."""

    violations: list[Violation] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)

    def expect(self, holds: bool, rule: str, seen: str, hint: str) -> bool:
        if holds:
            if rule not in self.passed:
                self.passed.append(rule)
        elif all(v.rule != rule for v in self.violations):
            self.violations.append(Violation(rule, seen, hint))
        return holds


@contextmanager
def _opened(factory: Factory) -> Iterator[Env]:
    env = factory()
    try:
        yield env
    finally:
        with suppress(Exception):  # a close() that raises is a rule of its own
            env.close()


def check_agent_env(factory: Factory, *, seed: int = 0, episodes: int = 4, turns: int = 6) -> tuple[str, ...]:
    """Try the whole contract on environments that `factory` makes; each call must give a fresh, equal one.

    Returns the names of the rules that were tried and held. Raises `ContractViolation`.
    """
    notes = _Notes()
    with _opened(factory) as env:
        able = capabilities(env)
        if not isinstance(env.unwrapped, AgentEnv):
            seen = f"the factory makes a {type(env.unwrapped).__name__}"
            raise ContractViolation((Violation("kind", seen, "Subclass AgentEnv."),))
    checks: list[_Check] = [_check_making, _check_order, _check_turns, _check_mistakes, _check_seeding, _check_ending]
    checks += [_check_digest] if "digest" in able else []
    checks += [_check_rollback] if "rollback" in able else []
    for check in checks:
        name = check.__name__.removeprefix("_check_")
        try:
            check(factory, notes, seed, episodes, turns)
        except Exception as error:
            seen = f"{type(error).__name__} was raised while {name} was tried: {str(error)[:200]}"
            notes.expect(False, f"raises_{name}", seen, "Only what step() documents may be raised.")
    if notes.violations:
        raise ContractViolation(tuple(notes.violations))
    return tuple(notes.passed)


def _check_making(factory: Factory, notes: _Notes, seed: int, episodes: int, turns: int) -> None:
    with _opened(factory) as env:
        tools = cast(AgentEnv, env.unwrapped).tools
        names = [t.name for t in tools]
        notes.expect(len(set(names)) == len(names), "tool_names", f"tools {names} share a name", "Rename one of them.")
        for tool in tools:
            for terse in (False, True):
                try:
                    json.dumps(tool.to_openai(terse=terse))
                    fits = True
                except (TypeError, ValueError):
                    fits = False
                notes.expect(fits, "tool_schema", f"the schema of {tool.name} is not JSON", "Use plain types.")
        env.action_space.seed(seed)
        for _ in range(20):
            action = env.action_space.sample()
            hint = "Give a space whose sample() and contains() agree, such as spaces.ActionSpace."
            notes.expect(env.action_space.contains(action), "action_space", "it does not contain its own sample", hint)
        env.close()
        try:
            env.close()
            twice = True
        except Exception:
            twice = False
        notes.expect(twice, "close", "a second close() raises", "Make close() do nothing the second time.")


def _check_order(factory: Factory, notes: _Notes, seed: int, episodes: int, turns: int) -> None:
    with _opened(factory) as env:
        hint = "Raise RuntimeError in step() until reset() was called."
        notes.expect(_refuses(env, Action()), "reset_first", "step() before reset() does not raise", hint)


def _refuses(env: Env, action: Action) -> bool:
    try:
        env.step(action)
    except EnvFailure:
        return False
    except Exception:
        return True
    return False


def _start(env: Env, notes: _Notes, seed: int) -> Observation:
    observation, info = env.reset(seed=seed)
    shape = isinstance(observation, Observation) and bool(observation.messages)
    notes.expect(shape, "reset", f"reset() gives {type(observation).__name__}", "Return an Observation with messages.")
    notes.expect(
        env.observation_space.contains(observation),
        "observation_space",
        "it does not contain what reset() gave",
        "Use spaces.ObservationSpace, and messages with a role and text.",
    )
    notes.expect(isinstance(info.get("task"), Task), "task", "info of reset() has no Task", 'Put it in info["task"].')
    return observation


def _play(env: Env, actions: list[Action], notes: _Notes | None = None) -> list[Any]:
    """Step through `actions` until the episode ends; the record of what came back."""
    record: list[Any] = []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        if notes is not None:
            _look(env, notes, action, observation, reward, terminated, truncated, info)
        record.append((observation, "nan" if reward != reward else reward, terminated, truncated))
        if terminated or truncated:
            break
    return record


def _look(env: Env, notes: _Notes, action: Action, observation: Observation, *rest: Any) -> None:
    """The rules of one step."""
    reward, terminated, truncated, info = rest
    notes.expect(
        env.observation_space.contains(observation),
        "observation_space",
        "it does not contain what step() gave",
        "Use spaces.ObservationSpace, and messages with a role and text.",
    )
    flags = isinstance(terminated, bool) and isinstance(truncated, bool)
    notes.expect(flags, "flags", "terminated or truncated is not a bool", "Return plain bools.")
    number = isinstance(reward, (int, float)) and not isinstance(reward, bool)
    graded = number and (math.isfinite(reward) or (math.isnan(reward) and bool(info.get("ungraded"))))
    hint = 'Return a finite float, or NaN with info["ungraded"] saying why.'
    notes.expect(graded, "reward", f"the reward is {reward!r}", hint)
    answers = [m for m in observation.messages if m.get("role") == "tool"]
    same = [m.get("name") for m in answers] == [c.name for c in action.tool_calls]
    ids = all(m.get("tool_call_id", "") == c.id for m, c in zip(answers, action.tool_calls, strict=False))
    notes.expect(
        same and ids,
        "tool_messages",
        f"{len(action.tool_calls)} calls were answered by {len(answers)} tool messages, or in another order",
        "Answer every call by one tool message with its name and id, in the order of the calls.",
    )
    errors = [m for m in answers if _error_code(m.get("content", "")) is not None]
    counted = info.get("tool_errors") == len(errors)
    seen = f'info["tool_errors"] is {info.get("tool_errors")!r} where {len(errors)} answers are errors'
    notes.expect(counted, "tool_errors", seen, "Count the calls answered by a ToolError.")
    if not action.tool_calls:
        notes.expect(terminated, "no_call_ends", "a turn without a call goes on", "Set terminated; the agent is done.")


def _error_code(content: str) -> str | None:
    if not content.startswith('{"error"'):
        return None
    try:
        found = json.loads(content)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(found)


def _sampled(env: Env, seed: int, count: int) -> list[Action]:
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(count)]


def _check_turns(factory: Factory, notes: _Notes, seed: int, episodes: int, turns: int) -> None:
    """Sampled actions: accepted, answered, never a structural mistake."""
    with _opened(factory) as env:
        for episode in range(episodes):
            _start(env, notes, seed + episode)
            record = _play(env, _sampled(env, seed + episode, turns), notes)
            codes = [_error_code(m.get("content", "")) for step in record for m in step[0].messages]
            wrong = [code for code in codes if code in STRUCTURAL]
            seen = f"a sampled call was answered by {wrong[:1]}"
            hint = "Make the space draw arguments that pass the tool's own validation."
            notes.expect(not wrong, "sample_valid", seen, hint)


def _check_mistakes(factory: Factory, notes: _Notes, seed: int, episodes: int, turns: int) -> None:
    """Mistakes of the agent: answered by a ToolError, one each, and the episode goes on."""
    with _opened(factory) as env:
        names = [t.name for t in cast(AgentEnv, env.unwrapped).tools]
        mistakes = [
            ToolCall("no_such_tool", {}, '{"name": "no_such_tool"}', "m1"),
            ToolCall("", None, "not json at all", "m2"),
            ToolCall(names[0], None, '{"name": "' + names[0] + '", "arguments": {', "m3"),
            ToolCall(names[0], {"no_such_field_\u00e9": [1, {"a": None}]}, "", "m4"),
            ToolCall(names[0], {"x": "y" * (MAX_CALL_CHARS + 1)}, "", "m5"),
        ]
        _start(env, notes, seed)
        for call in mistakes:
            action = Action("", (call,))
            hint = "Catch it and answer by a ToolError; Toolset.call does."
            try:
                observation, reward, terminated, truncated, info = env.step(action)
            except Exception as error:
                notes.expect(False, "mistakes", f"step() raised {type(error).__name__} for a mistaken call", hint)
                _start(env, notes, seed)
                continue
            _look(env, notes, action, observation, reward, terminated, truncated, info)
            codes = [_error_code(m.get("content", "")) for m in observation.messages]
            notes.expect(codes != [None], "mistakes", f"a mistaken call was answered by {observation.messages}", hint)
            text = " ".join(m.get("content", "") for m in observation.messages)
            hint = "Say what is wrong in the agent's terms."
            notes.expect("Traceback (most recent" not in text, "no_traceback", "an answer carries a traceback", hint)
            hint = "A mistake is no reason to end an episode; a limit may truncate it."
            if (
                not notes.expect(not terminated, "mistakes_go_on", "a mistaken call ended the episode", hint)
                or truncated
            ):
                _start(env, notes, seed)


def _check_seeding(factory: Factory, notes: _Notes, seed: int, episodes: int, turns: int) -> None:
    """Same seed, same actions: same observations and rewards, in a fresh environment and in one used before, in
    training and in an evaluation.
    """
    hint = "Draw only from self.np_random, and start every episode from nothing but the seed and the task."
    with _opened(factory) as one, _opened(factory) as two:
        for episode in range(episodes):
            actions = [*_sampled(one, seed + episode, turns), Action("done")]
            runs = []
            for env, options in ((one, None), (two, None), (one, None), (one, {"evaluation": True})):
                opening = env.reset(seed=seed + episode, options=options)
                runs.append((opening[0], getattr(opening[1].get("task"), "id", None), _play(env, actions)))
            notes.expect(runs[0] == runs[1], "seeding", "two equal environments went apart on one seed", hint)
            notes.expect(runs[0] == runs[2], "seeding_again", "one environment went apart from its first run", hint)
            told = 'Let options["evaluation"] change what info says at most.'
            notes.expect(runs[2] == runs[3], "evaluation", "an episode went apart when told it is an evaluation", told)


def _check_ending(factory: Factory, notes: _Notes, seed: int, episodes: int, turns: int) -> None:
    """After the end step() raises, and reset() starts a new episode."""
    with _opened(factory) as env:
        _start(env, notes, seed)
        record = _play(env, [Action("I am done.")], notes)
        if not (record[-1][2] or record[-1][3]):
            return
        hint = "Raise RuntimeError in step() once the episode is over."
        notes.expect(_refuses(env, Action()), "after_end", "step() after the end does not raise", hint)
        _start(env, notes, seed + 1)
        _play(env, _sampled(env, seed, 1), notes)


def _digest(env: Env) -> str:
    return str(cast(Any, env.unwrapped).state_digest())


def _check_digest(factory: Factory, notes: _Notes, seed: int, episodes: int, turns: int) -> None:
    """Equal states have equal digests; the end of an episode is another state."""
    hint = "Hash the whole state, the random generator included, and nothing else (no time, no identity)."
    with _opened(factory) as one, _opened(factory) as two:
        actions = [*_sampled(one, seed, turns), Action("done")]
        seen: list[list[str]] = []
        for env in (one, two):
            env.reset(seed=seed)
            digests = [_digest(env), _digest(env)]
            for action in actions:
                _, _, terminated, truncated, _ = env.step(action)
                digests.append(_digest(env))
                if terminated or truncated:
                    break
            seen.append(digests)
        notes.expect(seen[0][0] == seen[0][1], "digest_stable", "asking twice gives two digests", hint)
        notes.expect(seen[0] == seen[1], "digest_equal", "equal histories have different digests", hint)
        notes.expect(seen[0][0] != seen[0][-1], "digest_differs", "start and end of an episode share a digest", hint)


def _check_rollback(factory: Factory, notes: _Notes, seed: int, episodes: int, turns: int) -> None:
    """Snapshot, change, roll back: same digest, same future; a branch and its origin do not see each other."""
    whole = "Restore everything an episode depends on, the random generator included."
    with _opened(factory) as env:
        able = "digest" in capabilities(env)
        for episode in range(episodes):
            base = cast(Rollbackable, env.unwrapped)
            env.reset(seed=seed + episode)
            first = _sampled(env, seed + episode, turns)
            later = [*_sampled(env, seed + episode + 1_000, turns), Action("done")]
            if any(step[2] or step[3] for step in _play(env, first[: turns // 2])):
                env.reset(seed=seed + episode)
            kept = base.snapshot()
            before = _digest(env) if able else ""
            future = _play(env, later)
            base.rollback(kept)
            if able:
                notes.expect(_digest(env) == before, "rollback_digest", "rollback gives another digest", whole)
            notes.expect(_play(env, later) == future, "rollback_future", "the future differs after rollback", whole)
            base.rollback(kept)
            branch = base.branch(kept)
            try:
                notes.expect(_play(branch, later) == future, "branch_future", "a branch has another future", whole)
                hint = "Share nothing that changes between an environment and its branches."
                if able:
                    notes.expect(_digest(env) == before, "branch_apart", "a branch changed its origin", hint)
                notes.expect(_play(env, later) == future, "branch_apart", "a branch changed its origin", hint)
            finally:
                branch.close()
        _check_foreign(env, notes)


def _check_foreign(env: Env, notes: _Notes) -> None:
    hint = 'Compare snapshot.env_id and raise EnvFailure("foreign_snapshot").'
    try:
        cast(Rollbackable, env.unwrapped).rollback(Snapshot("of another environment", "0" * 64, None))
        refused = False
    except EnvFailure:
        refused = True
    except Exception:
        refused = False
    notes.expect(refused, "foreign_snapshot", "a foreign snapshot does not raise EnvFailure", hint)
