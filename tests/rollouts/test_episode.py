"""The state machine alone: no environment, no sampler, no clock. Promises 1, 2 and 3."""

import math
import random
from collections import Counter
from dataclasses import replace

import adding
import pytest
from espalier.envs.core import Action, Observation
from espalier.rollouts.episode import (
    Ended,
    Episode,
    EpisodeOrderError,
    EpisodeSpec,
    NeedSample,
    NeedStep,
    environment_seed,
    episode_key,
)
from espalier.rollouts.samplers.base import Sample
from espalier.rollouts.types import EndReason, Failure, FailureKind, TokenSequence, TokenSpan, Trajectory
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

TOOLS = [adding.add.to_openai()]
OPENING = Observation(({"role": "user", "content": "reach 7"},))
TOOL = Observation(({"role": "tool", "content": "total 3"},))
USER = Observation(({"role": "user", "content": "another question"},))


def spec(version=3):
    return EpisodeSpec("g/0", "g", adding.task(7), "toy", 11, version)


def sample(renderer, text, finish="stop", version=3, logprob=-0.25):
    tokens = (*renderer.encode(text), *((renderer.stop_ids[0],) if finish == "stop" else ()))
    return Sample(tokens, tuple(logprob - i for i in range(len(tokens))), finish, version)


def begun(renderer, on_overflow=None, **changes):
    episode = Episode(spec(), adding.budget(**changes), renderer, on_overflow, branchable=True)
    episode.begin(OPENING, TOOLS, {"initial": "0", "task": object()})
    return episode


def finish(episode, reward=1.0, info=None):
    request = episode.stepped(Observation(), reward, True, False, info or {}, 1.0)
    assert isinstance(request, Ended)
    return request.outcome


def test_an_episode_from_start_to_end(plain):
    episode = begun(plain)
    first = episode.request.prompt
    one = sample(plain, adding.call("add", n=3))
    request = episode.sampled(one, 0.1, 0.1)
    assert request == NeedStep(Action("", request.action.tool_calls)) and request.action.tool_calls[0].name == "add"
    second = episode.stepped(TOOL, 0.0, False, False, {"tool_errors": 1}, 0.2).prompt
    assert second[: len(first) + len(one.tokens)] == (*first, *one.tokens)
    two = sample(plain, "done")
    assert not episode.sampled(two, 0.3).action.tool_calls
    trajectory = finish(episode, info={"tool_errors": 0, "final": "7", "array": math.inf, "object": object()})
    (sequence,) = trajectory.sequences
    assert sequence.tokens == (*second, *two.tokens) and sequence.logprobs == one.logprobs + two.logprobs
    assert [s.origin for s in sequence.spans] == ["prompt", "sampled", "template", "tool", "template", "sampled"]
    assert trajectory.info == {
        "initial": "0",
        "final": "7",
        "prompt_tokens": len(first),
        "calls": 1,
        "tool_errors": 1,
    }
    assert [(t.span, t.results) for t in trajectory.turns] == [(1, ("total 3",)), (5, ())]
    assert (trajectory.reward, trajectory.end, trajectory.versions) == (1.0, EndReason.DONE, {3})


def test_a_fork_begins_a_new_sequence_and_leaves_the_old_one(thinking):
    episode = begun(thinking)
    first = episode.request.prompt
    one = sample(thinking, "<think>\nseven\n</think>\n\nWhich one?")
    episode.sampled(one, 0.1)
    forked = episode.stepped(USER, 0.0, False, False, {}, 0.2).prompt
    assert forked[: len(first) + len(one.tokens)] != (*first, *one.tokens) and "seven" not in thinking.decode(forked)
    two = sample(thinking, "done")
    episode.sampled(two, 0.3)
    old, new = finish(episode).sequences
    assert old.tokens == (*first, *one.tokens) and old.logprobs == one.logprobs
    assert new.tokens == (*forked, *two.tokens) and new.logprobs == two.logprobs
    assert [s.origin for s in new.spans] == ["prompt", "sampled"]


