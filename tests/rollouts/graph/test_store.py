"""The operation graph on disk: it survives kill -9, what is broken is found, and it stays within its bytes."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import machine
import pytest
from espalier.envs.core import Observation
from espalier.rollouts.graph.core import OperationGraph
from espalier.rollouts.graph.pool import GraphPool
from espalier.rollouts.graph.statepool import ThreadStatePool
from espalier.rollouts.graph.states import Traits
from espalier.rollouts.graph.store import EdgeRow, GraphStore, GraphStoreError, SpaceRow

PLANS = [[("move", {"by": n}), ("look", {}), ("move", {"by": 1})] for n in range(3)]


async def episodes(path, plans=PLANS, kind=machine.Machine, **options):
    """What the episodes saw, and what was carried out for them."""
    machine.Machine.done.clear()
    graph = OperationGraph(GraphStore(path), **options)
    pool = GraphPool(ThreadStatePool(kind, deadline_s=10), graph, env_id="m", identity="x", verify_share=0.0)
    found = []
    for plan in plans:
        handle = await pool.take("t")
        opening = await pool.reset(handle, 3, {"task": machine.task()})
        steps = [await pool.step(handle, machine.act(call, turn=turn)) for turn, call in enumerate(plan)]
        steps.append(await pool.step(handle, machine.act()))
        pool.give(handle)
        found.append((opening, steps))
    await pool.close()
    return found, graph


def database(path, statement, *values):
    with sqlite3.connect(path) as opened:
        return opened.execute(statement, values).fetchall()


async def test_a_later_process_is_served_by_what_an_earlier_one_did(tmp_path):
    first, graph = await episodes(tmp_path / "g.sqlite")
    assert graph.counts.executed == machine.Machine.done.total() - graph.counts.replayed > 0
    again, graph = await episodes(tmp_path / "g.sqlite")
    assert again == first and not machine.Machine.done
    assert graph.counts.hits == graph.counts.requested


async def test_an_unknown_operation_behind_known_ones_is_come_to_again(tmp_path):
    await episodes(tmp_path / "g.sqlite")
    longer = [[*PLANS[0], ("move", {"by": 2})]]
    found, graph = await episodes(tmp_path / "g.sqlite", longer)
    assert graph.counts.replayed == 1 + 3 and graph.counts.executed == 2
    machine.Machine.done.clear()
    fresh, _ = await episodes(tmp_path / "other.sqlite", longer)
    assert found == fresh


CHILD = """
import asyncio, os, sys
sys.path[:0] = sys.argv[2:]
from test_store import PLANS, machine, GraphPool, GraphStore, OperationGraph, ThreadStatePool
from pathlib import Path

async def main():
    pool = GraphPool(ThreadStatePool(machine.Machine, deadline_s=10), OperationGraph(GraphStore(Path(sys.argv[1]))),
                     env_id="m", identity="x", verify_share=0.0)
    number = 0
    while True:
        for plan in (*PLANS, [("move", {"by": number})]):
            handle = await pool.take("t")
            await pool.reset(handle, 3, {"task": machine.task()})
            for turn, call in enumerate(plan):
                await pool.step(handle, machine.act(call, turn=turn))
            await pool.step(handle, machine.act())
            pool.give(handle)
        number += 1
        if number == 2:
            pool.graph.store.flush()
            print("ready", flush=True)

asyncio.run(main())
"""


async def test_kill_minus_9_leaves_a_graph_that_goes_on(tmp_path):
    path = tmp_path / "g.sqlite"
    here = Path(__file__).parent
    command = [sys.executable, "-c", CHILD, str(path), str(here), str(here.parent)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"})
    try:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.05)  # in the middle of writing more
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    fresh, _ = await episodes(tmp_path / "other.sqlite")
    found, graph = await episodes(path)
    assert found == fresh and graph.counts.hits == graph.counts.requested and not machine.Machine.done
    assert database(path, "PRAGMA integrity_check") == [("ok",)]


async def test_a_broken_body_is_found_and_done_again(tmp_path):
    """I10. Negative control: without the digest the broken answer would be the episode's."""
    path = tmp_path / "g.sqlite"
    first, _ = await episodes(path)
    for digest, data in database(path, "SELECT digest, data FROM bodies"):
        turned = bytes(data[:-3]) + bytes([data[-3] ^ 1]) + bytes(data[-2:])
        database(path, "UPDATE bodies SET data = ? WHERE digest = ?", turned, digest)
    again, graph = await episodes(path)
    assert again == first and graph.store.corrupted >= 5 and machine.Machine.done["step"] > 0
    third, graph = await episodes(path)
    assert third == first and graph.store.corrupted == 0 and not machine.Machine.done


