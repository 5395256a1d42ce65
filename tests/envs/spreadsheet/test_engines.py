"""Engines: one protocol, literal text, snapshots, pinned clocks, budgets, processes that may die."""

import gc
import io
import stat
import subprocess
import sys
import zipfile
from contextlib import suppress
from datetime import UTC, datetime

import openpyxl
import psutil
import pytest
from espalier.envs.spreadsheet.engines import CellError, EngineError, choose_referee, engine_versions, get_engine
from espalier.envs.spreadsheet.engines.base import StoredFormula
from espalier.envs.spreadsheet.engines.formualizer import write_cached_values
from espalier.envs.spreadsheet.engines.guard import Guard
from espalier.envs.spreadsheet.engines.libreoffice import LibreOffice, find_libreoffice
from espalier.envs.spreadsheet.engines.volatile import pin, unpin
from espalier.envs.spreadsheet.families import generate
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl.comments import Comment
from openpyxl.worksheet.formula import ArrayFormula


def saved(made):
    out = io.BytesIO()
    made.save(out)
    return out.getvalue()


def workbook():
    made = openpyxl.Workbook()
    sheet = made.active
    sheet.title = "Data"
    for row in range(1, 6):
        sheet.cell(row, 1, row)
        sheet.cell(row, 2, row * 1.5)
        sheet.cell(row, 3, f"=A{row}*B{row}")
    sheet["D1"] = "text"
    made.create_sheet("Two")["A1"] = "=SUM(Data!C1:C5)"
    return saved(made)


PACKAGE = workbook()
ENGINES = [get_engine("ironcalc"), get_engine("formualizer")]


@pytest.fixture(params=ENGINES, ids=lambda e: e.name)
def engine(request):
    return request.param


@pytest.fixture
def book():
    return get_engine().open(PACKAGE)


def test_names_and_versions(engine):
    assert engine.version == engine_versions()[engine.name]
    with pytest.raises(ValueError, match="ironcalc, formualizer"):
        get_engine("excel")
    with pytest.raises(ValueError, match="libreoffice"):
        choose_referee("excel")


def test_asking_for_an_engine_imports_no_other():
    code = (
        "import sys; from espalier.envs.spreadsheet.engines import get_engine; get_engine('ironcalc');"
        "print([m for m in ('formualizer', 'openpyxl', 'ironcalc', 'psutil') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "formualizer" not in done.stdout and "openpyxl" not in done.stdout


def test_open_calculates(engine):
    found = engine.open(PACKAGE)
    assert [info.name for info in found.sheets()] == ["Data", "Two"]
    assert found.value("Two", 1, 1) == 82.5
    assert found.values("data", 1, 1, 2, 4) == [[1.0, 1.5, 1.5, "text"], [2.0, 3.0, 6.0, None]]
    assert found.formula("Data", 1, 1) is None
    assert (found.formula("Data", 2, 3) or "").replace(" ", "") == "=A2*B2"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_ironcalc_opens_a_package_however_it_is_packed(method):
    package, packed = generate(0, 0, "train").cases[0].package, io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(package)) as source, zipfile.ZipFile(packed, "w", method) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    ironcalc = get_engine("ironcalc")
    assert ironcalc.open(packed.getvalue()).snapshot() == ironcalc.open(package).snapshot()


def test_edit_and_recalculate(engine):
    found = engine.open(PACKAGE)
    found.set_value("Data", 1, 1, 11.0)
    found.set_formula("Two", 2, 1, "=A1*2")
    found.recalculate()
    assert found.value("Two", 2, 1) == 195.0
    found.set_value("Two", 2, 1, None)
    found.recalculate()
    assert found.value("Two", 2, 1) is None and found.formula("Two", 2, 1) is None


@given(st.text(max_size=40, alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])))
@settings(max_examples=60, deadline=None)
def test_text_is_stored_literally(text):
    for engine in ENGINES:
        found = engine.open(PACKAGE)
        found.set_value("Data", 9, 9, text)
        found.recalculate()
        assert found.value("Data", 9, 9) == (text or found.value("Data", 9, 9))
        assert found.formula("Data", 9, 9) is None


