"""One trajectory, readable in a terminal: instruction, each call, each observation, the grid before and after, reward.

Always true: nothing is made up. The grids come from doing the calls again, and a difference from the record is said;
text from the policy and from workbooks is printed without control characters, so that it cannot steer the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..rollouts.store import StoreError, TrajectoryStore
from ..rollouts.types import Failure, Group, Trajectory
from .errors import UserError
from .replay import Grid, NotReplayable, Replay, replay
from .runs import Run

CELL_WIDTH = 18
Decode = Callable[[Sequence[int]], str]


def open_store(run: Run) -> TrajectoryStore:
    """The run's trajectories, to read. Raises `UserError` when there are none."""
    try:
        return TrajectoryStore(run.folder / "trajectories", readonly=True)
    except StoreError as error:
        raise UserError(f"{run.folder}: {error}.") from None


def find_trajectory(store: TrajectoryStore, id: str | None = None, task: str | None = None) -> Trajectory:
    """The trajectory `id`, else the latest of `task`, else the latest. Raises `UserError`, which tells of near ids."""
    if id is not None:
        found = store.get(id)
        if isinstance(found, Failure):
            raise UserError(f"episode {id} is a failure, not a trajectory: {found.kind}: {found.message}")
        if found is not None:
            return found
        ids = [known for known in store.ids() if id in known][:5] or store.ids()[:5]
        raise UserError(f"there is no trajectory {id!r}; there are, for example, {', '.join(ids) or 'none at all'}.")
    for known in reversed(store.ids()):
        candidate = store.get(known)
        if isinstance(candidate, Trajectory) and task in (None, candidate.task):
            return candidate
    raise UserError(f"there is no trajectory of task {task!r}." if task else "no trajectory is stored yet.")


def try_replay(run: Run, trajectory: Trajectory) -> Replay | str:
    """The replay, or a sentence on why there is none."""
    try:
        return replay(run.config, trajectory)
    except (NotReplayable, ValueError, TypeError, RuntimeError) as error:
        return f"not shown: {error}"


def describe(
    trajectory: Trajectory, replayed: Replay | str, decode: Decode | None = None, group: Group | None = None
) -> str:
    """The whole trajectory as text; with `decode` (token ids to text) every sampled token with its log-probability;
    with `group` its tree, where it grew as one.
    """
    return "\n".join(safe(line) for line in _lines(trajectory, replayed, decode, group))


def as_json(
    trajectory: Trajectory, replayed: Replay | str, decode: Decode | None = None, group: Group | None = None
) -> dict[str, Any]:
    """The same as data."""
    body: dict[str, Any] = {
        "id": trajectory.id,
        "task": trajectory.task,
        "family": trajectory.family,
        "instruction": trajectory.instruction,
        "reward": trajectory.reward,
        "end": trajectory.end.value,
        "versions": sorted(trajectory.versions),
        "tokens": [len(sequence.tokens) for sequence in trajectory.sequences],
        "sampled_tokens": trajectory.sampled_tokens,
        "turns": [asdict(turn) for turn in trajectory.turns],
        "parent": trajectory.parent,
        "left_at": trajectory.left_at,
        "replay": replayed if isinstance(replayed, str) else asdict(replayed),
    }
    if group is not None:
        body["group"] = [
            {"id": t.id, "parent": t.parent, "left_at": t.left_at, "turns": len(t.turns), "reward": t.reward}
            for t in group.trajectories
        ]
    if decode is not None:
        body["logprobs"] = [[decode([token]), value] for token, value in sampled(trajectory)]
    return body


def tree_lines(group: Group, shown: str | None = None) -> Iterator[str]:
    """The trees of a group, a line a trajectory, branches below what they left and indented; nothing where none grew.

    `shown`: the id that is marked.
    """
    if all(t.parent is None for t in group.trajectories):
        return

    def grown(parent: str | None, depth: int) -> Iterator[str]:
        for t in group.trajectories:
            if t.parent == parent:
                name = t.id.removeprefix(f"{group.id}/")
                left = f"leaves {t.parent.removeprefix(f'{group.id}/')} at turn {t.left_at + 1}, " if t.parent else ""
                mark = "  <- this one" if t.id == shown else ""
                yield f"  {'  ' * depth}{name}  {left}{len(t.turns)} turns, reward {t.reward:g}{mark}"
                yield from grown(t.id, depth + 1)

    yield f"tree       of group {group.id}"
    yield from grown(None, 0)


