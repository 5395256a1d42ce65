"""Versions: whole or not there, never changed, whatever is killed or broken."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from espalier.trainer.durable import StorageError, publish_folder
from espalier.trainer.policy import CorruptVersion, PolicyStore, UnknownBase, UnknownVersion, resolve_base


@pytest.fixture
def store(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    return PolicyStore(tmp_path / "policies", model)


def adapter(content):
    def write(folder):
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(content)

    return write


def test_a_version_is_what_was_written(store):
    one = store.publish(adapter(b"one"), parent=0)
    two = store.publish(adapter(b"two"), parent=1)
    assert (one.number, two.number, two.parent) == (1, 2, 1)
    assert one.digest != two.digest
    assert store.list() == [1, 2]
    assert store.latest() == store.open(2) == two
    assert (one.path / "adapter_model.safetensors").read_bytes() == b"one"
    manifest = json.loads((one.path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert manifest["number"] == 1
    assert manifest["digest"] == one.digest
    assert manifest["base"] == store.open(0).digest
    assert store.open(0).is_base
    assert store.open(0).path == store.base


def test_a_number_never_changes_its_content(store):
    one = store.publish(adapter(b"one"), parent=0, number=1)
    assert store.publish(adapter(b"one"), parent=0, number=1) == one, "the same content again is the same version"
    other = store.publish(adapter(b"other"), parent=0, number=1)
    assert other.number == 2, "other content gets a number of its own"
    assert (one.path / "adapter_model.safetensors").read_bytes() == b"one"
    with pytest.raises(FileExistsError):
        publish_folder(one.path, adapter(b"other"))
    assert (one.path / "adapter_model.safetensors").read_bytes() == b"one"


def test_the_digest_is_that_which_samplers_check(store):
    from espalier.rollouts.digest import folder_digest

    one = store.publish(adapter(b"one"), parent=0)
    assert folder_digest(one.path) == one.digest


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_changed_file_is_named(store, name):
    version = store.publish(adapter(b"one"), parent=0)
    (version.path / name).write_bytes(b"tampered")
    with pytest.raises(CorruptVersion, match=name):
        store.open(1)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "manifest.json"])
def test_a_missing_file_is_named(store, name):
    version = store.publish(adapter(b"one"), parent=0)
    (version.path / name).unlink()
    with pytest.raises(CorruptVersion, match=name):
        store.open(1)


def test_a_forged_manifest_is_noticed(store):
    version = store.publish(adapter(b"one"), parent=0)
    path = version.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["digest"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptVersion, match=r"manifest\.json"):
        store.open(1)


def test_a_version_of_another_base_is_refused(store, tmp_path):
    store.publish(adapter(b"one"), parent=0)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"another": 1}')
    with pytest.raises(CorruptVersion, match="another base"):
        PolicyStore(store.root, other).open(1)


def test_an_unknown_version_says_which_there_are(store):
    store.publish(adapter(b"one"), parent=0)
    with pytest.raises(UnknownVersion, match="there are: 1"):
        store.open(7)


def test_retention(store):
    for i in range(6):
        store.publish(adapter(str(i).encode()), parent=i)
    assert store.retain(2, best=[1], leased=[3]) == [2, 4]
    assert store.list() == [1, 3, 5, 6]
    assert store.retain(0) == [1, 3, 5, 6]
    assert store.latest().number == 0, "the base always stays"


@pytest.mark.parametrize("recent", [3, 4, 5, 6, 100])
def test_retention_of_more_than_there_are_deletes_nothing(store, recent):
    for i in range(3):
        store.publish(adapter(str(i).encode()), parent=i)
    assert store.retain(recent) == []
    assert store.list() == [1, 2, 3]


def test_numbers_are_not_reused_while_a_run_goes_on(store):
    for i in range(3):
        store.publish(adapter(str(i).encode()), parent=i)
    store.retain(1)
    assert store.publish(adapter(b"next"), parent=3).number == 4


def test_what_a_killed_process_left_is_cleaned(store):
    store.publish(adapter(b"one"), parent=0)
    leftover = store.root / ".tmp-v000002-99999"
    leftover.mkdir()
    (leftover / "adapter_model.safetensors").write_bytes(b"half")
    assert store.list() == [1]
    store.publish(adapter(b"two"), parent=1)
    assert not leftover.exists()


def test_a_failing_writer_leaves_nothing(store):
    def write(folder):
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        store.publish(write, parent=0)
    assert list(store.root.iterdir()) == []


def test_a_full_disk_is_one_sentence_and_spoils_nothing(store):
    import resource

    store.publish(adapter(b"one"), parent=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*v000002: File too large.*--resume"):
            store.publish(adapter(b"x" * 100_000), parent=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in store.root.iterdir()] == ["v000001"]
    assert store.latest().number == 1


PUBLISHER = """
import sys
from pathlib import Path
from espalier.trainer.policy import PolicyStore

store = PolicyStore(Path(sys.argv[1]), Path(sys.argv[2]))

def write(folder):
    for name in ("adapter_config.json", "adapter_model.safetensors", "more"):
        (folder / name).write_bytes(name.encode() * 20_000)
        (folder / name).open("ab").write(str(len(store.list())).encode())

print("ready", flush=True)
while True:
    print(store.publish(write, parent=0).number, flush=True)
    store.retain(5)
"""


def kill_while_publishing(store, kills, seed):
    draw = random.Random(seed)
    acknowledged = 0
    for _ in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(store.root), str(store.base)], stdout=subprocess.PIPE
        )
        for _ in range(draw.randint(1, 4)):  # "ready", then the numbers
            line = child.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        for number in store.list():
            store.open(number)  # raises if anything of it is missing or changed
        acknowledged = max(acknowledged, int(line) if line != b"ready\n" else 0)
        assert max(store.list(), default=0) >= acknowledged, "an acknowledged version was lost"
    store.publish(adapter(b"after"), parent=0)
    assert not list(store.root.glob(".tmp-*"))
    return acknowledged


def test_kill_minus_9_never_leaves_a_part(store):
    assert kill_while_publishing(store, kills=6, seed=1) > 3


@pytest.mark.long
def test_kill_minus_9_never_leaves_a_part_long(store):
    assert kill_while_publishing(store, kills=80, seed=2) > 80


def test_bases(tmp_path, base, monkeypatch):
    assert resolve_base(str(base)) == base
    with pytest.raises(UnknownBase, match=r"config\.json"):
        resolve_base(str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UnknownBase, match=r"hf download Qwen/Qwen3-4B$"):
        resolve_base("Qwen/Qwen3-4B")
    with pytest.raises(UnknownBase, match="there is no such folder"):
        resolve_base("/no/such/folder")
    with pytest.raises(UnknownBase, match="neither a folder nor"):
        resolve_base("no such model")
