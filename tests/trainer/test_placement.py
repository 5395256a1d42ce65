"""Which card an engine stands on, and how much of it is its own."""

import pytest
from espalier.configs.schema import RunConfig
from espalier.rollouts.samplers.vllm_limits import card_environment, of_a_launcher
from espalier.trainer.errors import UserError
from espalier.trainer.placement import MOST, SPARE, Needs, place
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

GB = 1e9
SMALL = Needs(trainer=30 * GB, resting=12 * GB, sampler=20 * GB)


def config(schedule="sync", **sampler):
    return RunConfig(sampler={"kind": "vllm", **sampler}, schedule={"kind": schedule})


def on_one(needs, room=80 * GB, **options):
    return place(config(**options), needs, visible=1, room=room, training=1)


def test_the_memory_is_split_where_both_fit_and_taken_by_turns_where_not():
    split = on_one(SMALL)
    assert (split.cards, split.sleeps) == ((0,), False)
    assert split.memory == pytest.approx(50 / 80 - SPARE)
    turns = on_one(SMALL, room=40 * GB)
    assert turns.sleeps
    assert turns.memory == pytest.approx(28 / 40 - SPARE)
    assert not on_one(SMALL, room=40 * GB, schedule="async").sleeps, "sampling never stops, so nothing is given back"
    assert not on_one(SMALL, room=40 * GB, kind="vllm-server").sleeps
    assert not on_one(SMALL, room=40 * GB, sharing="split").sleeps
    assert on_one(SMALL, sharing="sleep").sleeps


def test_what_is_asked_for_is_given():
    assert on_one(SMALL, gpu_memory=0.3).memory == 0.3
    large = on_one(SMALL, gpu_memory=0.8)
    assert (large.memory, large.sleeps) == (0.8, True), "beside the trainer it would not fit"
    assert on_one(None, gpu_memory=0.3).memory == 0.3


@given(
    st.builds(
        Needs, trainer=st.floats(10 * GB, 90 * GB), resting=st.floats(1 * GB, 10 * GB), sampler=st.floats(1, 60 * GB)
    ),
    st.floats(24 * GB, 200 * GB),
)
def test_what_auto_chooses_fits_if_anything_does(needs, room):
    found = on_one(needs, room=room)
    beside = needs.resting if found.sleeps else needs.trainer
    assert 0 <= found.memory <= MOST
    assert found.memory * room + beside <= room * (1 + 1e-9)
    if not found.sleeps:
        assert found.memory * room >= needs.sampler


def test_a_card_that_nobody_trains_on_is_the_samplers_own():
    two = place(config(), SMALL, visible=2, room=24 * GB, training=1)
    assert (two.cards, two.memory, two.sleeps) == ((1,), MOST, False)
    replicas = place(config(replicas=3), SMALL, visible=8, room=24 * GB, training=4)
    assert replicas.cards == (4, 5, 6)
    alone = place(config(), SMALL, visible=1, room=24 * GB, training=0)
    assert (alone.cards, alone.memory) == ((0,), MOST)
    with pytest.raises(UserError, match=r"sampler.replicas = 3, but 1 of 2 cards are free of training; set it to 1"):
        place(config(replicas=3), SMALL, visible=2, room=24 * GB, training=1)


def test_an_engine_sees_one_card_of_those_that_this_process_sees(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert card_environment(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5f")
    assert card_environment(1) == {"CUDA_VISIBLE_DEVICES": "GPU-5f"}


def test_what_a_launcher_sets_is_known_from_what_others_set():
    assert all(map(of_a_launcher, ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")))
    assert not any(map(of_a_launcher, ("PATH", "CUDA_VISIBLE_DEVICES", "MASTER", "OMP_NUM_THREADS")))


@pytest.mark.parametrize(
    ("sampler", "schedule", "said"),
    [
        ({"kind": "torch", "sharing": "sleep"}, "sync", 'only for sampler.kind = "vllm"'),
        ({"kind": "vllm", "sharing": "sleep"}, "async", "stops sampling while the trainer works"),
        ({"kind": "vllm-server", "url": "http://host", "replicas": 2}, "sync", "names one server"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_read(sampler, schedule, said):
    with pytest.raises(ValidationError, match=said):
        RunConfig(sampler=sampler, schedule={"kind": schedule})