@pytest.mark.parametrize("value", ["=1+1", "12", "TRUE", "#N/A", "2024-01-05", "'x", True, False, 0.0, 1e300, -2.5])
def test_constants_come_back_as_they_were(engine, value):
    found = engine.open(PACKAGE)
    found.set_value("Data", 9, 9, value)
    found.recalculate()
    assert found.value("Data", 9, 9) == value and type(found.value("Data", 9, 9)) is type(value)


def test_errors_are_values(engine):
    found = engine.open(PACKAGE)
    found.set_formula("Data", 9, 1, "=1/0")
    found.set_formula("Data", 9, 2, "=NA()")
    found.set_formula("Data", 9, 3, '="#DIV/0!"')
    found.set_value("Data", 9, 4, CellError("#N/A"))
    found.recalculate()
    assert found.values("Data", 9, 1, 9, 4) == [[CellError("#DIV/0!"), CellError("#N/A"), "#DIV/0!", CellError("#N/A")]]


def test_a_cycle_is_an_error_value_not_a_hang(engine):
    found = engine.open(PACKAGE)
    found.set_formula("Data", 9, 1, "=B9+1")
    found.set_formula("Data", 9, 2, "=A9+1")
    found.recalculate()
    assert isinstance(found.value("Data", 9, 1), CellError)


@pytest.mark.parametrize("bad", ["=1+", '="abc', "=(1", "=<1", "=SUM(A1;A2)"])
def test_syntax_errors_are_told(engine, bad):
    with pytest.raises(EngineError):
        engine.open(PACKAGE).set_formula("Data", 9, 1, bad)


@pytest.mark.parametrize(
    "bad", ["=ABS(1,2)", "=A1 A2", "=1,2", "=1)", "=A1||B1", "=FOO(1)(2)", "=A1[0]", "=TEXT(1)", "A1"]
)
def test_ironcalc_does_not_swallow_half_a_formula(book, bad):
    with pytest.raises(EngineError):
        book.set_formula("Data", 9, 1, bad)


VALID = """
=SUM(A1:A3)|=IF(A1>1,"a","b")|=VLOOKUP(A1,A1:C5,2,FALSE)|=INDEX(A1:A3,MATCH(2,B1:B3,0))|=XLOOKUP(A1,B1:B3,C1:C3,"none")
=SUMIFS(A1:A3,B1:B3,">=2",C1:C3,"x")|=COUNTIF(A:A,"*x*")|=SUMPRODUCT(--(A1:A3=1))|=TEXT(A1,"yyyy-mm-dd")|=EOMONTH(A1,1)
=IFERROR(A1/B1,0)|=IFS(A1>1,"x",TRUE,"y")|=SWITCH(A1,1,"a","z")|=TEXTJOIN(",",TRUE,A1:A3)|=FILTER(A1:A3,B1:B3>1)|=SORT(A1:A3)
=LET(x,1,y,2,x+y)|=LAMBDA(x,x+1)(2)|=MAP(A1:A3,LAMBDA(x,x*2))|=OFFSET(A1,1,0)|=INDIRECT("A1")|=A1%+-B1^2|={1,2;3,4}
="a""b"|=Two!B2|=SUM($A$1:A3)|=SUM(A:A)|=SUM(1:3)|=TODAY()-A1|=RAND()*RANDBETWEEN(1,6)|=1E3+1.50|=IF(A1,,1)|=#N/A|=-1|=+A1
= A1 + 1|=VSTACK(A1:A2,B1:B2)|=IF(TODAY()>A1,NOW(),"x")|=SUBTOTAL(9,A1:A3)|=TRUE|=N(A1)|=CHAR(10)&CODE("a")|=REPT("x",3)
""".strip().replace("\n", "|").split("|")  # fmt: skip


