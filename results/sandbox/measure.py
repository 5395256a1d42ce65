"""The sandbox: what a snapshot and a rollback cost, next to fork() and to copying in the same run.

Always true: 20 ms pass between a step and what is timed after it, for all contenders alike (a model thinks for longer);
fork() is measured in a process with the same modules that does the same steps, in turns with the box; a
rollback counts as cold when the box says that no copy stood ready; a step is a light one (three small files written, a
small DataFrame made); scheduling is the system's ordinary one.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import _bench
from espalier.envs.coding.families import generate
from espalier.envs.coding.testing import preload, run_visible
from espalier.envs.sandbox import Box, BoxSnapshot, Limits, SnapshotIncomplete

FILES, FOLDERS = 10_000, 100
MODULES = "import numpy as np, pandas as pd"
WRITES = "for _k in range(3): open(f'/workspace/made{_k}', 'w').write('x' * 100)\n"
STEP = WRITES + "frame = pd.DataFrame({'a': np.arange(100), 'b': np.random.random(100)}); total = float(frame.b.sum())"
BARE_STEP = WRITES + "total = sum(range(100))"
THINK_MS = (0, 10, 50)
SETTLE_S = 0.02
KEPT = 100
FIRST = 5
"""Depths that later ones are compared with."""
LIMITS = Limits(memory="4G", snapshots=1000, snapshot_memory="8G", seconds=60)


def workspace(folder: Path) -> Path:
    """10,000 small files in 100 folders."""
    for n in range(FILES):
        place = folder / f"folder{n % FOLDERS}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"file{n}.txt").write_text(f"{n}\n" * 20)
    return folder


class Forker:
    """A process that steps and forks on request; see forker.py."""

    def __init__(self, modules: str, step: str) -> None:
        script = Path(__file__).with_name("forker.py")
        here = tempfile.mkdtemp(prefix="espalier-bench-")
        self._here = here
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(KEPT), modules, step.replace("/workspace", here)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def fork(self) -> float:
        """Milliseconds of one fork, after one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """End it and its children."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        shutil.rmtree(self._here)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of a call, and its result."""
    started = time.perf_counter()
    result = call()
    return (time.perf_counter() - started) * 1e3, result


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of `values` lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@contextlib.contextmanager
def ready_box(folder: Path, modules: str) -> Iterator[Box]:
    """A box with its modules loaded and one step done."""
    with Box(folder, LIMITS) as box:
        box.python(modules)
        box.python(STEP if "pd" in modules else BARE_STEP)
        yield box


