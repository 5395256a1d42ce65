"""Export: the edits are in the file, everything else is as it was, and opening it again gives the same book."""

import io
import os
import re
import runpy
import zipfile
from pathlib import Path

import openpyxl
import pytest
from espalier.envs.spreadsheet.edits import Format
from espalier.envs.spreadsheet.engines import EngineError, get_engine
from espalier.envs.spreadsheet.export import export_package
from espalier.envs.spreadsheet.package import check_package
from espalier.envs.spreadsheet.refs import Rect
from espalier.envs.spreadsheet.sheet_xml import SheetXml, patched
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl.styles import Font
from openpyxl.workbook.defined_name import DefinedName
from openpyxl.worksheet.formula import ArrayFormula

ENGINE = get_engine()
# the workbook whose export the benchmark measures
BENCHMARK = runpy.run_path(str(Path(__file__).parents[3] / "results" / "spreadsheet" / "rich_workbook.py"))
rich_workbook, kept = BENCHMARK["rich_workbook"], BENCHMARK["kept"]


def saved(made):
    out = io.BytesIO()
    made.save(out)
    return out.getvalue()


RICH = rich_workbook({"A1": "=SUM(Totals)", "A2": "=Data!D2", "B1": "x"})


def contents(book):
    return {(info.name, *at): c for info in book.sheets() for at, c in book.contents(info.name).items()}


def values(book):
    return {key: book.value(*key) for key in contents(book)}


def exported(edit, package=RICH, formats=()):
    start, live = ENGINE.open(package), ENGINE.open(package)
    edit(live)
    live.recalculate()
    data = export_package(package, start, live, formats)
    check_package(data)
    return data, live


def edit_some(book):
    book.set_formula("Data", 8, 4, "=SUM(D2:D7)")
    book.set_value("Data", 8, 1, "=not a formula <&> \"'")
    book.set_value("Data", 2, 2, 99.0)
    book.set_value("Data", 3, 1, None)
    book.set_value("Data", 20, 20, 45000.5)
    book.set_number_format("Data", 20, 20, 'yyyy-mm-dd "x"')
    book.set_value("Other", 5, 5, True)


def test_edits_are_there_with_cached_values_and_everything_else_is_kept():
    data, live = exported(edit_some)
    assert all(kept(data).values()), kept(data)
    sheet = openpyxl.load_workbook(io.BytesIO(data), data_only=True)["Data"]
    assert (sheet["D8"].value, sheet["B2"].value, sheet["A3"].value) == (499.5, 99, None)
    assert sheet["A8"].value == "=not a formula <&> \"'" and sheet["A8"].data_type == "s"
    assert sheet["T20"].number_format == 'yyyy-mm-dd "x"' and str(sheet["T20"].value) == "2023-03-15 12:00:00"
    again = ENGINE.open(data)
    assert contents(again) == contents(live) and values(again) == values(live)


def test_untouched_parts_are_byte_for_byte_the_same():
    data, _ = exported(lambda book: book.set_value("Other", 9, 9, 1.0))
    with zipfile.ZipFile(io.BytesIO(RICH)) as a, zipfile.ZipFile(io.BytesIO(data)) as b:
        changed = {n for n in a.namelist() if n not in b.namelist() or a.read(n) != b.read(n)}
    sheets = {n for n in changed if n.startswith("xl/worksheets/")}
    assert changed <= sheets | {"[Content_Types].xml", "xl/_rels/workbook.xml.rels"}
    assert "xl/worksheets/sheet2.xml" in sheets


@pytest.mark.parametrize("lost", ["bold", "chart", "comment", "merge"])
def test_the_check_of_what_is_kept_can_fail(lost):
    made = openpyxl.load_workbook(io.BytesIO(RICH))
    page = made["Data"]
    if lost == "bold":
        page["A1"].font = Font(bold=False)
    elif lost == "chart":
        page._charts.clear()
    elif lost == "comment":
        page["B1"].comment = None
    else:
        page.unmerge_cells("A10:C10")
    assert not kept(saved(made))[lost] and sum(not ok for ok in kept(saved(made)).values()) == 1


def test_structure_follows():
    def edit(book):
        book.rename_sheet("Data", "My Data")
        book.add_sheet("New")
        book.set_formula("New", 1, 1, "='My Data'!D6+1")
        book.delete_rows("My Data", 3, 2)
        book.copy_sheet("Other", "Copy")
        book.set_sheet_state("Other", "hidden")
        book.move_sheet("New", 0)

    data, live = exported(edit)
    made = openpyxl.load_workbook(io.BytesIO(data))
    assert made.sheetnames == ["New", "My Data", "Other", "Copy"]
    assert [sheet.sheet_state for sheet in made] == ["visible", "visible", "hidden", "visible"]
    assert made.defined_names["Totals"].attr_text.startswith("'My Data'!")
    assert made["My Data"]._charts[0].series[0].val.numRef.f.startswith("'My Data'!")
    assert [str(r) for r in made["My Data"].merged_cells.ranges] == ["A8:C8"]
    again = ENGINE.open(data)
    assert contents(again) == contents(live)


