"""What each command does: resolve, call the room that does the work, show, return what was found.

Always true here: a command imports what it needs when it runs, so that `espalier --help` loads nothing heavy; with
`args.json` nothing is shown, the returned `Result` is all there is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.load import load
from ..configs.schema import RunConfig
from .errors import UserError
from .shipped import POLICY_OF

if TYPE_CHECKING:
    from .runs import Run

Result = dict[str, Any]
"""What a command found, JSON-ready. `exit_code` (default 0) is taken out and becomes the process's."""


def doctor(args: argparse.Namespace) -> Result:
    """What fits together on this machine, what does not."""
    from .display import show_findings
    from .doctor import examine

    findings = examine(args.out)
    if not args.json:
        show_findings(findings)
    return {
        "findings": [{"name": f.name, "status": f.status, "detail": f.detail, "mend": f.mend} for f in findings],
        "exit_code": int(any(finding.status == "bad" for finding in findings)),
    }


def envs(args: argparse.Namespace) -> Result:
    """List registered environments, or check one against the contract."""
    import gymnasium

    from .. import envs as _registers  # noqa: F401  (importing it registers Espalier's environments)

    ids = sorted(name for name in gymnasium.registry if name.startswith("espalier/"))
    if args.action == "list":
        found = [{"id": name, **_describe(name)} for name in ids]
        if not args.json:
            for item in found:
                print(f"{item['id']:<28}{item['about']}\n{'':<28}can: {', '.join(item['capabilities']) or 'no extras'}")
        return {"environments": found}
    if args.id is None:
        raise UserError(f"envs check needs an ID, such as {ids[0] if ids else 'module:Name-v0'}.")
    try:
        gymnasium.make(args.id, disable_env_checker=True).close()
    except (gymnasium.error.Error, ImportError) as error:
        raise UserError(f"{args.id}: {error}; registered here: {', '.join(ids)}.") from None
    from ..envs.check import ContractViolation, check_agent_env

    try:
        held = check_agent_env(lambda: gymnasium.make(args.id, disable_env_checker=True))
    except ContractViolation as broken:
        if not args.json:
            print("\n".join(f"broken: {violation}" for violation in broken.violations))
        return {"id": args.id, "broken": [str(violation) for violation in broken.violations], "exit_code": 1}
    if not args.json:
        print("\n".join(f"held: {rule}" for rule in held))
    return {"id": args.id, "held": list(held), "broken": []}


def _describe(name: str) -> dict[str, Any]:
    """What an environment's class says of itself, without making one."""
    import gymnasium

    from ..envs.core import Digestible, Rollbackable

    entry = gymnasium.registry[name].entry_point
    found = gymnasium.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
    doc = (getattr(found, "__doc__", "") or "").strip().partition("\n")[0]
    able: list[str] = []
    if isinstance(found, type):
        able = [word for word, kind in (("rollback", Rollbackable), ("digest", Digestible)) if issubclass(found, kind)]
    return {"about": doc, "capabilities": able}


def train(args: argparse.Namespace) -> Result:
    """Train, evaluating before and after, and write the report."""
    overrides = list(args.overrides)
    if args.from_adapter is not None:
        overrides += [f"--policy.from_adapter={args.from_adapter}"]
    config = load(args.config, overrides)
    if args.dry_run:
        return _dry_run(config, as_json=args.json)
    _require_model(config)
    _settle(config)
    from .parallel import follows
    from .runs import claim

    if follows():
        from . import loop

        loop.follow(config)
        return {}  # the run's first process says what came of it
    folder = config.out / config.name
    with claim(folder, resume=args.resume):
        from . import loop
        from .report import write_report

        with _display(config, silent=args.json) as on_event:
            result = loop.train_claimed(
                config, resume=args.resume, from_trajectories=args.from_trajectories, on_event=on_event
            )
        page = write_report(folder)
    if not args.json:
        print(f"report: {page}")
    return {**result, "report": str(page)}


def rollout(args: argparse.Namespace) -> Result:
    """Collect trajectories with the base or the run's latest version; no training."""
    config = load(args.config, args.overrides)
    _require_model(config)
    _settle(config)
    from .runs import claim

    folder = config.out / config.name
    with claim(folder, resume=(folder / "config.json").is_file()):
        from . import loop

        with _display(config, silent=args.json) as on_event:
            found = loop.collect(config, episodes=args.episodes, on_event=on_event)
    if not args.json:
        print(f"{found['episodes']} episodes, mean reward {found['reward_mean']}, in {folder / 'trajectories'}")
    return {"run": str(folder), **found}


