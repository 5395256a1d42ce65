"""The spreadsheet environment: its exact texts, its rewards, its states, and that it touches no file."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import espalier.envs
import gymnasium
import pytest
from espalier.envs.check import check_agent_env
from espalier.envs.core import Action, EnvFailure, ToolCall, capabilities
from espalier.envs.spreadsheet import scoring
from espalier.envs.spreadsheet.cache import BookCache
from espalier.envs.spreadsheet.engines import EngineError, get_engine
from espalier.envs.spreadsheet.env import TOOLS, SpreadsheetEnv
from espalier.envs.spreadsheet.grading import Grader, Verdict
from espalier.envs.spreadsheet.scoring import Scorer
from espalier.envs.spreadsheet.task import Case, SpreadsheetTask

IN_PROCESS = [name for name in TOOLS.by_name if name != "code_interpreter"]


def test_it_is_registered_and_makes_without_wrapper_trouble(task: SpreadsheetTask) -> None:
    env = gymnasium.make("espalier/Spreadsheet-v0", tasks=[task])
    observation, info = env.reset(seed=1)
    assert info["task"] is task and observation.messages[0]["role"] == "user"
    assert capabilities(env) == {"rollback", "digest"}
    assert espalier.envs.SPREADSHEET == "espalier/Spreadsheet-v0"


def test_importing_the_room_loads_no_engine() -> None:
    code = (
        "import sys, gymnasium, espalier.envs; "
        "print([m for m in ('ironcalc','formualizer','openpyxl','torch','pyarrow','trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_the_contract_holds(task: SpreadsheetTask) -> None:
    passed = check_agent_env(lambda: SpreadsheetEnv([task], tools=IN_PROCESS), episodes=8)
    assert {"rollback_future", "branch_apart", "digest_equal", "sample_valid"} <= set(passed)


def test_the_first_message_is_exact(drive, task: SpreadsheetTask) -> None:
    def opening(**options: Any) -> str:
        return SpreadsheetEnv([task], **options).reset(seed=0)[0].messages[0]["content"]

    assert opening() == (
        "Put the total of Units below.\nAnswer: Data!C8\nSheets: Data B3:D6; Prices A1:B2; Empty Sheet empty"
    )
    assert opening(show_answer_position=False, show_sheets=False) == "Put the total of Units below."


def test_inspect_range_is_exact(drive) -> None:
    call = drive()
    assert call("inspect_range", range="B3:E11") == (
        'Region@B3 Units@C3 Price@D3\nEast@B4 12@C4 4.5@D4\n"North East"@B5 3@C5 2@D5\nWest@B6 7@C6 1.25@D6'
    )
    assert call("inspect_range", range="F1:H9") == "(empty)"
    assert call("inspect_range", range="A1:B2", sheet_name="Prices") == "key@A1\nEast@A2 9@B2"
    assert call("inspect_range", range="Prices!A2:B2") == "East@A2 9@B2"
    assert call("inspect_range", range="B4:C4,D3") == "B4:C4\nEast@B4 12@C4\nD3\nPrice@D3"
    assert call("inspect_range", range="c:c") == "Units@C3\n12@C4\n3@C5\n7@C6"
    assert call("inspect_range", range="4:4") == "East@B4 12@C4 4.5@D4"


def test_writing_tools_answer_with_what_the_cells_hold(drive) -> None:
    call = drive()
    assert call("fill_formula", start_cell="C8", formula_template="=SUM(C4:C6)") == "22@C8"
    assert call("fill_formula", start_cell="E4", formula_template="=C4*D4", end_row=6) == "54@E4 6@E5 8.75@E6"
    filled = call("fill_formula", start_cell="F4", formula_template="=$C4*2", end_row=6, end_col="G")
    assert filled == "24@F4 24@G4 6@F5 6@G5 ... (6 cells)"
    assert (
        call("inspect_range", range="C8:E8,E4", include_details=True) == "C8:E8\n22@C8{=SUM(C4:C6)}\nE4\n54@E4{=C4*D4}"
    )
    assert call("write_range", range="H4:H6", data=["x", True, 2.5]) == "x@H4 TRUE@H5 2.5@H6"
    assert call("write_range", range="H4", data=[["y", 1], [None, 2]]) == "y@H4 1@I4 TRUE@H5 2@I5"
    assert call("clear_range", range="H4:I6") == "cleared H4:I6"
    assert call("inspect_range", range="H1:I9") == "(empty)"
    assert call("fill_formula", start_cell="F4", formula_template="=C4/0") == "#DIV/0!@F4"
    assert call("submit") == "submitted"


def test_values_read_as_they_should(drive) -> None:
    call = drive()
    call("write_range", range="A20:F20", data=["TRUE", "a b", "12", "-x", "50%", "Größe"])
    assert call("inspect_range", range="A20:F20") == '"TRUE"@A20 "a b"@B20 "12"@C20 "-x"@D20 "50%"@E20 "Größe"@F20'
    call("write_range", range="A21:D21", data=[45296, 0.1, 1e20, 45296.75])
    assert call("inspect_range", range="A21:D21") == "45296@A21 0.1@B21 1e+20@C21 45296.75@D21"
    call("format_range", range="A21", number_format="yyyy-mm-dd")
    call("format_range", range="D21", number_format="yyyy-mm-dd hh:mm")
    assert call("inspect_range", range="A21:D21") == "2024-01-05@A21 0.1@B21 1e+20@C21 2024-01-05T18:00:00@D21"
    call("fill_formula", start_cell="A22", formula_template="=0.1+0.2")
    assert call("inspect_range", range="A22") == "0.3@A22"


def test_details_show_formatting(drive) -> None:
    call = drive()
    assert call("format_range", range="C4", bold=True, fill_color="#FFFF00", number_format="0.00").startswith(
        "formatted C4:"
    )
    assert call("inspect_range", range="C4", include_details=True) == "12@C4{fill=#FFFF00,bold,number_format=0.00}"
    call("delete_rows", rows=["1"])
    assert call("inspect_range", range="C3", include_details=True) == "12@C3{fill=#FFFF00,bold,number_format=0.00}"
    call("delete_columns", columns=["C"])
    assert "bold" not in call("inspect_range", range="C3", include_details=True)


def test_long_output_ends_with_where_to_go_on(drive) -> None:
    call = drive()
    call("write_range", range="A10:J70", data=7)
    lines = call("inspect_range", range="A10:J70").splitlines()
    assert len(lines) == 41 and lines[-1] == "... omitted_from=A50"
    call("write_range", range="A100:A300", data="word " * 30)
    text = call("inspect_range", range="A100:A300")
    assert len(text) <= 10_240 and text.splitlines()[-1].startswith("... omitted_from=A1")


def test_sheets_and_search(drive) -> None:
    call = drive()
    assert call("list_sheets") == "Data B3:D6 visible\nPrices A1:B2 visible\nEmpty Sheet empty visible"
    assert call("find_cells", query="east") == 'East@B4\n"North East"@B5\nEast@Prices!A2'
    assert call("find_cells", query="east", match="equals", sheet_name="Prices") == "East@A2"
    assert call("find_cells", query="East", **{"return": "first"}) == "East@B4"
    assert call("find_cells", query="east", max_results=1) == "East@B4\n... more than 1"
    assert call("find_cells", query="12", include_values=False) == "@C4"
    assert call("find_cells", query="^[EW].st$", match="regex", range="B3:B6") == "East@B4\nWest@B6"
    assert call("find_cells", query="nothing") == "(no match)"
    call("fill_formula", start_cell="C8", formula_template="=SUM(C4:C6)")
    assert call("find_cells", query="SUM(", search_in="formulas") == "22@C8{=SUM(C4:C6)}"
    assert call("recalculate_and_read", cell_ranges=["C8", "B4:C4"]) == "C8\n22@C8\nB4:C4\nEast@B4 12@C4"


def test_structure(drive) -> None:
    call = drive()
    call("fill_formula", start_cell="C8", formula_template="=SUM(C4:C6)+Prices!B2")
    assert call("delete_rows", rows=["5"]) == "deleted rows 5; Data B3:D7"
    assert call("inspect_range", range="C7", include_details=True) == "28@C7{=SUM(C4:C5)+Prices!B2}"
    assert (
        call("manage_sheet", action="copy", sheet_name="Prices", new_name="Copy").splitlines()[2]
        == "Copy A1:B2 visible"
    )
    assert call("manage_sheet", action="move", sheet_name="Copy", index=0).splitlines()[0] == "Copy A1:B2 visible"
    assert "Hidden" not in call("manage_sheet", action="hide", sheet_name="Copy")
    assert call("list_sheets").splitlines()[0] == "Copy A1:B2 hidden"
    assert call("manage_sheet", action="delete", sheet_name="Empty Sheet").count("\n") == 2
    assert call("manage_sheet", action="create", sheet_name="New").splitlines()[-1] == "New empty visible"
    assert call("delete_columns", columns=["E", "A", "D:E"], sheet_name="Data") == "deleted columns A, D:E; Data A3:B7"


def test_a_summary_has_a_line_a_column(drive) -> None:
    text = drive()("inspect_range", range="A:Z", mode="summary")
    assert text.splitlines() == [
        "B3:D6 rows=4 columns=3",
        "B first=Region filled=4 texts=4 distinct=4",
        "C first=Units filled=4 numbers=3 min=3 max=12 sum=22 texts=1 distinct=1",
        "D first=Price filled=4 numbers=3 min=1.25 max=4.5 sum=7.75 texts=1 distinct=1",
    ]


def solve(call: Any, formula: str | None = "=SUM(C4:C6)", value: object = None) -> tuple[Any, ...]:
    if formula is not None:
        call("fill_formula", start_cell="C8", formula_template=formula)
    else:
        call("write_range", range="C8", data=value)
    call("submit")
    return call.last


def test_a_formula_passes_every_case(drive) -> None:
    _, reward, terminated, truncated, info = solve(drive())
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info["cases"] == (True, True) and info["soft"] == 1.0 and info["collateral"] == 0
    assert all(v.passed for v in info["verdict"]) and "ungraded" not in info


def test_a_pasted_value_fails_on_the_perturbed_copy(drive) -> None:
    _, reward, _, _, info = solve(drive(), None, 22)
    assert reward == 0.0 and info["cases"] == (True, False) and info["soft"] == 0.5
    _, reward, _, _, info = solve(drive(perturbed=False), None, 22)
    assert reward == 1.0 and info["cases"] == (True,)


def test_stopping_at_a_failure_gives_the_same_reward(drive) -> None:
    _, reward, _, _, info = solve(drive(stop_at_failure=True), None, 23)
    assert reward == 0.0 and info["cases"] == (False,) and info["soft"] == 0.0
    _, reward, _, _, info = solve(drive(stop_at_failure=True))
    assert reward == 1.0 and info["cases"] == (True, True) and info["soft"] == 1.0


def test_an_evaluation_grades_every_case_after_a_rollback_too(drive) -> None:
    call = drive(stop_at_failure=True)
    env = call.env
    start = env.snapshot()
    env.reset(seed=0, options={"task": env.tasks[0], "evaluation": True})
    evaluation = env.snapshot()
    assert evaluation.digest != start.digest
    assert solve(call, None, 23)[4]["cases"] == (False, False)
    env.rollback(start)
    assert solve(call, None, 23)[4]["cases"] == (False,)
    env.rollback(evaluation)
    assert solve(call, None, 23)[4]["cases"] == (False, False)


def test_an_edit_another_case_does_not_allow_fails_it(task: SpreadsheetTask) -> None:
    import io

    import openpyxl

    book = openpyxl.load_workbook(io.BytesIO(task.cases[1].package))
    del book["Prices"]
    out = io.BytesIO()
    book.save(out)
    lacking = dataclasses.replace(task, cases=(task.cases[0], Case(out.getvalue(), task.cases[1].golden)))
    env = SpreadsheetEnv([lacking])
    env.reset(seed=0)
    env.step(Action("", (ToolCall("write_range", {"range": "A5", "data": 1, "sheet_name": "Prices"}),)))
    env.step(Action("", (ToolCall("fill_formula", {"start_cell": "C8", "formula_template": "=SUM(C4:C6)"}),)))
    _, reward, _, _, info = env.step(Action("done"))
    assert reward == 0.0 and info["cases"] == (True, False) and info["collateral"] == 1


def test_doing_nothing_and_saying_so_ends_the_episode_with_zero(drive) -> None:
    call = drive()
    call.do()
    _, reward, terminated, _, info = call.last
    assert (reward, terminated, info["collateral"]) == (0.0, True, 0)


def test_engines_that_disagree_give_no_verdict(drive) -> None:
    """IronCalc computes REDUCE with LAMBDA, formualizer does not, and there is no referee."""
    _, reward, terminated, _, info = solve(drive(referee="none"), "=REDUCE(0,C4:C6,LAMBDA(a,b,a+b))")
    assert terminated and math.isnan(reward)
    assert "disagree" in info["ungraded"] and None in info["cases"]
    _, reward, _, _, info = solve(drive(crosscheck=None), "=REDUCE(0,C4:C6,LAMBDA(a,b,a+b))")
    assert reward == 1.0 and "ungraded" not in info


def put_office(monkeypatch, folder: Path, version: str) -> Path:
    """A program with LibreOffice's command line on PATH, which sums C4:C6 into Data!C8; the log of what it was given to
    recalculate.
    """
    log, program = folder / "log", folder / "soffice"
    program.write_text(
        f"""#!{sys.executable}
