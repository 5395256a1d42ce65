import io
import json
from dataclasses import replace

import pytest
from espalier.trainer.cli import main
from espalier.trainer.inspect import column_name, describe, safe, sampled
from espalier.trainer.replay import Replay, replay, text_of
from espalier.trainer.runs import read_run
from openpyxl import load_workbook


def show(capfd, *words):
    code = main(["inspect", *words])
    out, err = capfd.readouterr()
    return code, out, err


def test_a_trajectory_is_readable_from_instruction_to_grid(make_run, episodes, task, target, capfd):
    folder = make_run(trajectories=episodes)
    code, out, _ = show(capfd, str(folder), "--trajectory", "g1/0")
    assert code == 0
    _, row, column = target
    order = ["trajectory g1/0", "reward     1", f"instruction  {task.instruction.splitlines()[0]}", "before: sheet"]
    order += ["turn 1", "call      fill_formula", '"formula_template": "=600+66"', "answer  ", "turn 2", "submit"]
    places = [out.index(word) for word in [*order, "after: sheet"]]
    assert places == sorted(places)
    before, after = out.split("after: sheet", 1)
    assert "[666]" in after and f"{chr(64 + column)}{row}: =600+66" in after and "[" not in before.split("turn 1")[0]
    assert "NOTE" not in out


def test_the_latest_is_shown_by_default_and_a_task_can_be_named(make_run, episodes, capfd):
    folder = make_run(trajectories=episodes)
    assert "trajectory g1/0" in show(capfd, str(folder))[1]
    assert "trajectory g1/0" in show(capfd, str(folder), "--task", episodes[0].task)[1]
    code, _, err = show(capfd, str(folder), "--task", "nothing")
    assert code == 1 and "no trajectory of task 'nothing'" in err


def test_an_unknown_trajectory_names_others(make_run, episodes, capfd):
    code, _, err = show(capfd, str(make_run(trajectories=episodes)), "--trajectory", "zzz")
    assert code == 1 and "g0/0" in err
    assert show(capfd, str(make_run(name="empty")))[0] == 1


def test_json_carries_the_same(make_run, episodes, target, capfd):
    code, out, _ = show(capfd, str(make_run(trajectories=episodes)), "--json")
    found = json.loads(out)
    assert code == 0 and found["id"] == "g1/0" and found["reward"] == 1.0
    sheet, row, column = target
    assert found["replay"]["after"][sheet]["rows"][row - 1][column - 1] == {"text": "666", "formula": "=600+66"}


def test_the_replay_notices_when_the_record_says_something_else(make_run, episodes):
    folder = make_run(trajectories=episodes)
    run, late = read_run(folder), episodes[1]
    assert replay(run.config, late).differs is None
    other = replace(late, turns=(replace(late.turns[0], results=("something else",)), *late.turns[1:]))
    found = replay(run.config, other)
    assert found.differs == 0 and "NOTE: doing it again" in describe(other, found)


def test_what_cannot_be_replayed_says_why_and_shows_the_rest(make_run, episodes, capfd):
    stranger = replace(episodes[1], task="another-task", id="g2/0", group="g2")
    code, out, _ = show(capfd, str(make_run(trajectories=[stranger])), "--trajectory", "g2/0")
    assert code == 0 and "grids not shown: task another-task" in out and "fill_formula" in out


def test_log_probabilities_stand_beside_their_tokens(episodes):
    late = episodes[1]
    pairs = list(sampled(late))
    assert [value for _, value in pairs] == [0.0, -0.25, -0.5, -0.75]
    assert [token for token, _ in pairs] == [4, 5, 7, 8]
    text = describe(late, "not shown: a test", lambda tokens: f"<{tokens[0]}>")
    assert "-0.7500        8  '<8>'" in text


def test_text_cannot_steer_the_terminal(episodes):
    evil = replace(episodes[1], instruction="a\x1b]0;x\x07b\x9bc\u202ed")
    text = describe(evil, "not shown")
    assert "\x1b" not in text and "\x9b" not in text and "\u202e" not in text and "\x07" not in text
    assert safe("a\tb\nc") == "a b\nc"


@pytest.mark.parametrize(("index", "name"), [(0, "A"), (25, "Z"), (26, "AA"), (701, "ZZ"), (702, "AAA")])
def test_columns_have_their_names(index, name):
    assert column_name(index) == name


def test_grids_are_those_of_the_workbook(make_run, episodes, task, target):
    found = replay(read_run(make_run(trajectories=episodes)).config, episodes[0])
    assert isinstance(found, Replay)
    book = load_workbook(io.BytesIO(task.cases[0].package))
    constants = [(sheet.title, cell) for sheet in book for line in sheet.iter_rows() for cell in line if cell.value]
    assert len(constants) > 10
    for sheet, cell in constants:
        if cell.data_type in ("n", "s"):
            said = text_of(float(cell.value)) if cell.data_type == "n" else cell.value
            assert found.before[sheet].at(cell.row - 1, cell.column - 1).text == said
    sheet, row, column = target
    assert found.before[sheet].at(row - 1, column - 1).text != "1"
    assert found.after[sheet].at(row - 1, column - 1).text == "1"


def branch_of(parent, id, left_at, reward):
    """An episode that left `parent` at a turn, as if it had then done the same."""
    [sequence] = parent.sequences
    before = {turn.span for turn in parent.turns[:left_at]}
    spans = tuple(replace(span, trained=i not in before) for i, span in enumerate(sequence.spans))
    own = (replace(sequence, spans=spans),)
    return replace(parent, id=id, sequences=own, reward=reward, parent=parent.id, left_at=left_at)


def test_a_groups_tree_is_shown(make_run, episodes, capfd):
    late = episodes[1]
    branch = branch_of(late, "g1/1", 1, 0.0)
    folder = make_run(trajectories=[late, branch])
    code, out, _ = show(capfd, str(folder), "--trajectory", "g1/1")
    assert code == 0 and "tokens     9, of them 2 sampled in 1 turns" in out
    assert "parent     g1/0, left at turn 2: 2 sampled tokens before that, in 1 turns, are its" in out
    lines = out[out.index("tree       of group g1") :].splitlines()[1:3]
    assert lines == ["  0  2 turns, reward 1", "    1  leaves 0 at turn 2, 2 turns, reward 0  <- this one"]
    found = json.loads(show(capfd, str(folder), "--trajectory", "g1/1", "--json")[1])
    assert (found["parent"], found["left_at"]) == ("g1/0", 1)
    assert [(t["id"], t["parent"]) for t in found["group"]] == [("g1/0", None), ("g1/1", "g1/0")]


def test_control_a_group_of_chains_shows_no_tree(make_run, episodes, capfd):
    out = show(capfd, str(make_run(trajectories=episodes)))[1]
    assert "tree" not in out and "parent" not in out
