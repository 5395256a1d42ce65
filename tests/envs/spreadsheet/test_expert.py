"""The scripted expert solves everything through the environment; its faulty twin fails where it says it does."""

from __future__ import annotations

import random
from types import MappingProxyType

import pytest
from espalier.envs.spreadsheet.env import SpreadsheetEnv
from espalier.envs.spreadsheet.expert import FAULTS, FaultModel, expert, faulty_expert
from espalier.envs.spreadsheet.families import FAMILIES, draw_draft, generate
from espalier.envs.spreadsheet.task import SpreadsheetTask

NEVER = dict.fromkeys(FAULTS, 0.0)


@pytest.fixture(scope="module")
def tasks():
    return [generate(31, index, split) for split in ("train", "test") for index in range(40)]


def play(task, actions, **options) -> tuple[float, int]:
    """(reward, tool errors) of the actions in the environment."""
    env = SpreadsheetEnv([task], **options)
    env.reset(options={"task": task})
    errors = 0
    for at, action in enumerate(actions):
        _, reward, terminated, _, info = env.step(action)
        errors += info["tool_errors"]
        assert terminated == (at == len(actions) - 1)
    env.close()
    return reward, errors


def habits_of(task) -> set[str]:
    return {name for name, applies in FAULTS.items() if applies(task.draft)}


def test_the_clean_expert_solves_every_task_on_every_case(tasks):
    for task in tasks:
        assert play(task, expert(task)) == (1.0, 0), (task.id, task.instruction, expert(task))


def test_it_looks_first_and_submits_with_its_last_write(tasks):
    for task in tasks:
        look, write = expert(task)
        looked = [call.name for call in look.tool_calls]
        assert looked == ["find_cells"] * len(task.draft.finds) + ["inspect_range"] * (task.family == "repair")
        assert [call.name for call in write.tool_calls][-1] == "submit"
        assert {call.name for call in write.tool_calls} <= {"fill_formula", "write_range", "submit"}


def test_every_header_it_needs_is_in_what_it_saw(tasks):
    for task in tasks:
        env = SpreadsheetEnv([task])
        env.reset(options={"task": task})
        observation, *_ = env.step(expert(task)[0])
        seen = " ".join(message["content"] for message in observation.messages)
        sketch, table = task.draft.sketch, task.draft.table
        for column in filter(None, (sketch.value, sketch.key, sketch.other)):
            assert f"{table.headers[column - table.left]}@" in seen, (task.instruction, seen)


def test_without_faults_the_faulty_expert_is_the_expert(tasks):
    model = FaultModel(**NEVER)
    for task in tasks:
        assert faulty_expert(task, random.Random(0), model) == expert(task)


def test_it_is_a_pure_function_of_task_and_random_numbers(tasks):
    for seed, task in enumerate(tasks):
        first, second = (faulty_expert(task, random.Random(seed), FaultModel()) for _ in range(2))
        assert first == second


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_a_habit_that_always_shows_is_wrong_in_its_context_and_absent_elsewhere(name, tasks):
    model = FaultModel(**{**NEVER, name: 1.0})
    inside = [task for task in tasks if name in habits_of(task)]
    outside = [task for task in tasks if name not in habits_of(task)]
    assert len(inside) >= 5
    for task in outside:
        assert faulty_expert(task, random.Random(1), model) == expert(task)
    guessed = name in ("blind", "repair_blind")  # a guess is right now and then
    rewards = [play(task, faulty_expert(task, random.Random(1), model))[0] for task in inside]
    assert sum(rewards) <= (0.6 * len(rewards) if guessed else 0)


def test_habits_show_as_often_as_the_model_says():
    task = next(t for t in (generate(32, index, "train") for index in range(60)) if habits_of(t) == {"no_dollar"})
    for probability in (0.0, 0.3, 0.8):
        model = FaultModel(no_dollar=probability)
        rng = random.Random(5)
        wrong = sum(faulty_expert(task, rng, model) != expert(task) for _ in range(400)) / 400
        assert abs(wrong - probability) < 0.1


def test_every_task_can_be_solved_by_the_faulty_expert_now_and_then(tasks):
    """What is never right cannot be found by sampling."""
    for task in tasks[::5]:
        rng = random.Random(9)
        assert any(faulty_expert(task, rng, FaultModel()) == expert(task) for _ in range(300)), task.instruction


def test_families_are_shown_by_weight():
    rng = random.Random(0)
    drawn = [FaultModel().draw_family(rng) for _ in range(5000)]
    for family, weight in FaultModel().weights.items():
        assert abs(drawn.count(family) / 5000 - weight) < 0.03
    only = FaultModel(weights=MappingProxyType({f: float(f == "share") for f in FAMILIES}))
    assert only.draw_family(rng) == "share"


@pytest.mark.parametrize(
    "wrong",
    [{"pasted": 1.5}, {"blind": -0.1}, {"weights": {"total": 1.0}}, {"weights": dict.fromkeys(FAMILIES, 0.0)}],
)
def test_a_fault_model_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1|each family once"):
        FaultModel(**wrong)


def test_each_context_is_common_enough_to_learn_and_rare_enough_to_tell():
    drafts = [draw_draft(33, index, "test") for index in range(1000)]
    for applies in FAULTS.values():
        assert 0.03 < sum(map(applies, drafts)) / len(drafts) < 0.5


def test_a_task_from_elsewhere_is_refused():
    task = SpreadsheetTask("x", "Sum it.")
    with pytest.raises(ValueError, match="not generated here"):
        expert(task)
