"""What a user of a box sees: code runs, state stays, a rollback brings all of it back, a branch is apart."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from espalier.envs.sandbox import Box, BoxError, Limits, SnapshotIncomplete


def test_variables_stay_and_the_last_value_is_shown(box: Box) -> None:
    assert box.python("x = 20\nx + 1").text == "21\n"
    assert box.python("x").text == "20\n"
    failed = box.python("def f():\n    return 1 / 0\nf()")
    assert failed.status == 1
    assert "ZeroDivisionError" in failed.text and "return 1 / 0" in failed.text
    assert "worker.py" not in failed.text


def test_a_program_sees_the_interpreters_folder_and_environment(box: Box) -> None:
    box.python("import os; os.chdir('src'); os.environ['COLOUR'] = 'green'")
    assert box.shell("pwd; echo $COLOUR; exit 3").text == "/workspace/src\ngreen\n"
    assert box.shell("exit 3").status == 3


def test_the_users_folder_is_never_written_to(box: Box, workspace: Path) -> None:
    assert box.shell("echo more >> a.txt; rm -rf src; touch new; chmod 600 link").status == 0
    assert (workspace / "a.txt").read_text() == "first\n"
    assert (workspace / "src" / "mod.py").exists() and not (workspace / "new").exists()


def test_a_rollback_brings_back_files_and_interpreter(box: Box) -> None:
    box.python("import os, random; x = [1]; random.seed(3); random.random(); f = open('a.txt'); f.read(2)")
    box.python("os.environ['A'] = '1'; os.chdir('src'); os.umask(0o077)")
    box.shell("echo kept > /tmp/t; echo more >> ../a.txt")
    here = box.snapshot()
    future = "(x, random.random(), f.read(), os.environ.get('A'), os.getcwd(), os.umask(0o077), os.listdir('/tmp'))"
    expected = box.python(future).text
    box.python("x.append(2); os.environ['A'] = '2'; os.chdir('/tmp'); f.seek(0); os.remove('/tmp/t')")
    box.shell("rm -rf /workspace/src /workspace/a.txt; mkdir /workspace/src")
    for _ in range(3):
        box.rollback(here)
        assert box.python(future).text == expected
        assert box.shell("cat /workspace/a.txt /workspace/src/mod.py").text == "first\nmore\nVALUE = 1\n"


def test_branches_run_and_do_not_see_each_other(box: Box) -> None:
    box.python("x = 0; f = open('shared', 'w+'); f.write('abc'); f.flush()")
    here = box.snapshot()
    with box.branch(here) as left, box.branch(here) as right:
        for name, branch in (("left", left), ("right", right)):
            branch.python(f"x = {name!r}; f.write(x); f.flush(); open({name!r}, 'w').close()")
        assert left.python("x, open('shared').read()").text == "('left', 'abcleft')\n"
        assert right.python("x, open('shared').read()").text == "('right', 'abcright')\n"
        assert box.python("x, f.tell(), open('shared').read()").text == "(0, 3, 'abc')\n"
        assert left.shell("ls").text.split() == ["a.txt", "left", "link", "shared", "src"]


def test_a_file_in_the_place_of_standard_input_keeps_its_offset(box: Box) -> None:
    box.python("import os; os.close(0); f = open('a.txt'); f.fileno(), f.read(2)")
    assert box.python("f.fileno()").text == "0\n"
    here = box.snapshot()
    for _ in range(2):
        assert box.python("os.lseek(0, 0, os.SEEK_CUR), os.read(0, 3)").text != ""
        box.python("os.lseek(0, 0, os.SEEK_SET)")
        box.rollback(here)
        assert box.python("os.lseek(0, 0, os.SEEK_CUR)").text == "6\n"


def test_a_snapshot_of_an_unchanged_state_is_the_same_one(box: Box) -> None:
    box.python("x = 1")
    first = box.snapshot()
    assert box.snapshot().number == first.number
    box.rollback(first)
    assert box.snapshot().number == first.number
    box.python("x = 2")
    assert box.snapshot().number != first.number


def test_a_program_that_changed_nothing_leaves_the_snapshot_in_force(box: Box) -> None:
    box.python("x = 1; import gc; gc.disable()")
    here = box.snapshot()
    for command in ("ls -R | sort > /dev/null", "cat a.txt; cd src; X=1; false", "kill -9 $$"):
        before = box.stats()["processes"]
        box.shell(command)
        again = box.snapshot()
        assert again.number == here.number and box.stats()["processes"] == before, command
    box.rollback(again)
    assert box.python("x").text == "1\n"
    for command in ("echo more >> a.txt", "touch /tmp/new", "chmod 600 a.txt"):
        box.shell(command)
        again = box.snapshot()
        assert again.number != here.number, command
        here = again
    box.python("pass")
    assert box.snapshot().number != here.number


@pytest.mark.parametrize(
    "code",
    [
        "import signal; signal.signal(signal.SIGWINCH, lambda *_: seen.append(1))",
        "import signal; signal.signal(signal.SIGCHLD, lambda *_: seen.append(1))",
        "import subprocess; old = subprocess.Popen.wait; "
        "subprocess.Popen.wait = lambda *a, **k: (seen.append(1), old(*a, **k))[1]",
        "import sys; sys.addaudithook(lambda event, _: event == 'subprocess.Popen' and seen.append(1))",
        "import gc; gc.callbacks.append(lambda *_: seen.append(1)); gc.set_threshold(1)",
        "import gc; gc.set_threshold(1)\nclass Cycle:\n    def __del__(self): seen.append(1)\n"
        "gc.disable(); c = Cycle(); c.c = c; del c; gc.enable()",
        "import os; r, w = os.pipe(); os.write(w, b'ab'); seen = type('', (), {'__len__': lambda s: 1})()",
    ],
)
def test_what_a_program_set_off_in_the_interpreter_is_kept(box: Box, code: str) -> None:
    box.python("seen = []")
    assert box.python(code).status == 0
    first = box.snapshot()
    box.shell("kill -WINCH $PPID; sleep 0.1")
    again = box.snapshot()
    assert again.number != first.number
    box.rollback(again)
    assert box.python("len(seen) > 0").text == "True\n"


def test_a_snapshot_that_was_let_go_and_made_again_stays(box: Box) -> None:
    box.python("x = 1")
    box.snapshot()  # nobody keeps it
    again = box.snapshot()
    time.sleep(0.2)  # spare time, in which it would go
    box.python("x = 2")
    box.rollback(again)
    assert box.python("x").text == "1\n"


def test_a_branch_that_nobody_has_any_more_ends(box: Box) -> None:
    before = box.stats()["processes"]
    here = box.snapshot()
    other = box.branch(here)
    other.python("x = 1")
    assert box.stats()["processes"] > before
    box.drop(here)
    del other, here
    for _ in range(600):
        if box.stats()["processes"] == before:
            break
        time.sleep(0.05)
    assert box.stats()["processes"] == before
    assert box.python("1").text == "1\n"


def test_a_box_knows_whether_files_were_written_or_processes_left(box: Box) -> None:
    for command in ("cat a.txt; ls src", "cd /tmp", "kill -9 $$"):
        box.snapshot()
        box.shell(command)
        assert not box.changed(), command
    for command in ("touch new", "rm -r src", "echo 1 > /tmp/x", "chmod 600 a.txt", "sleep 30 &"):
        here = box.snapshot()
        box.shell(command)
        assert box.changed(), command
        box.rollback(here)
        assert not box.changed()


def test_a_masked_snapshot_is_made_before_the_next_call(box: Box) -> None:
    box.python("x = 1")
    here = box.snapshot(wait=False)
    assert box.python("x = 2; x").text == "2\n"
    box.rollback(here)
    assert box.python("x").text == "1\n"


def test_a_masked_snapshot_that_cannot_be_kept_says_so_when_it_is_used(box: Box) -> None:
    box.python("import socket; s = socket.socket()")
    here = box.snapshot(wait=False)
    assert box.python("s.close(); 1").text == "1\n"
    with pytest.raises(SnapshotIncomplete, match="socket"):
        box.rollback(here)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "thread"),
        ("import subprocess; p = subprocess.Popen(['sleep', '60'])", "running process"),
        ("import subprocess; subprocess.run('sleep 60 & disown', shell=True)", "running process"),
        ("import socket; s = socket.socket()", "socket"),
        ("import socket; a, b = socket.socketpair()", "socket"),
        ("import asyncio; loop = asyncio.new_event_loop()", "anon_inode|socket"),
        ("import fcntl; f = open('a.txt'); fcntl.flock(f, fcntl.LOCK_EX)", "lock"),
        ("import fcntl; f = open('a.txt', 'r+'); fcntl.lockf(f, fcntl.LOCK_EX)", "lock"),
        (
            "import os; pid = os.fork() or os._exit(0); os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)",
            "nobody waited for",
        ),
        ("import os; n = [open(f'n{i}', 'w').close() for i in range(9)]; it = os.scandir('.'); next(it)", "listing"),
        ("import os; f = open('n', 'w'); os.chmod('n', 0)", "opened again"),
        ("import os; f = open('n', 'w'); os.link('n', 'm'); os.remove('n')", "other names"),
        ("from signal import *; pthread_sigmask(SIG_BLOCK, [10]); raise_signal(10)", "blocked signal"),
        ("from signal import *; pthread_sigmask(SIG_BLOCK, [40]); raise_signal(40)", "blocked signal"),
        ("import _multiprocessing as m; lock = m.SemLock(1, 3, 3, '/named', False)", "deleted file"),
        ("import os, resource as r; f = open('n', 'w'); os.dup2(f.fileno(), 99); r.setrlimit(7, (50, 50))", "limit"),
        ("import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')", "working directory"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(box: Box, code: str, reason: str) -> None:
    box.python("import time")
    assert box.python(code).status == 0
    box.python("time.sleep(0.1)")
    with pytest.raises(SnapshotIncomplete, match=reason) as caught:
        box.snapshot()
    assert caught.value.reasons
    assert box.python("6 * 7").text == "42\n"


def test_pipes_keep_their_contents_on_both_sides(box: Box) -> None:
    box.python("import os; r, w = os.pipe(); os.write(w, b'abcdef'); os.read(r, 2)")
    here = box.snapshot()
    assert box.python("os.write(w, b'XY'), os.read(r, 10)").text == "(2, b'cdefXY')\n"
    for _ in range(2):
        box.rollback(here)
        assert box.python("os.write(w, b'!'), os.read(r, 10)").text == "(1, b'cdef!')\n"


@pytest.mark.parametrize("broken", ["_own_pipes", "_own_memory"])
def test_control_without_what_carries_them_a_copy_shares_pipes_and_memory(box: Box, broken: str) -> None:
    """What the two tests around this one would see if nothing was carried."""
    box.python("import os, mmap, sys; r, w = os.pipe(); os.write(w, b'abc'); m = mmap.mmap(-1, 4096); m[:1] = b'1'")
    box.python(f"sys.modules['espalier_box.carry'].{broken} = lambda carried: None")
    here = box.snapshot()
    box.python("os.read(r, 10); os.write(w, b'later'); m[:1] = b'2'")
    box.rollback(here)
    kept = box.python("os.read(r, 10), m[:1]").text
    assert kept != "(b'abc', b'1')\n"


def test_shared_memory_is_apart_after_a_snapshot(box: Box) -> None:
    box.python("import mmap; m = mmap.mmap(-1, 10000); m[:5] = b'first'")
    box.python("f = open('data', 'w+b'); f.truncate(8192); g = mmap.mmap(f.fileno(), 8192); g[:5] = b'first'")
    here = box.snapshot()
    box.python("m[:5] = b'later'; g[:5] = b'later'; g.flush()")
    assert box.shell("head -c 5 data").text == "later"
    for _ in range(2):
        box.rollback(here)
        assert box.python("bytes(m[:5]), bytes(g[:5])").text == "(b'first', b'first')\n"
        assert box.shell("head -c 5 data").text == "first"
        box.python("m[:5] = b'other'; g[:5] = b'other'")
        assert box.shell("head -c 5 data").text == "other"


def test_an_unlinked_file_that_is_still_open_is_kept(box: Box) -> None:
    box.python("import os; f = open('gone', 'w+'); f.write('secret'); f.flush(); os.remove('gone'); f.seek(2)")
    here = box.snapshot()
    assert box.python("f.read()").text == "'cret'\n"
    box.python("f.seek(0); f.write('SECRET'); f.flush()")
    box.rollback(here)
    assert box.python("f.read()").text == "'cret'\n"
    assert "gone" not in box.shell("ls").text


def test_a_temporary_file_without_a_name_is_kept(box: Box) -> None:
    """Python's own way: O_TMPFILE, whose flags look like a folder's."""
    box.python("import tempfile; f = tempfile.TemporaryFile(); f.write(b'secret'); f.flush(); f.seek(2)")
    here = box.snapshot()
    assert box.python("f.read()").text == "b'cret'\n"
    box.python("f.seek(0); f.write(b'SECRET'); f.flush()")
    box.rollback(here)
    assert box.python("f.read()").text == "b'cret'\n"


def test_descriptors_of_one_opening_keep_one_offset(box: Box) -> None:
    box.python("import os; f = open('x', 'wb', buffering=0); g = os.dup(f.fileno()); h = open('x', 'rb', buffering=0)")
    box.python("f.write(b'ab')")
    here = box.snapshot()
    for again in (False, True, True):
        if again:
            box.rollback(here)
        box.python("os.write(g, b'c'); f.write(b'd')")
        assert box.python("h.read()").text == "b'abcd'\n", "the reader's own offset is 0"


def test_two_openings_of_an_unlinked_file_see_one_file(box: Box) -> None:
    box.python("import os; f = open('u', 'w+b', buffering=0); g = open('u', 'rb'); os.remove('u'); f.write(b'first')")
    here = box.snapshot()
    for again in (False, True):
        if again:
            box.rollback(here)
        assert box.python("f.write(b' second'); g.read()").text == "b'first second'\n"


def test_what_a_finished_child_said_can_still_be_read(box: Box) -> None:
    box.python("import subprocess; p = subprocess.Popen(['echo', 'said'], stdout=-1, stdin=-1); p.wait()")
    here = box.snapshot()
    assert box.python("p.stdout.read()").text == "b'said\\n'\n"
    for _ in range(2):
        box.rollback(here)
        assert box.python("p.stdout.read()").text == "b'said\\n'\n"
        assert "BrokenPipeError" in box.python("p.stdin.write(b'x'); p.stdin.flush()").text


def test_a_pipe_to_who_is_outside_the_interpreter_is_refused(box: Box) -> None:
    box.python("import subprocess; p = subprocess.Popen(['sleep', '100'], stdout=-1)")
    with pytest.raises(SnapshotIncomplete) as caught:
        _ = box.snapshot().number
    assert any("outside the interpreter" in reason for reason in caught.value.reasons), caught.value.reasons


def test_a_semaphore_is_kept(box: Box) -> None:
    """multiprocessing's locks, which progress bars make too: memory of a file that was unlinked."""
    box.python("import multiprocessing; lock = multiprocessing.Semaphore(3); lock.acquire()")
    here = box.snapshot()
    assert box.python("lock.acquire(); lock.get_value()").text == "1\n"
    then = box.snapshot()
    for state, value in ((here, 2), (then, 1), (here, 2)):
        box.rollback(state)
        assert box.python("lock.get_value()").text == f"{value}\n"
        box.python("lock.acquire()")


