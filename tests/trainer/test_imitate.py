"""The base policy: demonstrations hold what episodes hold, and the recipe gives the same policy twice."""

import json
import random

import pytest
import torch
from espalier.envs.core import Action
from espalier.envs.spreadsheet.env import SpreadsheetEnv
from espalier.envs.spreadsheet.expert import FaultModel, expert
from espalier.rollouts.digest import folder_digest
from espalier.rollouts.render import make_renderer
from espalier.trainer.demonstrations import demonstrate, play, said, sketch_task
from espalier.trainer.imitate import TOOLS, Recipe, make_policy

SMALL = Recipe(hidden=32, layers=1, heads=2, kv_heads=1, feed_forward=48, merges=600, demonstrations=64, steps=4)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("policy") / "tiny", SMALL, say=lambda line: None)


def test_the_same_recipe_gives_the_same_policy(policy, tmp_path):
    again = make_policy(tmp_path / "again", SMALL, say=lambda line: None)
    other = make_policy(tmp_path / "other", Recipe(**{**vars_of(SMALL), "seed": 1}), say=lambda line: None)

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
        make_policy(policy, SMALL)
    assert folder_digest(policy) == before


@pytest.mark.parametrize("family", ["total", "lookup", "repair", "summary"])
def test_a_demonstration_is_an_episode_of_exact_tokens(policy, family):
    env = SpreadsheetEnv([sketch_task(0, 0, "total")], tools=TOOLS, terse=True)
    renderer = make_renderer(policy, thinking=False)
    task = sketch_task(3, 1, family)
    shown = demonstrate(env, renderer, task, random.Random(0), FaultModel(**no_faults()))
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
def test_demonstrations_that_copy_a_word_are_known(policy, family, copies):
    env = SpreadsheetEnv([sketch_task(0, 0, "total")], tools=TOOLS, terse=True)
    renderer = make_renderer(policy, thinking=False)
    shown = demonstrate(env, renderer, sketch_task(3, 2, family), random.Random(0), FaultModel(**no_faults()))
    assert shown.copies is copies


def no_faults():
    return dict.fromkeys(("short_range", "decoy_column", "pasted", "blind", "no_dollar", "repair_blind"), 0.0)


def test_torch_threads_are_part_of_the_recipe(policy):
    assert torch.get_num_threads() == SMALL.threads


def test_the_shipped_policy_is_small_and_says_its_recipe():
    from espalier.trainer.policy import resolve_base
    from transformers import Qwen3ForCausalLM

    folder = resolve_base("tiny")
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4_000_000
    card = json.loads((folder / "policy.json").read_text())
    assert card["recipe"] == vars_of(Recipe())
    assert card["faults"]["weights"] == dict(FaultModel().weights)
    assert {name: card["faults"][name] for name in no_faults()} == {n: getattr(FaultModel(), n) for n in no_faults()}
    assert Qwen3ForCausalLM.from_pretrained(folder).num_parameters() == card["parameters"]