def test_deleted_sheets_are_gone_with_their_parts():
    data, live = exported(lambda book: book.delete_sheet("Data"))
    assert contents(ENGINE.open(data)) == contents(live)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        types = archive.read("[Content_Types].xml").decode()
    assert "xl/worksheets/sheet1.xml" not in names and "xl/worksheets/_rels/sheet1.xml.rels" not in names
    assert "/xl/worksheets/sheet1.xml" not in types


def test_local_names_follow_their_sheet():
    made = openpyxl.Workbook()
    for title in ("A", "B", "C"):
        sheet = made.create_sheet(title)
        sheet["A1"] = title
        sheet.defined_names["here"] = DefinedName("here", attr_text=f"{title}!$A$1")
    package = saved(made)

    def edit(book):
        book.delete_sheet("Sheet")
        book.delete_sheet("B")
        book.move_sheet("C", 0)

    data, _ = exported(edit, package)
    found = openpyxl.load_workbook(io.BytesIO(data))
    assert {s.title: s.defined_names["here"].attr_text for s in found} == {"C": "C!$A$1", "A": "A!$A$1"}


def test_dynamic_arrays_are_written_as_arrays_with_their_values():
    data, live = exported(lambda book: book.set_formula("Data", 2, 7, "=SEQUENCE(3)*B3"))
    cell = openpyxl.load_workbook(io.BytesIO(data))["Data"]["G2"].value
    assert cell.ref == "G2:G4" and cell.text == "=_xlfn.SEQUENCE(3)*B3"
    shown = openpyxl.load_workbook(io.BytesIO(data), data_only=True)["Data"]
    assert [shown.cell(r, 7).value for r in (2, 3, 4, 5)] == [3, 6, 9, None]
    again = ENGINE.open(data)
    assert again.values("Data", 2, 7, 4, 7) == live.values("Data", 2, 7, 4, 7)


def test_an_array_that_is_removed_leaves_nothing_behind():
    made = openpyxl.Workbook()
    made.active["A1"], made.active["C1"] = 2, ArrayFormula("C1:C3", "=ROW(A1:A3)*A1")
    with_values, live = exported(lambda book: None, saved(made))
    shown = openpyxl.load_workbook(io.BytesIO(with_values), data_only=True).active
    assert [row[0].value for row in shown["C1:C3"]] == [2, 4, 6]
    with pytest.raises(EngineError, match="array"):
        live.set_value("Sheet", 1, 3, None)  # as in Excel: no part of an array can be changed alone
    data, _ = exported(lambda book: book.delete_columns("Sheet", 3, 1), with_values)
    shown = openpyxl.load_workbook(io.BytesIO(data), data_only=True).active
    assert [shown.cell(row, 3).value for row in (1, 2, 3)] == [None, None, None]


def shared_formulas():
    """A sheet in which C2:C5 share one formula, as Excel writes fills."""
    made = openpyxl.Workbook()
    for row in range(2, 6):
        made.active.cell(row, 1, row)
        made.active.cell(row, 3, "=A2*10")
    data = saved(made)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "xl/worksheets/sheet1.xml":
                content = re.sub(rb"<f>A2\*10</f>", b'<f t="shared" si="0" ref="C2:C5">A2*10</f>', content, count=1)
                content = re.sub(rb"<f>A2\*10</f>", b'<f t="shared" si="0"/>', content)
            target.writestr(name, content)
    return out.getvalue()


def test_cells_that_shared_an_overwritten_formula_keep_it():
    package = shared_formulas()
    assert ENGINE.open(package).formula("Sheet", 5, 3) == "=A5*10"
    data, live = exported(lambda book: book.set_value("Sheet", 2, 3, 7.0), package)
    again = ENGINE.open(data)
    assert contents(again) == contents(live)
    assert [again.value("Sheet", r, 3) for r in range(2, 6)] == [7.0, 30.0, 40.0, 50.0]


