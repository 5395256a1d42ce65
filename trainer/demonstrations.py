"""What the base policy learns from: lessons, played out and written down as tokens.

Always true: a demonstration is rendered by the renderer and answered by the environment that episodes use, so it holds
the very tokens that an episode would hold; its mask marks what the expert said and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..envs.core import Action, AgentEnv, Message, Task
from ..rollouts.render import ChatRenderer, Fork
from .lessons import Lesson


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Token ids of one episode; `said[i]` marks tokens of the expert's turns. `copies`: as of its lesson."""

    tokens: tuple[int, ...]
    said: tuple[bool, ...]
    copies: bool = False


def said(action: Action) -> str:
    """An action as the policy would write it, in Qwen3's format."""
    calls = [
        "<tool_call>\n"
        + json.dumps({"name": c.name, "arguments": dict(c.arguments or {})}, ensure_ascii=False)
        + "\n</tool_call>"
        for c in action.tool_calls
    ]
    return "\n".join([action.text, *calls] if action.text else calls) + "<|im_end|>"


def play(env: AgentEnv, task: Task, actions: Sequence[Action]) -> list[tuple[Message, ...] | Action]:
    """The conversation, messages and actions in turn. The last action is not carried out: nothing follows it."""
    opening, _ = env.reset(seed=0, options={"task": task})
    turns: list[tuple[Message, ...] | Action] = [opening.messages]
    for action in actions[:-1]:
        answer, *_ = env.step(action)
        turns += [action, answer.messages]
    return [*turns, actions[-1]]


def corpus(env: AgentEnv, lessons: Iterator[Lesson]) -> Iterator[str]:
    """Texts to train a tokenizer on: everything that stands in demonstrations."""
    for lesson in lessons:
        for turn in play(env, lesson.task, lesson.actions):
            if isinstance(turn, Action):
                yield said(turn)
            else:
                yield from ("user\n" + m["content"] for m in turn)


def demonstrate(env: AgentEnv, renderer: ChatRenderer, lesson: Lesson) -> Demonstration:
    """One episode of the expert as tokens."""
    tools = [tool.to_openai(terse=True) for tool in env.tools]
    opening, *rest = play(env, lesson.task, lesson.actions)
    if isinstance(opening, Action):
        raise TypeError("a conversation opens with messages")
    tokens = list(renderer.first_prompt(opening, tools))
    mask = [False] * len(tokens)
    prompt: tuple[int, ...] = tuple(tokens)
    sampled: tuple[int, ...] = ()
    for turn in rest:
        if isinstance(turn, Action):
            prompt, sampled = tuple(tokens), renderer.encode(said(turn))
            tokens += sampled
            mask += [True] * len(sampled)
        else:
            answer = renderer.extend(prompt, sampled, turn, tools)
            if isinstance(answer, Fork):
                raise ValueError("the template rewrites history; demonstrations need one that does not")
            tokens += answer.tokens
            mask += [False] * len(answer.tokens)
    return Demonstration(tuple(tokens), tuple(mask), lesson.copies)