import sys
from pathlib import Path
if "--version" in sys.argv:
    print("LibreOffice {version} 520")
    sys.exit()
import openpyxl
with open({str(log)!r}, "a") as log:
    log.write("x")
book = openpyxl.load_workbook(sys.argv[-1])
sheet = book["Data"]
sheet["C8"] = sum(sheet[cell].value for cell in ("C4", "C5", "C6"))
out = Path(sys.argv[sys.argv.index("--outdir") + 1])
out.mkdir()
book.save(out / "book.xlsx")
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    scoring._shared.cache_clear()  # a process keeps the referee it has found
    return log


def test_libreoffice_settles_what_the_engines_disagree_on_and_nothing_else(drive, monkeypatch, tmp_path) -> None:
    """Where it is installed, nobody has to ask for it; a disagreement is what starts it."""
    log = put_office(monkeypatch, tmp_path, "25.2.3.2")
    _, reward, _, _, info = solve(drive(), "=SUM(C4:C6)")
    assert reward == 1.0 and all("libreoffice" not in verdict.engines for verdict in info["verdict"])
    _, reward, _, _, info = solve(drive(), "=SUM(C4:C5)")
    assert reward == 0.0 and not log.exists()
    _, reward, _, _, info = solve(drive(), "=REDUCE(0,C4:C6,LAMBDA(a,b,a+b))")
    assert reward == 1.0 and log.read_text() == "xx"  # once a case
    assert [verdict.engines["libreoffice"] for verdict in info["verdict"]] == ["25.2.3.2"] * 2
    _, reward, _, _, _ = solve(drive(referee="none"), "=REDUCE(0,C4:C6,LAMBDA(a,b,a+b))")
    assert math.isnan(reward) and log.read_text() == "xx"


