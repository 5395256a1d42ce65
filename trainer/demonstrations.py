"""What the base policy learns from: demonstrations of the faulty expert.

Always true: a demonstration is rendered by the renderer and answered by the environment that episodes use, so it holds
the very tokens that an episode would hold; its mask marks what the expert said and nothing else.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..envs.core import Action, Message
from ..envs.spreadsheet.env import SpreadsheetEnv
from ..envs.spreadsheet.expert import FaultModel, faulty_expert
from ..envs.spreadsheet.families import GeneratedTask, draw_draft
from ..envs.spreadsheet.families.workbook import write_package
from ..envs.spreadsheet.task import Case
from ..rollouts.render import ChatRenderer, Fork


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Token ids of one episode; `said[i]` marks tokens of the expert's turns. `copies`: the expert copied a word of the
    instruction (a key, a verdict, a header to write) into a cell or a formula.
    """

    tokens: tuple[int, ...]
    said: tuple[bool, ...]
    copies: bool = False


def sketch_task(seed: int, index: int, family: str) -> GeneratedTask:
    """A training task without answers: enough to act in, and much cheaper than `generate`."""
    draft = draw_draft(seed, index, "train", family)
    return GeneratedTask(
        id=f"demo-{seed}-{index}-{family}",
        instruction=draft.instruction,
        family=family,
        answer_position=draft.answer_position,
        cases=(Case(write_package(draft.sheets, draft.cells[0]), {}),),
        draft=draft,
    )


def demonstration_tasks(seed: int, count: int, faults: FaultModel) -> Iterator[GeneratedTask]:
    """`count` tasks, their families drawn by the fault model's weights."""
    rng = random.Random(f"demonstrations/{seed}")
    for index in range(count):
        yield sketch_task(seed, index, faults.draw_family(rng))


def said(action: Action) -> str:
    """An action as the policy would write it, in Qwen3's format."""
    calls = [
        "<tool_call>\n"
        + json.dumps({"name": c.name, "arguments": dict(c.arguments or {})}, ensure_ascii=False)
        + "\n</tool_call>"
        for c in action.tool_calls
    ]
    return "\n".join([action.text, *calls] if action.text else calls) + "<|im_end|>"


def play(env: SpreadsheetEnv, task: GeneratedTask, actions: Sequence[Action]) -> list[tuple[Message, ...] | Action]:
    """The conversation, messages and actions in turn. The last action is not carried out: nothing follows it."""
    opening, _ = env.reset(seed=0, options={"task": task})
    turns: list[tuple[Message, ...] | Action] = [opening.messages]
    for action in actions[:-1]:
        answer, *_ = env.step(action)
        turns += [action, answer.messages]
    return [*turns, actions[-1]]


def corpus(env: SpreadsheetEnv, tasks: Iterator[GeneratedTask], seed: int, faults: FaultModel) -> Iterator[str]:
    """Texts to train a tokenizer on: everything that stands in demonstrations."""
    rng = random.Random(f"corpus/{seed}")
    for task in tasks:
        for turn in play(env, task, faulty_expert(task, rng, faults)):
            if isinstance(turn, Action):
                yield said(turn)
            else:
                yield from ("user\n" + m["content"] for m in turn)


def demonstrate(
    env: SpreadsheetEnv, renderer: ChatRenderer, task: GeneratedTask, rng: random.Random, faults: FaultModel
) -> Demonstration:
    """One episode of the faulty expert as tokens."""
    tools = [tool.to_openai(terse=env.terse) for tool in env.tools]
    opening, *rest = play(env, task, faulty_expert(task, rng, faults))
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
    return Demonstration(
        tuple(tokens), tuple(mask), any(isinstance(t, Action) and _copies(t, task.instruction) for t in rest)
    )


def _copies(action: Action, instruction: str) -> bool:
    """Whether `action` writes a capitalised word of the instruction, as a cell's content or in quotes in a formula."""
    words = set(re.findall(r"[A-Z][a-z]+", instruction))
    given = [value for call in action.tool_calls for value in (call.arguments or {}).values() if isinstance(value, str)]
    written = {word for value in given for word in re.findall('"([A-Z][a-z]+)"', value)}
    labels = {str(call.arguments["data"]) for call in action.tool_calls if call.arguments and "data" in call.arguments}
    return bool(words & (written | labels))
