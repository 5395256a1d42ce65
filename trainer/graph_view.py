"""A task's operation graph as a picture, for a terminal and for the report; and what the graph has saved.

Always true: the picture shows what episodes went through, the most visited first, and says what it leaves out; text of
tools and of the policy is printed without control characters, and escaped in the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..rollouts.graph.store import EdgeRow, GraphStore, GraphStoreError, SpaceRow
from .errors import UserError
from .inspect import safe
from .runs import Row, Run, graph_path

MOST_EDGES = 40
DEEPEST = 8
LABEL = 60
TOTALS = (
    "requested", "hits", "coalesced", "executed", "bypassed", "failed", "replayed", "restored", "verified",
    "mismatches",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shown:
    """One operation of a picture: between which states (numbered by when they are met), how often episodes went through
    it and what they were worth in the end (None: no episode has ended yet).
    """

    depth: int
    start: int
    stop: int
    label: str
    visits: int
    reward: float | None
    ended: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """A task's graph: its largest part, and how much there is in all."""

    task: str
    by_digest: bool
    demoted: tuple[str, ...]
    states: int
    operations: int
    edges: tuple[Shown, ...]


def saved(rows: Sequence[Row]) -> dict[str, float]:
    """What the graph was asked and saved in a run, over its rows; empty where it had none. `dedup`: operations asked
    for, over those that environments carried out, for whatever reason.
    """
    told = [row["graph"] for row in rows if isinstance(row.get("graph"), dict)]
    if not told:
        return {}
    found: dict[str, float] = {name: sum(int(one.get(name, 0)) for one in told) for name in TOTALS}
    done = found["executed"] + found["bypassed"] + found["replayed"] + found["verified"]
    found["dedup"] = found["requested"] / done if done else float(found["requested"])
    found["live_most"] = max(int(one.get("live_most", 0)) for one in told)
    return found


def notes(rows: Sequence[Row]) -> list[str]:
    """What the graph found wrong, in order."""
    told = (row["graph"].get("notes", []) for row in rows if isinstance(row.get("graph"), dict))
    return [str(note) for some in told for note in some]


def picture(run: Run, task: str | None = None) -> Picture:
    """The graph of `task`, else of the task that was worked on last. Raises `UserError` when there is none."""
    path = graph_path(run.config)
    try:
        with GraphStore(path, readonly=True) as store:
            known = [space for space in store.spaces() if space.root is not None]
            chosen = [space for space in known if task in (None, space.task)]
            if not chosen:
                some = ", ".join(dict.fromkeys(space.task for space in known[:50]))
                raise UserError(f"there is no graph of task {task!r}; there are, for example, {some or 'none at all'}.")
            if task is None:
                return _draw(store, _busiest(store, chosen))
            return _draw(store, max(chosen, key=lambda space: len(store.visits(space.id))))
    except GraphStoreError as error:
        hint = "" if path.is_file() else "; graph.enabled, and graph.disk_mb above 0, keep one"
        raise UserError(f"{error}{hint}.") from None


def _busiest(store: GraphStore, spaces: Sequence[SpaceRow]) -> SpaceRow:
    """Of the latest namespaces, the one that most episodes went through."""
    return max(spaces[:50], key=lambda space: sum(count for count, _ in store.visits(space.id).values()))


def _draw(store: GraphStore, space: SpaceRow) -> Picture:
    found = store.space(space.id)
    row, edges = found if found is not None else (space, [])
    root = row.root or b""
    visits, texts = store.visits(row.id), store.operations(row.id)
    edges.sort(key=lambda edge: -visits.get((edge.node, edge.op), (0, 0.0))[0])
    numbers = {root: 0}
    shown = []
    for depth, edge in walk(edges, root):
        start = numbers[edge.node]
        stop = numbers.setdefault(edge.next, len(numbers))
        count, total = visits.get((edge.node, edge.op), (0, 0.0))
        if depth < DEEPEST:
            label = _label(texts.get(edge.op, ""))
            shown.append(Shown(depth, start, stop, label, count, total / count if count else None, edge.ended))
    shown = sorted(shown, key=lambda one: -one.visits)[:MOST_EDGES]
    nodes = {edge.node for edge in edges} | {edge.next for edge in edges}
    return Picture(row.task, row.by_digest, row.demoted, len(nodes | {root}), len(edges), tuple(shown))


def walk(edges: list[EdgeRow], root: bytes) -> Iterator[tuple[int, EdgeRow]]:
    """The edges that can be reached from `root`, nearest first, each with its depth."""
    by_node: dict[bytes, list[EdgeRow]] = {}
    for edge in edges:
        by_node.setdefault(edge.node, []).append(edge)
    seen, front, depth = {root}, [root], 0
    while front:
        following: list[bytes] = []
        for node in front:
            for edge in by_node.get(node, ()):
                yield depth, edge
                if edge.next not in seen:
                    seen.add(edge.next)
                    following.append(edge.next)
        front, depth = following, depth + 1


def _label(text: str) -> str:
    """An operation as a person reads it."""
    try:
        said, calls = json.loads(text)
    except (TypeError, ValueError):
        return "?"
    told = "; ".join(name + " " + json.dumps(args, ensure_ascii=False) for name, args, *_ in calls) or said or "(done)"
    told = safe(" ".join(told.split()))
    return told if len(told) <= LABEL else told[: LABEL - 1] + "…"


