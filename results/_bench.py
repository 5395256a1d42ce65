"""What the benchmarks share: arguments, the envelope of figures.json, the machine, fair comparisons, finished arms.

A benchmark is `results/NAME/measure.py`, run by `espalier bench NAME` (which puts this folder on its path). Always
true: contenders alternate within one run; figures are plain numbers, booleans as 0 or 1; a quick run never writes into
the folder that the README quotes; what ran on a GPU stands beneath it in `cuda/`, beside no figure of the CPU; no host
name, user name or path of this machine enters a file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import psutil

T = TypeVar("T")

VERSIONED = (
    "espalier",
    "torch",
    "transformers",
    "trl",
    "peft",
    "ironcalc",
    "formualizer",
    "renderers",
    "gymnasium",
    "numpy",
)


@dataclass(frozen=True)
class Bench:
    """One invocation. `folder` is where figures.json, plots and report.md go; None when it must be left alone. `device`
    ("cpu" or "cuda", which is there) is where models stand.
    """

    name: str
    quick: bool
    json_file: Path | None
    folder: Path | None
    arms: Path
    device: str = "cpu"

    @property
    def command(self) -> str:
        """The command that makes these figures again."""
        device = "" if self.device == "cpu" else f" --device {self.device}"
        return f"espalier bench {self.name}{device}" + (" --quick" if self.quick else "")

    def finish(self, claim: str, seeds: Sequence[int], figures: Mapping[str, float], runs: Sequence[Any]) -> None:
        """Write figures.json where this invocation may write it, and print the figures."""
        found = envelope(claim, seeds, figures, runs, self.command)
        text = json.dumps(found, indent=1, allow_nan=False) + "\n"
        if self.json_file is not None:
            self.json_file.parent.mkdir(parents=True, exist_ok=True)
            self.json_file.write_text(text, encoding="utf-8")
        elif self.folder is not None:
            (self.folder / "figures.json").write_text(text, encoding="utf-8")
        for name, value in found["figures"].items():
            print(f"{name:<28}{value:,.6g}")
        if self.quick:
            print("(a quick run: a smoke test, not a figure)")

    def arm(self, settings: Mapping[str, Any], run: Callable[[], T]) -> T:
        """The result of one finished arm, kept on disk by its settings, so that a killed benchmark resumes.

        `run` gives JSON-ready data. The kept arm names the commit that it was measured at; remove `runs/bench/NAME` to
        start over.
        """
        what = {"settings": dict(settings), "quick": self.quick, "versions": versions()}
        if self.device != "cpu":
            what["device"] = self.device
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        kept = self.arms / f"{digest}.json"
        if kept.is_file():
            found = json.loads(kept.read_text(encoding="utf-8"))
            if found["commit"] != commit():
                print(f"kept from commit {found['commit']}: {kept}; remove it to measure anew", file=sys.stderr)
            result: T = found["result"]
            return result
        result = run()
        self.arms.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        part.write_text(json.dumps({**what, "commit": commit(), "result": result}), encoding="utf-8")
        part.replace(kept)
        return result


def start(
    script: str, description: str, argv: Sequence[str] | None = None, devices: Sequence[str] = ("cpu", "cuda")
) -> Bench:
    """Read the command line of `measure.py`; `script` is its `__file__`, `devices` what it can run on. Ends the program
    with a sentence where it cannot run on what is asked for.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smoke run for tests, never a figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures to FILE, leave the folder alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where models stand")
    args = parser.parse_args(argv)
    folder = Path(script).resolve().parent
    if args.device not in devices:
        raise SystemExit(f"{folder.name} runs no model, so --device {args.device} has no meaning for it; leave it out.")
    if args.device == "cuda" and not _has_cuda():
        raise SystemExit("--device cuda: this machine has no CUDA device that torch can use; leave it out.")
    arms = folder.parent.parent / "runs" / "bench" / folder.name
    place = None if args.quick or args.json is not None else folder
    if place is not None and args.device != "cpu":
        place /= args.device
        place.mkdir(exist_ok=True)
    return Bench(folder.name, args.quick, args.json, place, arms, args.device)


def _has_cuda() -> bool:
    import torch  # here, because a benchmark without a model loads none

    return bool(torch.cuda.is_available())


def envelope(
    claim: str, seeds: Sequence[int], figures: Mapping[str, float], runs: Sequence[Any], command: str
) -> dict[str, Any]:
    """What figures.json holds. Raises `ValueError` for a figure that is not a finite number."""
    plain: dict[str, float] = {}
    for name, value in figures.items():
        number = int(value) if isinstance(value, bool) else value
        if not isinstance(number, int | float) or number != number or number in (float("inf"), float("-inf")):
            raise ValueError(f"figure {name} = {value!r} is not a finite number")
        plain[name] = number
    return {
        "claim": claim,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "seeds": list(seeds),
        "command": command,
        "figures": plain,
        "runs": list(runs),
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system and accelerator; nothing that names the host."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": _gpu(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str:
    torch = sys.modules.get("torch")  # a benchmark that uses one has it loaded
    if torch is None or not torch.cuda.is_available():
        return "none"
    return str(torch.cuda.get_device_name(0))


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with "+" when something in it is not committed; "unknown" without git."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


@dataclass(frozen=True)
class Sweep:
    """Speeds by thread count, and the count with the best median."""

    best: int
    rows: tuple[tuple[int, tuple[float, ...]], ...]


def sweep_threads(speed: Callable[[int], float], counts: Sequence[int], rounds: int = 3) -> Sweep:
    """Measure `speed(threads)` (larger is better) in `rounds` rounds over all counts in turn; keep the best median."""
    seen: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            seen[count].append(speed(count))
    best = max(counts, key=lambda count: median(seen[count]))
    return Sweep(best, tuple((count, tuple(values)) for count, values in seen.items()))


def alternate(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every contender once a round, the order turned by one each round: drift of the machine hits all alike."""
    names = list(contenders)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(contenders[name]())
    return found