def test_a_branch_keeps_the_referee_that_was_chosen(drive, monkeypatch, tmp_path) -> None:
    put_office(monkeypatch, tmp_path, "25.2.3.2")
    call = drive()
    here = call.env.snapshot()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EngineError, match="not installed"):
        drive(referee="libreoffice")
    assert call.env._options.referee == "libreoffice 25.2.3.2"
    with pytest.raises(EnvFailure, match="other options"):
        drive().env.rollback(here)  # nothing is found now, so that is another environment


def test_a_libreoffice_that_will_not_do_is_left_alone(drive, monkeypatch, tmp_path) -> None:
    log = put_office(monkeypatch, tmp_path, "7.4.7.2")
    _, reward, _, _, _ = solve(drive(), "=REDUCE(0,C4:C6,LAMBDA(a,b,a+b))")
    assert math.isnan(reward) and not log.exists()
    for wanted, error, said in (
        ("libreoffice", EngineError, "7.4.7.2 is too old"),
        ("libreoffice 25.2.3.2", EngineError, "too old"),
        ("excel", ValueError, '"auto", "libreoffice" or "none"'),
    ):
        with pytest.raises(error, match=said):
            drive(referee=wanted)


def test_a_referee_of_another_version_is_not_taken_for_the_one_wanted(drive, monkeypatch, tmp_path) -> None:
    put_office(monkeypatch, tmp_path, "24.8.1.1")
    with pytest.raises(EngineError, match=r'"libreoffice 25\.2\.3\.2", but LibreOffice 24\.8\.1\.1'):
        drive(referee="libreoffice 25.2.3.2")


