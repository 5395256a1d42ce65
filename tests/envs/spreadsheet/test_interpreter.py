"""code_interpreter with real processes: bounded in every direction, blind to everything but its workbook."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from espalier.envs.core import ToolCall
from espalier.envs.spreadsheet.engines import get_engine
from espalier.envs.spreadsheet.interpreter import CodeLimits, CodeResult, CodeRunner

LIMITS = CodeLimits(seconds=60, memory_mb=512, processes=16, file_mb=8, output=2_000)


def run(code: str, limits: CodeLimits = LIMITS) -> CodeResult:
    runner = CodeRunner(limits)
    try:
        return runner.run(code, b"DATA")
    finally:
        runner.close()


@pytest.fixture(scope="module")
def isolated() -> None:
    refused = run("pass").refused
    if refused is not None:
        pytest.skip(f"no namespaces here: {refused}")


@pytest.fixture(autouse=True)
def nothing_left_behind():
    def folders() -> set[str]:
        return {p.name for p in Path(tempfile.gettempdir()).glob("espalier-code-*")}

    before, mine = folders(), psutil.Process()
    yield
    assert folders() <= before
    assert [p for p in mine.children(recursive=True) if "espalier_box" in " ".join(p.cmdline())] == []


def test_it_runs_and_hands_the_file_back(isolated: None) -> None:
    result = run("print('hello'); open('data.xlsx', 'a').write(' and more')")
    assert result == CodeResult("hello\n", 0, None, b"DATA and more")
    failed = run("raise ValueError('no')")
    assert failed.status == 1 and "ValueError: no" in failed.output


def test_an_endless_loop_is_killed(isolated: None) -> None:
    result = run("while True: pass", CodeLimits(seconds=2))
    assert result.stopped == "time" and result.package is None


def test_a_sleeper_that_left_its_session_is_killed_too(isolated: None) -> None:
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\nprint('parent done')"
    result = run(code)
    assert result.output == "parent done\n" and result.stopped is None


def test_a_memory_bomb_fails_inside(isolated: None) -> None:
    result = run("x = bytearray(40_000_000_000)")
    assert result.status == 1 and "MemoryError" in result.output


def test_a_fork_bomb_is_bounded(isolated: None) -> None:
    code = """
import os, time
made = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(600)
        made += 1
except OSError:
    print(made)
"""
    result = run(code)
    assert 0 < int(result.output) < LIMITS.processes + 12  # the clean state and the box's own come on top


def test_files_and_output_are_bounded(isolated: None) -> None:
    assert "No space left" in run("open('big', 'wb').write(bytes(100_000_000))").output
    code = "for i in range(50): open(str(i), 'wb').write(bytes(7_000_000))"
    assert "No space left" in run(code).output
    long = run("print('x' * 1_000_000)")
    assert len(long.output) <= LIMITS.output and "output cut, 1000001 bytes" in long.output


def test_there_is_no_network(isolated: None) -> None:
    code = """
import socket
for host in ('1.1.1.1', '127.0.0.1'):
    try:
        socket.create_connection((host, 80), 5)
    except OSError as error:
        print(error)
"""
    result = run(code)
    assert result.output.count("\n") == 2 and "unreachable" in result.output


def test_nothing_of_the_machine_is_to_be_seen(isolated: None, tmp_path: Path) -> None:
    oracle = tmp_path / "answer.xlsx"
    oracle.write_text("42")
    oracle.chmod(0o644)
    os.environ["ESPALIER_TEST_SECRET"] = "s3cret"
    try:
        code = f"""
import os
print(sorted(os.environ), os.listdir('.'))
for path in ({str(oracle)!r}, '/proc/1/environ', '/proc/{os.getpid()}/mem', '/etc/shadow', '/home'):
    try:
        print(os.stat(path))
    except OSError as error:
        print(type(error).__name__)
for path in ('/x', '/usr/x', {sys.prefix + "/x"!r}):
    try:
        open(path, 'w')
    except OSError as error:
        print(type(error).__name__)
try:
    os.kill({os.getpid()}, 0)
except OSError as error:
    print(type(error).__name__)
print(os.getuid() != 0)
"""
        lines = run(code).output.splitlines()
    finally:
        del os.environ["ESPALIER_TEST_SECRET"]
    assert "s3cret" not in "".join(lines) and "ESPALIER_TEST_SECRET" not in lines[0]
    assert sorted(lines[0].split("[")[2].strip("]").replace("'", "").split(", ")) == ["data.xlsx"]
    assert lines[1:6] == ["FileNotFoundError"] * 5
    assert lines[6:9] == ["OSError"] * 3
    assert lines[9:] == ["ProcessLookupError", "True"]


def test_a_link_in_place_of_the_file_is_not_followed(isolated: None) -> None:
    code = "import os; os.remove('data.xlsx'); os.symlink('/usr/bin/env', 'data.xlsx')"
    assert run(code).package is None


def test_no_way_back_out_of_the_new_root(isolated: None) -> None:
    code = """