@pytest.mark.parametrize("good", VALID)
def test_formulas_that_must_be_taken_and_shown_as_written(book, good):
    book.set_formula("Data", 20, 9, good)
    shown = book.formula("Data", 20, 9)
    plain = str.maketrans("", "", " +")
    assert shown.translate(plain).upper() == good.translate(plain).upper().replace("1E3", "1000").replace("1.50", "1.5")


def test_dense_formula_over_the_sheet_is_refused_before_it_runs(book):
    for row in range(1, 8):
        book.set_formula("Data", row, 9, "=MATCH(9,A:A,0)+MATCH(9,B:B,0)")
    before = book.snapshot()
    with pytest.raises(EngineError, match="whole columns"):
        book.recalculate()
    assert book.snapshot() == before
    book.set_value("Data", 1, 9, None)
    for row in range(2, 8):
        book.set_formula("Data", row, 9, "=MATCH(9,$A$1:$A$90,0)")
    book.recalculate()


def test_budget_survives_snapshots_and_moves(book):
    engine = get_engine()
    for row in range(1, 8):
        book.set_formula("Data", row, 9, "=MATCH(9,A:A,0)+MATCH(9,B:B,0)")
    other = engine.restore(book.snapshot())
    with pytest.raises(EngineError, match="visit"):
        other.recalculate()
    other.delete_rows("Data", 1, 6)
    other.recalculate()


# Snapshots


edits = st.lists(
    st.one_of(
        st.tuples(
            st.just("value"), st.integers(1, 8), st.integers(1, 6), st.floats(-1e6, 1e6) | st.text("ab=1", max_size=3)
        ),
        st.tuples(
            st.just("formula"),
            st.integers(1, 8),
            st.integers(1, 6),
            st.sampled_from(["=SUM(A1:A3)", "=A1&B1", "=ROW()"]),
        ),
        st.tuples(st.just("delete_rows"), st.integers(1, 8), st.integers(1, 2), st.none()),
        st.tuples(st.just("insert_columns"), st.integers(1, 5), st.integers(1, 2), st.none()),
    ),
    max_size=6,
)


def apply(book, edit):
    kind, a, b, content = edit
    if kind == "value":
        book.set_value("Data", a, b, content)
    elif kind == "formula":
        book.set_formula("Data", a, b, content)
    else:
        getattr(book, kind)("Data", a, b)
    book.recalculate()


def state(book):
    return {
        (info.name, at): (c, book.value(info.name, *at))
        for info in book.sheets()
        for at, c in book.contents(info.name).items()
    }


@given(edits, edits)
@settings(max_examples=40, deadline=None)
def test_a_restored_book_is_the_book_and_neither_sees_the_other(first, second):
    engine = get_engine()
    book = engine.open(PACKAGE)
    for edit in first:
        apply(book, edit)
    kept, snapshot = state(book), book.snapshot()
    other = engine.restore(snapshot)
    assert state(other) == kept
    for edit in second:
        apply(book, edit)
    assert state(other) == kept
    for edit in second:
        apply(other, edit)
    assert state(other) == state(book)


# Structure


