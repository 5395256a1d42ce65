"""The command line: words to calls, errors to sentences.

Always true here: nothing heavy is imported before a command needs it; `--json` prints one JSON object and nothing else
on standard output; what a user got wrong ends in one sentence on standard error and a non-zero exit code (2: the
configuration or command line, 1: anything else, 130: interrupted). A traceback is a bug of ours.
"""

from __future__ import annotations

import argparse
import dis
import errno
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from ..configs.load import ConfigError, is_override, shipped
from . import commands
from .errors import UserError
from .shipped import POLICY_OF

_TAKES_CONFIG = ("train", "rollout", "eval")


class _Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words and (not words or words[0] != "bench")
    signal.signal(signal.SIGTERM, _interrupt)
    with _stdout(as_json) as out:
        try:
            args = _parse(words)
            result = args.run(args)
            code = int(result.pop("exit_code", 0))
        except (Exception, KeyboardInterrupt) as error:
            sentence, code = _explain(error, words)
            if sentence is None:
                raise
            print(sentence, file=sys.stderr)
            result = {"error": sentence}
        if as_json and result:
            print(json.dumps(result, ensure_ascii=False, default=str), file=out)
    return code


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _stdout(as_json: bool) -> Iterator[TextIO]:
    """Standard output; with `--json` whatever else prints (libraries, child processes) goes to standard error."""
    if not as_json:
        yield sys.stdout
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _explain(error: BaseException, words: Sequence[str]) -> tuple[str | None, int]:
    """A sentence and an exit code for an error a user can mend; (None, _) for a bug of ours."""
    if isinstance(error, ConfigError):
        return "\n".join(f"espalier: {line}" for line in str(error).splitlines()), 2
    if isinstance(error, UserError):
        return f"espalier: {error}", 1
    if isinstance(error, KeyboardInterrupt):
        again = "" if "--resume" in words else " --resume"
        hint = f" Continue with: espalier {' '.join(words)}{again}" if words[:1] == ["train"] else ""
        return f"espalier: interrupted.{hint}", 130
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"espalier: the disk is full{where}; free some space, then run it again with --resume.", 1
    if isinstance(error, sqlite3.OperationalError):
        return f"espalier: the store of trajectories cannot be used: {error}; free some space or check its folder.", 1
    if isinstance(error, (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError)):
        return f"espalier: {error.filename or error}: {error.strerror or 'cannot be used'}.", 1
    if isinstance(error, BrokenPipeError):
        return "espalier: the reader of the output went away.", 1
    ours = type(error).__module__.startswith("espalier.") and isinstance(error, (RuntimeError, LookupError, ValueError))
    if ours or (isinstance(error, ValueError) and _raised_here(error)):
        return f"espalier: {error}", 1
    return None, 1


def _raised_here(error: BaseException) -> bool:
    """Whether a `raise` of Espalier's own made this error: a sentence for a person, where `int("x")` would be a bug."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not str(last.tb_frame.f_globals.get("__name__")).startswith("espalier."):
        return False
    return last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """argparse over what is not a configuration override; `overrides` holds the rest."""
    command = next((word for word in words if not word.startswith("-")), "")
    rest, overrides = _split_overrides(words) if command in _TAKES_CONFIG else (list(words), [])
    parser = _build()
    if not rest:
        parser.print_help()
        raise SystemExit(0)
    args = parser.parse_args(rest)
    args.overrides = overrides
    return args


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    rest: list[str] = []
    overrides: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not is_override(word):
            rest.append(word)
            continue
        overrides.append(word)
        if "=" not in word and at < len(words) and not words[at].startswith("--"):
            overrides.append(words[at])
            at += 1
    return rest, overrides


def _build() -> argparse.ArgumentParser:
    configs = "\n".join(f"  {name:<24}{line}" for name, line in shipped().items())
    parser = _Parser(
        prog="espalier",
        description="Online reinforcement learning for LLM agents that use tools.",
        epilog=f"shipped configurations:\n{configs}\n\n"
        "Any configuration key can be set on the command line: --trainer.steps 10 --policy.base Qwen/Qwen3-4B",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"espalier {metadata.version('espalier')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], commands.Result], text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        if name != "bench":
            sub.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        if name in _TAKES_CONFIG:
            sub.add_argument("config", metavar="CONFIG", help="a shipped name or a path; --section.key VALUE overrides")
        return sub

    train = command("train", commands.train, "train a policy, evaluating it before and after")
    train.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    train.add_argument("--from-adapter", type=Path, metavar="DIR", help="start from this PEFT adapter")
    train.add_argument("--from-trajectories", type=Path, metavar="DIR", help="train on recorded trajectories only")
    train.add_argument("--dry-run", action="store_true", help="print the memory plan and what is missing, then exit")

    rollout = command("rollout", commands.rollout, "collect trajectories, without training")
    rollout.add_argument("--episodes", type=int, metavar="N", help="how many (default: one training step's)")

    evaluate = command("eval", commands.evaluate, "measure a policy on held-out tasks")
    evaluate.add_argument("--policy", metavar="VERSION", help="number in the run, base, latest, or an adapter folder")
    tasks = "a SpreadsheetBench folder or a Spreadsheet-RL parquet file; a folder of coding tasks"
    evaluate.add_argument("--tasks", metavar="DIR", help=tasks)
    evaluate.add_argument("--samples", type=int, default=1, metavar="K", help="episodes a task, for pass@k")
    protocols = ["solution_once_apply_3", "agent_per_workbook"]
    evaluate.add_argument("--protocol", choices=protocols, default=protocols[0], help="how several workbooks count")

    bench = command("bench", commands.bench, "run results/NAME/measure.py (in a checkout)")
    bench.add_argument("name", metavar="NAME")
    bench.add_argument("--json", metavar="FILE", type=Path, help="write figures to FILE, leave the folder alone")
    bench.add_argument("--quick", action="store_true", help="a smoke run, never a figure")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="where models stand (default: cpu)")

    report = command("report", commands.report, "write report.html of a run")
    inspect = command("inspect", commands.inspect, "show one trajectory, readable")
    export = command("export", commands.export, "copy a version as a PEFT adapter or merged weights")
    for sub in (report, inspect, export):
        sub.add_argument("run_name", metavar="RUN", help="a run's name or folder")
    inspect.add_argument("--trajectory", metavar="ID", help="which one (default: the latest)")
    inspect.add_argument("--task", metavar="ID", help="the latest of this task")
    inspect.add_argument("--graph", action="store_true", help="the operation graph of a task, and what it has saved")
    inspect.add_argument("--logprobs", action="store_true", help="log-probability of every sampled token")
    export.add_argument("--version", type=int, metavar="N", help="which version (default: the best, else the latest)")
    export.add_argument("--merged", action="store_true", help="whole weights instead of an adapter")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder")

    envs = command("envs", commands.envs, "list environments, or check one against the contract")
    envs.add_argument("action", choices=["list", "check"])
    envs.add_argument("id", nargs="?", metavar="ID", help="a Gymnasium id, for check")

    make = command("make-policy", commands.make_policy, "rebuild a shipped policy from nothing, by seed")
    make.add_argument("subject", nargs="?", choices=[*POLICY_OF], default="spreadsheet", help="what it learns")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--to", type=Path, metavar="DIR", help="a new folder (default: policies/ and its shipped name)")

    doctor = command("doctor", commands.doctor, "what is installed, what is wrong, and the command that mends it")
    doctor.add_argument("--out", type=Path, default=Path("runs"), help="where runs would be written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
