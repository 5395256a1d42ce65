"""What a person sees of the operation graph: in a terminal, as data, in the report."""

import asyncio
import json
import sqlite3
from contextlib import closing

import pytest
from espalier.configs.schema import RunConfig
from espalier.envs.core import Action, ToolCall
from espalier.envs.spreadsheet.families import generate
from espalier.rollouts.graph.store import EdgeRow
from espalier.trainer.cli import main
from espalier.trainer.graph_view import saved, walk
from espalier.trainer.report import write_report
from espalier.trainer.runs import read_run
from espalier.trainer.sampling import make_pool

LOOK = ToolCall("inspect_range", {"range": "A1:B2"}, "", "0.0")
EVIL = ToolCall("write_range", {"x": "\x1b[31m<script>"}, "", "1.0")


def play(config: RunConfig, count: int = 3) -> dict:
    """A few episodes of one task, through the pool that a run has."""
    task = generate(0, 3, "train")

    async def episodes():
        pool = make_pool(config, [task])
        for number in range(count):
            handle = await pool.take(task.id)
            await pool.reset(handle, 1, {"task": task})
            for call in [LOOK, EVIL][: 1 + number]:
                await pool.step(handle, Action("", (call,)))
            await pool.step(handle, Action())
            pool.give(handle)
        await pool.settled()
        counts = pool.counts
        await pool.close()
        return {**counts.since(type(counts)()), "notes": ["something <odd>"]}

    return asyncio.run(episodes())


@pytest.fixture
def worked(make_run):
    folder = make_run(overrides=["--env.processes", "0"])
    counts = play(read_run(folder).config)
    with (folder / "metrics.jsonl").open("a") as rows:
        rows.write(json.dumps({"kind": "train", "step": 3, "graph": counts}) + "\n")
    return folder, counts


def inspect(capfd, *words):
    code = main(["inspect", *map(str, words)])
    out, err = capfd.readouterr()
    return code, out, err


def test_the_graph_of_a_task_is_drawn_with_visits_and_reward(worked, capfd):
    folder, counts = worked
    code, out, _ = inspect(capfd, folder, "--graph")
    assert code == 0 and "named by digest" in out and out.isprintable() is False and "\x1b" not in out
    assert 'inspect_range {"range": "A1:B2"} -> s0  [3x, reward 0.00]' in out, "reading leads to the same state"
    assert "(done) -> s" in out and "end  [" in out and "write_range" in out
    assert f"{counts['requested']:,} operations asked for" in out and "something <odd>" in out


def test_the_same_as_data_and_by_task(worked, capfd):
    folder, counts = worked
    task = generate(0, 3, "train").id
    code, out, _ = inspect(capfd, folder, "--graph", "--task", task, "--json")
    body = json.loads(out)
    assert code == 0 and body["task"] == task and body["operations"] == len(body["edges"]) == 3
    assert body["totals"]["requested"] == counts["requested"] and body["totals"]["dedup"] > 1
    assert sum(edge["visits"] for edge in body["edges"] if edge["end"]) == 3
    code, _, err = inspect(capfd, folder, "--graph", "--task", "nothing")
    assert code == 1 and "no graph of task 'nothing'" in err


def test_a_run_without_a_graph_says_so(make_run, capfd):
    code, _, err = inspect(capfd, make_run(), "--graph")
    assert code == 1 and "there is no operation graph" in err and "graph.enabled" in err


def test_the_report_shows_it_and_runs_nothing(worked):
    folder, _ = worked
    page = write_report(folder).read_text()
    assert "Work done once" in page and "<svg" in page and "something &lt;odd&gt;" in page
    assert "<script" not in page and "&lt;script&gt;" in page


def test_a_run_whose_rows_know_no_graph_reports_none(make_run):
    folder = make_run()
    assert "Work done once" not in write_report(folder).read_text() and saved(read_run(folder).rows) == {}


def test_an_evaluation_leaves_a_folder_that_is_not_there_alone(tmp_path):
    config = RunConfig(name="nobody", out=tmp_path)
    assert play(config)["requested"] > 0 and not (tmp_path / "nobody").exists()


def test_a_walk_goes_from_the_root_by_depth_and_meets_an_edge_once():
    def edge(a, op, b):
        return EdgeRow(a, op, b, b"", b"", False, 0.0, 0.0)

    edges = [
        edge(b"b", b"1", b"c"),
        edge(b"a", b"1", b"b"),
        edge(b"a", b"2", b"c"),
        edge(b"c", b"1", b"a"),
        edge(b"x", b"1", b"y"),
    ]
    assert [(depth, e.node + e.next) for depth, e in walk(edges, b"a")] == [
        (0, b"ab"),
        (0, b"ac"),
        (1, b"bc"),
        (1, b"ca"),
    ]


def test_a_graph_that_is_broken_is_a_sentence_and_spoils_no_report(worked, capfd):
    folder, _ = worked
    with closing(sqlite3.connect(folder / "graph.sqlite")) as opened:
        opened.execute("DROP TABLE visits")
        opened.commit()
    code, out, err = inspect(capfd, folder, "--graph")
    assert code != 0 and not out and err.count("\n") == 1 and "it is a cache: remove it" in err
    assert "Work done once" in write_report(folder).read_text("utf-8")