def test_a_fork_behind_which_nothing_was_sampled_is_not_kept(thinking):
    episode = begun(thinking, "grade")
    episode.sampled(sample(thinking, "<think>\nseven\n</think>\n\nWhich one?"), 0.1)
    episode.stepped(USER, 0.0, False, False, {}, 0.2)
    episode.out_of_time(40.0)
    assert len(finish(episode, 0.0).sequences) == 1


@pytest.mark.parametrize("on_overflow", ["failure", "grade", "drop"])
@pytest.mark.parametrize("reason", [EndReason.MAX_TOKENS, EndReason.MAX_TURNS, EndReason.MAX_SECONDS, "full"])
def test_every_budget_truncates_with_its_reason(plain, reason, on_overflow):
    episode = begun(plain, on_overflow, max_turns=1 if reason is EndReason.MAX_TURNS else 6, max_tokens=700)
    if reason is EndReason.MAX_TOKENS:
        request = episode.sampled(sample(plain, "I go on and", finish="length"), 0.1)
    else:
        episode.sampled(sample(plain, adding.call("add", n=3)), 0.1)
        answer = Observation(({"role": "tool", "content": "x" * 700},)) if reason == "full" else TOOL
        request = episode.stepped(answer, 0.0, False, False, {}, 31.0 if reason is EndReason.MAX_SECONDS else 0.2)
    expected = EndReason.MAX_TOKENS if reason == "full" else reason
    if on_overflow == "drop":
        assert request.outcome.kind is FailureKind.OVERFLOW and str(expected) in request.outcome.message
        return
    if on_overflow == "grade":
        assert request == NeedStep(Action(), grading=True)
        trajectory, reward = finish(episode, 1.0), 1.0
    else:
        trajectory, reward = request.outcome, 0.0
    assert (trajectory.end, trajectory.reward, trajectory.truncated) == (expected, reward, True)
    assert trajectory.sequences[0].spans[-1].origin == "sampled"


def test_rewards_on_the_way_do_not_pay_for_an_episode_that_counts_as_a_failure(plain):
    episode = begun(plain, "failure")
    episode.sampled(sample(plain, adding.call("add", n=3)), 0.1)
    episode.stepped(TOOL, 0.5, False, False, {}, 0.2)
    assert episode.sampled(sample(plain, "I go on and", finish="length"), 0.3).outcome.reward == 0.0


def test_a_cut_turn_is_recorded_masked_and_never_an_action(plain):
    episode = begun(plain, "grade")
    episode.sampled(sample(plain, adding.call("add", n=3)), 0.1)
    episode.stepped(TOOL, 0.0, False, False, {}, 0.2)
    cut = sample(
        plain, adding.call("add", n=4), finish="length"
    )  # complete by chance: still cut, since it did not stop
    assert episode.sampled(cut, 0.3) == NeedStep(Action(), grading=True)
    sequence = finish(episode, 0.0).sequences[0]
    assert sequence.tokens[-len(cut.tokens) :] == cut.tokens and sequence.logprobs[-len(cut.tokens) :] == cut.logprobs
    assert sum(sequence.sampled_mask()) - sum(sequence.trained_mask()) == len(cut.tokens)
    assert not any(sequence.trained_mask()[-len(cut.tokens) :])


def test_a_cut_turn_is_trained_where_the_configuration_says_so(plain):
    """Once, with the log-probabilities it was sampled with, and the episode's own reward; still never an action."""
    episode = begun(plain, "grade", cut_turns="train")
    one = sample(plain, adding.call("add", n=3))
    episode.sampled(one, 0.1)
    episode.stepped(TOOL, 0.0, False, False, {}, 0.2)
    cut = sample(plain, adding.call("add", n=4), finish="length")
    assert episode.sampled(cut, 0.3) == NeedStep(Action(), grading=True)
    trajectory = finish(episode, 0.0)
    (sequence,) = trajectory.sequences
    assert sequence.trained_mask() == sequence.sampled_mask()
    assert sequence.logprobs == one.logprobs + cut.logprobs
    assert (trajectory.reward, trajectory.end) == (0.0, EndReason.MAX_TOKENS)


def test_a_dropped_episode_trains_nothing_of_its_cut_turn(plain):
    episode = begun(plain, "drop", cut_turns="train")
    outcome = episode.sampled(sample(plain, "I go on and", finish="length"), 0.1).outcome
    assert isinstance(outcome, Failure) and outcome.kind is FailureKind.OVERFLOW


