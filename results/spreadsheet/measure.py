"""The spreadsheet environment's engines: speed, snapshots, agreement with Excel's cached values, fidelity of exports.

Always true: speeds are per second of processor time of one thread (so other load on the machine distorts them little);
agreement is counted by SpreadsheetBench's compare rule over formula cells of the golden workbooks that have a cached
value, with the cells that depend on the author's locale counted apart; an engine that is not there gets no figure.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import _bench
import openpyxl
from espalier.envs.spreadsheet.engines import EngineError, get_engine
from espalier.envs.spreadsheet.engines.base import Book, Referee, StoredFormula
from espalier.envs.spreadsheet.engines.libreoffice import LibreOffice
from espalier.envs.spreadsheet.export import export_package
from espalier.envs.spreadsheet.grading import Grader, cached_values, golden_values, normalise, same

sys.path.insert(0, str(Path(__file__).resolve().parent))
from rich_workbook import kept, rich_workbook

# TEXT(..., "mmmm") and the like give the month's or day's name in the language of whoever saved the file.
LOCALE = re.compile(r'TEXT\([^"]*"[^"]*(?:mmm|ddd)', re.IGNORECASE)


def small_book() -> bytes:
    """60 rows x 7 columns: four of numbers, three of formulas (180)."""
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Data"
    for row in range(1, 61):
        for column in range(1, 5):
            sheet.cell(row, column, row * column % 17)
        sheet.cell(row, 5, f"=A{row}*B{row}")
        sheet.cell(row, 6, f'=IF(C{row}>8,"high","low")')
        sheet.cell(row, 7, f"=E{row}+D{row}")
    return saved(book)


def tiny_book() -> bytes:
    """8 rows x 4 columns of names and numbers, no formula."""
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Data"
    sheet.append(["Name", "Units", "Price", "Region"])
    for row in range(2, 9):
        sheet.append([f"n{row}", row, row * 1.5, "East" if row % 2 else "West"])
    return saved(book)


def large_book() -> bytes:
    """10,000 cells, 1,000 of them formulas."""
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Data"
    for row in range(1, 1001):
        for column in range(1, 10):
            sheet.cell(row, column, row + column)
        sheet.cell(row, 10, f"=SUM(A{row}:I{row})")
    return saved(book)


def saved(book: openpyxl.Workbook) -> bytes:
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def steps(book: Book, count: int) -> float:
    """Steps per processor second; a step sets a formula or a constant, recalculates, and observes ten rows."""
    last = min(10, book.sheets()[0].max_row)
    width = book.sheets()[0].max_column
    started = time.process_time()
    for i in range(count):
        row = i % last + 1
        if i % 2:
            book.set_formula("Data", row, width + 1, f"=SUM(B{row}:C{row})*2")
        else:
            book.set_value("Data", row, 2, float(i))
        book.recalculate()
        book.values("Data", 1, 1, last, width + 1)
    return count / (time.process_time() - started)


def p50_ms(action: Callable[[], object], count: int) -> float:
    """Median processor time of one call, in milliseconds."""
    times = []
    for _ in range(count):
        started = time.thread_time_ns()
        action()
        times.append(time.thread_time_ns() - started)
    return median(times) / 1e6


def speeds(quick: bool) -> dict[str, list[float]]:
    """Steps per second and snapshot times, contenders alternating."""
    engine = get_engine()
    rounds, count = (2, 50) if quick else (7, 2000)
    large = engine.open(large_book())
    snapshot = large.snapshot()
    repeats = 20 if quick else 300
    return _bench.alternate(
        {
            "steps_per_s_core": lambda: steps(engine.open(small_book()), count),
            "steps_per_s_core_tiny": lambda: steps(engine.open(tiny_book()), count),
            "snapshot_ms_p50": lambda: p50_ms(large.snapshot, repeats),
            "rollback_ms_p50": lambda: p50_ms(lambda: engine.restore(snapshot), repeats),
        },
        rounds,
    )


def bench_tasks() -> list[tuple[dict[str, Any], list[tuple[bytes, bytes]]]]:
    """The real tasks with (input, answer) of each case; empty when ESPALIER_BENCH_DATA does not lead to them."""
    root = Path(os.environ.get("ESPALIER_BENCH_DATA", "/nowhere")) / "spreadsheetbench-20"
    if not root.is_dir():
        return []
    found = []
    for task in json.loads((root / "dataset.json").read_text(encoding="utf-8")):
        stems = [root / task["spreadsheet_path"] / f"{case}_{task['id']}" for case in (1, 2, 3)]
        cases = [(Path(f"{s}_input.xlsx").read_bytes(), Path(f"{s}_answer.xlsx").read_bytes()) for s in stems]
        found.append((task, cases))
    return found


def formula_cells(package: bytes, book: Book) -> Iterator[tuple[tuple[str, int, int], str]]:
    """Formula cells of a package that have a cached value, with their formulas."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = openpyxl.load_workbook(io.BytesIO(package), data_only=True)
    for info in book.sheets():
        for (row, column), content in book.contents(info.name).items():
            cell = values[info.name]._cells.get((row, column))
            if isinstance(content, StoredFormula) and cell is not None and cell.value is not None:
                yield (info.name, row, column), content.text


