"""Runs whose groups grow as trees: promises 2, 3, 5 and 10 with the real sampler, stores and trainer."""

import json
from typing import Any, ClassVar

import gymnasium
import pytest
import toy
from espalier.configs.schema import RunConfig
from espalier.envs.core import Action, EnvFailure, Observation, Snapshot
from espalier.rollouts.store import TrajectoryStore
from espalier.rollouts.types import EndReason
from espalier.trainer.errors import UserError
from espalier.trainer.loop import collect, train
from espalier.trainer.policy import PolicyStore
from pydantic import ValidationError

PHASES = {"seconds_rollout", "seconds_turning", "seconds_train", "seconds_publish", "seconds_checkpoint"}
TIMES = {"time", *PHASES, "tok_s", "seconds", "graph"}
TURNS = 3


class Spelling(toy.Letters):
    """Three answers in a row, each right that begins with "a" or "b"; it passes with two. Its states can be kept."""

    steps: ClassVar[int] = 0
    snapshots_travel = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.turn = self.right = 0
        self.counts = not (options or {}).get("evaluation")
        return super().reset(seed=seed, options=options)

    def step(self, action: Action) -> Any:
        Spelling.steps += self.counts
        self.turn += 1
        self.right += action.text.startswith(("a", "b"))
        over = self.turn == TURNS
        reward = float(over and self.right >= 2)
        said = Observation() if over else Observation(({"role": "user", "content": f"again, {self.right} right"},))
        return said, reward, over, False, {"tool_errors": 0, "soft": reward}

    def snapshot(self) -> Snapshot:
        return Snapshot("spelling", "", (self.turn, self.right), 16)

    def rollback(self, snapshot: Snapshot) -> None:
        if snapshot.env_id != "spelling":
            raise EnvFailure("foreign_snapshot", "of another environment")
        self.turn, self.right = snapshot.state
        self.counts = True

    def branch(self, snapshot: Snapshot) -> "Spelling":
        made = Spelling()
        made.rollback(snapshot)
        return made


gymnasium.register(id="Spelling-v0", entry_point=Spelling, order_enforce=False, disable_env_checker=True)


def config_of(base, out, **changes):
    settings = {
        "env": {"id": "Spelling-v0"},
        "episode": {"max_turns": 4, "max_tokens": 560},
        "branching": {"roots": 2, "rounds": 2, "at": "value"},
        "trainer": {"steps": 3, "group_size": 6},
        "eval": {"tasks": 4, "every": 0, "greedy": False},
        "schedule": {"checkpoint_every": 1},
    }
    for section, value in changes.items():
        settings[section] = {**settings.get(section, {}), **value}
    return toy.run_config(base, out, **settings)


def rows(folder, kind="train"):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def timeless(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(folder)]


def adapters(folder, base):
    store = PolicyStore(folder / "policies", base)
    return {number: store.open(number).digest for number in store.list()}


def stored(folder):
    store = TrajectoryStore(folder / "trajectories", readonly=True)
    try:
        return list(store.groups())
    finally:
        store.close()


@pytest.fixture(scope="module")
def whole(toy_base, tmp_path_factory):
    """An uninterrupted run of 3 steps: its folder."""
    out = tmp_path_factory.mktemp("whole")
    train(config_of(toy_base, out))
    return out / "toy"


def test_a_run_trains_what_its_trees_sampled_and_says_what_they_saved(whole):
    groups = stored(whole)
    for row in rows(whole):
        mine = [t for g in groups if g.id.split("/")[1] == str(row["step"]) for t in g.trajectories]
        kept = row["branching"]
        assert kept["branches"] > 0 and kept["branches"] + kept["trees"] == len(mine) == row["episodes"]
        assert kept["tokens_saved"] == sum(t.inherited_tokens for t in mine) > 0
        assert kept["turns_saved"] == sum(t.left_at for t in mine) and row["turns"] == sum(t.own_turns for t in mine)
        assert row["sampled_tokens"] == sum(t.sampled_tokens for t in mine) >= row["trained_tokens"] > 0
        assert row["logprob_gap"] < 1e-4 and row["failures"] == {}
        assert row["shared_prefix"] == "tree" and row["tokens_unique"] < row["tokens_total"]
        assert row["graph"]["replayed"] == 0, "no environment came to a state again"
    [said] = [row for row in rows(whole, "phase") if "tree_error" in row]
    assert said["tree_error"] <= 1e-5
    assert not rows(whole, "alarm")


class Killed(BaseException):
    """Stands for a kill -9."""


@pytest.mark.parametrize("step", [1, 2])
def test_resume_equals_no_interruption(whole, toy_base, tmp_path, step):
    config = config_of(toy_base, tmp_path)

    def die(row):
        if (row["kind"], row.get("step")) == ("train", step):
            raise Killed

    with pytest.raises(Killed):
        train(config, on_event=die)
    train(config, resume=True)
    assert timeless(tmp_path / "toy") == timeless(whole)
    assert adapters(tmp_path / "toy", toy_base) == adapters(whole, toy_base)
    assert [g.id for g in stored(tmp_path / "toy")] and len(stored(tmp_path / "toy")) == len(stored(whole))


