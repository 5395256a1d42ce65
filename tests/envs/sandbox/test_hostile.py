"""A guest that tries to get out, to reach others, or to use up the machine: it is held in, and the box goes on."""

from __future__ import annotations

import contextlib
import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from espalier.envs.sandbox import Box, BoxError, Limits, SnapshotIncomplete


def _code(text: str) -> str:
    return textwrap.dedent(text)


@pytest.mark.parametrize(
    "path", ["/etc/shadow", "/root/.bashrc", "/var/log", "/boot", "/sys/kernel", "/proc/1/root", "/proc/1/environ"]
)
def test_nothing_of_the_host_is_visible(box: Box, path: str) -> None:
    assert box.shell(f"ls -A {path} 2>/dev/null").text == ""
    assert box.shell(f"cat {path} 2>/dev/null").text == ""


def test_there_is_no_network(box: Box) -> None:
    out = box.python("import socket; s = socket.socket(); s.settimeout(1); s.connect_ex(('1.1.1.1', 53))")
    assert out.text.strip() not in ("0", "")
    assert box.shell("cat /proc/net/dev | grep -c :").text.strip() in ("0", "1")


@pytest.mark.parametrize(
    "call",
    [
        "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "libc.umount2(b'/workspace', 2)",
        "libc.unshare(0x10000000)",
        "libc.unshare(0x40000000)",
        "libc.setns(os.open('/proc/self/ns/mnt', 0), 0)",
        "libc.chroot(b'/tmp')",
        "libc.ptrace(16, 1, 0, 0)",
        "libc.syscall(428, -100, b'/', 1)",
        "libc.syscall(430, b'tmpfs', 0)",
        "libc.syscall(435, 0, 88)",
        "libc.mount(b'/tmp', b'/workspace', None, 4096, None)",
        "os.mknod('dev', 0o60644, os.makedev(8, 0)) or 0",
        "os.setuid(0) or 0",
        "libc.prlimit(1, 7, None, None)",
    ],
)
def test_what_would_lead_out_is_refused(box: Box, call: str) -> None:
    out = box.python(f"import ctypes, os; libc = ctypes.CDLL(None, use_errno=True); {call}")
    assert out.text.strip() == "-1" or "Error" in out.text, out.text


def test_even_with_a_mount_namespace_of_its_own_it_can_change_no_mount(box: Box) -> None:
    box.python("import ctypes; libc = ctypes.CDLL(None, use_errno=True); libc.unshare(0x20000)")
    assert box.python("libc.mount(b'none', b'/', None, 32 | 4096, None)").text == "-1\n"
    assert box.shell("touch /usr/x /etc/x 2>&1; mount -o remount,rw / 2>&1; true").text.count("rror") == 0
    assert not Path("/usr/x").exists() and not Path("/etc/x").exists()
    assert box.python("1").text == "1\n"


def test_no_program_has_a_capability(box: Box) -> None:
    again = "import ctypes; print(ctypes.CDLL(None).prctl(47, 2, 21, 0, 0))"  # raise it as ambient
    assert box.python(again).text == "-1\n"
    assert set(box.shell("grep Cap /proc/self/status | grep -v Bnd").text.split()[1::2]) == {"0" * 16}


def test_frozen_copies_and_siblings_cannot_be_signalled_or_seen(box: Box) -> None:
    box.python("x = 1")
    here = box.snapshot()
    with box.branch(here) as other:
        attack = _code(
            """
            import os, signal
            hit = []
            for pid in range(1, 200):
                if pid == os.getpid(): continue
                for sig in (signal.SIGKILL, signal.SIGSTOP, 0):
                    try: os.kill(pid, sig); hit.append(pid)
                    except OSError: pass
            for group in range(2, 200):
                if group == os.getpgid(0): continue
                try: os.killpg(group, signal.SIGKILL); hit.append(-group)
                except OSError: pass
            os.kill(-1, signal.SIGKILL)
            hit, [p for p in os.listdir('/proc') if p.isdigit() and int(p) != os.getpid()]
            """
        )
        assert box.python(attack).text == "([], [])\n"
        assert box.shell("kill -9 -1; echo no").text in ("", "no\n")
        assert other.python("x").text == "1\n"
    box.rollback(here)
    assert box.python("x").text == "1\n"


def test_it_can_signal_what_it_started(box: Box) -> None:
    out = box.python(
        "import subprocess; p = subprocess.Popen(['sleep', '60']); p.kill(); p.wait(), "
        "subprocess.run('sleep 60 & kill $!; wait $!; echo $?', shell=True, capture_output=True).stdout"
    )
    assert out.text == "(-9, b'143\\n')\n"


def test_a_fork_bomb_ends_with_its_call(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(pids=32, seconds=10)) as box:
        box.python("x = 1")
        here = box.snapshot()
        box.shell(":(){ :|:& };:", seconds=2)
        out = box.python("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", seconds=1)
        assert out.stopped == "time"
        box.rollback(here)
        assert box.python("x").text == "1\n"
        assert _until(lambda: box.stats()["processes"] < 12)


