"""A workbook with one of everything that an export must keep, and the question which of them are left in a file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from types import MappingProxyType

import openpyxl
from openpyxl.chart import BarChart, Reference
from openpyxl.comments import Comment
from openpyxl.formatting.rule import CellIsRule
from openpyxl.styles import Font, PatternFill
from openpyxl.workbook.defined_name import DefinedName
from openpyxl.worksheet.datavalidation import DataValidation


def rich_workbook(other: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """The package: sheet "Data" has 7 rows with formulas, bold and filled heading, formats, width, freeze, rule, chart,
    merge, validation, comment and a name; where `other` has cells, there is a sheet "Other" with them.
    """
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Data"
    sheet.append(["Name", "Qty", "Price", "Total"])
    for row in range(2, 8):
        sheet.append([f"n{row}", row, row * 1.5, f"=B{row}*C{row}"])
    sheet["A1"].font, sheet["A1"].fill = Font(bold=True), PatternFill("solid", start_color="FFFF00")
    sheet["C2"].number_format = "0.000"
    sheet.column_dimensions["A"].width = 30
    sheet.freeze_panes = "A2"
    red = PatternFill("solid", bgColor="FF0000")
    sheet.conditional_formatting.add("B2:B7", CellIsRule(operator="greaterThan", formula=["4"], fill=red))
    chart = BarChart()
    chart.add_data(Reference(sheet, min_col=2, min_row=1, max_row=7), titles_from_data=True)
    sheet.add_chart(chart, "H2")
    sheet.merge_cells("A10:C10")
    sheet["A10"] = "merged"
    validation = DataValidation(type="list", formula1='"a,b"')
    validation.add("E2")
    sheet.add_data_validation(validation)
    sheet["B1"].comment = Comment("hello", "me")
    book.defined_names["Totals"] = DefinedName("Totals", attr_text="Data!$D$2:$D$7")
    if other:
        page = book.create_sheet("Other")
        for at, content in other.items():
            page[at] = content
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def kept(package: bytes, title: str = "Data") -> dict[str, bool]:
    """Which features of `rich_workbook` are left, with its sheet now called `title`."""
    book = openpyxl.load_workbook(io.BytesIO(package))
    sheet = book[title]
    validations = sheet.data_validations.dataValidation
    return {
        "bold": bool(sheet["A1"].font.b),
        "fill": sheet["A1"].fill.start_color.rgb == "00FFFF00",
        "number format": sheet["C2"].number_format == "0.000",
        "width": sheet.column_dimensions["A"].width == 30,
        "freeze": sheet.freeze_panes == "A2",
        "conditional format": [str(rule.sqref) for rule in sheet.conditional_formatting] == ["B2:B7"],
        "chart": len(sheet._charts) == 1,
        "merge": [str(area) for area in sheet.merged_cells.ranges] == ["A10:C10"],
        "validation": [str(v.sqref) for v in validations] == ["E2"],
        "comment": sheet["B1"].comment is not None and sheet["B1"].comment.text == "hello",
        "name": "Totals" in book.defined_names,
    }