def agreement(tasks: list[Any], quick: bool) -> dict[str, Any]:
    """Per engine: formula cells that agree with the cached value, of how many; and the locale-dependent ones."""
    ironcalc, formualizer = get_engine("ironcalc"), get_engine("formualizer")
    referee: Referee | None = None
    try:
        referee = there = LibreOffice()
        said = f"LibreOffice {there.version}"
    except EngineError as missing:
        said = str(missing)
    counts: dict[str, Counter[str]] = {"ironcalc": Counter(), "formualizer": Counter(), "libreoffice": Counter()}
    by_task: dict[str, Counter[str]] = {name: Counter() for name in counts}
    for task, cases in tasks[: 3 if quick else None]:
        for _, answer in cases[: 1 if quick else None]:
            first = ironcalc.open(answer)
            second = formualizer.open(answer)
            cells = dict(formula_cells(answer, first))
            cached = cached_values(answer, cells)
            third = cached_values(referee.recalculate(answer), cells) if referee is not None else None
            for key, formula in cells.items():
                code = first.number_format(*key)
                found = {
                    "ironcalc": normalise(first.value(*key), code, first.date1904),
                    "formualizer": normalise(second.value(*key), code, first.date1904),
                }
                if third is not None:
                    found["libreoffice"] = third[key]
                kind = "locale" if LOCALE.search(formula) else "plain"
                for name, value in found.items():
                    agrees = same(value, cached[key])
                    counts[name][f"{kind}_{'agree' if agrees else 'differ'}"] += 1
                    if kind == "plain" and not agrees:
                        by_task[name][str(task["id"])] += 1
    return {
        "counts": {name: dict(c) for name, c in counts.items()},
        "differ_by_task": {name: dict(c) for name, c in by_task.items()},
        "referee": said,
    }


def verdicts(tasks: list[Any], quick: bool) -> dict[str, Any]:
    """The golden workbooks graded against themselves, and what a grade costs once the task is known."""
    engine, check = get_engine("ironcalc"), get_engine("formualizer")
    outcome: Counter[str] = Counter()
    milliseconds = []
    for task, cases in tasks[: 3 if quick else None]:
        for _, answer in cases:
            golden = golden_values(answer, task["answer_position"])
            book = engine.open(answer)
            grader = Grader(engine, check)
            verdict = grader.grade(book, answer, golden)
            milliseconds.append(p50_ms(partial(grader.grade, book, answer, golden), 3))
            outcome[{True: "passed", False: "failed", None: "ungraded"}[verdict.passed]] += 1
    return {"golden": dict(outcome), "grade_ms_p50": median(milliseconds), "grade_ms_max": max(milliseconds)}


def fidelity() -> dict[str, bool]:
    """What an export of the rich workbook keeps after edits to cells of both kinds."""
    package = rich_workbook()
    engine = get_engine()
    start, live = engine.open(package), engine.open(package)
    live.set_formula("Data", 8, 4, "=SUM(D2:D7)")
    live.set_value("Data", 2, 2, 99.0)
    live.recalculate()
    data = export_package(package, start, live)
    found = kept(data)
    shown = openpyxl.load_workbook(io.BytesIO(data), data_only=True)["Data"]
    found["edited values, cached"] = shown["D8"].value == live.value("Data", 8, 4) and shown["B2"].value == 99
    return found


def share(counts: Mapping[str, int]) -> float:
    """Agreeing cells of those that do not depend on a locale."""
    return counts["plain_agree"] / (counts["plain_agree"] + counts.get("plain_differ", 0))


