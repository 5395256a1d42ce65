"""An interpreter's libraries take few areas of memory, its state is what it was, and code stays as it is."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from espalier.envs.sandbox import Box

AREAS = "areas = [line.split(None, 5) for line in open('/proc/self/maps')]; print(len(areas))"
LOADED = "import ctypes, decimal, json, sqlite3, ssl, unicodedata, zlib, lzma, bz2, hashlib, numpy, numpy.random as r"


@pytest.fixture
def box(boxes_work: None, workspace: Path):
    with Box(workspace) as made:
        yield made


def libraries(box: Box) -> dict[str, list[str]]:
    """The rights of each library's areas, in order."""
    box.python(AREAS)
    return eval(
        box.python(
            "found = {}\nfor area in areas:\n    if '.so' in area[-1]: found.setdefault(area[-1], []).append(area[1])\nfound"
        ).text
    )


def test_each_library_is_two_areas_and_its_code_cannot_be_written(box: Box) -> None:
    assert box.python(LOADED).status == 0
    found = libraries(box)
    assert len(found) > 30
    known = platform.machine() == "x86_64"  # elsewhere variables are not copied, and gaps may be mapped too
    few = [name for name, rights in found.items() if len(rights) <= 3 - known]
    assert len(few) > 0.9 * len(found), found
    assert not [name for name, rights in found.items() if "rwxp" in rights]
    copied = [name for name, rights in found.items() if "rw-p" not in rights]
    assert len(copied) > 0.9 * len(found) or not known, found


def test_a_library_that_comes_later_is_joined_too(box: Box) -> None:
    before = int(box.python(AREAS).text)
    loaded = int(box.python(f"{LOADED}\n{AREAS}").text)
    after = int(box.python(AREAS).text)
    assert after - before < 0.7 * (loaded - before), "control: each brings five"


def test_what_a_process_holds_stays_what_it_was(box: Box) -> None:
    """Variables of libraries are copied in the process that runs on them, while signals come."""
    box.python("import signal, os; got = []; signal.signal(signal.SIGALRM, lambda *_: got.append(1))")
    box.python(
        "import random; random.seed(1); drawn = random.Random(1).getstate(); held = [os.urandom(9) for _ in range(99999)]"
    )
    box.python("import hashlib; was = hashlib.sha256(b''.join(held)).digest()")
    assert box.python("signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0003)").status == 0
    for part in LOADED.removeprefix("import ").split(", "):
        assert box.python(f"import {part}").status == 0
    assert box.python("signal.setitimer(signal.ITIMER_REAL, 0)").status == 0
    assert box.python(
        "random.getstate() == drawn, hashlib.sha256(b''.join(held)).digest() == was, len(got) > 9"
    ).text == ("(True, True, True)\n")
    assert box.python("sqlite3.connect(':memory:').execute('select 6 * 7').fetchone()[0]").text == "42\n"
    assert box.python("decimal.Decimal(2).sqrt(), len(ssl.create_default_context().get_ciphers()) > 3").status == 0
    assert box.python("(numpy.ones((40, 40)) @ numpy.ones((40, 40))).sum()").text.strip().endswith("64000.0)")
    here = box.snapshot()
    box.python("held.clear()")
    box.rollback(here)
    assert box.python("len(held), hashlib.sha256(b''.join(held)).digest() == was").text == "(99999, True)\n"


def test_an_agents_own_memory_is_neither_copied_nor_waited_for(box: Box) -> None:
    """It would be unshared from all frozen copies, and may go at any time: by the collector, say."""
    box.python("import gc, sys; big = bytearray(b'x') * (90 << 20)")
    here = box.snapshot()
    peak = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    before = int(box.python(peak).text)
    for name in ("sqlite3", "lzma", "decimal", "numpy", "ssl", "curses", "unicodedata", "bz2"):
        loop = "for n in range(9): node = [bytearray(100_000 << n % 4)]; node.append(node)"
        assert box.python(f"gc.collect(n := len(sys.modules) % 3)\n{loop}\nimport {name}").status == 0
    assert int(box.python(peak).text) < before + (60 << 10)
    assert box.stats()["snapshot_bytes"] < 60 << 20
    box.rollback(here)
    assert box.python("big.count(b'x') == len(big)").text == "True\n"


def test_a_file_that_is_mapped_as_a_copy_is_left_alone(box: Box) -> None:
    """Pages of a private mapping that nobody has written follow the file; only libraries are replaced."""
    box.python("import mmap; open('data', 'wb').write(bytes(8 << 12)); f = open('data', 'r+b')")
    box.python("copy = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)\nfor page in range(5): copy[page << 12] = 1")
    assert box.python(LOADED).status == 0
    box.python("f.seek(7 << 12); f.write(b'z'); f.flush()")
    assert box.python("copy[0], copy[7 << 12]").text == "(1, 122)\n"
    box.python(AREAS)
    assert box.python("[area[1] for area in areas if area[-1].endswith('/data\\n')]").text == "['rw-p']\n"


def test_a_snapshot_right_after_an_import_is_as_plain_as_any(box: Box) -> None:
    """When a call is answered its process only waits: whoever looks at it finds no file, no mapping, no thread."""
    for name in ("decimal", "sqlite3", "lzma", "ssl", "unicodedata", "numpy", "xml.etree.ElementTree", "curses"):
        assert box.python(f"import {name}").status == 0
        box.restart(box.snapshot())