def as_text(found: Picture, totals: dict[str, float]) -> Iterator[str]:
    """For a terminal: each state once, beneath it what was done there; `-> s3` may lead to one that stands above."""
    how = "digest" if found.by_digest else "history"
    yield f"task       {safe(found.task)}"
    yield f"graph      {found.states} states (named by {how}), {found.operations} operations; visits and mean reward:"
    yield ""
    seen: set[int] = set()
    yield "s0"
    yield from _below(found, 0, "", seen)
    left = found.operations - len(found.edges)
    if left > 0:
        yield f"... and {left} operations less often done, or deeper than {DEEPEST}"
    if found.demoted:
        yield f"no longer shared: {', '.join(name or 'the end' for name in found.demoted)}"
    if totals:
        yield ""
        yield from _total_lines(totals)


def _below(found: Picture, state: int, indent: str, seen: set[int]) -> Iterator[str]:
    seen.add(state)
    edges = [edge for edge in found.edges if edge.start == state]
    for number, edge in enumerate(edges):
        last = number == len(edges) - 1
        worth = "" if edge.reward is None else f", reward {edge.reward:.2f}"
        mark = " end" if edge.ended else ""
        yield f"{indent}{'└─' if last else '├─'} {edge.label} -> s{edge.stop}{mark}  [{edge.visits}x{worth}]"
        if edge.stop not in seen and not edge.ended:
            yield from _below(found, edge.stop, indent + ("   " if last else "│  "), seen)


def _total_lines(totals: dict[str, float]) -> Iterator[str]:
    yield f"the run    {totals['requested']:,.0f} operations asked for, {totals['dedup']:.2f} for each carried out:"
    for name in TOTALS[1:]:
        yield f"           {name:<11} {totals[name]:>10,.0f}"
    yield f"           {'live_most':<11} {totals['live_most']:>10,.0f}"


def as_html(found: Picture | None, totals: dict[str, float], told: Sequence[str]) -> str:
    """For the report: a table of what was saved, and the picture."""
    if not totals:
        return ""
    labels = {
        "requested": "starts and turns that episodes asked for",
        "hits": "known already",
        "coalesced": "under way already, waited for",
        "executed": "carried out for the first time",
        "bypassed": "not shared, carried out for the episode alone",
        "replayed": "carried out again, to come to a state",
        "verified": "carried out again, to check",
        "mismatches": "checks that found something else",
    }
    rows = "".join(
        f'<tr><td>{label}</td><td class="num">{totals[name]:,.0f}</td></tr>' for name, label in labels.items()
    )
    said = f"<p>Environments carried out one operation for every {totals['dedup']:.2f} that were asked for.</p>"
    alarms = "".join(f'<p class="alarm">{escape(safe(note))}</p>' for note in told[:20])
    drawn = _svg(found) if found is not None else ""
    return f"<h2>Work done once</h2>{said}{alarms}<table>{rows}</table>{drawn}"


def _svg(found: Picture) -> str:
    """States by depth from left to right; lines as wide as they were visited, green where episodes did well."""
    depths = {0: 0}
    for edge in sorted(found.edges, key=lambda one: one.depth):
        depths.setdefault(edge.stop, edge.depth + 1)
    columns: dict[int, list[int]] = {}
    for state, depth in sorted(depths.items()):
        columns.setdefault(depth, []).append(state)
    tallest, width = max(map(len, columns.values())), 720
    height = max(120, 26 * tallest + 40)
    step = (width - 60) / max(len(columns) - 1, 1)
    at = {
        state: (30 + depth * step, height * (place + 1) / (len(states) + 1))
        for depth, states in columns.items()
        for place, state in enumerate(states)
    }
    most = max((edge.visits for edge in found.edges), default=1) or 1
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>operation graph of task {escape(safe(found.task))}</title>"
    ]
    for edge in found.edges:
        if edge.start not in at:
            continue
        (x, y), (u, v) = at[edge.start], at[edge.stop]
        bend = 0 if edge.start != edge.stop else 24
        path = f"M{x:.0f},{y:.0f} C{x + step / 2:.0f},{y - bend:.0f} {u - step / 2:.0f},{v - bend:.0f} {u:.0f},{v:.0f}"
        worth = "" if edge.reward is None else f", mean reward {edge.reward:.2f}"
        parts.append(
            f'<path d="{path}" fill="none" stroke="{_colour(edge.reward)}" stroke-opacity="0.75" '
            f'stroke-width="{1 + 7 * edge.visits / most:.1f}"><title>{escape(edge.label)}: {edge.visits} visits{worth}'
            "</title></path>"
        )
    ends = {edge.stop for edge in found.edges if edge.ended}
    for state, (x, y) in at.items():
        fill = "#3e4c59" if state in ends else "#fff"
        parts.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="5" fill="{fill}" stroke="#3e4c59"/>')
    note = (
        f'<p class="note">Task {escape(safe(found.task))}: {found.states} states, {found.operations} operations '
        f"(the {len(found.edges)} most visited are drawn). A line is as wide as it was gone through, and greener the "
        "more its episodes were worth; a full dot is an end.</p>"
    )
    return "".join(parts) + "</svg>" + note


def _colour(reward: float | None) -> str:
    if reward is None:
        return "#9aa5b1"
    share = min(1.0, max(0.0, reward))
    low, high = (0xB8, 0x69, 0x2E), (0x1F, 0x7A, 0x4D)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def as_json(found: Picture, totals: dict[str, float], told: Sequence[str]) -> dict[str, Any]:
    """The same as data."""
    edges = [
        {"from": e.start, "to": e.stop, "operation": e.label, "visits": e.visits, "reward": e.reward, "end": e.ended}
        for e in found.edges
    ]
    return {
        "task": found.task, "states": found.states, "operations": found.operations, "by_digest": found.by_digest,
        "demoted": list(found.demoted), "edges": edges, "totals": totals, "notes": list(told),
    }  # fmt: skip
