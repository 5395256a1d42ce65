"""`report.html`: what a run did, for someone who meets it for the first time.

Always true: the page is one file that needs no network and runs no script (its content policy forbids both); every word
that comes from a task, a workbook, the policy or a configuration is escaped; numbers are read from the run's folder.
"""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any, TypeGuard

from ..rollouts.types import Trajectory
from . import graph_view
from .charts import AFTER, THIRD, Pair, Point, Series, line_chart, pair_bars
from .errors import UserError
from .inspect import column_name, open_store, safe, try_replay
from .replay import Grid, Replay
from .runs import Row, Run, read_run

NEAR_ENDS = 400
"""Trajectories looked at, from the start and from the end of the record, to find examples."""

EXAMPLES = 3
_VERSIONED = ("espalier", "torch", "transformers", "trl", "peft", "ironcalc", "formualizer", "renderers", "gymnasium")

_STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1f2933;background:#fff;
max-width:780px;margin:2.5rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}
h2{font-size:1.2rem;margin-top:2.4rem}
p.note,td.note{color:#616e7c;font-size:.9rem}
.headline{display:flex;gap:1rem;flex-wrap:wrap}
.headline div{flex:1;min-width:150px;padding:1rem;background:#f5f7fa;
border-radius:8px}.headline b{display:block;font-size:2rem;line-height:1.2}.headline .after b{color:#1f7a4d}
table{border-collapse:collapse;margin:.6rem 0}
td,th{padding:.25rem .7rem;border-bottom:1px solid #e4e7eb;text-align:left;
vertical-align:top}td.num,th.num{text-align:right;font-variant-numeric:tabular-nums}
.grid{overflow-x:auto}.grid table{font:13px/1.4 ui-monospace,monospace}
.grid td,.grid th{border:1px solid #d5dae1;padding:.1rem .45rem;white-space:pre}
.grid th{background:#f5f7fa;color:#616e7c;font-weight:400;text-align:center}
.grid td.new{background:#dff3e6}.legend span{margin-right:1.2rem;font-size:.9rem}
.legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin-right:.35rem}
svg{width:100%;height:auto}pre,code{font:13px/1.45 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.attempt{border-left:4px solid #d5dae1;padding-left:1rem;margin:1rem 0}
.attempt.good{border-color:#1f7a4d}.attempt.bad{border-color:#b8692e}.alarm{background:#fdecea;padding:.5rem .8rem}
details{margin:.6rem 0}summary{cursor:pointer}
"""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder; replaced whole or not at all. Raises `UserError` for a broken folder."""
    run = read_run(folder)
    if not run.rows:
        raise UserError(f"{folder}: nothing to report yet, metrics.jsonl is missing or empty.")
    page, part = folder / "report.html", folder / ".report.html.part"
    part.write_text(build(run), encoding="utf-8")
    part.replace(page)
    return page


def build(run: Run) -> str:
    """The page as text."""
    sections = [
        _headline(run),
        _alarms(run),
        _learning(run),
        _families(run),
        _left_out(run),
        _lengths(run),
        _graph(run),
        _examples(run),
        _settings(run),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(run.config.name)} - Espalier</title><style>{_STYLE}</style></head><body>"
        f"{''.join(sections)}</body></html>\n"
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """The first and the last evaluation in one mode; `after` is None before anything was trained and measured."""

    mode: str
    before: Row
    after: Row | None


def measured(run: Run) -> list[Measured]:
    """First against last evaluation, by mode; the last is the largest of the latest version measured."""
    found: dict[str, list[Row]] = {}
    for row in run.of_kind("eval"):
        found.setdefault(str(row.get("mode", "sampled")), []).append(row)
    return [
        Measured(mode, rows[0], rows[-1] if rows[-1].get("version") != rows[0].get("version") else None)
        for mode, rows in sorted(found.items(), key=lambda item: item[0] != "sampled")
    ]


def _headline(run: Run) -> str:
    modes = measured(run)
    title = f"<h1>{_e(run.config.name)}</h1>"
    if not modes:
        return title + "<p>No evaluation has been made yet.</p>"
    first = modes[0]
    before, after = first.before, first.after
    said = f"Before training, the agent solved {_share(before)} of {_e(before.get('n', '?'))} tasks it had never seen. "
    cards = [_card("before training", before, "before")]
    if after is not None:
        said += f"After {_e(after.get('step', '?'))} steps of training it solved {_share(after)}."
        cards.append(_card("after training", after, "after"))
    else:
        said += "It has not been measured again yet."
    rows = "".join(_mode_row(one) for one in modes)
    return (
        f'{title}<p>{said}</p><div class="headline">{"".join(cards)}</div><table><tr><th>pass@1</th>'
        '<th class="num">before</th><th class="num">after</th><th class="num">gain</th><th class="num">tasks</th></tr>'
        f'{rows}</table><p class="note">A task counts as solved only if the workbook is right and stays right when its '
        "numbers are changed. Sampled: the policy draws its words by chance, as in training; greedy: it always takes "
        "the likeliest. In brackets: 95&nbsp;% Wilson intervals over tasks.</p>"
    )


def _card(label: str, row: Row, kind: str) -> str:
    return f'<div class="{kind}">{label}<b>{_percent(row.get("pass1"))}</b>{_interval(row)}</div>'


def _mode_row(one: Measured) -> str:
    after = f"{_percent(one.after.get('pass1'))} {_interval(one.after)}" if one.after else "-"
    gain = "-"
    if one.after and _is_number(one.after.get("pass1")) and _is_number(one.before.get("pass1")):
        gain = f"{(one.after['pass1'] - one.before['pass1']) * 100:+.1f} points"
    numbers = {str(row.get("n", "?")) for row in (one.before, one.after) if row}
    before = f"{_percent(one.before.get('pass1'))} {_interval(one.before)}"
    cells = (before, after, gain, _e(" / ".join(sorted(numbers))))
    numbers_html = "".join(f'<td class="num">{cell}</td>' for cell in cells)
    return f"<tr><td>{_e(one.mode)}</td>{numbers_html}</tr>"


def _alarms(run: Run) -> str:
    said = [str(row.get("message") or row.get("alarm") or "") for row in run.of_kind("alarm")[:20]]
    return "".join(f'<p class="alarm">Alarm: {_e(text)}</p>' for text in said)


def _learning(run: Run) -> str:
    train = [row for row in run.of_kind("train") if _is_number(row.get("reward_mean"))]
    series = [Series("mean reward in training", THIRD, [Point(row["step"], row["reward_mean"]) for row in train])]
    for mode, colour in (("sampled", AFTER), ("greedy", "#2b6cb0")):
        points = [
            Point(row.get("step", 0), row["pass1"], row.get("low"), row.get("high"))
            for row in run.of_kind("eval")
            if row.get("mode", "sampled") == mode and _is_number(row.get("pass1"))
        ]
        if points:
            series.append(Series(f"pass@1 on held-out tasks, {mode}", colour, points, dots=True))
    chart = line_chart([one for one in series if one.points], x_label="training step", y_label="pass@1 and reward")
    seconds = sum(_number(row.get(key)) for row in train for key in ("seconds_rollout", "seconds_train"))
    tokens = sum(int(_number(row.get("sampled_tokens"))) for row in train)
    episodes = sum(int(_number(row.get("episodes"))) for row in train)
    note = (
        f"{len(train)} steps, {episodes:,} episodes, {tokens:,} sampled tokens, {seconds / 60:.1f} minutes of training."
    )
    return f'<h2>How it learnt</h2>{chart}<p class="note">{note}{_trees(train)}</p>'


def _trees(train: Sequence[Row]) -> str:
    """What branching saved, in a sentence; nothing where no group grew as a tree."""
    grown = [row["branching"] for row in train if isinstance(row.get("branching"), dict)]
    if not grown:
        return ""
    branches, trees, tokens, turns = (
        sum(int(_number(one.get(name))) for one in grown)
        for name in ("branches", "trees", "tokens_saved", "turns_saved")
    )
    return (
        f" Of the episodes {trees:,} began at the start and {branches:,} left one of those at a turn, which saved "
        f"{tokens:,} sampled tokens and {turns:,} turns of environments."
    )


def _families(run: Run) -> str:
    modes = measured(run)
    if not modes:
        return ""
    before, after = modes[0].before.get("by_family") or {}, (modes[0].after or {}).get("by_family") or {}
    names = sorted({*before, *after})
    rows = [Pair(safe(name), _family(before, name), _family(after, name)) for name in names]
    chart = pair_bars(rows, names=("before training", "after training"))
    return f"<h2>By kind of task</h2>{chart}" if rows else ""


def _family(table: Mapping[str, Any], name: str) -> float | None:
    value = (table.get(name) or {}).get("pass1")
    return float(value) if _is_number(value) else None


def _left_out(run: Run) -> str:
    train = run.of_kind("train")
    failures: Counter[str] = Counter()
    for row in train:
        failures.update({str(kind): int(n) for kind, n in (row.get("failures") or {}).items()})
    rows: list[tuple[str, object]] = [(f"failed episodes: {kind}", n) for kind, n in sorted(failures.items())] or [
        ("failed episodes", 0)
    ]
    rows += [
        ("groups dropped because all attempts did equally well", _total(train, "groups_no_signal")),
        ("groups trained on", _total(train, "groups_used")),
        ("episodes cut off by a limit (kept, with the reward they had)", _total(train, "truncated")),
    ]
    for one in run.of_kind("eval"):
        if one.get("failures"):
            what = ", ".join(f"{kind} {n}" for kind, n in sorted(one["failures"].items()))
            rows.append(
                (f"evaluation of version {one.get('version')} ({one.get('mode')}): without verdict: {what}", "")
            )
    return (
        "<h2>What was left out</h2>"
        "<p>A failure of ours is dropped and counted, never scored as a mistake of the agent.</p>"
        f"<table>{''.join(_table_row(label, value) for label, value in rows)}</table>{_tasks(run)}"
    )


def _tasks(run: Run) -> str:
    """The tasks that were not used, and what is noted of others."""
    found = ""
    for row in run.of_kind("tasks")[-1:]:
        for key, title in (("dropped", "Tasks left out"), ("noted", "Noted of tasks")):
            said = "".join(_table_row(task, why) for task, why in (row.get(key) or {}).items())
            found += f"<h3>{title}</h3><table>{said}</table>" if said else ""
    return found


def _lengths(run: Run) -> str:
    train = run.of_kind("train")
    measures = [
        ("prompt_tokens_mean", "tokens of the first prompt"),
        ("episode_tokens_mean", "tokens of a whole episode"),
        ("turns_mean", "turns an episode"),
        ("invalid_call_share", "share of calls answered by an error"),
        ("entropy", "entropy, nats a token"),
        ("kl", "KL from the sampling policy, nats a token"),
        ("tok_s", "sampled tokens a second"),
    ]
    rows = []
    for key, label in measures:
        values = [float(row[key]) for row in train if _is_number(row.get(key))]
        if values:
            first, last = fmean(values[:5]), fmean(values[-5:])
            rows.append(f'<tr><td>{label}</td><td class="num">{first:.4g}</td><td class="num">{last:.4g}</td></tr>')
    if not rows:
        return ""
    head = '<tr><th></th><th class="num">first steps</th><th class="num">last steps</th></tr>'
    return f'<h2>Lengths and health</h2><table>{head}{"".join(rows)}</table><p class="note">Means of five steps.</p>'


def _graph(run: Run) -> str:
    totals = graph_view.saved(run.rows)
    if not totals:
        return ""
    try:
        drawn = graph_view.picture(run)
    except UserError:
        drawn = None
    return graph_view.as_html(drawn, totals, graph_view.notes(run.rows))


def _examples(run: Run) -> str:
    try:
        store = open_store(run)
    except UserError:
        return ""
    try:
        ids = store.ids()
        early = [t for id in ids[:NEAR_ENDS] if isinstance(t := store.get(id), Trajectory)]
        late = [t for id in ids[-NEAR_ENDS:] if isinstance(t := store.get(id), Trajectory)]
    finally:
        store.close()
    parts = [_example(run, before, after) for before, after in choose_examples(early, late)]
    if not parts:
        return ""
    intro = (
        "<p>Two attempts each: an early one that failed, and one by the trained policy. They are training tasks.</p>"
    )
    return f"<h2>What it did, early and late</h2>{intro}{''.join(parts)}"


def choose_examples(early: Sequence[Trajectory], late: Sequence[Trajectory]) -> list[tuple[Trajectory, Trajectory]]:
    """Early failures with late successes, one a family: of the same task if there is one, else of the same family."""
    pairs: dict[str, tuple[Trajectory, Trajectory]] = {}
    for same in ("task", "family"):
        won: dict[str, Trajectory] = {getattr(t, same): t for t in late if t.reward >= 1}
        for lost in early:
            after = won.get(getattr(lost, same))
            if lost.reward < 1 and after and min(after.versions) > max(lost.versions) and lost.family not in pairs:
                pairs[lost.family] = (lost, after)
    return [pairs[family] for family in sorted(pairs)][:EXAMPLES]


def _example(run: Run, before: Trajectory, after: Trajectory) -> str:
    return f"<h3>{_e(before.family or before.task)}</h3>{_attempt(run, before)}{_attempt(run, after)}"


def _attempt(run: Run, trajectory: Trajectory) -> str:
    replayed = try_replay(run, trajectory)
    good = trajectory.reward >= 1
    version = ", ".join(map(str, sorted(trajectory.versions)))
    head = f"version {version} of the policy: {'solved' if good else 'not solved'} (reward {trajectory.reward:g})"
    parts = [f"<p><b>{_e(head)}</b></p><p>{_e(trajectory.instruction)}</p>"]
    if isinstance(replayed, Replay):
        parts.append(f'<p class="note">The workbook at the start; answer expected in {_e(replayed.answer)}:</p>')
        parts += [_grid(grid) for grid in replayed.before.values()]
    parts += list(_turns(trajectory))
    if isinstance(replayed, Replay):
        again = "" if replayed.differs is None else " (done again it answered differently: the grid may not be exact)"
        parts.append(f'<p class="note">The workbook at the end, what changed in green{again}:</p>')
        parts += [_grid(grid, replayed.before.get(name)) for name, grid in replayed.after.items()]
    else:
        parts.append(f'<p class="note">Grids {_e(replayed)}</p>')
    return f'<div class="attempt {"good" if good else "bad"}">{"".join(parts)}</div>'


def _turns(trajectory: Trajectory) -> Iterator[str]:
    for turn in trajectory.turns:
        for call in turn.calls:
            arguments = call.get("arguments")
            shown = call.get("raw", "") if arguments is None else json.dumps(arguments, ensure_ascii=False)
            yield f"<pre>&#9654; <b>{_e(call.get('name', ''))}</b> {_e(shown)}</pre>"
        if not turn.calls:
            yield f"<pre>{_e(turn.text)}</pre>"
        for result in turn.results:
            yield f"<details><summary>answer</summary><pre>{_e(result)}</pre></details>"


def _grid(grid: Grid, before: Grid | None = None) -> str:
    columns = max(map(len, grid.rows), default=0)
    head = "".join(f"<th>{column_name(c)}</th>" for c in range(columns))
    body: list[str] = []
    for r in range(len(grid.rows)):
        cells: list[str] = []
        for c in range(columns):
            cell = grid.at(r, c)
            new = ' class="new"' if before is not None and cell != before.at(r, c) else ""
            title = f' title="{_e(cell.formula)}"' if cell.formula else ""
            shown = f"{cell.text}  {cell.formula}" if new and cell.formula else cell.text
            cells.append(f"<td{new}{title}>{_e(shown)}</td>")
        body.append(f"<tr><th>{r + 1}</th>{''.join(cells)}</tr>")
    more = '<p class="note">The sheet is larger than what is shown.</p>' if grid.cut else ""
    return (
        f'<div class="grid"><p class="note">sheet {_e(grid.sheet)}</p><table><tr><th></th>{head}</tr>{"".join(body)}'
        f"</table>{more}</div>"
    )


def _settings(run: Run) -> str:
    versions = "".join(_table_row(name, _version(name)) for name in _VERSIONED)
    config = json.dumps(run.config.model_dump(mode="json"), indent=2, ensure_ascii=False)
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return (
        f"<h2>Settings and versions</h2><details><summary>configuration</summary><pre>{_e(config)}</pre></details>"
        f"<details><summary>versions, where this page was written</summary><p>{_e(machine)}</p>"
        f"<table>{versions}</table></details>"
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _table_row(label: str, value: object) -> str:
    return f'<tr><td>{_e(label)}</td><td class="num">{_e(value)}</td></tr>'


def _total(rows: Sequence[Row], key: str) -> int:
    return sum(int(_number(row.get(key))) for row in rows)


def _share(row: Row) -> str:
    return f"<b>{_percent(row.get('pass1'))}</b>"


def _percent(value: object) -> str:
    return f"{value:.1%}" if _is_number(value) else "-"


def _interval(row: Row) -> str:
    return f"[{_percent(row.get('low'))}, {_percent(row.get('high'))}]"


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _e(value: object) -> str:
    """Escaped for text and attributes, without control characters."""
    return escape(safe(str(value)), quote=True)