def test_formats_are_applied():
    style = (
        ("bold", True), ("italic", True), ("underline", True), ("font_color", "#0000FF"), ("fill_color", "#00FF00"),
        ("number_format", "0.0"), ("text_rotation", -30), ("border_style", "thin"), ("border_color", "#FF0000"),
        ("row_height", 30.0), ("column_width", 12.0), ("horizontal_alignment", "center"), ("wrap_text", True),
    )  # fmt: skip
    data, _ = exported(lambda book: None, formats=[Format("Data", Rect(2, 2, 3, 3), style)])
    sheet = openpyxl.load_workbook(io.BytesIO(data), data_only=True)["Data"]
    cell = sheet["B3"]
    assert (cell.font.b, cell.font.i, cell.font.u, cell.font.color.rgb) == (True, True, "single", "000000FF")
    assert (cell.fill.start_color.rgb, cell.number_format, cell.alignment.textRotation) == ("0000FF00", "0.0", 120)
    assert (cell.alignment.horizontal, cell.alignment.wrap_text, cell.border.left.style) == ("center", True, "thin")
    assert (sheet.row_dimensions[2].height, sheet.column_dimensions["B"].width, sheet["D2"].value) == (30, 12, 6)
    assert len(sheet._charts) == 1


cells = st.dictionaries(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.one_of(
        st.none(), st.booleans(), st.floats(-1e9, 1e9), st.integers(-5, 5).map(float),
        st.sampled_from(["=1+1", "=A1&B2", "x"]), st.text("a<&>\"' \n\té_x0041", min_size=1, max_size=6),
    ),
    max_size=10,
)  # fmt: skip


@given(cells, st.sets(st.sampled_from(["=SUM(B2:B7)", "=A1&B2", "=COUNTA(Data!A1:D7)"])))
@settings(max_examples=25, deadline=None)
def test_opening_an_export_gives_the_book_back(found, formulas):
    def edit(book):
        for (row, column), content in found.items():
            book.set_value("Data", row, column, content)
        for i, formula in enumerate(sorted(formulas)):
            book.set_formula("Other", 20 + i, 1, formula)

    data, live = exported(edit)
    again = ENGINE.open(data)
    assert contents(again) == contents(live)
    assert values(again) == values(live)


@given(st.dictionaries(st.tuples(st.integers(1, 6), st.integers(1, 6)), st.floats(0, 9).map(float), max_size=6))
@settings(max_examples=60, deadline=None)
def test_patching_touches_only_its_cells_whatever_the_spelling(changed):
    head = b'<?xml version="1.0"?><x:worksheet xmlns:x="u" xmlns:q="v"><x:dimension ref="A1"/><x:sheetData >'
    rows = (
        b'<x:row r="1" spans="1:3"><x:c r="A1" s="2" ><x:v>1</x:v></x:c ><x:c r="C1"/></x:row>\n'
        b'<x:row r="3" q:z="1"/><x:row ><x:c><x:v>4</x:v></x:c>'
        b'<x:c t="inlineStr"><x:is><x:t>a</x:t></x:is></x:c></x:row>'
    )
    data = head + rows + b"</x:sheetData ><x:pageMargins/></x:worksheet>"
    sheet = SheetXml(data)
    out = patched(sheet, changed, {})
    again = SheetXml(out)
    had = {(r.number, c.column) for r in sheet.rows for c in r.cells}
    assert had == {(1, 1), (1, 3), (4, 1), (4, 2)}
    assert {(r.number, c.column) for r in again.rows for c in r.cells} == had | changed.keys()
    for row in again.rows:
        for cell in row.cells:
            piece = out[cell.start : cell.stop]
            if (row.number, cell.column) in changed:
                assert piece.startswith(b"<x:c r=") and b"<x:v>" in piece
            else:
                assert piece in data
    assert out.endswith(b"<x:pageMargins/></x:worksheet>")
    if not changed:
        assert SheetXml(out).data.count(b"<x:c") == data.count(b"<x:c")


def test_real_workbooks_come_back_the_same():
    root = os.environ.get("ESPALIER_BENCH_DATA")
    if not root or not (Path(root) / "spreadsheetbench-20").is_dir():
        pytest.skip("ESPALIER_BENCH_DATA does not lead to spreadsheetbench-20")
    files = sorted((Path(root) / "spreadsheetbench-20" / "spreadsheet").glob("*/1_*_input.xlsx"))
    assert len(files) == 20
    for file in files:
        package = file.read_bytes()
        first = ENGINE.open(package).sheets()[0].name

        def edit(book, first=first):
            book.set_formula(first, 1, 200, "=1+1")
            book.set_value(first, 2, 200, "=text")

        data, live = exported(edit, package)
        again = ENGINE.open(data)
        assert contents(again) == contents(live), file.name
        assert again.values(first, 1, 200, 2, 200) == [[2.0], ["=text"]]
