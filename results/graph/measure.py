"""The operation graph: how much environment work is done once instead of again and again, and what that changes.

Always true: a rollout draws its own actions, by a generator of its own; the same rollouts run with the graph and
without it, and every observation, reward and end is compared; what the environments did is counted in the environments'
pool (first executions, those done again to come to a state, those done again to check), and all of it counts against
the graph. Sixteen rollouts a task, at most four live environments. Toy-text policies are seeded softmax tables of two
sharpnesses, the same in every epoch; spreadsheets and coding tasks are played by the shipped policies in the embedded
sampler, terminal work in the sandbox by a script with chances, not a model.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import _bench
import coding
import policies
import toytext
from espalier.envs.core import Action, Observation, Task
from espalier.rollouts.envpool import EnvPool
from espalier.rollouts.graph.core import GraphCounts, OperationGraph
from espalier.rollouts.graph.pool import GraphPool
from espalier.rollouts.graph.statepool import ThreadStatePool
from espalier.rollouts.graph.store import GraphStore

ROLLOUTS = 16
LIVE = ROLLOUTS // 4
EPOCHS = 4
STEPS = 24
SHARPNESSES = (1.0, 3.0)
SLOW_SECONDS = 0.1
Policy = Callable[[Observation, int, random.Random], Action]
Record = list[Any]


async def rollout(pool: EnvPool, task: Task, seed: int, policy: Policy, rng: random.Random, steps: int) -> Record:
    """One rollout: what was seen."""
    handle = await pool.take(task.id)
    observation, _, _ = await pool.reset(handle, seed, {"task": task})
    seen: Record = [observation]
    for number in range(steps):
        observation, reward, terminated, truncated, _ = await pool.step(handle, policy(observation, number, rng))
        seen.append((observation, reward, terminated, truncated))
        if terminated or truncated:
            break
    pool.give(handle)
    return seen


async def group(
    pool: EnvPool, task: Task, seed: int, policy: Policy, epoch: int, steps: int, size: int
) -> list[Record]:
    """`size` rollouts of a task at once, each with its own generator."""
    rngs = [random.Random(f"{task.id}/{epoch}/{number}") for number in range(size)]
    return await asyncio.gather(*(rollout(pool, task, seed, policy, rng, steps) for rng in rngs))


def work(counts: dict[str, int]) -> int:
    """Operations that environments carried out, whatever for."""
    return counts["executed"] + counts["bypassed"] + counts["replayed"] + counts["verified"]


def distinct(graph: OperationGraph) -> int:
    """Different operations that the graph knows, starts included."""
    return sum(len(space.edges) + (space.row.root is not None) for space in graph._spaces.values())


def graph_pool(make: Callable[[], Any], name: str, graph: OperationGraph, seconds: float = 60.0) -> GraphPool:
    """Environments behind `graph`, four of them at once."""
    pool = ThreadStatePool(make, deadline_s=seconds, workers=1)
    return GraphPool(pool, graph, env_id=name, identity=name, live=LIVE)


async def toy(kind: str, sharpness: float, tasks: int, epochs: int) -> dict[str, Any]:
    """One toy-text environment with one policy, over epochs; a task at a time."""

    def make() -> toytext.ToyText:
        return toytext.ToyText(kind)

    totals = {"first": 0, "first_work": 0, "requested": 0, "work": 0, "carried": 0, "verified": 0, "distinct": 0}
    most = 0
    identical = True
    with tempfile.TemporaryDirectory(prefix="espalier-bench-") as folder:
        graph = OperationGraph(GraphStore(Path(folder) / "graph.sqlite"))
        on, off = graph_pool(make, kind, graph), ThreadStatePool(make, deadline_s=60)
        for epoch in range(epochs):
            before = GraphCounts(**asdict(graph.counts))
            for number, task in enumerate(toytext.tasks(tasks)):
                table = toytext.Softmax(kind, sharpness, f"{kind}/{number}")

                def policy(seen: Observation, turn: int, rng: random.Random, table: Any = table) -> Action:
                    return toytext.turn(table.draw(str(seen.messages[0]["content"]), rng), turn)

                records = [await group(pool, task, number, policy, epoch, STEPS, ROLLOUTS) for pool in (on, off)]
                identical = identical and records[0] == records[1]
            await on.settled()
            found = graph.counts.since(before)
            if epoch == 0:
                totals["first"], totals["first_work"] = found["requested"], work(found)
            totals["requested"] += found["requested"]
            totals["work"] += work(found)
            totals["carried"] += found["executed"] + found["replayed"]
            totals["verified"] += found["verified"]
            most = max(most, found["live_most"])
        totals["distinct"] = distinct(graph)
        mismatches = graph.counts.mismatches
        await on.close()
        await off.close()
    return {
        "name": kind, "sharpness": sharpness, **totals, "live_most": most, "identical": identical,
        "mismatches": mismatches, "dedup": totals["first"] / totals["first_work"],
        "dedup_epochs": totals["requested"] / totals["work"],
        "executed_over_distinct": totals["carried"] / totals["distinct"],
    }  # fmt: skip


async def sandbox(tasks: int, epochs: int, size: int) -> dict[str, Any]:
    """Terminal work on generated coding tasks by a script with chances."""
    found: dict[str, Any] = {"name": "sandbox", "requested": 0, "work": 0, "identical": True}
    seconds = {"on": 0.0, "off": 0.0}
    graph = OperationGraph()
    on = graph_pool(coding.environment, "sandbox", graph, 120.0)
    off = ThreadStatePool(coding.environment, deadline_s=120.0, workers=LIVE)
    try:
        for epoch in range(epochs):
            before = GraphCounts(**asdict(graph.counts))
            for task in coding.tasks(tasks):
                records = {}
                for name, pool in (("on", on), ("off", off)):
                    started = time.perf_counter()
                    records[name] = await group(pool, task, 0, coding.policy(task), epoch, coding.TURNS, size)
                    seconds[name] += time.perf_counter() - started
                found["identical"] &= records["on"] == records["off"]
            await on.settled()
            counts = graph.counts.since(before)
            if epoch == 0:
                found["dedup"] = counts["requested"] / work(counts)
            found["requested"] += counts["requested"]
            found["work"] += work(counts)
        found |= {
            "live_most": graph.counts.live_most, "mismatches": graph.counts.mismatches, "distinct": distinct(graph),
            "executed_over_distinct": (graph.counts.executed + graph.counts.replayed) / distinct(graph),
            "dedup_epochs": found["requested"] / found["work"], "counts": asdict(graph.counts),
            "seconds_on": seconds["on"], "seconds_off": seconds["off"], "notes": graph.notes,
        }  # fmt: skip
    finally:
        await on.close()
        await off.close()
    return found


async def slow_tool(steps: int, rounds: int) -> dict[str, Any]:
    """Wall time of one group whose every step takes 100 ms, in turns with the graph and without it."""

    def make() -> toytext.ToyText:
        return toytext.ToyText("frozenlake", SLOW_SECONDS)

    task = toytext.tasks(1)[0]
    table = toytext.Softmax("frozenlake", SHARPNESSES[0], "slow")

    def policy(seen: Observation, turn: int, rng: random.Random) -> Action:
        return toytext.turn(table.draw(str(seen.messages[0]["content"]), rng), turn)

    spent: dict[str, list[float]] = {"off": [], "on": [], "on_next_epoch": []}

    async def timed(name: str, pool: EnvPool, epoch: int) -> None:
        started = time.perf_counter()
        await group(pool, task, 0, policy, epoch, steps, ROLLOUTS)
        spent[name].append(time.perf_counter() - started)

    for number in range(rounds):
        graph = OperationGraph()
        fast = ThreadStatePool(make, deadline_s=60, workers=LIVE)
        on = GraphPool(fast, graph, env_id="slow", identity="slow", live=LIVE)
        off = ThreadStatePool(make, deadline_s=60, workers=ROLLOUTS)
        turns: list[Callable[[], Awaitable[None]]] = [
            lambda off=off, number=number: timed("off", off, number),  # type: ignore[misc]
            lambda on=on, number=number: timed("on", on, number),  # type: ignore[misc]
        ]
        for run in turns if number % 2 else turns[::-1]:
            await run()
        await timed("on_next_epoch", on, number + rounds)
        await on.close()
        await off.close()
    return {"name": "slow tool", "steps": steps, **{f"seconds_{name}": median(found) for name, found in spent.items()}}


def main() -> None:
    """Measure, and write figures.json, report.md and plot.png."""
    bench = _bench.start(__file__, __doc__ or "", devices=("cpu",))
    quick = bench.quick
    tasks, epochs = (2, 2) if quick else (24, EPOCHS)
    runs: list[dict[str, Any]] = []
    for kind in toytext.KINDS:
        for sharpness in SHARPNESSES:

            def measure(kind: str = kind, sharpness: float = sharpness) -> dict[str, Any]:
                return asyncio.run(toy(kind, sharpness, tasks, epochs))

            runs.append(bench.arm({"toy": kind, "sharpness": sharpness, "tasks": tasks}, measure))
    shipped = [("spreadsheet", "spreadsheet-tiny", 24)] + [("code", "code-tiny", 4)] * coding.possible()
    for name, config, many in shipped:

        def played(name: str = name, config: str = config, many: int = many) -> dict[str, Any]:
            return asyncio.run(policies.measure(name, config, 2 if quick else many, 4 if quick else ROLLOUTS))

        runs.append(bench.arm({"shipped": config, "tasks": many}, played))
    if coding.possible():
        arm = (1, 1, 4) if quick else (4, 2, ROLLOUTS)
        runs.append(bench.arm({"sandbox": arm}, lambda: asyncio.run(sandbox(*arm))))
    slow = bench.arm({"slow": 1}, lambda: asyncio.run(slow_tool(4 if quick else STEPS, 1 if quick else 5)))
    figures = reckon(runs, slow)
    claim = "Environment work that one episode has done is not done again by another, and no episode can tell."
    bench.finish(claim, [0], figures, [*runs, slow])
    if bench.folder is not None:
        (bench.folder / "report.md").write_text(report(figures, runs, slow), encoding="utf-8")
        picture(runs, bench.folder / "plot.png")


def reckon(runs: list[dict[str, Any]], slow: dict[str, Any]) -> dict[str, float]:
    """The figures; of two sharpnesses the lower one counts."""
    figures: dict[str, float] = {}
    toys = [run for run in runs if run["name"] in toytext.KINDS]
    for run in runs:
        name = f"dedup_{run['name']}"
        figures[name] = min(figures.get(name, run["dedup"]), run["dedup"])
    figures["dedup_epochs_min"] = min(run["dedup_epochs"] for run in toys)
    figures["executed_over_distinct_max"] = max(run["executed_over_distinct"] for run in toys)
    figures["executed_over_distinct_max_all"] = max(run["executed_over_distinct"] for run in runs)
    figures["live_env_share"] = max(run["live_most"] / run.get("rollouts", ROLLOUTS) for run in runs)
    figures["identical"] = all(run["identical"] for run in runs)
    figures["mismatches"] = sum(run["mismatches"] for run in runs)
    for name in ("seconds_off", "seconds_on", "seconds_on_next_epoch"):
        figures[f"slow_tool_{name}"] = slow[name]
    for run in runs:
        if run["name"] == "sandbox":
            figures |= {f"sandbox_{name}": run[name] for name in ("seconds_on", "seconds_off", "dedup_epochs")}
    return figures


def report(figures: dict[str, float], runs: list[dict[str, Any]], slow: dict[str, Any]) -> str:
    """The page."""
    machine, versions = _bench.machine(), _bench.versions()
    rows = "\n".join(
        f"| {run['name']} | {run.get('sharpness', '-')} | {run['dedup']:.2f} x | {run['dedup_epochs']:.1f} x "
        f"| {run['executed_over_distinct']:.3f} | {run['live_most']} of {run.get('rollouts', ROLLOUTS)} "
        f"| {'yes' if run['identical'] else 'NO'} |"
        for run in runs
    )
    told = ""
    for run in runs:
        if run["name"] == "sandbox":
            told = (
                f"The sandbox's groups took {run['seconds_on']:.0f} s with the graph and {run['seconds_off']:.0f} s "
                f"without it ({LIVE} boxes with it, without it one for each rollout). Other work shared the machine, so "
                "read these times, and those below, as an order.\n\n"
            )
    return f"""# The operation graph