@pytest.mark.parametrize("grading", [False, True])
def test_no_verdict_is_a_failure_and_never_a_zero(plain, grading):
    for reward, info in [(math.nan, {}), (0.0, {"ungraded": "engines disagree"})]:
        episode = begun(plain, "grade")
        episode.sampled(sample(plain, "done", finish="length" if grading else "stop"), 0.1)
        outcome = finish(episode, reward, info)
        assert isinstance(outcome, Failure) and outcome.kind is FailureKind.UNGRADED


def test_a_prompt_that_does_not_fit_is_a_typed_failure(plain):
    episode = Episode(spec(), adding.budget(max_prompt_tokens=20), plain)
    outcome = episode.begin(OPENING, TOOLS, {}).outcome
    assert outcome.kind is FailureKind.OVERFLOW and "max_prompt_tokens is 20" in outcome.message


def test_time_that_runs_out_while_a_sample_is_awaited_is_never_a_reward_of_0(plain):
    episode = begun(plain, "failure")
    episode.sampled(sample(plain, adding.call("add", n=3)), 0.1)
    episode.stepped(TOOL, 0.0, False, False, {}, 0.2)
    outcome = episode.out_of_time(99.0).outcome
    assert isinstance(outcome, Failure) and outcome.kind is FailureKind.SAMPLER_TIMEOUT and outcome.retryable


def test_time_that_passes_before_anything_was_sampled_is_not_the_policys_fault(plain):
    episode = begun(plain)
    outcome = episode.out_of_time(99.0).outcome
    assert outcome.kind is FailureKind.SAMPLER_TIMEOUT and outcome.retryable


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": (), "logprobs": ()}, "no token"),
        ({"logprobs": (-1.0,)}, "log-probabilities for"),
        ({"logprobs": None}, "not finite"),
        ({"version": 4}, "version 4"),
        ({"tokens": (1,) * 500, "logprobs": (-1.0,) * 500}, "at most 200"),
    ],
)
def test_a_sample_that_cannot_be_trained_on_is_refused(plain, change, said):
    good = sample(plain, "done")
    if change == {"logprobs": None}:
        change = {"logprobs": (math.nan,) * len(good.tokens)}
    outcome = begun(plain).sampled(replace(good, **change), 0.1).outcome
    assert outcome.kind is FailureKind.SAMPLER and said in outcome.message


def test_events_out_of_order_are_bugs(plain):
    episode = begun(plain)
    with pytest.raises(EpisodeOrderError):
        episode.begin(OPENING, TOOLS, {})
    with pytest.raises(EpisodeOrderError):
        episode.stepped(TOOL, 0.0, False, False, {}, 0.1)
    episode.sampled(sample(plain, "done"), 0.1)
    with pytest.raises(EpisodeOrderError):
        episode.sampled(sample(plain, "done"), 0.1)
    with pytest.raises(EpisodeOrderError):
        episode.out_of_time(0.1)
    finish(episode)
    with pytest.raises(EpisodeOrderError):
        episode.fail(FailureKind.INTERNAL, "twice")


def test_a_branch_has_the_turns_before_and_its_own_end(plain):
    episode = begun(plain)
    one, two = sample(plain, adding.call("add", n=3)), sample(plain, adding.call("add", n=4))
    episode.sampled(one, 0.1, 0.5)
    second = episode.stepped(TOOL, 0.25, False, False, {"tool_errors": 1, "seen": "once"}, 0.2, 0.5).prompt
    episode.sampled(two, 0.3)
    episode.stepped(TOOL, 0.5, False, False, {"tool_errors": 1, "seen": "twice"}, 0.4)
    episode.sampled(sample(plain, "done"), 0.5)
    parent = finish(episode)
    branch = episode.branch(replace(spec(), id="g/1"), 1)
    assert branch.request == NeedSample(second, 200, 1)
    other = sample(plain, "no more", logprob=-3.0)
    branch.sampled(other, 0.1)
    made = finish(branch, 0.0)
    assert (made.id, made.parent, made.left_at, made.reward) == ("g/1", "g/0", 1, 0.25)
    assert (made.info["seen"], made.info["tool_errors"], made.info["calls"]) == ("once", 1, 1)
    assert made.turns[0] == replace(parent.turns[0], seconds_sampling=0.0, seconds_env=0.0)
    (sequence,) = made.sequences
    assert sequence.tokens == (*second, *other.tokens) and sequence.logprobs == one.logprobs + other.logprobs
    assert [s.trained for s in sequence.spans if s.origin == "sampled"] == [False, True]
    assert sum(sequence.trained_mask()) == made.sampled_tokens == len(other.tokens)
    assert all(s.trained for s in parent.sequences[0].spans) and parent.parent is None


