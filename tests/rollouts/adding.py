"""A small environment, a small tokenizer and builders for the tests of this folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from espalier.configs.schema import EpisodeSection
from espalier.envs.core import Action, AgentEnv, EnvFailure, Observation, Task
from espalier.envs.tools import Tool, tool
from espalier.rollouts.render import ChatRenderer, make_renderer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


def chat_template(name: str = "qwen3") -> str:
    """Qwen3's own template as the installed TRL carries it (read as text; TRL is not imported)."""
    spec = find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text("utf-8")


def write_tokenizer(
    folder: Path,
    template: str = "qwen3",
    special: Sequence[str] = SPECIAL,
    markup: Sequence[str] = MARKUP,
    **named: str,
) -> Path:
    """A byte-level BPE with a model's template and its special tokens (Qwen3's), `named` among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(['{"name": "add", "arguments": {"n": 1}} user assistant system total'] * 5, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in markup])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(chat_template(template), encoding="utf-8")
    named = named or {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def renderer(folder: Path, *, thinking: bool = False) -> ChatRenderer:
    return make_renderer(write_tokenizer(folder), thinking=thinking)


def call(name: str, **arguments: Any) -> str:
    """A tool call as Qwen3 writes it."""
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


@tool(effect="writes", context=False)
def add(n: int) -> str:
    """Add n to the total."""
    return str(n)


class Adder(AgentEnv):
    """Reach the number that the task's instruction names by calls of `add`; finish by answering without a call.

    `fault(env, action)` runs before each step and may raise, hang, or return what `step` shall return.
    """

    made: int = 0

    def __init__(self, fault: Callable[[Adder, Action], Any] | None = None) -> None:
        self.total = 0
        self.goal = 0
        self.steps = 0
        self.task: Task | None = None
        self.seed: int | None = None
        self.fault = fault
        self.closed = False

    @property
    def tools(self) -> Sequence[Tool]:
        return (add,)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self.task = (options or {})["task"]
        assert self.task is not None
        self.seed = seed
        self.total, self.steps, self.goal = 0, 0, int(self.task.instruction)
        return Observation(({"role": "user", "content": f"reach {self.goal}"},)), {"task": self.task, "initial": "0"}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.fault is not None:
            result = self.fault(self, action)
            if result is not None:
                return result  # type: ignore[no-any-return]
        if not action.tool_calls:
            return Observation(), float(self.total == self.goal), True, False, {"tool_errors": 0, "final": self.total}
        messages, errors = [], 0
        for made in action.tool_calls:
            if made.name != "add" or made.arguments is None or not isinstance(made.arguments.get("n"), int):
                errors += 1
                content = '{"error": {"code": "bad"}}'
            else:
                self.total += made.arguments["n"]
                content = f"total {self.total}"
            messages.append({"role": "tool", "content": content, "tool_call_id": made.id, "name": made.name})
        return Observation(tuple(messages)), 0.0, False, False, {"tool_errors": errors}  # type: ignore[arg-type]

    def close(self) -> None:
        self.closed = True


def crash(env: Adder, action: Action) -> None:
    raise EnvFailure("engine_crashed", "the engine is gone")


def bug(env: Adder, action: Action) -> None:
    raise ZeroDivisionError("a bug of the environment's")


def hang(seconds: float) -> Callable[[Adder, Action], None]:
    return lambda env, action: time.sleep(seconds)


def ungraded(env: Adder, action: Action) -> Any:
    return Observation(), float("nan"), True, False, {"ungraded": "engines disagree"}


def task(goal: int, id: str = "") -> Task:
    return Task(id or f"reach-{goal}", str(goal), "adding")


def budget(**changes: Any) -> EpisodeSection:
    values: dict[str, Any] = {
        "max_turns": 6,
        "max_prompt_tokens": 600,
        "max_tokens": 1200,
        "max_turn_tokens": 200,
        "max_seconds": 30.0,
        "turn_seconds": 10.0,
        "step_seconds": 10.0,
    }
    return EpisodeSection(**{**values, **changes})