@given(st.lists(st.text("=1+'#TRUE/0.3", max_size=6) | st.floats(-1, 1), min_size=3, max_size=8), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_moved_constants_stay_what_they_were(values, deleted):
    """IronCalc's own move types the contents in again: "=1+1" would become a formula, 1/3 lose digits."""
    book = get_engine().open(PACKAGE)
    for row, value in enumerate(values, 10):
        book.set_value("Two", row, 2, value)
    book.delete_rows("Two", 2, deleted)
    book.insert_columns("Two", 1, 2)
    book.recalculate()
    for row, value in enumerate(values, 10):
        assert book.value("Two", row - deleted, 4) == (value if value != "" else book.value("Two", row - deleted, 4))
        assert book.formula("Two", row - deleted, 4) is None


def test_references_follow_rows_and_sheets(book):
    book.delete_rows("Data", 2, 2)
    book.recalculate()
    assert book.formula("Two", 1, 1) == "=SUM(Data!C1:C3)" and book.value("Two", 1, 1) == 63.0
    book.rename_sheet("Data", "My Data")
    book.add_sheet("New", 0)
    book.copy_sheet("my data", "Copy")
    book.move_sheet("Two", 0)
    assert [info.name for info in book.sheets()] == ["Two", "New", "My Data", "Copy"]
    assert book.formula("Two", 1, 1) == "=SUM('My Data'!C1:C3)"
    book.set_sheet_state("New", "hidden")
    assert [info.state for info in book.sheets()] == ["visible", "hidden", "visible", "visible"]
    book.delete_sheet("My Data")
    book.recalculate()
    assert book.value("Two", 1, 1) == CellError("#REF!")


def test_structure_mistakes_are_told(book):
    for call, match in [
        (lambda: book.value("None", 1, 1), "no sheet named 'None'"),
        (lambda: book.value("Data", 0, 1), "outside"),
        (lambda: book.set_value("Data", 1_048_577, 1, 1.0), "outside"),
        (lambda: book.add_sheet("data"), "already exists"),
        (lambda: book.add_sheet("a/b"), "Invalid name"),
        (lambda: book.copy_sheet("Data", "two"), "already"),
        (lambda: book.move_sheet("Data", 7), "no position"),
        (lambda: book.set_value("Data", 1, 1, "x" * 40_000), "32767"),
        (lambda: [book.delete_sheet("Two"), book.delete_sheet("Data")], "at least one visible"),
    ]:
        with pytest.raises(EngineError, match=match):
            call()


def test_ids_stay_with_their_sheet(book):
    before = {info.name: info.id for info in book.sheets()}
    book.rename_sheet("Data", "X")
    book.move_sheet("X", 1)
    book.add_sheet("Data")
    after = {info.name: info.id for info in book.sheets()}
    assert after["X"] == before["Data"] and after["Two"] == before["Two"] and after["Data"] not in before.values()


def test_contents_tell_arrays_from_what_they_fill(book):
    book.set_formula("Data", 10, 1, "=SEQUENCE(2,3)")
    book.recalculate()
    assert book.contents("Data")[10, 1] == StoredFormula("=SEQUENCE(2,3)", (2, 3))
    assert (10, 2) not in book.contents("Data") and book.value("Data", 11, 3) == 6.0


@pytest.mark.parametrize("content", ["=A1", "=A1:A2", 7.0, "text", True, CellError("#N/A"), None])
def test_what_replaces_an_array_takes_the_place_of_all_it_filled(book, content):
    book.set_formula("Data", 10, 5, "=A1:A4")
    book.recalculate()
    if isinstance(content, str) and content.startswith("="):
        book.set_formula("Data", 10, 5, content)
    else:
        book.set_value("Data", 10, 5, content)
    book.recalculate()
    below = [2.0, None, None] if content == "=A1:A2" else [None, None, None]
    assert [row[0] for row in book.values("Data", 11, 5, 13, 5)] == below
    assert {at for at in book.contents("Data") if at[1] == 5} == ({(10, 5)} if content is not None else set())


def test_a_fill_over_an_array_and_what_it_filled(book):
    book.set_formula("Data", 10, 5, "=A1:A4")
    book.recalculate()
    for row in (10, 11):
        book.set_formula("Data", row, 5, f"=A{row - 9}*10")
    book.recalculate()
    assert [row[0] for row in book.values("Data", 10, 5, 13, 5)] == [10.0, 20.0, None, None]
    assert {at: c for at, c in book.contents("Data").items() if at[1] == 5} == {
        (10, 5): StoredFormula("=A1*10"),
        (11, 5): StoredFormula("=A2*10"),
    }


def test_a_refused_formula_leaves_the_array_as_it_was(book):
    book.set_formula("Data", 10, 5, "=A1:A4")
    book.recalculate()
    for refused in ("=SUM(", '=WEBSERVICE("x")'):
        with pytest.raises(EngineError):
            book.set_formula("Data", 10, 5, refused)
    with pytest.raises(EngineError, match="characters"):
        book.set_value("Data", 10, 5, "x" * 40_000)
    book.recalculate()
    assert [row[0] for row in book.values("Data", 10, 5, 13, 5)] == [1.0, 2.0, 3.0, 4.0]


def entered_array():
    made = openpyxl.Workbook()
    made.active["A1"], made.active["C1"] = 2, ArrayFormula("C1:C3", "=ROW(A1:A3)*A1")
    made.active["E1"] = ArrayFormula("E1:F2", "=TODAY()")
    made.active["H1"] = ArrayFormula("H1", "=SUM(ROW(A1:A3)*A1)")
    return get_engine().open(saved(made))


@pytest.mark.parametrize("at", [(1, 3), (2, 3)])
@pytest.mark.parametrize("content", ["=A1", 7.0, None])
def test_no_part_of_an_entered_array_is_changed_alone(at, content):
    book = entered_array()
    with pytest.raises(EngineError, match="array formula that was entered over several cells"):
        book.set_formula("Sheet", *at, content) if content == "=A1" else book.set_value("Sheet", *at, content)
    book.recalculate()
    assert [row[0] for row in book.values("Sheet", 1, 3, 3, 3)] == [2.0, 4.0, 6.0]
    assert book.contents("Sheet")[1, 3] == StoredFormula("=ROW(A1:A3)*A1", (3, 1))


def test_entered_arrays_keep_their_range_when_they_are_pinned_and_a_single_cell_may_be_replaced():
    book = entered_array()
    assert book.contents("Sheet")[1, 5] == StoredFormula("=TODAY()", (2, 2))
    (day, *same) = [value for row in book.values("Sheet", 1, 5, 2, 6) for value in row]
    assert day == 45658.0 and same == [day] * 3, "every cell has the engine's clock, not the machine's"
    book.set_formula("Sheet", 1, 8, "=A1")
    book.recalculate()
    assert book.value("Sheet", 1, 8) == 2.0


def test_number_formats_and_merges():
    made = openpyxl.Workbook()
    made.active["A1"] = datetime(2024, 1, 5)
    made.active.merge_cells("B2:C4")
    book = get_engine().open(saved(made))
    assert book.number_format("Sheet", 1, 1) == "yyyy-mm-dd h:mm:ss" and book.value("Sheet", 1, 1) == 45296.0
    assert list(book.merged("Sheet")) == [(2, 2, 4, 3)]
    book.set_number_format("Sheet", 9, 9, "0.000")
    assert get_engine().restore(book.snapshot()).number_format("Sheet", 9, 9) == "0.000"


def test_1904_dates_are_seen_and_kept():
    made = openpyxl.Workbook()
    made.epoch = openpyxl.utils.datetime.MAC_EPOCH
    book = get_engine().open(saved(made))
    assert book.date1904 and get_engine().restore(book.snapshot()).date1904
    assert not get_engine().open(PACKAGE).date1904


# Bugs of IronCalc 0.9.1 that loading works around; each fails without the work-around.


def test_comments_of_openpyxl_load():
    made = openpyxl.Workbook()
    made.active["A1"] = 5
    made.active["A1"].comment = Comment("hello", "me")
    assert get_engine().open(saved(made)).value("Sheet", 1, 1) == 5.0


def test_styled_empty_cells_stay_empty():
    made = openpyxl.Workbook()
    made.active["A1"].font = openpyxl.styles.Font(bold=True)
    made.active["A2"] = "=ISBLANK(A1)"
    book = get_engine().open(saved(made))
    assert book.value("Sheet", 1, 1) is None and book.value("Sheet", 2, 1) is True


def test_nothing_stays_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    book = get_engine().open(PACKAGE)
    book.set_value("Data", 1, 1, 2.0)
    book.recalculate()
    assert list(tmp_path.iterdir()) == []


# Volatile functions


VOLATILE = "=TODAY()+RAND()+RANDBETWEEN(1,100)*YEAR(NOW())"


def test_two_runs_give_equal_values_and_other_seeds_or_clocks_others(engine):
    def run(**options):
        found = get_engine(engine.name, **options).open(PACKAGE)
        for row in range(1, 6):
            found.set_formula("Data", row, 9, VOLATILE)
        found.recalculate()
        return found.values("Data", 1, 9, 5, 9)

    assert run(seed=3) == run(seed=3)
    assert run(seed=3) != run(seed=4)
    assert run(clock=datetime(2020, 5, 1, tzinfo=UTC)) != run(clock=datetime(2021, 5, 1, tzinfo=UTC))
    assert len({row[0] for row in run(seed=3)}) == 5


def test_clock_agrees_between_engines_and_in_files():
    made = openpyxl.Workbook()
    made.active["A1"], made.active["A2"], made.active["A3"] = "=TODAY()", "=NOW()", '=IF(TRUE,"TODAY()",1)'
    clock = datetime(2021, 3, 4, 18, 0, tzinfo=UTC)
    for name in ("ironcalc", "formualizer"):
        found = get_engine(name, clock=clock).open(saved(made))
        assert found.values("Sheet", 1, 1, 3, 1) == [[44259.0], [44259.75], ["TODAY()"]]
    book = get_engine("ironcalc", clock=clock).open(saved(made))
    assert book.formula("Sheet", 2, 1) == "=NOW()"
    cached = openpyxl.load_workbook(io.BytesIO(write_cached_values(saved(made), clock)), data_only=True).active
    assert cached["A1"].value in (44259, datetime(2021, 3, 4))


@given(
    st.lists(
        st.sampled_from(["TODAY()", "now( )", "RAND()", "RANDBETWEEN(1,9)", '"RAND()"', "A1", "'TODAY()'!A1"]),
        min_size=1,
    )
)
def test_pinning_is_undone(parts):
    formula = "=" + "+".join(parts)
    assert (
        "TODAY(" not in pin("=TODAY()")
        and unpin(pin(formula)).replace(" ", "").upper() == formula.replace(" ", "").upper()
    )


# What could hang or end the process runs in another one


def guarded_state(formula):
    import ironcalc

    model = ironcalc.create("x")
    model.update_cell_with_formula(0, 1, 1, formula)
    return model.to_bytes()


@pytest.fixture(scope="module")
def guard():
    made = Guard(cpu_seconds=1, wall_seconds=45)
    yield made
    made.close()


def test_guard_answers_then_survives_a_crash_and_a_hang(guard):
    import ironcalc

    def value(formula):
        return ironcalc.load_from_bytes(guard.recalculate(guarded_state(formula))).get_cell_value(0, 1, 1)

    assert value("=SUM(SEQUENCE(100))") == 5050.0
    with pytest.raises(EngineError, match="ends the engine"):
        value("=LET(f,LAMBDA(g,n,IF(n=0,0,g(g,n-1))),f(f,1000000))")
    assert value("=1+1") == 2.0
    with pytest.raises(EngineError, match="more than"):
        value("=PERMUT(1E15,1E15)")
    assert value("=1+2") == 3.0


def test_unbounded_formulas_go_to_the_guard_and_come_back(book):
    book.set_formula("Data", 9, 1, '=REPT("ab",A1+1)')
    book.set_formula("Data", 9, 2, "=SUM(MAP(A1:A5,LAMBDA(x,x*2)))")
    book.recalculate()
    assert book.values("Data", 9, 1, 9, 2) == [["abab", 30.0]]
    assert book.value("Two", 1, 1) == 82.5


def test_recursion_never_reaches_the_engine(book):
    with pytest.raises(EngineError, match="call itself"):
        book.set_formula("Data", 9, 1, "=LET(f,LAMBDA(g,n,IF(n=0,0,g(g,n-1))),f(f,1000000))")


# LibreOffice: the pool's mechanics with a stand-in program, the real thing where it is installed


@pytest.fixture
def stand_in(tmp_path):
    """A program with LibreOffice's command line that answers, hangs or dies as the document says."""
    script = tmp_path / "soffice"
    script.write_text(
        f"""#!{sys.executable}
import os, subprocess, sys, time
from pathlib import Path
if "--version" in sys.argv:
    print("LibreOffice " + os.environ.get("STAND_IN_VERSION", "25.2.3.2") + " 520")
    sys.exit()
data = Path(sys.argv[-1]).read_bytes()
profile = next(a for a in sys.argv if a.startswith("-env:UserInstallation=")).split("file://")[1]
with open(Path(profile) / "used", "a") as log:
    log.write("x")
if data == b"hang":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", sys.argv[0]])
    time.sleep(600)
if data == b"die":
    os.kill(os.getpid(), 11)
if data == b"grow":
    keep = bytearray(300_000_000)
    time.sleep(600)
out = Path(sys.argv[sys.argv.index("--outdir") + 1])
out.mkdir()
settings = Path(profile) / "user" / "registrymodifications.xcu"
count = len((Path(profile) / "used").read_text())
(out / "book.xlsx").write_bytes(data + f" {{count}} {{settings.exists()}}".encode())
"""
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def test_pool_answers_with_a_profile_that_forbids_macros(stand_in):
    with LibreOffice(stand_in) as pool:
        assert (pool.name, pool.version) == ("libreoffice", "25.2.3.2")
        assert pool.recalculate(b"a") == b"a 1 True"
        assert pool.recalculate(b"b") == b"b 2 True"
        settings_file = next(pool._root.rglob("registrymodifications.xcu")).read_text()
    assert "MacroSecurityLevel" in settings_file and "OOXMLRecalcMode" in settings_file
    assert pool._root is None


def test_a_pool_makes_nothing_before_it_is_used_and_leaves_nothing(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    pool = LibreOffice(stand_in)
    assert not list((tmp_path / "t").iterdir())
    pool.recalculate(b"a")
    assert list((tmp_path / "t").iterdir())
    del pool
    gc.collect()
    assert not list((tmp_path / "t").iterdir())


def test_pool_kills_a_hang_with_everything_it_started(stand_in):
    with LibreOffice(stand_in, timeout=3) as pool:
        with pytest.raises(EngineError, match="more than 3 s"):
            pool.recalculate(b"hang")
        left = [p for p in psutil.process_iter(["cmdline"]) if stand_in in str(p.info["cmdline"])]
        for process in left:
            with suppress(psutil.Error):
                process.wait(30)
        assert not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        pool.timeout = 60
        assert pool.recalculate(b"a") == b"a 1 True"


def test_pool_survives_death_and_growth_and_renews_profiles(stand_in):
    with LibreOffice(stand_in, documents_per_profile=2, max_rss_bytes=200_000_000) as pool:
        with pytest.raises(EngineError, match="without a result"):
            pool.recalculate(b"die")
        with pytest.raises(EngineError, match="bytes"):
            pool.recalculate(b"grow")
        assert [pool.recalculate(b"a") for _ in range(3)] == [b"a 1 True", b"a 2 True", b"a 1 True"]


def test_pool_is_bounded(stand_in):
    with LibreOffice(stand_in, processes=1, timeout=1) as pool:
        seat = pool._free.get_nowait()
        with pytest.raises(EngineError, match="busy"):
            pool.recalculate(b"a")
        pool._free.put(seat)
    with pytest.raises(EngineError, match="closed"):
        pool.recalculate(b"a")


@pytest.mark.parametrize("version", ["7.4.7.2", "24.2.7.2"])
def test_old_libreoffice_is_refused_in_one_sentence(stand_in, monkeypatch, version):
    monkeypatch.setenv("STAND_IN_VERSION", version)
    with pytest.raises(EngineError, match=rf"LibreOffice {version} is too old.*install 24.8"):
        LibreOffice(stand_in)


def test_missing_libreoffice_is_told():
    with pytest.raises(EngineError, match="not installed"):
        find_libreoffice("no-such-program-anywhere")


def test_real_libreoffice_recalculates():
    try:
        path, _ = find_libreoffice()
    except EngineError as missing:
        pytest.skip(str(missing))
    with LibreOffice(path, timeout=120) as pool:
        done = openpyxl.load_workbook(io.BytesIO(pool.recalculate(PACKAGE)), data_only=True)
    assert done["Two"]["A1"].value == 82.5