def test_a_memory_bomb_is_stopped(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(memory="200M", seconds=20)) as box:
        box.python("x = 1")
        here = box.snapshot()
        out = box.python("held = []\nwhile True: held.append(bytearray(1 << 20))")
        assert out.stopped in ("memory", "crash") or "MemoryError" in out.text
        box.rollback(here)
        assert box.python("x").text == "1\n"


def test_disk_and_inodes_are_bounded(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(files="20M", inodes=2000)) as box:
        here = box.snapshot()
        assert "No space" in box.shell("head -c 100M /dev/zero > big").text
        box.rollback(here)
        many = "import errno\ntry:\n    for n in range(10_000): open(f'f{n}', 'w').close()\nexcept OSError as e: print(e.errno)"
        assert box.python(many).text == "28\n"
        box.rollback(here)
        assert box.python("open('small', 'w').write('x')").text == "1\n"


@pytest.mark.parametrize("hold", ["pass", "f = open('/tmp/kept', 'w')"])
def test_a_snapshot_without_room_is_refused_and_nothing_is_lost(boxes_work: None, workspace: Path, hold: str) -> None:
    """Both ways of a snapshot (with and without something to carry) meet a full file system in mid-handshake."""
    with Box(workspace, Limits(files="20M", inodes=2000)) as box:
        box.python(f"x = 7; {hold}")
        first = box.snapshot()
        box.python("n = 0\ntry:\n    while True: open(f'f{n}', 'w').close(); n += 1\nexcept OSError: pass")
        with pytest.raises(SnapshotIncomplete, match="room"):
            box.snapshot()
        for _ in range(3):
            assert box.python("x += 1; n > 100, x > 7").text == "(True, True)\n"
        assert box.shell("rm -f f*; echo done").text == "done\n"
        second = box.snapshot()
        box.rollback(first)
        assert box.python("x").text == "7\n"
        box.rollback(second)
        assert box.python("x").text == "10\n"


def test_processes_are_as_many_as_the_limit_says_and_none_that_snapshots_need(
    boxes_work: None, workspace: Path
) -> None:
    grow = (
        "import resource, subprocess\n"
        "def grow():\n"
        "    started = []\n"
        "    try:\n        while True: started.append(subprocess.Popen(['sleep', '60']))\n"
        "    except OSError: return len(started)\n"
        "def more():\n"
        "    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]\n"
        "    try: resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))\n"
        "    except (OSError, ValueError): return 'refused'\n"
    )
    with Box(workspace, Limits(pids=4, snapshots=20)) as box:
        box.python("x = 1")
        first = box.snapshot()
        with box.branch(first) as other:
            other.python(grow)
            assert other.python("grow()").text == "4\n"
            assert other.python("more(), grow()").text == "('refused', 0)\n"
            assert other.shell("ulimit -Su hard; ulimit -Su $(ulimit -Hu)").status != 0
            assert box.python("x = 2; x").text == "2\n"
            second = box.snapshot()
            box.branch(first).close()
            box.rollback(first)
            assert box.python("x").text == "1\n"
            box.rollback(second)
        assert box.python("x").text == "2\n"


def test_no_interpreter_is_lost_when_there_are_too_many_branches(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(pids=4, snapshots=4, spares=0)) as box, contextlib.ExitStack() as branches:
        box.python("x = 1")
        first = box.snapshot()
        box.python("x = 2")
        with pytest.raises(BoxError):
            for _ in range(30):
                branches.enter_context(box.branch(first))
        with pytest.raises(SnapshotIncomplete, match="process"):
            box.snapshot()
        assert box.python("x").text == "2\n"
        box.rollback(first)
        assert box.python("x").text == "1\n"


def _until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return true()


SPIN = "while True: pass"
HOARD = "import time; held = [bytearray(b'x') * (30 << 20) for _ in range(3)]; time.sleep(600)"


@pytest.mark.parametrize("code", [SPIN, HOARD])
def test_what_a_call_leaves_running_is_bounded_between_calls(boxes_work: None, workspace: Path, code: str) -> None:
    """Four processes of 90 MB each are over a limit of 300 MB only together."""
    with Box(workspace, Limits(memory="300M", cpu_seconds=2, seconds=60)) as box:
        box.python("x = 7")
        alone = box.stats()["processes"]
        box.shell("sleep 600 & sleep 600 & true")
        waits = "import os, time\nwhile not os.path.exists('/workspace/go'): time.sleep(0.02)\n"
        start = f"for _ in range(4): subprocess.Popen([sys.executable, '-c', {waits + code!r}])"
        out = box.python(f"import subprocess, sys\n{start}")
        assert not out.stopped and box.stats()["processes"] == alone + 6
        box.write_file("go", b"")
        assert _until(lambda: box.stats()["processes"] <= alone + 4)  # four of them stay as zombies of the interpreter
        assert _until(lambda: "600" not in box.shell("cat /proc/*/cmdline | tr '\\0' ' '").text)
        assert box.python("x").text == "7\n"