async def test_a_body_under_a_wrong_name_is_found(tmp_path):
    store = GraphStore(tmp_path / "g.sqlite")
    store.put_body(b"s", sha256(b"one").digest(), b"one")
    store.put_body(b"s", sha256(b"two").digest(), b"another")
    store.flush()
    assert store.body(sha256(b"one").digest()) == b"one"
    assert store.body(sha256(b"two").digest()) is None and store.corrupted == 1
    store.close()


async def test_the_file_stays_within_its_bytes_and_the_least_recently_used_tasks_go(tmp_path):
    path = tmp_path / "g.sqlite"
    store = GraphStore(path, most_bytes=400_000)
    for number in range(60):
        id = b"%16d" % number
        store.put_space(SpaceRow(id, "env", f"task-{number}", 0, root=b"r"))
        for n in range(20):
            data = os.urandom(1000)
            store.put_body(id, sha256(data).digest(), data)
            store.put_edge(id, EdgeRow(b"r", b"%d" % n, b"n", sha256(data).digest(), b"e", False, 0.0, 0.1))
        store.flush()
    kept = [row.task for row in store.spaces()]
    assert 2 < len(kept) < 55 and kept[0] == "task-59" and "task-0" not in kept
    store.close()
    pages, size = database(path, "PRAGMA page_count")[0][0], database(path, "PRAGMA page_size")[0][0]
    assert pages * size < 1_500_000, "60 tasks would be more than that"


async def test_a_distrusted_tool_stays_distrusted_in_later_processes(tmp_path):
    path = tmp_path / "g.sqlite"
    graph = OperationGraph(GraphStore(path))
    pool = GraphPool(ThreadStatePool(machine.Fickle, deadline_s=10), graph, env_id="m", identity="x", verify_share=1.0)
    handle = await pool.take("t")
    await pool.reset(handle, 3, {"task": machine.task()})
    await pool.step(handle, machine.act(("look", {})))
    await pool.step(handle, machine.act())
    pool.give(handle)
    await pool.close()
    assert graph.counts.mismatches == 1
    found, graph = await episodes(path, [[("look", {})]] * 3, machine.Fickle)
    assert len({steps[0][0].messages[0]["content"] for _, steps in found}) == 3
    assert graph.counts.bypassed == 6


async def test_a_little_memory_is_enough_where_there_is_a_file(tmp_path):
    path = tmp_path / "g.sqlite"
    first, graph = await episodes(path, most_bytes=30_000)
    assert graph.held_bytes <= 30_000
    again, graph = await episodes(path, most_bytes=30_000)
    assert again == first and not machine.Machine.done


async def test_a_task_with_more_than_memory_takes_is_had_in_part(tmp_path):
    path = tmp_path / "g.sqlite"
    plans = [[("move", {"by": n})] for n in range(30)]
    first, _ = await episodes(path, plans)
    again, graph = await episodes(path, plans, most_bytes=20_000)
    assert again == first and graph.counts.hits > 30 and graph.held_bytes <= 20_000


def busy():
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return error


def test_two_runs_may_begin_a_file_at_once(tmp_path, monkeypatch):
    """One changes the journal while the other does, and is told at once that it is locked."""
    connect, tried = GraphStore._connect, []

    def locked(self, readonly=False):
        tried.append(readonly)
        if len(tried) < 3:
            raise busy()
        return connect(self, readonly)

    monkeypatch.setattr(GraphStore, "_connect", locked)
    GraphStore(tmp_path / "g.sqlite").close()
    assert len(tried) >= 3
    monkeypatch.setattr("espalier.rollouts.graph.store.BUSY_SECONDS", 0.0)
    tried.clear()
    with pytest.raises(GraphStoreError, match="locked"):
        GraphStore(tmp_path / "g.sqlite")


