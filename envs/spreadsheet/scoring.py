"""From a finished episode to its reward: the journal replayed on every case, graded, and what was changed besides.

Always true: 1.0 exactly when every case passes, 0.0 when one fails; NaN with a reason when there is no verdict. An
edit that another case does not allow (a sheet that is not there) fails that case: the agent relied on what only the
first one has. Grading is a pure function of task and journal (clock and seed of a workbook are pinned), so a group's
episodes that did the same share one verdict; an episode without a verdict is never taken for another's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from functools import lru_cache
from threading import Lock
from typing import Any

from .cache import BookCache
from .engines import get_engine, get_referee
from .engines.base import Book, Engine, EngineError
from .grading import Grader, Verdict
from .task import Case, SpreadsheetTask
from .workspace import Workspace

KEPT = 512
"""Cross-checks kept open: four batches of 32 tasks with four cases each."""
KEPT_SCORES = 16_384
"""Scores remembered, some hundred bytes each."""

Score = tuple[float, dict[str, Any]]


class _Shared:
    """What all environments of one process with the same engines share: the grader with its open cross-checks, and
    the scores given so far, those used longest ago going first.
    """

    def __init__(self, grader: Grader) -> None:
        self.grader = grader
        self.lock = Lock()
        self._scores: OrderedDict[Hashable, Score] = OrderedDict()

    def score(self, key: Hashable) -> Score | None:
        with self.lock:
            found = self._scores.get(key)
            if found is not None:
                self._scores.move_to_end(key)
            return found

    def keep(self, key: Hashable, score: Score) -> None:
        with self.lock:
            self._scores[key] = score
            if len(self._scores) > KEPT_SCORES:
                self._scores.popitem(last=False)


@lru_cache(maxsize=8)
def _shared(engine: str, crosscheck: str | None, referee: str) -> _Shared:
    second = get_engine(crosscheck) if crosscheck is not None else None
    return _Shared(Grader(get_engine(engine), second, get_referee(referee), KEPT))


class Scorer:
    """Grades for one environment. Raises `ValueError` for an unknown engine, `EngineError` for a missing referee."""

    def __init__(
        self,
        engine: Engine,
        cache: BookCache,
        crosscheck: str | None,
        referee: str,
        perturbed: bool,
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._shared = _shared(engine.name, crosscheck, referee)
        self._perturbed = perturbed

    def score(self, task: SpreadsheetTask, space: Workspace, *, whole: bool = True) -> Score:
        """Reward and what the step's info says about it (see `SpreadsheetEnv.step`). `whole`: grade every case, also
        after a failed one.
        """
        key = (task.digest, space.history, self._perturbed, whole)
        found = self._shared.score(key)
        if found is None:
            found = self._score(task, space, whole)
            if not math.isnan(found[0]):
                self._shared.keep(key, found)
        return found[0], dict(found[1])

    def _score(self, task: SpreadsheetTask, space: Workspace, whole: bool) -> Score:
        verdicts = [self._verdict(task.cases[0], space)]
        others = task.cases[1:] if self._perturbed else ()
        for case in others:
            if not whole and verdicts[-1].passed is False:
                break
            verdicts.append(self._again(case, space))
        passed = tuple(verdict.passed for verdict in verdicts)
        info: dict[str, Any] = {
            "cases": passed,
            "soft": sum(p is True for p in passed) / (1 + len(others)),
            "verdict": tuple(verdicts),
            "collateral": self._collateral(task, space),
        }
        if False in passed:
            return 0.0, info
        if None in passed:
            info["ungraded"] = _why(verdicts)
            return float("nan"), info
        return 1.0, info

    def _again(self, case: Case, space: Workspace) -> Verdict:
        """The verdict on another case, on which the journal is replayed."""
        other = Workspace(self._engine)
        asked = {self._engine.name: self._engine.version}
        other.load(self._cache.get(self._engine, case))
        try:
            other.replay(space.journal)
        except EngineError:
            return Verdict(False, len(case.golden), len(case.golden), asked)
        try:
            other.book.recalculate()
        except EngineError:
            return Verdict(None, 0, len(case.golden), asked, tuple(sorted(case.golden)))
        return self._verdict(case, other)

    def _verdict(self, case: Case, space: Workspace) -> Verdict:
        return self._shared.grader.grade(
            space.book,
            case.package,
            case.golden,
            start=lambda: self._start(case),
            digest=case.digest,
            export=space.export,
        )

    def _start(self, case: Case) -> Book:
        return self._engine.restore(self._cache.get(self._engine, case).snapshot)

    def _collateral(self, task: SpreadsheetTask, space: Workspace) -> int:
        """Cells outside the answer whose formula or constant differs from the start."""
        if not space.journal:
            return 0
        answer = task.cases[0].golden
        return sum(key not in answer for key in changed_cells(self._start(task.cases[0]), space.book))


def _why(verdicts: list[Verdict]) -> str:
    cells = [f"{sheet}!{row},{column}" for v in verdicts for sheet, row, column in v.disputed]
    shown = ", ".join(cells[:3]) + (" ..." if len(cells) > 3 else "")
    return f"the engines disagree on {len(cells)} answer cells ({shown}) and nothing settles it"


def changed_cells(before: Book, after: Book) -> Iterator[tuple[str, int, int]]:
    """Cells whose formula or constant differs between two books."""
    had = {info.name for info in before.sheets()}
    has = {info.name for info in after.sheets()}
    for name in sorted(had | has):
        old = before.contents(name) if name in had else {}
        new = after.contents(name) if name in has else {}
        for at in sorted(old.keys() | new.keys()):
            if old.get(at) != new.get(at):
                yield (name, *at)
