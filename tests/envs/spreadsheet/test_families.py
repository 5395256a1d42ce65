"""Generated tasks: sound, deterministic, solvable by looking, and held-out ones truly held out."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from dataclasses import replace

import openpyxl
import pytest
from espalier.envs.spreadsheet.answers import normalise
from espalier.envs.spreadsheet.engines import get_engine
from espalier.envs.spreadsheet.families import (
    FAMILIES,
    draw_draft,
    generate,
    reference_solution,
    solution_package,
    solve,
    task_id,
    words,
)
from espalier.envs.spreadsheet.families.drafts import Draft
from espalier.envs.spreadsheet.families.sketch import Sketch
from espalier.envs.spreadsheet.families.split import layout_split, subject_split, unasked, wording_split
from hypothesis import given, settings
from hypothesis import strategies as st

SPLITS = ("train", "test")
MANY = 2000


def holds(task, steps) -> bool:
    """Whether edits give the golden values in every case."""
    engine = get_engine("ironcalc")
    for case in task.cases:
        book = engine.open(case.package)
        for step in steps:
            step.apply(book)
        book.recalculate()
        if any(normalise(book.value(*key)) != golden for key, golden in case.golden.items()):
            return False
    return True


@pytest.fixture(scope="module")
def tasks():
    return [generate(11, index, split) for split in SPLITS for index in range(30)]


@pytest.fixture(scope="module")
def drafts() -> dict[str, list[Draft]]:
    return {split: [draw_draft(21, index, split) for index in range(MANY)] for split in SPLITS}


def test_same_arguments_same_bytes(tasks):
    for task in tasks[::7]:
        at = task.origin
        again = generate(at.seed, at.index, at.split)
        assert again == task
        assert generate(at.seed, at.index, at.split, family=task.family) == task
        assert generate(at.seed + 1, at.index, at.split).cases != task.cases


def test_families_take_turns_and_can_be_forced():
    assert [generate(0, index, "train").family for index in range(10)] == list(FAMILIES)
    assert {generate(0, 3, "test", family=family).family for family in FAMILIES} == set(FAMILIES)
    assert task_id(0, 3, "test") == generate(0, 3, "test").id
    assert task_id(0, 3, "test", "stat") == generate(0, 3, "test", family="stat").id
    with pytest.raises(ValueError, match="no family 'sum'"):
        generate(0, 0, "train", family="sum")
    with pytest.raises(ValueError, match="no split 'dev'"):
        generate(0, 0, "dev")


def test_a_task_is_four_cases_with_different_answers(tasks):
    for task in tasks:
        assert len(task.cases) == 4
        assert all(case.golden.keys() == task.cases[0].golden.keys() for case in task.cases)
        assert any(case.golden != task.cases[0].golden for case in task.cases[1:])
        assert all(value is not None for case in task.cases for value in case.golden.values())


def test_reference_solves_and_doing_nothing_does_not(tasks):
    for task in tasks:
        assert holds(task, reference_solution(task)), task
        assert not holds(task, ()), task


def test_formualizer_agrees_with_the_golden_values(tasks):
    engine = get_engine("formualizer")
    for task in tasks[::3]:
        for number, case in enumerate(task.cases):
            book = engine.open(solution_package(task, number))
            book.recalculate()
            assert {key: normalise(book.value(*key)) for key in case.golden} == dict(case.golden), task


def mutants(task) -> dict[str, Sketch]:
    """The true sketch, bent in one place each."""
    sketch, table = task.draft.sketch, task.draft.table
    bent = {}
    if sketch.family not in ("row_formula", "flag", "lookup") and sketch.kind != "running":
        bent["short"] = replace(sketch, last=sketch.last - 1)
        bent["late"] = replace(sketch, first=sketch.first + 1)
    if sketch.family in ("flag", "share", "lookup", "summary"):
        bent["no dollar"] = replace(sketch, anchored=False)
    if sketch.value:
        for header in table.headers:
            if header in words.NUMBERS and table.column(header) != sketch.value:
                bent[f"column {header}"] = replace(sketch, value=table.column(header))
    if sketch.lookup is not None:
        sheet, area, index = sketch.lookup
        bent["short list"] = replace(sketch, lookup=(sheet, replace(area, bottom=area.bottom - 1), index))
        if task.draft.decoy:
            bent["decoy"] = replace(sketch, lookup=(sheet, area, task.draft.decoy))
    return bent


def test_no_near_miss_passes(tasks):
    tried = Counter()
    for task in tasks:
        for name, sketch in mutants(task).items():
            tried[name.split()[0]] += 1
            assert not holds(task, solve(sketch)), (name, task.instruction)
    assert min(tried[name] for name in ("short", "late", "no", "column", "decoy")) > 2


def test_pasted_values_pass_the_first_case_only(tasks):
    engine = get_engine("ironcalc")
    for task in tasks[:20]:
        books = [engine.open(case.package) for case in task.cases]
        verdicts = []
        for book, case in zip(books, task.cases, strict=True):
            for key, value in task.cases[0].golden.items():
                book.set_value(*key, value)
            book.recalculate()
            verdicts.append(all(normalise(book.value(*key)) == value for key, value in case.golden.items()))
        assert verdicts[0] and not all(verdicts)


def test_packages_are_real_workbooks_that_openpyxl_reads_back(tasks):
    for task in tasks[:20]:
        draft = draw_draft(task.origin.seed, task.origin.index, task.origin.split, attempt=task.origin.attempt)
        for case, cells in zip(task.cases, draft.cells, strict=True):
            book = openpyxl.load_workbook(io.BytesIO(case.package))
            assert tuple(book.sheetnames) == draft.sheets
            read = {
                (sheet.title, cell.row, cell.column): cell.value
                for sheet in book
                for row in sheet.iter_rows()
                for cell in row
                if cell.value is not None
            }
            assert read == cells


def test_solution_workbook_holds_formulas_in_the_answer_cells(tasks):
    for task in tasks[:10]:
        book = openpyxl.load_workbook(io.BytesIO(solution_package(task)))
        for sheet, row, column in task.cases[0].golden:
            value = book[sheet].cell(row, column).value
            assert str(value).startswith("=") or task.family == "row_formula"


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(SPLITS))
@settings(max_examples=150, deadline=None)
def test_every_draft_keeps_the_bounds(seed, index, split):
    draft = draw_draft(seed, index, split)
    sketch, table = draft.sketch, draft.table
    for cells in draft.cells:
        assert all(row <= 40 and column <= 12 for _, row, column in cells)
        assert not any((sketch.sheet, row, column) in cells for row, column in answer_cells(draft)) or (
            draft.family == "repair"
        )
    assert 4 <= table.rows <= 16 and 3 <= len(table.headers) <= 5
    assert len(set(table.headers)) == len(table.headers)
    assert len(draft.instruction.split()) <= 25
    assert "{" not in draft.instruction
    for column in (sketch.value, sketch.key, sketch.other):  # what has to be found is named as its header is written
        if column:
            assert re.search(rf"\b{table.headers[column - table.left]}\b", draft.instruction), draft.instruction


def answer_cells(draft: Draft) -> list[tuple[int, int]]:
    at = draft.sketch.target
    return [(row, column) for row in range(at.top, at.bottom + 1) for column in range(at.left, at.right + 1)]


# --- held out --------------------------------------------------------------------------------------------------------


def content_hash(draft: Draft) -> str:
    return hashlib.sha256(repr(sorted(draft.cells[0].items())).encode()).hexdigest()


def test_no_workbook_and_no_instruction_on_both_sides(drafts):
    books = {split: {content_hash(draft) for draft in drafts[split]} for split in SPLITS}
    said = {split: {draft.instruction for draft in drafts[split]} for split in SPLITS}
    assert not books["train"] & books["test"]
    assert not said["train"] & said["test"]
    # control: the same comparison does find what two draws of one split share
    other = {draw_draft(22, index, "train").instruction for index in range(MANY)}
    assert said["train"] & other


def test_each_side_keeps_to_its_layouts_wordings_and_subjects(drafts):
    for split in SPLITS:
        for draft in drafts[split]:
            table = draft.table
            assert layout_split(table.header_row, table.left, table.rows) == split
            if draft.family in ("total", "stat", "repair"):
                asked = table.headers[draft.sketch.value - table.left]
                assert subject_split(draft.family, asked, "") == split


def test_both_sides_of_every_wording_exist():
    for frames, groups in (
        (words.CELL_FRAMES, (*words.AGGREGATES.values(), *words.CONDITIONALS.values(), *words.DOUBLE.values())),
        (words.FILL_FRAMES, (*words.OPERATIONS.values(), *words.SHARES.values(), words.LOOKUPS, words.SUMMARIES)),
        (words.FLAG_FRAMES, words.FLAGS.values()),
        (words.REPAIR_FRAMES, words.AGGREGATES.values()),
    ):
        for phrases in groups:
            assert {wording_split(frame, phrase) for frame in frames for phrase in phrases} == set(SPLITS), phrases


def tokens(text: str) -> set[str]:
    """Words, column letters, numbers below 100 and the digits of longer ones: the pieces a small tokenizer cuts."""
    found = re.findall(r"[A-Z](?![A-Za-z])|[A-Za-z]+|\d+|[^\sA-Za-z\d]", text)
    return {piece for token in found for piece in ([token] if not token.isdigit() or len(token) < 3 else token)}


def roles(draft: Draft) -> dict[str, set[str]]:
    """Tokens of a task by the part they play."""
    cells = draft.cells[0]
    formulas = " ".join(str(step) for step in solve(draft.sketch))
    return {
        "instruction": tokens(draft.instruction),
        "content": set().union(*(tokens(str(value)) for value in cells.values())),
        "row": {str(row) for _, row, _ in cells} | {str(row) for row, _ in answer_cells(draft)},
        "column": {str(column) for _, _, column in cells} | {str(column) for _, column in answer_cells(draft)},
        "answer": tokens(draft.answer_position),
        "formula": {t for t in tokens(formulas) if not t.islower()},
        "find": set(draft.finds),
    }


def test_every_token_of_a_held_out_task_occurs_in_training_in_its_role(drafts):
    known: dict[str, set[str]] = {}
    for draft in drafts["train"]:
        for role, found in roles(draft).items():
            known.setdefault(role, set()).update(found)
    for draft in drafts["test"]:
        for role, found in roles(draft).items():
            assert found <= known[role], (role, found - known[role])
    # control: a row that no training table reaches would be noticed
    assert "40" not in known["row"]


def test_held_out_tasks_ask_for_words_that_training_tasks_of_the_family_only_name_beside_others(drafts):
    def asks(draft: Draft) -> bool:
        named = [word for word in re.findall("[A-Z][a-z]+", draft.instruction) if word in words.NUMBERS]
        return bool(named) and named[0] in unasked(draft.family)

    asked = {split: sum(asks(draft) for draft in drafts[split]) for split in SPLITS}
    assert asked["test"] > MANY * 0.1
    assert not asked["train"]


def test_every_family_keeps_four_words_and_every_word_is_asked_for_in_most_families():
    kept = [word for family in FAMILIES for word in unasked(family)]
    assert {len(unasked(family)) for family in FAMILIES} == {4}
    assert {word: kept.count(word) for word in words.NUMBERS} == dict.fromkeys(words.NUMBERS, 2)