{ROLLOUTS} rollouts a task at once, at most {LIVE} live environments. Requested operations (starts and turns) over
operations that environments carried out, for whatever reason: first executions, those done again to come to a state,
and the checks (1 % of the episodes are done again as a whole and compared). "Executed over distinct" leaves the checks
out: 1 means that nothing was done twice.

| environment | sharpness | in one group | over all epochs | executed over distinct | live environments | same as without |
|---|---|---|---|---|---|---|
{rows}

Toy-text: 24 tasks, {EPOCHS} epochs, {STEPS} steps at most; policies are random softmax tables (logits are the sharpness
times a standard normal), the same in each epoch: read the order, not the sizes. Spreadsheet: `spreadsheet-tiny`'s
training tasks with the shipped policy at temperature 1 in the embedded sampler; whole trajectories are compared, token
ids and log-probabilities included. Code: the same with `code-tiny`, whose policy reads a file, writes one whole and
submits. Sandbox: terminal work on generated coding tasks; the policy is a script that at each turn does what
it does most there with chance {coding.HABIT:g}, else draws evenly among commands, edits and tests, so its figure says
what such a script repeats, not what a model does; states are named by the history of what may have changed something.

{told}A group whose every step takes {SLOW_SECONDS * 1e3:.0f} ms ({slow["steps"]} steps at most, FrozenLake, sharpness
{SHARPNESSES[0]:g}; {ROLLOUTS} environments without the graph, {LIVE} with it) takes {slow["seconds_off"]:.2f} s without
the graph, {slow["seconds_on"]:.2f} s with it, and {slow["seconds_on_next_epoch"]:.2f} s in the next epoch (median of
five).

![Requested over carried out, by environment](plot.png)

Machine: {machine["cpu"]}, {machine["cores"]} cores, {machine["system"]}. Python {versions["python"]}, Gymnasium
{versions["gymnasium"]}.
"""


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """Bars: in a group and over epochs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    labels = [run["name"] + (f"\nsharpness {run['sharpness']:g}" if "sharpness" in run else "") for run in runs]
    places = range(len(runs))
    axes.bar([at - 0.2 for at in places], [run["dedup"] for run in runs], 0.4, label="in one group")
    axes.bar([at + 0.2 for at in places], [run["dedup_epochs"] for run in runs], 0.4, label="over all epochs")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(list(places), labels, fontsize=8)
    axes.set_ylabel("requested / carried out")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
