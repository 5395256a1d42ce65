"""Canonical operations lose nothing, and outcomes come back byte for byte."""

import json
import math

import pytest
from espalier.envs.core import Action, Observation, ToolCall
from espalier.rollouts.graph.operation import may_keep, operation, outcome, result_of
from hypothesis import given
from hypothesis import strategies as st

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    ToolCall,
    st.sampled_from(["a", "b"]),
    st.none() | st.dictionaries(st.text(max_size=3), VALUES, max_size=3),
    st.text(max_size=4),
    st.text(max_size=3),
)
ACTIONS = st.builds(Action, st.text(max_size=5), st.lists(CALLS, max_size=3).map(tuple))


@given(ACTIONS, ACTIONS)
def test_two_turns_are_one_operation_exactly_when_an_environment_can_see_no_difference(one, two):
    """An environment that promises nothing sees everything; json tells 1, 1.0 and true apart, as types do."""

    def seen(action):
        return repr((action.text, [(c.name, c.arguments, c.raw, c.id) for c in action.tool_calls]))

    a, b = operation(one, False), operation(two, False)
    assert (a.id == b.id) == (seen(one) == seen(two))
    assert operation(one, True).id == operation(Action("other", one.tool_calls), True).id


def call(arguments, raw="", id="7.0", name="t"):
    return Action("x", (ToolCall(name, arguments, raw, id),))


def test_what_is_only_echoed_makes_no_difference_where_that_is_promised():
    assert operation(call({"a": 1}, "r", "1.0"), True).id == operation(call({"a": 1}, "s", "2.0"), True).id
    assert operation(call({"a": 1}, "r"), False).id != operation(call({"a": 1}, "s"), False).id
    assert operation(call(None, "r"), True).id != operation(call(None, "s"), True).id, "raw is all there is"
    assert operation(call({"a": 1}), True).id != operation(call({"a": 1.0}), True).id
    assert operation(call({"a": 1, "b": 2}), True).id != operation(call({"b": 2, "a": 1}), True).id


@pytest.mark.parametrize("arguments", [{"a": object()}, {"a": {1: 2}}, {"a": b"x"}, {"a": {(1, 2): 3}}])
def test_what_json_cannot_say_is_no_operation(arguments):
    assert operation(call(arguments), True) is None


def test_effects_decide_what_is_kept():
    effects = {"p": "pure", "r": "reads", "w": "writes", "c": "chance", "t": "clock", "n": "network", "e": "external"}

    def kept(*names, demoted=(), by_digest=False, effects=effects):
        made = operation(Action("", tuple(ToolCall(name, {}) for name in names)), True)
        return may_keep(made, effects, demoted, by_digest)

    assert kept("p", "r", "w") and not any(kept("w", name) for name in "ctne")
    assert kept("c", by_digest=True) and not any(kept(name, by_digest=True) for name in "tne")
    assert not kept("w", demoted=("w",)) and kept("r", demoted=("w",))
    assert not kept("w", effects={"w": "of some new kind"})
    calm = {"r": "reads", "w": "writes"}
    for names in ((), ("no such tool",)):
        assert kept(*names, effects=calm) and not kept(*names) and not kept(*names, effects=calm, demoted=("w",))


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.just("tool"), "content": st.text(max_size=8)}, optional={"name": st.text(max_size=3)}
    ),
    max_size=3,
).map(tuple)


@given(MESSAGES, st.floats(allow_nan=False), st.booleans(), st.booleans(), st.dictionaries(st.text(max_size=3), VALUES))
def test_an_outcome_comes_back_as_it_was(messages, reward, terminated, truncated, info):
    info = {name: value for name, value in info.items() if name not in ("ungraded", "unrepeatable")}
    kept = outcome((Observation(messages), reward, terminated, truncated, info))
    if any(isinstance(v, float) and math.isinf(v) for v in json.loads(json.dumps(list(info.values())))) or kept is None:
        return
    found = result_of(kept.body, None)
    assert found == (Observation(messages), reward, terminated, truncated, info)
    assert math.copysign(1, found[1]) == math.copysign(1, reward)


def test_ids_of_calls_are_the_episodes_own():
    made = operation(
        Action("", (ToolCall("a", {}, "", "5.0"), ToolCall("a", {}, "", ""), ToolCall("a", {}, "", "5.2"))), True
    )
    answers = [
        {"role": "tool", "content": "x", **({"tool_call_id": c.id} if c.id else {})} for c in made.action.tool_calls
    ]
    kept = outcome((Observation(tuple(answers)), 0.0, False, False, {}))
    found = result_of(kept.body, made.ids)[0].messages
    assert [m.get("tool_call_id") for m in found] == ["5.0", None, "5.2"] and "tool_call_id" not in found[1]


def test_no_verdict_is_no_outcome():
    for reward, info in ((math.nan, {}), (0.0, {"ungraded": "why"}), (0.0, {"unrepeatable": "time"})):
        assert outcome((Observation(), reward, True, False, info)) is None
    with pytest.raises(ValueError, match="not a kept outcome"):
        result_of(b"[1, 2]", None)