import ctypes, os, threading
libc = ctypes.CDLL(None, use_errno=True)
print(libc.mount(b'none', b'/workspace', b'tmpfs', 0, None), libc.unshare(0x10000000), libc.setns(0, 0))
print(libc.clone(0, 0, 0x10000011, 0), libc.memfd_create(b'x', 0), libc.shmget(0, 99, 0o1600), libc.ptrace(0, 0, 0, 0))
try:
    os.chroot('.')
except OSError as error:
    print(type(error).__name__)
thread = threading.Thread(target=print, args=('threads work',))
thread.start(); thread.join()
"""
    assert run(code).output.splitlines() == ["-1 -1 -1", "-1 -1 -1 -1", "PermissionError", "threads work"]


def test_many_processes_share_the_memory_limit(isolated: None) -> None:
    code = """
import os, time
for _ in range(10):
    if os.fork() == 0:
        kept = bytearray(os.urandom(1)) * 150_000_000
        time.sleep(600)
time.sleep(600)
"""
    assert run(code).stopped == "memory"


def test_without_isolation_nothing_runs_as_root() -> None:
    if os.getuid() != 0:
        pytest.skip("only root becomes another user, or is refused")
    result = CodeRunner(LIMITS, "none").run("import os\nprint('user', os.getuid())", b"DATA")
    if result.refused is None:
        assert result.output.startswith("user ") and result.output != "user 0\n"
    else:
        assert "root" in result.refused and result.output == ""


def test_where_isolation_fails_the_tool_refuses_and_says_why(drive, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() != 0:
        pytest.skip("needs a refusal to provoke: root with code_isolation='none'")
    monkeypatch.setattr(sys, "executable", "/missing/python")
    call = drive(code_isolation="none")
    answer = json.loads(call("code_interpreter", code="print(1)"))["error"]
    assert answer["code"] == "unavailable" and answer["retryable"] is False and "root" in answer["message"]


def test_macros_that_the_code_put_in_are_left_out_and_it_is_told(isolated: None, drive) -> None:
    code = """
import openpyxl, zipfile
book = openpyxl.load_workbook('data.xlsx')
book['Data']['C8'] = 5
book.save('data.xlsx')
with zipfile.ZipFile('data.xlsx', 'a') as archive:
    archive.writestr('xl/vbaProject.bin', b'macro')
"""
    answer = drive(code_seconds=60.0)("code_interpreter", code=code)
    assert answer == "[data.xlsx: 1 cells changed; macros were removed]"


def test_what_the_code_does_to_the_workbook_becomes_edits(isolated: None, drive) -> None:
    call = drive(code_seconds=60.0)
    code = """
import openpyxl
book = openpyxl.load_workbook('data.xlsx')
data = book['Data']
print([c.value for c in data[4]])
data['C8'] = '=SUM(C4:C6)'
data['F4'] = 'new'
data['B6'] = None
book.create_sheet('Made')['A1'] = 5
book.save('data.xlsx')
"""
    answer = call("code_interpreter", code=code)
    assert answer == "[None, 'East', 12, 4.5]\n[data.xlsx: 4 cells changed]"
    assert call("inspect_range", range="B6:F8", include_details=True) == "7@C6 1.25@D6\n22@C8{=SUM(C4:C6)}"
    assert call("list_sheets").splitlines()[-1] == "Made A1:A1 visible"
    call("write_range", range="B6", data="West")
    call("submit")
    assert call.last[1] == 1.0


def test_cached_values_are_there_for_code_to_read(isolated: None, drive) -> None:
    call = drive(code_seconds=60.0)
    call("fill_formula", start_cell="C8", formula_template="=SUM(C4:C6)")
    code = "import openpyxl; print(openpyxl.load_workbook('data.xlsx', data_only=True)['Data']['C8'].value)"
    assert call("code_interpreter", code=code) == "22"


@pytest.mark.parametrize("left", ["b'nonsense'", "b'PK' + bytes(100)", "b''"])
def test_a_file_that_is_no_workbook_is_refused_and_changes_nothing(isolated: None, drive, left: str) -> None:
    call = drive(code_seconds=60.0)
    answer = json.loads(call("code_interpreter", code=f"open('data.xlsx', 'wb').write({left})"))
    assert answer["error"]["code"] == "bad_workbook"
    assert call.env.journal == () and call("inspect_range", range="B4") == "East@B4"


def test_code_that_runs_out_of_time_changes_nothing(isolated: None, drive) -> None:
    call = drive(code_seconds=4.0)
    code = """
import openpyxl
book = openpyxl.load_workbook('data.xlsx')
book['Data']['A1'] = 1
book.save('data.xlsx')
while True:
    pass
"""
    assert call("code_interpreter", code=code).splitlines()[-1] == "[stopped after 4 s; data.xlsx is as before]"
    assert call.env.journal == ()


def test_the_golden_values_are_not_in_the_file_the_code_gets(isolated: None, drive, task) -> None:
    call = drive(code_seconds=60.0)
    code = """
import zipfile
file = zipfile.ZipFile('data.xlsx')
print(sum(b'22' in file.read(name) for name in file.namelist() if 'sheet' in name))
"""
    assert call.do(ToolCall("code_interpreter", {"code": code})).splitlines()[0] == "0"
    assert get_engine().open(call.env.export()).value("Data", 8, 3) is None