def test_nobody_waits_for_another_s_referee(drive, monkeypatch) -> None:
    """While one episode's disagreement is settled, another is graded."""
    began, go_on = Event(), Event()

    class Slow:
        name, version = "libreoffice", "1"

        def recalculate(self, package: bytes) -> bytes:
            began.set()
            assert go_on.wait(60)
            raise EngineError("no opinion")

    monkeypatch.setattr(scoring, "get_referee", lambda wanted: Slow())
    slow, quick = (drive(referee="libreoffice slow") for _ in range(2))
    with ThreadPoolExecutor(2) as threads:
        try:
            disputed = threads.submit(solve, slow, "=REDUCE(1,C4:C6,LAMBDA(a,b,a+b))-1")
            assert began.wait(60)
            assert threads.submit(solve, quick, "=SUM(C4:C6)*1").result(60)[1] == 1.0
            assert not disputed.done()
        finally:
            go_on.set()
        assert math.isnan(disputed.result(60)[1])


def test_a_turn_limit_truncates_and_grades(drive) -> None:
    call = drive(max_turns=2)
    call("fill_formula", start_cell="C8", formula_template="=SUM(C4:C6)")
    assert call.last[2:4] == (False, False)
    call("list_sheets")
    assert call.last[1:4] == (1.0, False, True)
    with pytest.raises(RuntimeError, match="reset"):
        call("list_sheets")