def test_what_another_run_holds_up_is_written_later(tmp_path, monkeypatch):
    monkeypatch.setattr("espalier.rollouts.graph.store.BUSY_SECONDS", 0.02)
    path = tmp_path / "g.sqlite"
    with GraphStore(path) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.put_space(SpaceRow(b"s", "env", "task", 0))
        time.sleep(0.3)
        store.put_space(SpaceRow(b"t", "env", "task", 0))
        assert not store.trouble and not store.spaces()
        other.execute("COMMIT")
        store.flush()
        assert {row.id for row in store.spaces()} == {b"s", b"t"} and not store.trouble


async def test_a_task_in_use_stays_in_the_file_and_what_belongs_to_none_goes(tmp_path):
    store = GraphStore(tmp_path / "g.sqlite", most_bytes=300_000)
    graph = OperationGraph(store)
    space = graph.space("x", "env", machine.task(), 0, {})
    graph.begun(space, (Observation(({"role": "user", "content": "hello"},)), {}, []), Traits(), None, 0.1)
    store.put_space(SpaceRow(b"other", "env", "other", 0, root=b"r"))
    for number in range(45):
        data = os.urandom(20_000)
        store.put_body(b"none's" if number % 2 else b"%16d" % number, sha256(data).digest(), data)
        if not number % 2:
            store.put_space(SpaceRow(b"%16d" % number, "env", f"task-{number}", 0, root=b"r"))
        graph.visited(space, [], 0.5)
        store.flush()
    kept = [row.task for row in store.spaces()]
    assert machine.task().id in kept and "other" not in kept and 4 < len(kept) < 20
    store.close()
    ((left,),) = database(tmp_path / "g.sqlite", "SELECT sum(length(data)) FROM bodies")
    assert left < 600_000


def test_what_waits_for_a_slow_disk_stays_within_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("espalier.rollouts.graph.store.MOST_PENDING_BYTES", 100_000)
    path = tmp_path / "g.sqlite"
    store = GraphStore(path)
    bodies = [os.urandom(10_000) for _ in range(40)]
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for data in bodies:
            store.put_body(b"s", sha256(data).digest(), data)
        assert sum(map(len, store._bodies.values())) <= 100_000 and store.left_out > 20
        other.execute("COMMIT")
    store.flush()
    again = store.left_out
    store.put_body(b"s", sha256(bodies[-1]).digest(), bodies[-1])
    store.flush()
    assert store.left_out == again and not store._bodies
    store.close()
    with GraphStore(path) as store:
        assert sum(store.body(sha256(data).digest()) is not None for data in bodies) == 40 - again + 1


def test_rows_that_are_broken_are_not_there_and_who_looks_is_told_in_a_sentence(tmp_path):
    path = tmp_path / "g.sqlite"
    with GraphStore(path) as store:
        graph = OperationGraph(store)
        space = graph.space("x", "env", machine.task(), 0, {})
        graph.begun(space, (Observation(({"role": "user", "content": "hello"},)), {}, []), Traits(), None, 0.1)
    for column, wrong in (("traits", '{"unknown": 1}'), ("traits", "["), ("demoted", "{")):
        database(path, f"UPDATE spaces SET {column} = ?", wrong)
        with GraphStore(path) as store:
            graph = OperationGraph(store)
            assert graph.space("x", "env", machine.task(), 0, {}).row.root is None and store.corrupted == 1
        database(path, "UPDATE spaces SET traits = '{}'")
    with GraphStore(path, readonly=True) as store, pytest.raises(GraphStoreError, match="it is a cache"):
        store.spaces()
    database(path, "UPDATE spaces SET demoted = '[]'")
    database(path, "DROP TABLE visits")
    with GraphStore(path, readonly=True) as store, pytest.raises(GraphStoreError, match="no such table"):
        store.visits(b"s")