@pytest.mark.parametrize("on_overflow", ["failure", "grade", "drop"])
def test_a_branch_that_had_no_time_for_a_turn_of_its_own_is_a_failure(plain, on_overflow):
    """It would be its parent's beginning again, with a verdict on that."""
    episode = begun(plain, on_overflow)
    episode.sampled(sample(plain, adding.call("add", n=3)), 0.1)
    episode.stepped(TOOL, 0.0, False, False, {}, 0.2)
    episode.sampled(sample(plain, "done"), 0.3)
    finish(episode)
    branch = episode.branch(replace(spec(), id="g/1"), 1)
    outcome = branch.out_of_time(99.0).outcome
    assert isinstance(outcome, Failure) and outcome.kind is FailureKind.SAMPLER_TIMEOUT and outcome.retryable


def test_what_cannot_be_left_is_refused(plain):
    episode = begun(plain)
    episode.sampled(sample(plain, adding.call("add", n=3)), 0.1)
    episode.stepped(TOOL, 0.0, False, False, {}, 0.2)
    for turn in (0, 1, 2):  # its first, one not sampled yet, one never asked for
        with pytest.raises(ValueError, match=f"no turn {turn} of its own"):
            episode.branch(replace(spec(), id="g/1"), turn)
    episode.sampled(sample(plain, "done"), 0.1)
    with pytest.raises(ValueError, match="another kind of episode"):
        episode.branch(replace(spec(version=4), id="g/1"), 1)


def test_an_episode_that_nobody_leaves_remembers_no_turn(plain):
    episode = Episode(spec(), adding.budget(), plain)
    episode.begin(OPENING, TOOLS, {})
    for _ in range(2):
        episode.sampled(sample(plain, adding.call("add", n=3)), 0.1)
        episode.stepped(TOOL, 0.0, False, False, {"long": "x" * 1000}, 0.2)
    assert not episode._before
    with pytest.raises(ValueError, match="no turn 1 of its own"):
        episode.branch(replace(spec(), id="g/1"), 1)


def test_keys_and_seeds_depend_on_all_their_parts_and_on_nothing_else():
    parts = [("r", "g/0", 0), ("s", "g/0", 0), ("r", "g/1", 0), ("r", "g/0", 1), ("r", "g", 0), ("rg", "/0", 0)]
    assert len({episode_key(*p) for p in parts}) == len(parts)
    assert episode_key("run", "g/0", 2) == 5415351359797670752 and 0 <= episode_key("r", "", 0) < 2**64
    assert environment_seed(1, "t") != environment_seed(2, "t") != environment_seed(1, "u")
    assert environment_seed(1, "t") == environment_seed(1, "t") < 2**31


def rebuilt(seen, made):
    """What the sampler was shown and made, from its side: the truth that a trajectory must equal."""
    sequences = []
    for prompt, tokens in zip(seen, made, strict=True):
        if sequences and prompt[: len(sequences[-1])] == sequences[-1]:
            sequences[-1] = (*prompt, *tokens)
        else:
            sequences.append((*prompt, *tokens))
    return sequences


def check(trajectory, seen, made, logprobs):
    assert [s.tokens for s in trajectory.sequences] == rebuilt(seen, made)
    sampled, recorded = [], []
    for turn in trajectory.turns:
        sequence = trajectory.sequences[turn.sequence]
        span = sequence.spans[turn.span]
        assert span.origin == "sampled"
        sampled.append(sequence.tokens[span.start : span.stop])
    for sequence in trajectory.sequences:
        recorded.extend(sequence.logprobs)
    assert sampled == made and recorded == [p for turn in logprobs for p in turn]
    marked = sum(s.origin == "sampled" for q in trajectory.sequences for s in q.spans)
    assert marked == len(trajectory.turns), "every sampled turn stands in exactly one span"
    own = sum(map(len, made[trajectory.left_at :]))
    assert trajectory.sampled_tokens == own and trajectory.inherited_tokens == sum(map(len, made)) - own
    assert trajectory.info["calls"] == sum(len(turn.calls) for turn in trajectory.turns)


