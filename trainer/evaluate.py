"""Measuring a policy on tasks it was not trained on.

Always true: nothing that is measured here enters a store of training trajectories; a report names what makes its
figures comparable: the data and their hash, what was left out and why, the engines and their versions, the protocol,
and what doing nothing scores. How tasks are counted is in `scores`.

Protocols. `solution_once_apply_3`: the agent works on a task's first workbook, its edits are replayed on all (hard:
all pass; soft: the share that passes). `agent_per_workbook`: the agent works on every workbook of a task on its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

from ..configs.load import load as load_config
from ..configs.schema import Overflow, RunConfig
from ..envs.core import Action, AgentEnv, EnvFailure, Task
from ..envs.spreadsheet.task import SpreadsheetTask
from ..rollouts.digest import folder_digest
from ..rollouts.envpool import EnvPool, ThreadEnvPool
from ..rollouts.episode import environment_seed
from ..rollouts.render import RenderError
from ..rollouts.runner import GroupSpec, RolloutRunner, env_factory
from ..rollouts.samplers.base import SamplerError, SamplingParams
from ..rollouts.types import PolicyVersion
from . import tasks as tasklists
from .background import Background
from .errors import UserError
from .policy import PolicyStore, UnknownVersion, resolve_base
from .sampling import make_pool, make_runner, make_sampler
from .scores import EvalResult, FamilyScore, Mode, summarise

__all__ = [
    "EvalReport",
    "EvalResult",
    "FamilyScore",
    "Untouched",
    "do_nothing",
    "evaluate",
    "evaluate_config",
    "evaluate_tasks",
]

Protocol = Literal["solution_once_apply_3", "agent_per_workbook"]


@dataclass(frozen=True, slots=True)
class Untouched:
    """What doing nothing scores: `n` tasks with a verdict, `ungraded` without."""

    n: int
    hard: float
    soft: float
    ungraded: int


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Everything about an evaluation that its figures depend on."""

    dataset: str
    sha256: str
    tasks: int
    cases: int
    dropped: Mapping[str, str]
    noted: Mapping[str, str]
    engines: Mapping[str, str]
    protocol: Protocol
    policy: Mapping[str, Any]
    environment: Mapping[str, Any]
    do_nothing: Untouched
    results: tuple[EvalResult, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "results": [result.event() for result in self.results]}

    def text(self) -> str:
        """The report as a person reads it."""
        return "\n".join(_lines(self))


async def evaluate_tasks(
    runner: RolloutRunner,
    tasks: Sequence[Task],
    version: int,
    *,
    greedy: bool,
    samples: int = 1,
    step: int = 0,
    sampling: SamplingParams | None = None,
) -> EvalResult:
    """Run `tasks` with a published `version` and count.

    Sampled means temperature 1 on the whole distribution (or `sampling`); greedy takes one sample a task. The random
    keys depend on the task and the sample only, so two versions are compared on common random numbers.
    """
    return await _evaluate(runner, list(tasks), [[task] for task in tasks], version, greedy, samples, step, sampling)


async def _evaluate(
    runner: RolloutRunner,
    tasks: Sequence[Task],
    parts: Sequence[Sequence[Task]],
    version: int,
    greedy: bool,
    samples: int,
    step: int = 0,
    sampling: SamplingParams | None = None,
) -> EvalResult:
    """`parts[i]` are the tasks that are run for `tasks[i]`: itself, or one a workbook."""
    if greedy and samples != 1:
        raise ValueError("greedy sampling gives the same episode every time; samples must be 1")
    mode: Mode = "greedy" if greedy else "sampled"
    params = SamplingParams(temperature=0.0) if greedy else (sampling or SamplingParams())
    specs = [GroupSpec(f"eval/{mode}/{part.id}", part, samples) for some in parts for part in some]
    before = time.monotonic()
    overflow: Overflow = "failure" if runner.episode.on_overflow == "drop" else runner.episode.on_overflow
    groups = iter(await runner.run_groups(specs, params, version, on_overflow=overflow, evaluation=True))
    found = [[next(groups) for _ in some] for some in parts]
    seconds = time.monotonic() - before
    return summarise(found, tasks, step=step, version=version, mode=mode, samples=samples, seconds=seconds)


def evaluate(
    config: RunConfig | str | Path,
    policy: int | str | None = None,
    tasks: str | Path | None = None,
    *,
    samples: int = 1,
    protocol: Protocol = "solution_once_apply_3",
) -> EvalReport:
    """Measure a policy as `config` (a path, a shipped name, or a parsed configuration) says.

    `policy`: a version's number in the run's folder, "base", "latest" (the default), or the folder of a PEFT adapter.
    `tasks`: a data set of which every task is run; without it, `eval.tasks` held-out tasks of `env.tasks`. `samples`
    episodes a task for pass@k. Raises `UserError` for what a user can mend.
    """
    config = config if isinstance(config, RunConfig) else load_config(str(config))
    return evaluate_config(config, policy, None if tasks is None else str(tasks), samples=samples, protocol=protocol)