def test_a_file_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "g.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(GraphStoreError, match="it is a cache: remove it"):
        GraphStore(tmp_path / "g.sqlite")
    store = GraphStore(tmp_path / "old.sqlite")
    store.close()
    database(tmp_path / "old.sqlite", "UPDATE meta SET value = 'other' WHERE key = 'schema'")
    with pytest.raises(GraphStoreError, match="another version"):
        GraphStore(tmp_path / "old.sqlite")
    with pytest.raises(GraphStoreError, match="there is no operation graph"):
        GraphStore(tmp_path / "none.sqlite", readonly=True)


async def test_a_disk_that_takes_nothing_more_stops_no_episode(tmp_path):
    path = tmp_path / "g.sqlite"
    first, _ = await episodes(tmp_path / "fine.sqlite")
    GraphStore(path).close()
    path.with_name("g.sqlite-wal").unlink(missing_ok=True)
    database(path, "DROP TABLE edges")
    found, graph = await episodes(path)
    assert found == first and "no such table" in graph.store.trouble


async def test_an_episode_without_a_verdict_does_not_end_what_is_stored(tmp_path):
    """Its reward is NaN, which is nothing that can be summed up."""

    class Here(machine.Machine):
        def step(self, action):
            observation, reward, over, cut, info = super().step(action)
            return observation, float("nan") if over else reward, over, cut, info

    path = tmp_path / "g.sqlite"
    await episodes(path, kind=Here)
    _, graph = await episodes(path, kind=Here)
    assert not graph.store.trouble and graph.counts.executed == 0
    assert database(path, "SELECT sum(count) FROM visits") == [(None,)]


@pytest.mark.parametrize("row", [{"task": "\udcff"}, {"seed": 2**70}])
def test_what_sqlite_cannot_hold_ends_no_writer_in_silence(tmp_path, row):
    store = GraphStore(tmp_path / "g.sqlite")
    store.put_space(SpaceRow(**{"id": b"s", "env": "env", "task": "task", "seed": 0, **row}))
    store.flush()
    assert "nothing more is stored" in store.trouble and store._writer.is_alive()
    store.close()
    assert not store._writer.is_alive()


async def test_a_worker_that_dies_costs_nobody_what_is_known():
    """Environments in processes: those that stood there, and what was kept of states, are replaced."""
    from espalier.configs.schema import EnvSection
    from espalier.rollouts.envprocess import ProcessEnvPool
    from espalier.rollouts.recipe import env_recipe

    recipe = env_recipe(EnvSection(id="machine:MachineKeeping-v0"))
    inner = ProcessEnvPool(recipe, processes=1, deadline_s=10)
    pool = GraphPool(inner, OperationGraph(), env_id="m", identity="x", verify_share=0.0)

    async def episode(plan):
        handle = await pool.take("t")
        fit = False
        try:
            seen = [await pool.reset(handle, 3, {"task": machine.task()})]
            for turn, call in enumerate([*plan, None]):
                seen.append(await pool.step(handle, machine.act(*([call] if call else []), turn=turn)))
            fit = True
            return seen
        finally:
            (pool.give if fit else pool.drop)(handle)

    first = await asyncio.gather(*(episode(plan) for plan in PLANS))
    (pid,) = inner.pids
    os.kill(pid, signal.SIGKILL)
    while inner.pids:
        await asyncio.sleep(0.01)
    longer = [[*plan, ("move", {"by": 3})] for plan in PLANS]
    found = await asyncio.gather(*(episode(plan) for plan in longer))
    assert [one[:4] for one in found] == [one[:4] for one in first], "known steps need no environment"
    assert inner.pids != [pid] and pool.counts.replayed >= 1
    await pool.close()
    assert pool.counts.live == 0


def test_what_was_distrusted_is_not_trusted_again_by_a_process_that_does_not_know(tmp_path):
    with GraphStore(tmp_path / "g.sqlite") as one, GraphStore(tmp_path / "g.sqlite") as other:
        one.put_space(SpaceRow(b"s", "env", "task", 0, generation=1, demoted=("look",)))
        one.flush()
        other.put_space(SpaceRow(b"s", "env", "task", 0, root=b"r"))
        other.flush()
        (row,) = other.spaces()
        assert row.generation == 1 and row.demoted == ("look",)