class Machine(RuleBasedStateMachine):
    """Any order of events that a runner may produce, with what the sampler saw and made written down beside it."""

    renderer = None

    @initialize(
        turns=st.integers(1, 5),
        tokens=st.integers(600, 1200),
        on_overflow=st.sampled_from(["failure", "grade", "drop"]),
        cut_turns=st.sampled_from(["mask", "train"]),
    )
    def start(self, turns, tokens, on_overflow, cut_turns):
        budget = adding.budget(max_turns=turns, max_tokens=tokens, max_turn_tokens=40, cut_turns=cut_turns)
        self.episode = Episode(spec(), budget, self.renderer, on_overflow, branchable=True)
        self.budget = budget
        self.seen, self.made, self.logprobs, self.ends = [], [], [], 0
        self.elapsed = 0.0
        self.note(self.episode.begin(OPENING, TOOLS, {}))

    def note(self, request):
        self.ends += isinstance(request, Ended)

    def waits_for(self, kind):
        return isinstance(self.episode.request, kind)

    @precondition(lambda self: self.waits_for(NeedSample))
    @rule(
        text=st.sampled_from(
            ["done", "<think>\nhm\n</think>\n\n", "<tool_call>\n{bad", adding.call("add", n=1), "é\u20ac"]
        ),
        length=st.sampled_from([False] * 7 + [True]),
    )
    def sample(self, text, length):
        request = self.episode.request
        assert len(request.prompt) + request.max_tokens <= self.budget.max_tokens
        made = sample(self.renderer, text, "length" if length else "stop")
        made = replace(made, tokens=made.tokens[: request.max_tokens], logprobs=made.logprobs[: request.max_tokens])
        self.seen.append(request.prompt)
        self.made.append(made.tokens)
        self.logprobs.append(made.logprobs)
        self.note(self.episode.sampled(made, self.elapsed))

    @precondition(lambda self: self.waits_for(NeedStep))
    @rule(
        observation=st.sampled_from([TOOL, USER, Observation((*TOOL.messages, *TOOL.messages))]),
        reward=st.sampled_from([0.0] * 6 + [1.0, math.nan]),
        ends=st.sampled_from([""] * 6 + ["terminated", "truncated"]),
        passed=st.sampled_from([0.0, 1.0, 2.0, 20.0]),
    )
    def step(self, observation, reward, ends, passed):
        self.elapsed += passed
        self.note(
            self.episode.stepped(observation, reward, ends == "terminated", ends == "truncated", {}, self.elapsed)
        )

    @precondition(lambda self: not self.waits_for(Ended))
    @rule(what=st.sampled_from([None] * 30 + ["out of time", *FailureKind]))
    def break_something(self, what):
        """Seldom, or no episode would live long enough to be interesting."""
        if what == "out of time" and self.waits_for(NeedSample):
            self.note(self.episode.out_of_time(99.0))
        elif isinstance(what, FailureKind):
            self.note(self.episode.fail(what, "broken"))

    @precondition(lambda self: self.waits_for(Ended))
    @rule()
    def nothing_happens_after_the_end(self):
        before = self.episode.request
        for event in (
            lambda: self.episode.fail(FailureKind.INTERNAL, "late"),
            lambda: self.episode.out_of_time(1.0),
            lambda: self.episode.stepped(TOOL, 1.0, True, False, {}, 1.0),
            lambda: self.episode.sampled(sample(self.renderer, "late"), 1.0),
        ):
            with pytest.raises(EpisodeOrderError):
                event()
        assert self.episode.request is before

    @precondition(lambda self: self.waits_for(Ended) and isinstance(self.episode.request.outcome, Trajectory))
    @rule(data=st.data())
    def leave(self, data):
        """Go on as a branch of the episode that has ended; that stays as it was."""
        parent = self.episode.request.outcome
        if len(parent.turns) <= max(parent.left_at, 1):
            return
        turn = data.draw(st.integers(max(parent.left_at, 1), len(parent.turns) - 1))
        branch = self.episode.branch(replace(self.episode.spec, id=f"{parent.id}+"), turn)
        assert branch.request == NeedSample(self.seen[turn], branch.request.max_tokens, turn)
        check(parent, self.seen, self.made, self.logprobs)
        self.episode, self.ends, self.elapsed = branch, 0, 0.0
        self.seen, self.made, self.logprobs = self.seen[:turn], self.made[:turn], self.logprobs[:turn]

    @invariant()
    def ends_once(self):
        if not hasattr(self, "episode"):
            return
        assert self.ends == self.waits_for(Ended)
        if self.ends and isinstance(self.episode.request.outcome, Trajectory):
            check(self.episode.request.outcome, self.seen, self.made, self.logprobs)