TRY_LOCK = """
import fcntl, sys
try:
    fcntl.lockf(open('a.txt', 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print('held')
"""


@pytest.mark.parametrize("locked", ["f", "g"])
def test_a_refused_snapshot_leaves_locks_as_they_are(box: Box, locked: str) -> None:
    """A process loses its locks on a file with any descriptor of it that it closes."""
    box.write_file("try.py", TRY_LOCK.encode())
    box.python(f"import fcntl; f = open('a.txt', 'r+'); g = open('a.txt', 'r+'); fcntl.lockf({locked}, fcntl.LOCK_EX)")
    for _ in range(2):
        with pytest.raises(SnapshotIncomplete, match="lock"):
            box.snapshot()
        assert box.shell("python3 try.py").text == "held\n"


MAP = """
import ctypes as c, os
L = c.CDLL(None)
L.mmap.restype, L.mmap.argtypes = c.c_void_p, (c.c_void_p, c.c_size_t, c.c_int, c.c_int, c.c_int, c.c_long)
f = open(name, 'w+b'); f.truncate(8192)
m = L.mmap(None, 8192, 3, 1, f.fileno(), 0); c.memset(m, 97, 1)
"""
"""Shared memory of a file, without the descriptor that Python's mmap keeps."""


@pytest.mark.parametrize(
    ("name", "more", "kept"),
    [
        ("/dev/shm/sem.m", "f.close()", True),
        ("m", "f.close()", False),
        ("/dev/shm/sem.m", "pass", False),
        ("/dev/shm/sem.m", "f.truncate(4096); f.close()", False),
        ("/dev/shm/sem.m", "n = L.mmap(None, 8192, 3, 1, f.fileno(), 0); f.close()", False),
        ("/dev/shm/sem.m", "os.link(name, name + '2'); f.close()", False),
    ],
    ids=["semaphore", "any", "open", "shorter", "twice", "named"],
)
def test_memory_of_a_deleted_file_is_kept_where_it_is_a_semaphore_s_alone(
    box: Box, name: str, more: str, kept: bool
) -> None:
    assert box.python(f"name = {name!r}\n{MAP}\n{more}; os.remove(name)").status == 0
    if kept:
        here = box.snapshot()
        box.python("c.memset(m, 98, 1)")
        box.rollback(here)
    else:
        with pytest.raises(SnapshotIncomplete, match="deleted file"):
            _ = box.snapshot().number
    assert box.python("c.string_at(m, 1)").text == "b'a'\n"