@pytest.mark.parametrize(
    "change", [{"graph": {"enabled": False}}, {"graph": {"live": 1}}, {"sampler": {"slots": 3}}], ids=str
)
def test_a_run_does_not_depend_on_how_its_environments_are_branched(whole, toy_base, tmp_path, change):
    """On snapshots behind every step, or in the graph; many at once, or few."""
    before = Spelling.steps
    train(config_of(toy_base, tmp_path, **change))
    assert adapters(tmp_path / "toy", toy_base) == adapters(whole, toy_base)
    if change == {"graph": {"enabled": False}}:
        everything = [t for group in stored(tmp_path / "toy") for t in group.trajectories]
        cut = sum(t.end is EndReason.MAX_TOKENS for t in everything)  # a turn that was cut is no step
        assert Spelling.steps - before == sum(t.own_turns for t in everything) - cut


@pytest.mark.parametrize("change", [{"at": "random"}, {"at": "entropy"}, {"roots": 0}], ids=str)
def test_control_other_trees_are_another_run(whole, toy_base, tmp_path, change):
    train(config_of(toy_base, tmp_path, branching={"rounds": 1, **change}, trainer={"steps": 1}))
    assert adapters(tmp_path / "toy", toy_base)[1] != adapters(whole, toy_base).get(1)
    assert timeless(tmp_path / "toy")[0]["sampled_tokens"] != timeless(whole)[0]["sampled_tokens"]


def test_sampling_may_run_ahead(toy_base, tmp_path):
    schedule = {"kind": "async", "max_staleness": 1}
    result = train(config_of(toy_base, tmp_path, schedule=schedule, branching={"at": "random", "rounds": 1}))
    assert result["steps"] == 3
    for row in rows(tmp_path / "toy"):
        assert row["staleness_max"] <= 1 and row["failures"] == {} and row["branching"]["branches"] > 0
    for group in stored(tmp_path / "toy"):
        assert len({v for t in group.trajectories for v in t.versions}) == 1, "a tree keeps its version"


def test_replay_trains_stored_trees_as_they_were(whole, toy_base, tmp_path):
    original = rows(whole)[0]
    as_many = {"steps": 1, "groups": original["groups_used"]}  # of the first step, which all come first
    train(config_of(toy_base, tmp_path, trainer=as_many), from_trajectories=whole)
    first = rows(tmp_path / "toy")[0]
    assert first["trained_tokens"] == original["trained_tokens"]
    assert first["loss"] == pytest.approx(original["loss"], abs=1e-6)
    config = config_of(
        toy_base,
        tmp_path / "other",
        branching={"roots": 0, "rounds": 1},
        trainer={"importance_sampling_level": "sequence"},
    )
    with pytest.raises(
        UserError, match=r"grew as trees: trainer\.importance_sampling_level = \"sequence\" weighs whole"
    ):
        train(config, from_trajectories=whole)


def test_what_cannot_be_branched_is_said_once_and_trained_as_chains(toy_base, tmp_path):
    train(config_of(toy_base, tmp_path, env={"id": toy.ENV_ID}, trainer={"steps": 2}))
    [alarm] = rows(tmp_path / "toy", "alarm")
    assert alarm["alarm"] == "branching" and "groups are chains" in alarm["message"] and not alarm["stops"]
    assert all(row["branching"]["branches"] == 0 and row["trained_tokens"] > 0 for row in rows(tmp_path / "toy"))


def test_a_budget_without_room_for_a_branch_is_said_to_be_one(toy_base, tmp_path):
    train(config_of(toy_base, tmp_path, branching={"max_turns": 1}, trainer={"steps": 1}))
    [alarm] = rows(tmp_path / "toy", "alarm")
    assert alarm["alarm"] == "branching" and "branching.max_turns" in alarm["message"]
    assert rows(tmp_path / "toy")[0]["branching"]["branches"] == 0


def test_collecting_grows_trees_too(toy_base, tmp_path):
    (tmp_path / "toy").mkdir()
    found = collect(config_of(toy_base, tmp_path), episodes=12)
    assert found["episodes"] == 12 and found["branching"]["branches"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"branching": {"roots": 6}}, "leaves none of trainer.group_size = 6"),
        ({"branching": {"roots": 4, "rounds": 3}}, "branching.rounds = 3 are more than the 2 branches"),
        ({"episode": {"max_turns": 1}}, "episode.max_turns = 1 has none"),
        ({"trainer": {"loss": "vespo"}}, 'trainer.loss = "vespo" weighs whole sequences'),
        ({"trainer": {"importance_sampling_level": "sequence"}}, "importance_sampling_level"),
        ({"trainer": {"off_policy_correction": "sequence_mask"}}, 'off_policy_correction = "sequence_mask"'),
        ({"trainer": {"off_policy_mask_threshold": 0.5}}, "off_policy_mask_threshold weighs"),
    ],
)
def test_what_no_tree_can_is_refused_when_it_is_parsed(changes, said):
    settings = {"branching": {"roots": 2}, "trainer": {"group_size": 6}}
    for section, value in changes.items():
        settings[section] = {**settings.get(section, {}), **value}
    with pytest.raises(ValidationError, match=said):
        RunConfig(**settings)
    RunConfig(**{**settings, "branching": {"roots": 0}})