def evaluate_config(
    config: RunConfig,
    policy: int | str | None = None,
    tasks: str | None = None,
    *,
    samples: int = 1,
    protocol: Protocol = "solution_once_apply_3",
) -> EvalReport:
    """`evaluate` for a parsed configuration."""
    if protocol not in get_args(Protocol):
        raise UserError(f"there is no protocol {protocol!r}; choose one of {', '.join(get_args(Protocol))}")
    if samples < 1:
        raise UserError(f"samples must be at least 1, not {samples}")
    base = resolve_base(config.policy.base)
    version = find_policy(config, base, policy)
    data = _load_data(config, tasks)
    parts = [_parts(task, protocol) for task in data.tasks]
    try:
        make_env = env_factory(config.env, **tasklists.environment_options(config.env, data.tasks))
    except ValueError as error:
        raise UserError(str(error)) from error
    pool = make_pool(config, data.tasks)
    episodes = sum(map(len, parts)) * (samples + config.eval.greedy)
    waves = episodes // config.sampler.slots + 2
    loop = Background("espalier-evaluation")
    try:
        untouched = loop.call(
            do_nothing(make_env, data.tasks, seed=config.seed, deadline_s=config.episode.step_seconds),
            2 * config.episode.step_seconds * (len(data.tasks) + 1),
        )
        work = _measure(config, base, version, pool, data.tasks, parts, samples)
        results = loop.call(work, waves * config.episode.max_seconds + 120.0)
    finally:
        loop.close()
    return EvalReport(
        dataset=data.name,
        sha256=data.sha256,
        tasks=len(data.tasks),
        cases=sum(len(task.cases) if isinstance(task, SpreadsheetTask) else 1 for task in data.tasks),
        dropped=data.dropped,
        noted=data.noted,
        engines=_engines(config),
        protocol=protocol,
        policy={
            "version": version.number,
            "digest": version.digest,
            "path": str(version.path),
            "base": config.policy.base,
        },
        environment={"id": config.env.id, **config.env.kwargs, **tasklists.chosen_here(config.env)},
        do_nothing=untouched,
        results=results,
    )


async def _measure(
    config: RunConfig,
    base: Path,
    version: PolicyVersion,
    pool: EnvPool,
    tasks: Sequence[Task],
    parts: Sequence[Sequence[Task]],
    samples: int,
) -> tuple[EvalResult, ...]:
    """Sampled and, if the configuration says so, greedy, with the embedded sampler."""
    async with AsyncExitStack() as stack:
        try:
            sampler = make_sampler(config, base)
            stack.push_async_callback(sampler.close)
            runner = make_runner(config, base, sampler, pool)
            stack.push_async_callback(runner.close)
            await sampler.publish(version)
        except (SamplerError, RenderError) as error:
            raise UserError(str(error)) from error
        results = [await _evaluate(runner, tasks, parts, version.number, greedy=False, samples=samples)]
        if config.eval.greedy:
            results.append(await _evaluate(runner, tasks, parts, version.number, greedy=True, samples=1))
    return tuple(results)


async def do_nothing(
    make_env: Callable[[], AgentEnv], tasks: Sequence[Task], *, seed: int, deadline_s: float
) -> Untouched:
    """Start every task and hand it in as it stands. What fails on our side or has no verdict is counted apart."""
    pool = ThreadEnvPool(make_env, deadline_s=deadline_s)
    scores: list[tuple[float, float]] = []
    try:
        for task in tasks:
            env = await pool.take()
            try:
                reward, info = await pool.call(partial(_hand_in, env, task, seed))
            except (EnvFailure, TimeoutError):
                continue
            pool.give(env)
            if reward == reward and not info.get("ungraded"):
                soft = info.get("soft")
                scores.append((float(reward >= 1.0), float(soft) if isinstance(soft, int | float) else reward))
    finally:
        await pool.close()
    hard, soft_mean = (fmean(column) for column in zip(*scores, strict=True)) if scores else (0.0, 0.0)
    return Untouched(len(scores), hard, soft_mean, len(tasks) - len(scores))


def _hand_in(env: AgentEnv, task: Task, seed: int) -> tuple[float, dict[str, Any]]:
    env.reset(seed=environment_seed(seed, task.id), options={"task": task, "evaluation": True})
    _, reward, _, _, info = env.step(Action())
    return float(reward), info