def test_a_folder_that_a_snapshot_stands_in_can_be_removed(box: Box) -> None:
    box.python("import os; os.mkdir('d')")
    box.snapshot()
    box.python("os.chdir('d'); f = open('/workspace/a.txt')")
    box.python("f.close()")
    here = box.snapshot()  # nothing has been written since the other: both stand in one layer
    box.python("os.chdir('..'); os.rmdir('d')")
    gone = box.snapshot()
    box.rollback(here)
    assert box.python("os.getcwd(), os.listdir('/workspace').count('d')").text == "('/workspace/d', 1)\n"
    box.rollback(gone)
    assert box.python("os.getcwd(), os.listdir('/workspace').count('d')").text == "('/workspace', 0)\n"


def test_a_file_of_a_merged_layer_has_no_other_name_for_it(box: Box) -> None:
    box.python("import time; open('old', 'w').write('what it said')")
    for n in range(45):  # more layers than a stack may have
        box.python(f"open('step', 'w').write('{n}')")
        box.snapshot()
    assert box.python("import os; f = open('old'); os.stat('old').st_nlink > 1").text == "True\n", "control: merged"
    box.python("_ = f.read(5); os.remove('old')")
    here = box.snapshot()
    box.python("_ = f.read()")
    box.rollback(here)
    assert box.python("f.read(), os.path.exists('old')").text == "('it said', False)\n"