@pytest.mark.parametrize("mode", ["plain", "thinking"])
def test_whatever_happens_it_ends_once_and_records_exactly_what_was_seen_and_made(request, mode):
    renderer = request.getfixturevalue(mode)
    machine = type("Machine", (Machine,), {"renderer": renderer})
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine, settings=settings(max_examples=100, stateful_step_count=20, deadline=None))


@pytest.mark.parametrize("mode", ["plain", "thinking"])
def test_long_episodes_too(request, mode):
    """The same check on seeded walks without our own failures, which make long and forked episodes common."""
    renderer = request.getfixturevalue(mode)
    turns, forks = Counter(), Counter()
    for seed in range(60):
        rng = random.Random(seed)
        episode = begun(renderer, max_turns=6, max_turn_tokens=60)
        seen, made, logprobs = [], [], []
        while not isinstance(episode.request, Ended):
            wanted = episode.request
            if isinstance(wanted, NeedSample):
                text = rng.choice(
                    ["done", "<think>\nhm\n</think>\n\n", "<tool_call>\n{bad", adding.call("add", n=1), "é"]
                )
                new = sample(renderer, text, "length" if rng.random() < 0.1 else "stop")
                new = replace(new, tokens=new.tokens[: wanted.max_tokens], logprobs=new.logprobs[: wanted.max_tokens])
                seen.append(wanted.prompt)
                made.append(new.tokens)
                logprobs.append(new.logprobs)
                episode.sampled(new, 0.1)
            else:
                over = rng.random() < 0.1
                episode.stepped(rng.choice([TOOL, USER]), 0.0, over, False, {}, 0.1)
        check(episode.request.outcome, seen, made, logprobs)
        turns[len(episode.request.outcome.turns)] += 1
        forks[len(episode.request.outcome.sequences) > 1] += 1
    assert set(turns) == {1, 2, 3, 4, 5, 6}
    assert (mode == "thinking") == (forks[True] > 0) and forks[False] > 0


def test_the_check_above_catches_what_it_is_for(plain):
    """Negative control: a trajectory that was re-tokenised, and one that lost a turn, are both caught."""
    episode = begun(plain)
    seen = [episode.request.prompt]
    # "done" in single bytes: the same text as the tokenizer's own "done", other ids
    tokens = (*(plain.encode(c)[0] for c in "assistant"), plain.stop_ids[0])
    made = Sample(tokens, (-1.0,) * len(tokens), "stop", 3)
    episode.sampled(made, 0.1)
    trajectory = finish(episode)
    check(trajectory, seen, [tokens], [made.logprobs])
    again = (*seen[0], *plain.encode("assistant"), plain.stop_ids[0])
    assert plain.decode(again) == plain.decode(trajectory.sequences[0].tokens)
    spans = (TokenSpan(0, len(seen[0]), "prompt"), TokenSpan(len(seen[0]), len(again), "sampled", 3))
    retokenised = TokenSequence(again, spans, (-1.0,) * (len(again) - len(seen[0])))
    with pytest.raises(AssertionError):
        check(replace(trajectory, sequences=(retokenised,)), seen, [tokens], [made.logprobs])
    with pytest.raises(AssertionError):
        check(replace(trajectory, turns=()), seen, [tokens], [made.logprobs])