def find_policy(config: RunConfig, base: Path, policy: int | str | None) -> PolicyVersion:
    """The version that `policy` names. Raises `UserError`."""
    store = PolicyStore(config.out / config.name / "policies", base)
    wanted = "latest" if policy is None else str(policy)
    if wanted in ("base", "latest"):
        return store.base_version if wanted == "base" else store.latest()
    if wanted.isdecimal():
        try:
            return store.open(int(wanted))
        except UnknownVersion as error:
            raise UserError(str(error)) from error
    folder = Path(wanted).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f'policy "{wanted}" is not a version number, "base" or "latest", '
            f"and {folder} is not a folder with a PEFT adapter"
        )
    return PolicyVersion(1, folder_digest(folder), folder.resolve(), str(base), 0)


def _load_data(config: RunConfig, source: str | None) -> tasklists.Data:
    """The tasks to run, with what identifies them: held-out ones of `env.tasks`, or all of `source`."""
    section = config.env if source is None else config.env.model_copy(update={"tasks": source})
    if source is not None and section.id not in (tasklists.SPREADSHEET, tasklists.CODE_SANDBOX):
        raise UserError(
            f"{section.id} makes its own tasks; --tasks works with {tasklists.SPREADSHEET} and {tasklists.CODE_SANDBOX}"
        )
    try:
        if source is None or source == "generated":
            return tasklists.read(section, "test", config.seed, config.eval.tasks)
        return tasklists.read(section, "all", config.seed, 10**9)
    except ValueError as error:
        raise UserError(str(error)) from error


def _parts(task: Task, protocol: Protocol) -> list[Task]:
    """What is run for a task: itself, or one task a workbook."""
    if protocol == "solution_once_apply_3" or not isinstance(task, SpreadsheetTask) or len(task.cases) < 2:
        return [task]
    return [replace(task, id=f"{task.id}#{number}", cases=(case,)) for number, case in enumerate(task.cases, 1)]


def _engines(config: RunConfig) -> dict[str, str]:
    if config.env.id != tasklists.SPREADSHEET:
        return {}
    from ..envs.spreadsheet.engines import ENGINES, engine_versions

    used = dict(zip(("engine", "crosscheck"), ENGINES, strict=True)) | config.env.kwargs
    names = [str(used[key]) for key in ("engine", "crosscheck") if used[key]]
    return engine_versions(names, tasklists.chosen_here(config.env)["referee"])


def _lines(report: EvalReport) -> list[str]:
    policy, engines = report.policy, ", ".join(f"{name} {version}" for name, version in report.engines.items())
    workbooks = f", {report.cases} workbooks" if engines else ""
    lines = [
        f"data       {report.dataset}: {report.tasks} tasks{workbooks} (sha256 {report.sha256[:16]})",
        f"left out   {len(report.dropped)} tasks",
        *(f"             {task}: {why}" for task, why in report.dropped.items()),
        *([f"noted      {len(report.noted)} tasks"] if report.noted else []),
        *(f"             {task}: {note}" for task, note in report.noted.items()),
        *([f"engines    {engines}", f"protocol   {report.protocol}"] if engines else []),
        f"policy     {policy['base']}, version {policy['version']} (sha256 {policy['digest'][:16]})",
        f"nothing    hard {report.do_nothing.hard:.1%}, soft {report.do_nothing.soft:.1%}"
        + (f", {report.do_nothing.ungraded} tasks without verdict" if report.do_nothing.ungraded else ""),
    ]
    for result in report.results:
        lines += _result_lines(result)
    return lines


def _result_lines(result: EvalResult) -> list[str]:
    mode = "greedy" if result.mode == "greedy" else f"sampled (T=1, {result.samples} a task)"
    lines = [
        "",
        f"{mode}: pass@1 hard {result.pass1:.1%} [{result.low:.1%}, {result.high:.1%}], soft {result.soft:.1%}, "
        f"{result.n} of {result.asked} tasks with a verdict",
    ]
    if result.samples > 1:
        lines.append("  " + ", ".join(f"pass@{k} {value:.1%}" for k, value in result.pass_at.items()))
    lines += [
        f"  {name:<16} {score.pass1:6.1%}  soft {score.soft:6.1%}  of {score.n}"
        for name, score in result.by_family.items()
    ]
    if result.failures:
        said = ", ".join(f"{count} {kind}" for kind, count in result.failures.items())
        lines.append(f"  episodes that failed: {said} (overflow counts as a miss, the others leave the denominator)")
    lines.append(
        f"  a prompt of {result.prompt_tokens:.0f} tokens, {result.turns:.1f} turns, {result.sampled_tokens:.0f} tokens"
        f" sampled, {result.truncated:.1%} truncated, {result.tool_errors:.1%} of calls refused"
    )
    return lines