def test_a_finished_child_keeps_its_status(box: Box) -> None:
    box.python("import os, subprocess; p = subprocess.Popen(['sh', '-c', 'exit 7'])")
    box.python("_ = os.waitid(os.P_PID, p.pid, os.WEXITED | os.WNOWAIT)")
    here = box.snapshot()
    box.rollback(here)
    assert box.python("p.poll()").text == "7\n"


def test_a_timer_goes_on(box: Box) -> None:
    box.python("import signal, time; hits = []; signal.signal(signal.SIGALRM, lambda *_: hits.append(1))")
    box.python("signal.setitimer(signal.ITIMER_REAL, 1.0)")
    here = box.snapshot()
    box.rollback(here)
    assert box.python("time.sleep(1.5); hits").text == "[1]\n"


def test_threads_of_numpys_blas_are_no_obstacle(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, environment={"OPENBLAS_NUM_THREADS": "2"}) as box:
        box.python("import numpy as np, os; a = np.ones((400, 400)); (a @ a)[0, 0]")
        assert box.python("len(os.listdir('/proc/self/task'))").text == "2\n"
        here = box.snapshot()
        assert box.python("(a @ a)[0, 0]").text == "np.float64(400.0)\n"
        box.rollback(here)
        assert box.python("(a @ a)[0, 0], np.random.default_rng(0).random()").text.startswith("(np.float64(400.0)")