def _lines(trajectory: Trajectory, replayed: Replay | str, decode: Decode | None, group: Group | None) -> Iterator[str]:
    versions = ", ".join(map(str, sorted(trajectory.versions)))
    yield f"trajectory {trajectory.id}"
    yield f"task       {trajectory.task} ({trajectory.family or 'no family'})"
    yield f"policy     version {versions}"
    yield f"reward     {trajectory.reward:g}, ended: {trajectory.end.value}"
    lengths = " + ".join(str(len(sequence.tokens)) for sequence in trajectory.sequences)
    yield f"tokens     {lengths}, of them {trajectory.sampled_tokens} sampled in {trajectory.own_turns} turns"
    if trajectory.parent is not None:
        yield (
            f"parent     {trajectory.parent}, left at turn {trajectory.left_at + 1}: {trajectory.inherited_tokens} "
            f"sampled tokens before that, in {trajectory.left_at} turns, are its"
        )
    if group is not None:
        yield from tree_lines(group, trajectory.id)
    yield ""
    yield from _block("instruction", trajectory.instruction)
    if isinstance(replayed, Replay):
        for grid in replayed.before.values():
            yield ""
            yield f"before: sheet {grid.sheet}" + (f", answer expected in {replayed.answer}" if replayed.answer else "")
            yield from grid_lines(grid)
    for number, turn in enumerate(trajectory.turns, start=1):
        yield ""
        yield f"turn {number}"
        if not turn.calls:
            yield from _block("  said", turn.text)
        for call in turn.calls:
            arguments = call.get("arguments")
            shown = call.get("raw", "") if arguments is None else json.dumps(arguments, ensure_ascii=False)
            yield f"  call      {call.get('name', '')} {shown}"
        for result in turn.results:
            yield from _block("  answer  ", result)
    yield ""
    if isinstance(replayed, str):
        yield f"grids {replayed}"
    else:
        for grid in replayed.after.values():
            yield f"after: sheet {grid.sheet} (changed cells in [brackets])"
            yield from grid_lines(grid, replayed.before.get(grid.sheet))
            yield ""
        if replayed.differs is not None:
            yield f"NOTE: doing it again gave another observation in turn {replayed.differs + 1}; the grids may differ."
    if decode is not None:
        yield "log-probabilities (nats) of the sampled tokens:"
        for token, value in sampled(trajectory):
            yield f"  {value:10.4f}  {token:>7}  {decode([token])!r}"


def sampled(trajectory: Trajectory) -> Iterator[tuple[int, float]]:
    """(token id, log-probability) of every sampled token, in order."""
    for sequence in trajectory.sequences:
        tokens = (token for token, mine in zip(sequence.tokens, sequence.sampled_mask(), strict=True) if mine)
        yield from zip(tokens, sequence.logprobs, strict=True)


def grid_lines(grid: Grid, before: Grid | None = None) -> Iterator[str]:
    """A sheet as aligned columns; with `before`, cells that differ from it in brackets. Formulas are listed below."""
    if not grid.rows:
        yield "  (empty)"
        return
    columns = max(map(len, grid.rows))
    shown = [[_cell_text(grid, before, r, c) for c in range(columns)] for r in range(len(grid.rows))]
    widths = [max(len(column_name(c)), *(len(row[c]) for row in shown)) for c in range(columns)]
    margin = len(str(len(grid.rows)))
    yield "  " + " " * margin + "  " + "  ".join(column_name(c).ljust(widths[c]) for c in range(columns)).rstrip()
    for r, row in enumerate(shown):
        yield f"  {r + 1:>{margin}}  " + "  ".join(text.ljust(widths[c]) for c, text in enumerate(row)).rstrip()
    if grid.cut:
        yield "  ... (the sheet is larger)"
    for r, cells in enumerate(grid.rows):
        for c, cell in enumerate(cells):
            if cell.formula and (before is None or before.at(r, c).formula != cell.formula):
                yield f"    {column_name(c)}{r + 1}: {cell.formula}"


def _cell_text(grid: Grid, before: Grid | None, row: int, column: int) -> str:
    cell = grid.at(row, column)
    text = " ".join(cell.text.split())
    text = text if len(text) <= CELL_WIDTH else text[: CELL_WIDTH - 1] + "…"
    return f"[{text}]" if before is not None and cell != before.at(row, column) else text


def column_name(index: int) -> str:
    """0 -> A, 26 -> AA."""
    name = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        name = chr(65 + rest) + name
    return name


def _block(label: str, text: str) -> Iterator[str]:
    lines = text.splitlines() or [""]
    yield f"{label}  {lines[0]}"
    for line in lines[1:]:
        yield " " * (len(label) + 2) + line


def safe(text: str) -> str:
    """Text without control characters (terminal escapes among them); tabs become spaces."""
    return "".join(
        c if c.isprintable() or c == "\n" else " " if c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def decoder(run: Run) -> Decode:
    """Token ids to text by the run's tokenizer. Raises `UserError` when its base is not here."""
    from .model import load_tokenizer
    from .policy import UnknownBase, resolve_base

    try:
        tokenizer = load_tokenizer(resolve_base(run.config.policy.base))
    except UnknownBase as error:
        raise UserError(f"log-probabilities need the tokenizer: {error}") from None
    return lambda tokens: str(tokenizer.decode(list(tokens)))