def test_reading_leads_to_the_same_state_unless_turns_are_counted(drive) -> None:
    for most in (None, 5):
        call = drive(max_turns=most)
        start = call.env.state_digest()
        call("list_sheets")
        assert (call.env.state_digest() == start) == (most is None)
        call("fill_formula", start_cell="C8", formula_template="=SUM(C4:C6)")
        assert call.env.state_digest() != start


def test_a_turn_that_met_a_limit_of_time_may_go_otherwise_next_time(drive, monkeypatch) -> None:
    call = drive()
    call("fill_formula", start_cell="C8", formula_template="=SUM(C4:C6)")
    assert "unrepeatable" not in call.last[4]
    monkeypatch.setattr("espalier.envs.spreadsheet.workspace.RECALC_BUDGET_S", 0.0)
    call("fill_formula", start_cell="C9", formula_template="=SUM(C4:C6)")
    assert "time of a recalculation" in call.last[4]["unrepeatable"]
    call("list_sheets")
    assert "unrepeatable" not in call.last[4]


def test_the_answer_is_nowhere_in_what_the_agent_reads(task: SpreadsheetTask) -> None:
    secret = 918273645.25
    hidden = dataclasses.replace(task, cases=(Case(task.cases[0].package, {("Data", 8, 3): secret}),))
    env = SpreadsheetEnv([hidden], tools=IN_PROCESS)
    heard = [m["content"] for m in env.reset(seed=0)[0].messages]
    env.action_space.seed(5)
    for _ in range(60):
        observation, _, terminated, _, info = env.step(env.action_space.sample())
        heard += [m["content"] for m in observation.messages]
        heard.append(repr({k: v for k, v in info.items() if k != "verdict"}))
        if terminated:
            env.reset()
    assert not any("918273645" in text for text in heard)


@pytest.fixture
def touched() -> Callable[[Callable[[], None]], list[str]]:
    """Files opened, and modules imported, while a function runs (by an audit hook that is on only then)."""
    seen: list[str] = []
    on = [False]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if on[0] and event in ("open", "import", "os.mkdir", "tempfile.mkdtemp", "subprocess.Popen"):
            seen.append(f"{event} {arguments[0]}")

    sys.addaudithook(hook)

    def run(body: Callable[[], None]) -> list[str]:
        seen.clear()
        on[0] = True
        try:
            body()
        finally:
            on[0] = False
        return list(seen)

    return run