def operations(folder: Path, count: int) -> dict[str, list[float]]:
    """Snapshots in turns with forks, then rollbacks to random snapshots, cold and warm."""
    rng = random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in ("wait", "pause", "fork", "cold", "warm", "memory_mb")}
    forker = Forker(MODULES, STEP)
    try:
        with ready_box(folder, MODULES) as box:
            kept: deque[BoxSnapshot] = deque(maxlen=KEPT)
            for _ in range(count):
                box.python(STEP)
                time.sleep(SETTLE_S)
                wait, made = timed(lambda: box.snapshot(wait=False))
                _ = made.number
                found["wait"].append(wait)
                found["pause"].append(made.pause_us / 1e3)
                found["fork"].append(forker.fork())
                kept.append(made)
            box.python(STEP)  # the last one's pages part from the guest's, as all the others' have
            stats = box.stats()  # weighs every process
            found["memory_mb"].append(stats["snapshot_bytes"] / max(stats["snapshots"] - 1, 1) / 1e6)
            while len(found["cold"]) < count // 2:
                here = rng.choice(kept)
                time.sleep(SETTLE_S)
                spent, warm = timed(partial(box.rollback, here))
                if not warm:
                    found["cold"].append(spent)
                box.python(STEP)
                found["fork"].append(forker.fork())
            for _ in range(count // 4):
                here = rng.choice(kept)
                box.prepare(here)
                time.sleep(SETTLE_S)
                spent, warm = timed(partial(box.rollback, here))
                if warm:
                    found["warm"].append(spent)
                box.python(STEP)
    finally:
        forker.close()
    return found


def slow_down(folder: Path, count: int) -> dict[str, float]:
    """Milliseconds that a step takes longer after a snapshot, by the time between the two."""
    found = {}
    with ready_box(folder, MODULES) as box:
        for think in THINK_MS:
            plain, after = [], []
            for _ in range(count):
                time.sleep(think / 1e3)
                plain.append(timed(lambda: box.python(STEP))[0])
                kept = box.snapshot(wait=False)
                time.sleep(think / 1e3)
                after.append(timed(lambda: box.python(STEP))[0])
                del kept
            found[f"next_action_{think}_ms"] = median(after) - median(plain)
    return found


def bare(folder: Path, count: int) -> dict[str, list[float]]:
    """Snapshots and cold rollbacks of an interpreter without numpy and pandas."""
    found: dict[str, list[float]] = {"snapshot": [], "rollback": []}
    with ready_box(folder, "pass") as box:
        for _ in range(count):
            box.python(BARE_STEP)
            time.sleep(SETTLE_S)
            made = box.snapshot()
            found["snapshot"].append(made.pause_us / 1e3)
            box.python(BARE_STEP)
            time.sleep(SETTLE_S)
            found["rollback"].append(timed(partial(box.rollback, made))[0])
    return found


def fan_out(folder: Path, width: int) -> float:
    """Milliseconds a branch, for `width` branches of one snapshot."""
    with ready_box(folder, MODULES) as box:
        here = box.snapshot()
        spent, branches = timed(lambda: [box.branch(here) for _ in range(width)])
        for branch in branches:
            branch.close()
        return spent / width


def by_depth(folder: Path, depth: int) -> list[float]:
    """Milliseconds of a cold rollback and a snapshot together, each one deeper than the last."""
    found = []
    with ready_box(folder, MODULES) as box:
        here = box.snapshot()
        for _ in range(depth):
            time.sleep(0.03)  # as short as a model ever thinks; the box does its chores then
            back = timed(partial(box.rollback, here))[0]
            box.python(STEP)
            here = box.snapshot()
            found.append(back + here.pause_us / 1e3)
    return found


def copying(folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds of copying the workspace, the fastest way there is here, and of starting again."""
    ways: dict[str, Callable[[Path], object]] = {
        "cp -a": lambda to: subprocess.run(["cp", "-a", str(folder), str(to)], check=True),
        "copytree": lambda to: shutil.copytree(folder, to, symlinks=True),
        "reflink": lambda to: subprocess.run(
            ["cp", "-a", "--reflink=always", str(folder), str(to)], check=True, stderr=subprocess.DEVNULL
        ),
    }
    found: dict[str, list[float]] = {name: [] for name in [*ways, "restart"]}
    for _ in range(rounds):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as to:
                try:
                    found[name].append(timed(partial(way, Path(to) / "copy"))[0])
                except subprocess.CalledProcessError:  # this file system has no reflinks
                    continue
        found["restart"].append(timed(lambda: subprocess.run([sys.executable, "-c", MODULES], check=True))[0])
    return {name: median(values) for name, values in found.items() if values}


def search(nodes: int) -> dict[str, float]:
    """Nodes a second of a random tree search on generated tasks (go back to a node, change the file, run the visible
    tests, keep the state), in a box and with copies and fresh processes; and the share of states that a box refused in
    a search that takes an agent's actions (`acting`).
    """
    tasks = [generate("train", 0, number) for number in range(4)]
    spent = {"box": 0.0, "copy": 0.0}
    for task in tasks:
        module = next(name for name in task.files if not name.startswith("test_"))
        rng = random.Random(task.id)
        with Box(limits=LIMITS) as box:
            preload(box)
            for name, text in task.files.items():
                box.write_file(name, text.encode())
            kept = [box.snapshot()]
            started = time.perf_counter()
            for n in range(nodes):
                box.rollback(rng.choice(kept))
                box.write_file(module, f"{task.files[module]}\n# {n}\n".encode())
                run_visible(box, 30)
                with contextlib.suppress(SnapshotIncomplete):
                    kept.append(box.snapshot())
            spent["box"] += time.perf_counter() - started
        with tempfile.TemporaryDirectory() as folder:
            spent["copy"] += search_by_copies(task.files, module, rng, nodes, Path(folder))
    total = nodes * len(tasks)
    return {
        "search_nodes_s_box": total / spent["box"],
        "search_nodes_s_copy": total / spent["copy"],
        **acting(tasks, max(nodes, 2 * len(ACTIONS))),
    }


ACTIONS = (
    ("shell", "cat *.py | grep -n def | sort > listing.txt; wc -l < listing.txt"),
    ("shell", "find . -name '*.py' -exec wc -l {} + | tail -1 >> log.txt 2>&1"),
    ("shell", "python3 -c 'print(sum(range(10)))' | tee out.txt; sed -i 's/^/# /' out.txt"),
    ("shell", "(sleep 0.05; echo late >> log.txt) & wait"),
    ("shell", "sleep 30 > server.log 2>&1 &"),
    ("python", "import numpy as np; a = np.random.random((300, 300)); a @ a; np.save('a.npy', a)"),
    ("python", "import pandas as pd; frame = pd.DataFrame({'a': range(50)}); frame.to_csv('frame.csv')"),
    ("python", "log = open('log.txt', 'a'); log.write('a line\\n'); rows = open('rows.txt', 'w+')"),
    ("python", "import sqlite3; base = sqlite3.connect('base.db'); base.execute('create table if not exists t (n)')"),
    ("python", "import subprocess; print(subprocess.run('ls | head -3', shell=True, capture_output=True).stdout)"),
    (
        "python",
        "from concurrent.futures import ThreadPoolExecutor; print(sum(ThreadPoolExecutor(2).map(abs, [1, -1])))",
    ),
    (
        "python",
        "import tempfile, threading; held = tempfile.TemporaryFile(); held.write(b'x'); lock = threading.Lock()",
    ),
)
"""What agents do to a workspace and an interpreter, with habits that leave something behind among them."""


def acting(tasks: list[Any], nodes: int) -> dict[str, float]:
    """The share of states refused, and by whose last action, in a random tree search whose nodes go back to a kept
    state, take one of `ACTIONS`, each as often as any other, and keep what came of it.
    """
    refused = dict.fromkeys(range(len(ACTIONS)), 0)
    for task in tasks:
        rng = random.Random(task.id)
        with Box(limits=LIMITS) as box:
            for name, text in task.files.items():
                box.write_file(name, text.encode())
            kept = [box.snapshot()]
            for n in range(nodes):
                box.rollback(rng.choice(kept))
                which = n % len(ACTIONS)
                call = box.shell if ACTIONS[which][0] == "shell" else box.python
                if call(ACTIONS[which][1]).status != 0:
                    raise RuntimeError(f"an action of the search failed: {ACTIONS[which][1]}")
                try:
                    kept.append(box.snapshot())
                except SnapshotIncomplete:
                    refused[which] += 1
    found = {f"refused_{ACTIONS[which][0]}_{which}": count for which, count in refused.items() if count}
    return {"refused_share": sum(refused.values()) / (nodes * len(tasks)), **found}


def search_by_copies(files: Any, module: str, rng: random.Random, nodes: int, room: Path) -> float:
    """The same search with a full copy a node and a fresh process a test run; its seconds."""
    first = room / "0"
    first.mkdir()
    for name, text in files.items():
        (first / name).write_text(text)
    kept = [first]
    started = time.perf_counter()
    for n in range(nodes):
        here = room / str(n + 1)
        shutil.copytree(rng.choice(kept), here)
        (here / module).write_text(f"{files[module]}\n# {n}\n")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(here)]
        environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(here), "PATH": "/usr/bin:/bin"}
        subprocess.run(command, cwd=here, env=environment, capture_output=True, check=False)
        kept.append(here)
    return time.perf_counter() - started


def main() -> None:
    """Measure, and write figures.json, report.md and plot.png."""
    bench = _bench.start(__file__, __doc__ or "", devices=("cpu",))
    count = 20 if bench.quick else 1000
    with tempfile.TemporaryDirectory(prefix="espalier-bench-") as name:
        folder = workspace(Path(name) / "workspace")
        found: dict[str, Any] = {"operations": operations(folder, count)}
        found["slow_down"] = slow_down(folder, max(count // 10, 5))
        found["bare"] = bare(folder, max(count // 5, 5))
        found["fan_out"] = fan_out(folder, 8 if bench.quick else 64)
        found["depth"] = by_depth(folder, 12 if bench.quick else 110)
        found["copying"] = copying(folder, 1 if bench.quick else 5)
    found["search"] = search(3 if bench.quick else 30)
    figures = reckon(found)
    claim = "Files and a live interpreter roll back in about the time of a fork, for an unprivileged user, from pip."
    bench.finish(claim, [0], figures, [{k: v for k, v in found.items() if k != "operations"}])
    if bench.folder is not None:
        (bench.folder / "report.md").write_text(report(figures, found), encoding="utf-8")
        picture(found, bench.folder / "plot.png")


def reckon(found: dict[str, Any]) -> dict[str, float]:
    """The figures, from what was measured."""
    ops, depth = found["operations"], found["depth"]
    fork = median(ops["fork"])
    figures: dict[str, float] = {"fork_ms_p50": fork}
    for name in ("wait", "pause", "cold", "warm"):
        figures[f"{name}_ms_p50"] = median(ops[name])
        figures[f"{name}_ms_p99"] = quantile(ops[name], 0.99)
    figures["pause_vs_fork"] = figures["pause_ms_p50"] / fork
    figures["cold_vs_fork"] = figures["cold_ms_p50"] / fork
    figures |= found["slow_down"]
    figures["next_action_ms"] = max(found["slow_down"].values())
    figures["bare_snapshot_ms_p50"] = median(found["bare"]["snapshot"])
    figures["bare_rollback_ms_p50"] = median(found["bare"]["rollback"])
    figures["fanout_ms"] = found["fan_out"]
    figures["idle_snapshot_mb"] = ops["memory_mb"][0]
    fastest = min(spent for way, spent in found["copying"].items() if way != "restart")
    figures["copy_ms"], figures["restart_ms"] = fastest, found["copying"]["restart"]
    figures["vs_copy_restart"] = (fastest + found["copying"]["restart"]) / figures["cold_ms_p50"]
    figures["depth100_ratio"] = median(depth[-10:]) / median(depth[:FIRST])
    figures["depth_ms_max"] = max(depth)
    return {**figures, **found["search"]}


GOALS = (
    ("caller's wait for a masked snapshot, p50", "wait_ms_p50", "ms", "0.1"),
    ("the same, p99", "wait_ms_p99", "ms", "0.5"),
    ("pause of the worker at a snapshot, p50", "pause_ms_p50", "ms", "2.2"),
    ("the same, p99", "pause_ms_p99", "ms", "8"),
    ("the same, p50, in forks of the same run", "pause_vs_fork", "x", "1.5"),
    ("slow-down of the next action, worst think time", "next_action_ms", "ms", "1.5"),
    ("rollback, warm, p50", "warm_ms_p50", "ms", "0.3"),
    ("the same, p99", "warm_ms_p99", "ms", "1"),
    ("rollback, cold, p50", "cold_ms_p50", "ms", "2.5"),
    ("the same, p99", "cold_ms_p99", "ms", "8"),
    ("the same, p50, in forks of the same run", "cold_vs_fork", "x", "1.8"),
    ("bare interpreter: snapshot, p50", "bare_snapshot_ms_p50", "ms", "1"),
    ("bare interpreter: cold rollback, p50", "bare_rollback_ms_p50", "ms", "1"),
    ("64 branches of one snapshot, each", "fanout_ms", "ms", "2"),
    ("memory that an idle snapshot holds once the guest has gone on", "idle_snapshot_mb", "MB", "2"),
    ("copying and starting again, in cold rollbacks", "vs_copy_restart", "x", "100 or more"),
    ("latency at depth 100 to that at the first depths", "depth100_ratio", "x", "2"),
    ("the slowest rollback with its snapshot on the way there", "depth_ms_max", "ms", "-"),
)


def report(figures: dict[str, float], found: dict[str, Any]) -> str:
    """The page."""
    machine, versions = _bench.machine(), _bench.versions()
    rows = "\n".join(f"| {what} | {figures[name]:.3g} {unit} | {goal} |" for what, name, unit, goal in GOALS)
    thinks = ", ".join(f"{figures[f'next_action_{think}_ms']:.2g} ms after {think} ms" for think in THINK_MS)
    copies = ", ".join(f"{way} {spent:.0f} ms" for way, spent in found["copying"].items())
    return f"""# The sandbox

An interpreter with numpy and pandas on a workspace of {FILES:,} files; {len(found["operations"]["pause"]):,} steps, each
three small files written and a small DataFrame made, each followed by a snapshot; then rollbacks to random ones among
the last {KEPT}. fork() of a plain process with the same modules, which does the same steps and keeps as many frozen
children, took {figures["fork_ms_p50"]:.2f} ms (p50) in turns with it.

| | measured | goal |
|---|---|---|
{rows}

The next action's slow-down by think time: {thinks}. After no time at all the action waits for the snapshot itself.

Copying and starting again: {copies}. A random tree search on generated coding tasks (go back, change the file, run the
visible tests, keep) explores {figures["search_nodes_s_box"]:.1f} nodes a second in a box and
{figures["search_nodes_s_copy"]:.1f} with full copies and fresh processes. In a search that takes an agent's actions,
each of {len(ACTIONS)} as often (pipes and redirections, numpy and pandas, files left open), the box refused
{figures["refused_share"]:.0%} of the states: after {refusals(figures)}.

![Distributions of the operations' times, and the latency by depth](plot.png)

Machine: {machine["cpu"]}, {machine["cores"]} cores, {machine["system"]}, ordinary scheduling. Python
{versions["python"]}, numpy {versions["numpy"]}.
"""


def refusals(figures: dict[str, float]) -> str:
    """The actions after which states were refused."""
    numbers = [int(name.rsplit("_", 1)[1]) for name in figures if name.startswith("refused_") and name[-1].isdigit()]
    return "; ".join(f"`{ACTIONS[number][1]}`" for number in numbers) or "none"


def picture(found: dict[str, Any], path: Path) -> None:
    """Times as cumulative shares, and latency by depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    labels = {"fork": "fork() alone", "pause": "snapshot: pause", "cold": "rollback, cold", "warm": "rollback, warm"}
    for name, label in labels.items():
        values = sorted(found["operations"][name])
        left.plot(values, [(i + 1) / len(values) for i in range(len(values))], label=label)
    left.set(xscale="log", xlabel="milliseconds", ylabel="share of operations", title="Time of an operation")
    left.legend(fontsize=8)
    right.plot(range(1, len(found["depth"]) + 1), found["depth"], ".", markersize=4)
    right.set(xlabel="depth", ylabel="milliseconds", title="Cold rollback and snapshot, by depth", ylim=(0, None))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