def test_a_box_of_a_background_job_can_be_interrupted(boxes_work: None) -> None:
    """A shell's `command &` starts with SIGINT ignored, and everything below it would."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "from espalier.envs.sandbox import Box\n"
        "with Box() as box:\n"
        "    out = box.python('while True: pass', seconds=2)\n"
        "    print(out.stopped, out.restarted)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "time False\n", done.stderr


def test_a_call_beyond_its_time_is_interrupted_and_the_interpreter_stays(box: Box) -> None:
    box.python("x = 5")
    out = box.python("print('begun', flush=True)\nwhile True: pass", seconds=3)
    assert (out.stopped, out.restarted) == ("time", False)
    assert "begun" in out.text and "KeyboardInterrupt" in out.text
    assert box.python("x").text == "5\n"
    out = box.shell("echo begun; sleep 60", seconds=3)
    assert (out.stopped, out.text) == ("time", "begun\n")


def test_an_interpreter_that_cannot_be_interrupted_is_replaced_and_files_stay(box: Box) -> None:
    box.python("x = 5; open('kept', 'w').write('1')")
    stubborn = (
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nopen('late', 'w').close()\nwhile True: pass"
    )
    out = box.python(stubborn, seconds=3)
    assert (out.stopped, out.restarted) == ("time", True)
    assert "NameError" in box.python("x").text
    assert box.shell("ls").text.split() == ["a.txt", "kept", "late", "link", "src"]
    crash = box.python("import os; os._exit(3)")
    assert (crash.stopped, crash.restarted) == ("crash", True)
    assert box.python("open('kept').read()").text == "'1'\n"


def test_processor_time_is_bounded_whatever_the_clock_says(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(cpu_seconds=1, seconds=60)) as box:
        assert box.python("while True: pass").stopped == "cpu"
        assert box.shell("while true; do :; done").stopped == "cpu"
        assert box.python("1 + 1").text == "2\n"


def test_a_network_is_there_only_when_asked_for(boxes_work: None, workspace: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ask = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5).close()"
        with Box(workspace, network=True) as box:
            assert box.python(ask).status == 0
        with Box(workspace) as box:
            assert "Error" in box.python(ask).text


def test_output_is_bounded(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(output=1000)) as box:
        out = box.python("for _ in range(100_000): print('x' * 50)")
        assert len(out.text) == 1000 and out.cut == 100_000 * 51 - 1000
        out = box.shell("yes | head -c 5000000")
        assert len(out.text) == 1000 and out.cut == 4_999_000


def test_files_are_read_and_written_from_outside(box: Box) -> None:
    box.write_file("made/deep/file.bin", b"\0\1\2")
    assert box.python("open('made/deep/file.bin', 'rb').read()").text == "b'\\x00\\x01\\x02'\n"
    assert box.shell("echo -n x >> made/deep/file.bin").status == 0
    assert box.read_file("/workspace/made/deep/file.bin") == b"\0\1\2x"
    assert ("deep", "folder", 0) in box.list_files("made")
    assert box.read_file("link") == b"first\n"
    with pytest.raises(FileNotFoundError):
        box.read_file("missing")
    with pytest.raises(FileNotFoundError):
        box.read_file("/etc/passwd")
    with pytest.raises(IsADirectoryError):
        box.read_file("src")


def test_by_design_a_folder_in_a_lower_layer_is_not_renamed_but_moved(box: Box) -> None:
    rename = "import errno, os\ntry: os.rename({!r}, 'to')\nexcept OSError as e: print(errno.errorcode[e.errno])"
    box.shell("mkdir upper && echo 1 > upper/file")
    assert box.python(rename.format("upper") + "\nelse: os.rename('to', 'upper')").text == ""
    here = box.snapshot()
    box.rollback(here)
    for folder in ("src", "upper"):
        assert box.python(rename.format(folder)).text == "EXDEV\n"
    assert box.shell("mv src moved && cat moved/mod.py; ls -d src").text.startswith("VALUE = 1\n")
    assert box.python("import shutil; shutil.move('upper', 'away'); open('away/file').read()").text == "'1\\n'\n"


def test_by_design_hard_links_part_when_one_is_written_to(box: Box) -> None:
    box.shell("echo old > one; ln one two; echo new > one")
    assert box.shell("cat two; stat -c %h two").text == "new\n2\n"
    box.rollback(box.snapshot())
    box.shell("echo newer > one")
    assert box.shell("cat one two; [ one -ef two ] || echo apart").text == "newer\nnew\napart\n"


def test_by_design_a_rollback_changes_the_process_number_and_not_the_clock_nor_the_machines_randomness(
    box: Box,
) -> None:
    box.python("import os, random, time; random.seed(1)")
    here = box.snapshot()
    look = "print(os.getpid(), time.time_ns(), os.urandom(16).hex(), random.random())"
    seen = []
    for _ in range(3):
        seen.append(box.python(look).text.split())
        box.rollback(here)
    pids, clock, machine, seeded = zip(*seen, strict=True)
    assert len(set(pids)) == len(set(machine)) == 3 and len(set(seeded)) == 1
    assert sorted(clock, key=int) == list(clock) and len(set(clock)) == 3


def test_dropped_snapshots_are_let_go(box: Box) -> None:
    for n in range(12):
        box.python(f"x = {n}")
        box.snapshot()
    box.python("1")  # tells the box what nobody has a handle to
    end = time.monotonic() + 30
    while box.stats()["snapshots"] > 1 + 1 and time.monotonic() < end:  # the pristine one, and the last
        time.sleep(0.05)  # it lets them go in spare time
    assert box.stats()["snapshots"] <= 1 + 1
    kept = [box.snapshot()]
    for n in range(5):
        box.python(f"x = {n}")
        kept.append(box.snapshot())
    assert box.stats()["snapshots"] >= 6
    box.drop(kept[2])
    with pytest.raises(BoxError, match="no_snapshot"):
        box.rollback(kept[2])
    box.rollback(kept[3])
    assert box.python("x").text == "2\n"


def test_the_least_valuable_snapshots_go_when_there_are_too_many(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(snapshots=4)) as box:
        kept = []
        for n in range(10):
            box.python(f"x = {n}")
            kept.append(box.snapshot())
            if n == 1:
                box.python("x = 'off'")
                box.rollback(kept[0])  # used, so worth more
        box.python("import time; time.sleep(0.3)")
        box.stats()
        assert box.stats()["snapshots"] <= 5
        box.rollback(kept[0])
        assert box.python("x").text == "0\n"
        with pytest.raises(BoxError, match="no_snapshot"):
            box.rollback(kept[2])


def test_a_snapshot_of_another_box_is_refused(box: Box, workspace: Path) -> None:
    with Box(workspace) as other, pytest.raises(BoxError, match="foreign"):
        box.rollback(other.snapshot())


def test_a_missing_workspace_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder"):
        Box(tmp_path / "missing")
    with pytest.raises(ValueError, match="not a size"):
        Box(tmp_path, Limits(memory="much"))


def test_a_closed_box_says_so(box: Box) -> None:
    here = box.snapshot()
    box.close()
    box.close()
    with pytest.raises(BoxError, match="closed"):
        box.rollback(here)