def test_no_file_is_touched_between_reset_and_submission(task: SpreadsheetTask, touched, workbook) -> None:
    env = SpreadsheetEnv([task], tools=IN_PROCESS)

    def episode() -> None:
        env.reset(seed=0)
        for name, arguments in (
            ("inspect_range", {"range": "A1:Z50", "include_details": True}),
            ("fill_formula", {"start_cell": "C8", "formula_template": "=SUM(C4:C6)"}),
            ("fill_formula", {"start_cell": "C9", "formula_template": "=SUMM(C4:C6"}),
            ("write_range", {"range": "F4:G6", "data": "x"}),
            ("format_range", {"range": "F4", "bold": True, "number_format": "0.0"}),
            ("manage_sheet", {"action": "copy", "sheet_name": "Prices", "new_name": "P2"}),
            ("find_cells", {"query": "East"}),
            ("delete_rows", {"rows": ["20"]}),
        ):
            env.step(Action("", (ToolCall(name, arguments),)))
        env.branch(env.snapshot()).close()
        env.rollback(env.snapshot())
        env.state_digest()

    episode()  # the first time modules are imported and the workbook is opened
    env.step(Action("done"))
    assert touched(episode) == []
    assert openpyxl_calls(episode) == 0
    assert touched(Path(__file__).read_bytes) != []  # the hook does see
    assert openpyxl_calls(lambda: workbook([[1]])) > 0  # and so does the profile


