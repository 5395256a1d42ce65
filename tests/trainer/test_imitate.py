"""The base policy: demonstrations hold what episodes hold, and the recipe gives the same policy twice."""

import json
import re
from pathlib import Path

import pytest
import torch
from espalier.envs.coding.expert import HABITS
from espalier.envs.coding.families import generate
from espalier.envs.core import Action
from espalier.envs.spreadsheet.expert import FaultModel, expert
from espalier.rollouts.digest import folder_digest
from espalier.rollouts.render import make_renderer
from espalier.trainer.demonstrations import demonstrate, play, said
from espalier.trainer.imitate import RECIPES, Recipe, make_policy
from espalier.trainer.lessons import SUBJECTS, Coding, Lesson, Spreadsheets, sketch_task
from espalier.trainer.policy import resolve_base
from espalier.trainer.shipped import POLICY_OF, SHIPPED
from transformers import Qwen3ForCausalLM

ROOT = Path(__file__).parents[2]
SMALL = Recipe(hidden=32, layers=1, heads=2, kv_heads=1, feed_forward=48, merges=600, demonstrations=64, steps=4)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("policy") / "tiny", recipe=SMALL, say=lambda line: None)


def test_the_same_recipe_gives_the_same_policy(policy, tmp_path):
    again = make_policy(tmp_path / "again", recipe=SMALL, say=lambda line: None)
    other = make_policy(tmp_path / "other", recipe=Recipe(**{**vars_of(SMALL), "seed": 1}), say=lambda line: None)

    def weights(folder):
        return (folder / "model.safetensors").read_bytes()

    assert weights(again) == weights(policy)
    assert (again / "tokenizer.json").read_bytes() == (policy / "tokenizer.json").read_bytes()
    assert weights(other) != weights(policy)


def vars_of(recipe):
    return {name: getattr(recipe, name) for name in recipe.__dataclass_fields__}


def test_it_says_how_it_was_made_and_is_never_overwritten(policy):
    card = json.loads((policy / "policy.json").read_text())
    assert card["recipe"] == vars_of(SMALL)
    assert set(card["faults"]["weights"]) == set(FaultModel().weights)
    before = folder_digest(policy)
    with pytest.raises(FileExistsError, match="exists already"):
        make_policy(policy, recipe=SMALL)
    assert folder_digest(policy) == before


@pytest.mark.parametrize("family", ["total", "lookup", "repair", "summary"])
def test_a_demonstration_is_an_episode_of_exact_tokens(policy, family):
    env = Spreadsheets().environment()
    renderer = make_renderer(policy, thinking=False)
    task = sketch_task(3, 1, family)
    shown = demonstrate(env, renderer, Lesson(task, expert(task), copies=False))
    assert len(shown.tokens) == len(shown.said)
    wanted = [renderer.encode(said(turn)) for turn in play(env, task, expert(task)) if isinstance(turn, Action)]
    assert tuple(t for t, mine in zip(shown.tokens, shown.said, strict=True) if mine) == sum(wanted, ())
    # what the expert says is what the renderer reads back
    for turn, tokens in zip(expert(task), wanted, strict=True):
        read = renderer.parse(tokens, shown.tokens[:1])
        assert [(c.name, dict(c.arguments)) for c in read.tool_calls] == [
            (c.name, dict(c.arguments)) for c in turn.tool_calls
        ]


@pytest.mark.parametrize(
    ("family", "copies"), [("total", False), ("lookup", False), ("conditional", True), ("flag", True)]
)
def test_lessons_that_copy_a_word_are_known(family, copies):
    weights = dict.fromkeys(FaultModel().weights, 0.0) | {family: 1.0}
    subject = Spreadsheets(FaultModel(weights=weights, **no_faults()))
    assert {lesson.copies for lesson in subject.lessons(3, 5)} == {copies}


def no_faults():
    return dict.fromkeys(("short_range", "decoy_column", "pasted", "blind", "no_dollar", "repair_blind"), 0.0)


def test_torch_threads_are_part_of_the_recipe(policy):
    assert torch.get_num_threads() == SMALL.threads


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_policy_is_small_and_says_its_recipe(name):
    folder = resolve_base(name)
    subject = SHIPPED[name][1]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4_000_000
    card = json.loads((folder / "policy.json").read_text())
    assert card["recipe"] == vars_of(RECIPES[subject])
    assert card["faults"] == SUBJECTS[subject]().card()["faults"]
    assert Qwen3ForCausalLM.from_pretrained(folder).num_parameters() == card["parameters"]


@pytest.mark.parametrize(("page", "subject"), [("README.md", Spreadsheets()), ("docs/sandbox.md", Coding())])
def test_the_page_says_every_habit_with_its_share(page, subject):
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) \|$", (ROOT / page).read_text(), re.MULTILINE)
    faults = subject.card()["faults"]
    assert {name: float(share) for name, share in rows} == {n: s for n, s in faults.items() if n != "weights"}


def test_every_subject_has_one_shipped_policy():
    assert sorted(SUBJECTS) == sorted(subject for _, subject in SHIPPED.values()) == sorted(POLICY_OF)


def test_lessons_are_a_function_of_the_seed_and_hold_no_held_out_word():
    first, second, other = (list(Coding().lessons(seed, 40)) for seed in (0, 0, 1))
    assert first == second != other
    held_out = {task.instruction.split(" in ")[0].split("_")[0].split()[-1] for task in map(held_out_task, range(200))}
    assert len(held_out) == 8
    for lesson in first:
        assert not held_out & set(re.findall("[a-z]+", lesson.task.files[next(iter(lesson.task.files))]))


def held_out_task(number):
    return generate("test", 0, number)


def test_a_coding_demonstration_is_what_the_environment_answers(tmp_path):
    """Both families, as tokens, by an expert without habits; the environment pays for it."""
    subject = Coding(faults=dict.fromkeys(HABITS, 0.0))
    env = subject.environment()
    try:
        for lesson in subject.lessons(0, 6):
            env.reset(seed=0, options={"task": lesson.task})
            *_, reward, terminated, _, _ = [env.step(action) for action in lesson.actions][-1]
            assert (reward, terminated) == (1.0, True)
        won = 0.0
        for lesson in Coding().lessons(0, 20):
            env.reset(seed=0, options={"task": lesson.task})
            won += [env.step(action) for action in lesson.actions][-1][1]
        assert 0 < won < 14  # two habits apply to each task, each in half of the cases
    finally:
        env.close()