def test_what_is_left_running_within_the_limits_stays(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(memory="300M", cpu_seconds=2)) as box:
        alone = box.stats()["processes"]
        box.shell("sleep 600 & true")
        time.sleep(3)
        assert box.stats()["processes"] == alone + 1


def test_a_thread_that_spins_between_calls_costs_its_interpreter(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(cpu_seconds=2, seconds=60)) as box:
        box.python("x = 7; open('kept', 'w').write('1')")
        here = box.snapshot()
        spin = "import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin, daemon=True).start()"
        box.python(spin)
        guest = box.stats()["processes"]
        assert _until(lambda: box.stats()["processes"] < guest)
        with pytest.raises(BoxError, match="guest_gone"):
            box.python("x")
        assert box.python("open('kept').read()").text == "'1'\n"
        box.rollback(here)
        assert box.python("x").text == "7\n"


def test_children_count_as_processor_time_when_they_have_ended(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(cpu_seconds=2, seconds=60)) as box:
        burn = "while true; do timeout 0.1 sh -c 'while :; do :; done'; done"
        assert box.shell(burn).stopped == "cpu"


def test_guests_rank_below_who_made_them(box: Box) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert int(box.shell("nice").text) == min(19, own + 5)
    assert "not permitted" in box.python("import os; os.nice(-1)").text
    group = Path("/proc/self/autogroup")
    if group.exists() and group.read_text():
        assert box.shell("cat /proc/self/autogroup").text.split()[-1] == str(min(19, own + 5))


def test_as_many_snapshots_are_kept_as_the_limit_says(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(pids=4, snapshots=4, spares=0)) as box:
        kept = []
        for n in range(60):
            box.python(f"x = {n}")
            kept.append(box.snapshot())
        assert box.stats()["snapshots"] <= 5
        box.rollback(kept[-2])
        assert box.python("x").text == "58\n"
        with pytest.raises(BoxError, match="no snapshot"):
            box.rollback(kept[0])
        assert box.python("x").text == "58\n"


def test_a_guest_that_answers_by_the_byte_is_given_up(box: Box) -> None:
    box.python("import os, time")
    here = box.snapshot()
    slow = _code(
        """
        os.write(3, (60).to_bytes(4, 'little'))
        for byte in b'{"status": 0}'.ljust(60):
            os.write(3, bytes([byte])); time.sleep(0.5)
        """
    )
    out = box.python(slow, seconds=120)
    assert (out.stopped, out.restarted) == ("crash", True)
    box.rollback(here)
    assert box.python("1").text == "1\n"


def test_links_do_not_lead_out_of_the_box(box: Box) -> None:
    box.shell("ln -s /etc/passwd l; ln -s ../../../../etc/passwd m; ln -s / n; ln -s /proc/1/root o; mkfifo p")
    for path in ("l", "m", "n/etc/passwd", "o/etc/passwd"):
        with pytest.raises(OSError):
            box.read_file(path)
    with pytest.raises(OSError):
        box.read_file("p")
    box.write_file("n/etc/espalier-test", b"inside")
    assert not Path("/etc/espalier-test").exists()
    assert box.shell("cat /workspace/etc/espalier-test").text == "inside"


def test_a_forged_reply_harms_only_who_forges_it(box: Box) -> None:
    box.python("x = 1")
    here = box.snapshot()
    for forged in (b"garbage", b"\xff\xff\xff\xff", b"\x02\x00\x00\x00[]", b'\x0d\x00\x00\x00{"forked": 1}'):
        out = box.python(f"import os; os.write(3, {forged!r})")
        assert out.stopped in ("crash", "") or out.restarted
        box.rollback(here)
        assert box.python("x").text == "1\n"
    box.python("import os; os.close(3)")
    box.rollback(here)
    assert box.python("x").text == "1\n"


def test_a_descriptor_hidden_from_the_runtime_cannot_change_a_frozen_layer(box: Box) -> None:
    """The runtime lives in the guest's interpreter and can be lied to; the kernel's account of writers cannot."""
    box.python("import os; fd = os.open('a.txt', os.O_RDWR)")
    assert box.python("import sys; sys.modules['espalier_box.carry']._descriptor = lambda *a: None").text == ""
    with pytest.raises(SnapshotIncomplete, match="open for writing"):
        box.snapshot()


def test_the_supervisor_cannot_be_read_or_killed(box: Box) -> None:
    box.python("import os, signal")
    for sig in (9, 15, 19):
        box.python(f"os.kill(1, {sig})")
    assert box.python("x = 1; x").text == "1\n"
    assert "rror" in box.python("open('/proc/1/mem', 'rb')").text
    assert box.shell("ls /proc | grep -c '^1$'").text == "0\n"


def test_an_unknown_escape_is_an_error_of_the_box_not_a_hang(box: Box) -> None:
    os.kill(box._family.process.pid, 9)
    with pytest.raises(BoxError, match="box_gone"):
        for _ in range(3):
            box.python("1")