def openpyxl_calls(body: Callable[[], object]) -> int:
    """How many functions of openpyxl run while `body` does."""
    count = 0

    def profile(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and "openpyxl" in frame.f_code.co_filename

    sys.setprofile(profile)
    try:
        body()
    finally:
        sys.setprofile(None)
    return count


def test_a_reset_restores_and_the_cache_is_bounded(task: SpreadsheetTask) -> None:
    engine = get_engine()
    cache = BookCache(max_bytes=1)
    first = cache.get(engine, task.cases[0])
    assert cache.get(engine, task.cases[0]) is first
    second = cache.get(engine, task.cases[1])
    assert len(cache) == 1 and cache.get(engine, task.cases[1]) is second
    roomy = BookCache()
    for case in task.cases:
        roomy.get(engine, case)
    assert len(roomy) == 2 and roomy.bytes <= roomy.max_bytes


def test_an_unreadable_workbook_is_a_failure_of_ours(task: SpreadsheetTask) -> None:
    broken = dataclasses.replace(task, cases=(Case(b"PK\x03\x04 not a zip", {}),))
    with pytest.raises(EnvFailure, match="workbook_unreadable"):
        SpreadsheetEnv([broken]).reset()


def test_options_that_cannot_be_are_refused(task: SpreadsheetTask) -> None:
    with pytest.raises(ValueError, match="no tool named 'fly'"):
        SpreadsheetEnv([task], tools=["fly"])
    with pytest.raises(ValueError, match="no engine named"):
        SpreadsheetEnv([task], engine="abacus")
    with pytest.raises(ValueError, match="no tasks"):
        SpreadsheetEnv([])
    with pytest.raises(TypeError, match="SpreadsheetTask"):
        SpreadsheetEnv([task]).reset(options={"task": "something else"})


def test_states_are_exact_across_processes(task: SpreadsheetTask, drive) -> None:
    """The digest after the same calls in a fresh interpreter is the same: nothing of time or identity is in it."""
    import pickle

    calls = [
        ("fill_formula", {"start_cell": "C8", "formula_template": "=SUM(C4:C6)+RAND()*0+TODAY()*0"}),
        ("write_range", {"range": "F4", "data": "x"}),
        ("manage_sheet", {"action": "copy", "sheet_name": "Prices", "new_name": "P2"}),
    ]
    call = drive()
    for name, arguments in calls:
        call(name, **arguments)
    code = (
        "import sys, json, pickle; from espalier.envs.spreadsheet.env import SpreadsheetEnv; "
        "from espalier.envs.core import Action, ToolCall; task, calls = pickle.load(sys.stdin.buffer); "
        "env = SpreadsheetEnv([task]); env.reset(seed=0); "
        "[env.step(Action('', (ToolCall(n, a),))) for n, a in calls]; print(env.state_digest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps((task, calls)), capture_output=True, timeout=120, check=True
    )
    assert done.stdout.decode().strip() == call.env.state_digest()


def test_volatile_functions_are_pinned(drive) -> None:
    one, two = drive(), drive()
    for name in ("RAND()", "TODAY()", "NOW()", "RANDBETWEEN(1,1000000)"):
        assert one("fill_formula", start_cell="F1", formula_template=f"={name}") == two(
            "fill_formula", start_cell="F1", formula_template=f"={name}"
        )


def test_a_snapshot_of_other_options_is_foreign(drive) -> None:
    with pytest.raises(EnvFailure, match="foreign_snapshot"):
        drive(terse=True).env.rollback(drive().env.snapshot())


def test_environments_step_and_grade_in_any_thread(task: SpreadsheetTask) -> None:
    """A runner steps one environment now in this thread, now in that one, and many at once."""

    def turn(env: SpreadsheetEnv, name: str, **arguments: Any) -> tuple[Any, ...]:
        return env.step(Action("", (ToolCall(name, arguments),)))

    envs = [SpreadsheetEnv([task], tools=IN_PROCESS) for _ in range(8)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        for _ in range(3):
            list(pool.map(lambda env: env.reset(seed=0), envs))
            list(pool.map(lambda env: turn(env, "inspect_range", range="A1:D9"), envs))
            fill = partial(turn, name="fill_formula", start_cell="C8", formula_template="=SUM(C4:C6)")
            assert {r[0].messages[0]["content"] for r in pool.map(fill, envs)} == {"22@C8"}
            assert [r[1] for r in pool.map(lambda env: turn(env, "submit"), envs)] == [1.0] * 8


def test_export_is_the_edited_workbook(drive) -> None:
    import io

    import openpyxl

    call = drive()
    call("fill_formula", start_cell="C8", formula_template="=SUM(C4:C6)")
    call("format_range", range="C8", bold=True)
    call("delete_rows", rows=["1"])
    data = call.env.export()
    formulas = openpyxl.load_workbook(io.BytesIO(data))["Data"]
    values = openpyxl.load_workbook(io.BytesIO(data), data_only=True)["Data"]
    assert formulas["C7"].value == "=SUM(C3:C5)" and formulas["C7"].font.b and not formulas["C8"].font.b
    assert values["C7"].value == 22


def test_terse_tools_are_short_and_offer_the_same_names(drive) -> None:
    call = drive(tools=["inspect_range", "fill_formula", "write_range", "submit"], terse=True)
    schemas = [t.to_openai(terse=call.env.terse) for t in call.env.tools]
    assert [s["function"]["name"] for s in schemas] == ["inspect_range", "write_range", "fill_formula", "submit"]
    assert "description" not in json.dumps(schemas) and "path" not in json.dumps(schemas)
    assert json.loads(call("list_sheets"))["error"]["code"] == "unknown_tool"


def test_the_same_edits_of_a_task_are_graded_once_and_others_are_not_taken_for_them(task, drive, monkeypatch) -> None:
    graded: list[int] = []
    grade = Grader.grade

    def counted(self: Grader, *arguments: Any, **more: Any) -> Any:
        graded.append(1)
        return grade(self, *arguments, **more)

    monkeypatch.setattr(Grader, "grade", counted)
    fresh = dataclasses.replace(task, id="graded-once")
    call = drive()

    def again(formula: str, on: SpreadsheetTask) -> tuple[float, Any, int]:
        call.env.reset(options={"task": on})
        before = len(graded)
        _, reward, _, _, info = solve(call, formula)
        return reward, info["cases"], len(graded) - before

    assert again("=SUM(C4:C6)", fresh) == (1.0, (True, True), 2)
    assert again("=SUM(C4:C6)", fresh) == (1.0, (True, True), 0)
    assert again("=SUM(C4:C5)", fresh) == (0.0, (False, False), 2)
    wrong = dataclasses.replace(fresh.cases[1], golden={("Data", 8, 3): 8.0})
    other = dataclasses.replace(fresh, cases=(fresh.cases[0], wrong))
    assert again("=SUM(C4:C6)", other) == (0.0, (True, False), 2), "the answers are part of what a score belongs to"


def test_no_verdict_is_never_remembered(drive, monkeypatch) -> None:
    call = drive()
    shared = call.env._scorer._shared
    kept: list[object] = []
    monkeypatch.setattr(shared, "keep", lambda key, score: kept.append(score))
    monkeypatch.setattr(Grader, "grade", lambda *_, **__: Verdict(None, 0, 1, {}, (("Data", 8, 3),)))
    _, reward, _, _, info = solve(call, "=SUM(C4:C6)+0*1234")
    assert reward != reward and info["ungraded"] and not kept


def test_a_scorer_that_forgot_the_perturbed_cases_would_be_seen(drive) -> None:
    """Negative control: without the replay the pasted value passes."""
    call = drive()
    call.env._scorer = Scorer(get_engine(), call.env._cache, None, "none", perturbed=False)
    _, reward, _, _, _ = solve(call, None, 22)
    assert reward == 1.0