def report(figures: Mapping[str, float], found: Mapping[str, Any]) -> str:
    """report.md."""
    lines = [
        "# Spreadsheet engines",
        "",
        "Speeds are per second of processor time on one thread. A step sets a formula or a constant, recalculates and",
        "reads up to ten rows. Snapshot and rollback are of 10,000 cells, a tenth of them formulas.",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {value:,.4g} |" for name, value in figures.items()),
        "",
    ]
    agree = found.get("agreement")
    if agree:
        lines += [
            "Agreement with the cached values of the 20 tasks' golden workbooks (three cases each), by the official",
            "compare rule, over formula cells that have a cached value. Cells whose formula asks TEXT for the name of a",
            "month or a day depend on the locale of whoever saved the file (Spanish here) and are counted apart.",
            "",
            "| engine | agree | differ | locale-dependent: agree | differ | tasks where it differs (cells) |",
            "|---|---|---|---|---|---|",
        ]
        for name, counts in agree["counts"].items():
            if not counts:
                lines.append(f"| {name} | not measured: {agree['referee']} | | | | |")
                continue
            tasks = ", ".join(f"{task} ({n})" for task, n in agree["differ_by_task"][name].items()) or "none"
            numbers = [counts.get(k, 0) for k in ("plain_agree", "plain_differ", "locale_agree", "locale_differ")]
            lines.append(f"| {name} | {' | '.join(map(str, numbers))} | {tasks} |")
        graded = found["verdicts"]
        lines += [
            "",
            f"Golden workbooks graded against themselves, without a referee: {graded['golden']}. One grade with the second",
            f"engine's opinion costs {graded['grade_ms_p50']:.2f} ms (median), at most {graded['grade_ms_max']:.0f} ms.",
        ]
    else:
        lines += ["Agreement was not measured: ESPALIER_BENCH_DATA does not lead to spreadsheetbench-20."]
    lost = [name for name, ok in found["fidelity"].items() if not ok]
    lines += [
        "",
        f"Export of a workbook with {len(found['fidelity'])} features: lost {', '.join(lost) or 'nothing'}.",
        "",
    ]
    return "\n".join(lines)


def picture(figures: Mapping[str, float], found: Mapping[str, Any], file: Path) -> None:
    """Agreement by engine, and the two speeds with their goals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
    shares = {n.removeprefix("agree_"): v * 100 for n, v in figures.items() if n.startswith("agree_")}
    left.barh(list(shares), list(shares.values()), color="#4477aa")
    left.set_xlim(0, 100)
    left.set_title("agree with cached values, %")
    names = {"60x7, 180 formulas": "steps_per_s_core", "tiny": "steps_per_s_core_tiny"}
    right.barh(list(names), [figures[n] for n in names.values()], color="#228833")
    right.axvline(3000, color="black", linestyle=":", label="goal")
    right.legend()
    right.set_title("steps per second and core")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Measure, and write figures.json, report.md and plot.png."""
    bench = _bench.start(__file__, __doc__ or "", devices=("cpu",))
    rounds = speeds(bench.quick)
    figures = {name: median(values) for name, values in rounds.items()}
    found: dict[str, Any] = {"rounds": rounds, "fidelity": fidelity()}
    tasks = bench_tasks()
    if tasks:
        found["agreement"] = agreement(tasks, bench.quick)
        found["verdicts"] = verdicts(tasks, bench.quick)
        measured = {name: counts for name, counts in found["agreement"]["counts"].items() if counts}
        figures |= {f"agree_{name}": share(counts) for name, counts in measured.items()}
        figures["grade_ms_p50"] = found["verdicts"]["grade_ms_p50"]
        if "libreoffice" not in measured:
            print(f"agree_libreoffice is not measured: {found['agreement']['referee']}")
    else:
        print("agreement is not measured: ESPALIER_BENCH_DATA does not lead to spreadsheetbench-20")
    figures["export_kept"] = sum(found["fidelity"].values()) / len(found["fidelity"])
    claim = (
        "3,000 steps per second and core on small books; snapshots in 0.3 ms; agreement with Excel; exports keep all"
    )
    bench.finish(claim, [], figures, [found])
    if bench.folder is not None:
        (bench.folder / "report.md").write_text(report(figures, found), encoding="utf-8")
        picture(figures, found, bench.folder / "plot.png")


if __name__ == "__main__":
    main()