def evaluate(args: argparse.Namespace) -> Result:
    """Measure a policy on held-out tasks."""
    config = load(args.config, args.overrides)
    _require_model(config)
    _settle(config)
    from .evaluate import evaluate_config

    found = evaluate_config(config, args.policy, args.tasks, samples=args.samples, protocol=args.protocol)
    if not args.json:
        print(found.text())
    return found.to_json()


def _dry_run(config: RunConfig, *, as_json: bool) -> Result:
    """The memory plan and what is missing; exit code 1 when something is."""
    from .plan import make_plan, plan_text

    plan = make_plan(config)
    if not as_json:
        print(plan_text(config, plan))
    return {
        "config": config.model_dump(mode="json"),
        "device": plan.device,
        "room_bytes": plan.room,
        "total_bytes": plan.total,
        "parts": [{"name": part.name, "bytes": part.bytes, "how": part.how} for part in plan.parts],
        "speed": plan.speed,
        "missing": [{"what": missing.what, "mend": missing.mend} for missing in plan.missing],
        "exit_code": 1 if plan.missing else 0,
    }


def _require_model(config: RunConfig) -> None:
    """Say at once that the model is not here, before anything heavy is loaded."""
    from .plan import missing_model
    from .shapes import find_model

    if find_model(config.policy.base) is None:
        missing = missing_model(config.policy.base)
        raise UserError(f"{missing.what}; mend it with: {missing.mend}")


def _settle(config: RunConfig) -> None:
    """What must be settled before torch is imported: how OpenMP's threads wait, and how many there are.

    Threads that wait by spinning take the cores from those that work: many times slower on two busy cores.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(config.trainer.threads, config.sampler.threads)))


@contextmanager
def _display(config: RunConfig, *, silent: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    if silent:
        yield lambda _row: None
        return
    from .display import Display

    with Display(config.name, config.trainer.steps) as display:
        yield display.on_event


def report(args: argparse.Namespace) -> Result:
    """Write a run's report.html."""
    from .runs import find_run

    folder = find_run(args.run_name)
    from .report import write_report

    page = write_report(folder)
    if not args.json:
        print(page)
    return {"report": str(page)}


def inspect(args: argparse.Namespace) -> Result:
    """Show one trajectory, or the operation graph of a task."""
    from .runs import find_run, read_run

    run = read_run(find_run(args.run_name))
    if args.graph:
        return _inspect_graph(run, args.task, as_json=args.json)
    from . import inspect as look

    store = look.open_store(run)
    trajectory = look.find_trajectory(store, args.trajectory, args.task)
    group = store.group(trajectory.group)
    store.close()
    decode = look.decoder(run) if args.logprobs else None
    replayed = look.try_replay(run, trajectory)
    if not args.json:
        print(look.describe(trajectory, replayed, decode, group))
    return look.as_json(trajectory, replayed, decode, group) if args.json else {}


def _inspect_graph(run: Run, task: str | None, *, as_json: bool) -> Result:
    from . import graph_view

    found, totals = graph_view.picture(run, task), graph_view.saved(run.rows)
    if as_json:
        return graph_view.as_json(found, totals, graph_view.notes(run.rows))
    print("\n".join([*graph_view.as_text(found, totals), *graph_view.notes(run.rows)]))
    return {}


def export(args: argparse.Namespace) -> Result:
    """Copy a version for others to load."""
    from .runs import find_run, read_run

    run = read_run(find_run(args.run_name))
    from .export import export as write

    done = write(run, args.to, args.version, merged=args.merged)
    if not args.json:
        print(f"version {done['version']}: {'merged weights' if done['merged'] else 'PEFT adapter'} in {done['to']}")
    return done


def make_policy(args: argparse.Namespace) -> Result:
    """Rebuild a shipped policy from nothing."""
    to = args.to or Path("policies") / POLICY_OF[args.subject]
    if to.exists():
        raise UserError(f"{to} exists already; name a new folder in --to.")
    from .imitate import RECIPES
    from .imitate import make_policy as make
    from .lessons import SUBJECTS

    make(to, SUBJECTS[args.subject](), replace(RECIPES[args.subject], seed=args.seed))
    if not args.json:
        print(f"policy in {to}; use it with --policy.base {to}")
    return {"to": str(to), "seed": args.seed}


def bench(args: argparse.Namespace) -> Result:
    """Run a benchmark of this checkout."""
    from .bench import run_bench

    return {"exit_code": run_bench(args.name, json_file=args.json, quick=args.quick, device=args.device)}
