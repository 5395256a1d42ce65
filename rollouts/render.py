"""Messages to token ids and back, on the `renderers` package.

Always true: what was sampled is never tokenised again. A turn is added behind the exact ids that the sampler saw and
made; where a template cannot do that (it drops earlier thinking), the caller is given a `Fork`, a new context, and
the old one stays as it was. Text from outside (tool results, instructions) cannot forge turns: the tokenizer's
control tokens inside it are broken by a space. Needs neither torch nor transformers for Qwen3-style tokenizers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from renderers.base import MODEL_RENDERER_MAP, ParsedToolCall, RenderedTokens, Renderer, ToolCallParseStatus
from tokenizers import Tokenizer

from ..envs.core import Action, Message, ToolCall
from .types import Origin

_QWEN3_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)


class RenderError(ValueError):
    """A tokenizer or template that this room cannot use; says which and what would do."""


@dataclass(frozen=True, slots=True)
class Extension:
    """Tokens to put behind a sampled turn, and the length of each run by origin."""

    tokens: tuple[int, ...]
    runs: tuple[tuple[Origin, int], ...]


@dataclass(frozen=True, slots=True)
class Fork:
    """The template would rewrite what went before: a whole new prompt, to begin a new sequence with."""

    tokens: tuple[int, ...]


class ChatRenderer:
    """Renders one conversation format. Stateless, so any number of episodes may share it."""

    def __init__(self, renderer: Renderer, tokenizer: Any, control: Sequence[str]) -> None:
        """`control`: the strings that `tokenizer` reads as tokens of its own and that must not come from outside."""
        self._renderer = renderer
        self._tokenizer = tokenizer
        self._control = re.compile("|".join(re.escape(t) for t in sorted(control, key=len, reverse=True)) or r"(?!)")
        self.stop_ids: tuple[int, ...] = tuple(renderer.get_stop_token_ids())
        self._stops = frozenset(self.stop_ids)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text` as it stands (control tokens included)."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, control tokens shown."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False)) if tokens else ""

    def first_prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The prompt that opens an episode; ends where the assistant begins."""
        return tuple(self._render([self._outside(m) for m in messages], tools).token_ids)

    def extend(
        self,
        prompt: Sequence[int],
        sampled: Sequence[int],
        new: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        history: Sequence[Mapping[str, Any]] = (),
    ) -> Extension | Fork:
        """What follows `prompt + sampled` when the environment answers with `new`.

        `history` is the conversation up to and including the sampled turn (see `assistant_message`); it is needed
        only to fork. Raises `RenderError` if the template needs a fork and there is no history to render it from.
        """
        outside = [self._outside(m) for m in new]
        before = [*prompt, *sampled]
        bridged = self._renderer.bridge_to_next_turn(
            list(prompt), list(sampled), cast(Any, outside), tools=cast(Any, list(tools)) or None
        )
        if bridged is not None and bridged.token_ids[: len(before)] == before:
            owners = bridged.message_indices[len(before) :]
            return Extension(tuple(bridged.token_ids[len(before) :]), _runs(owners))
        if not history:
            raise RenderError("this template rewrites earlier turns, so extending a conversation needs its history")
        told = [m if m.get("role") == "assistant" else self._outside(cast(Message, m)) for m in history]
        whole = self._render([*told, *outside], tools)
        if whole.token_ids[: len(before)] == before:  # nothing had to be rewritten after all
            return Extension(
                tuple(whole.token_ids[len(before) :]),
                _runs([owner - len(told) for owner in whole.message_indices[len(before) :]]),
            )
        return Fork(tuple(whole.token_ids))

    def parse(self, sampled: Sequence[int], prompt: Sequence[int], turn: int = 0) -> Action:
        """What the policy said; never raises. A call that cannot be read has `arguments=None` and its raw text."""
        try:
            parsed = self._renderer.parse_response(list(sampled), prompt_ids=list(prompt))
        except (ValueError, RecursionError):
            # json refuses integers of thousands of digits and nesting of thousands of levels by other errors than
            # JSONDecodeError
            text = self.decode(self._without_stop(sampled))
            return Action("", (ToolCall("", None, text, f"{turn}.0"),))
        calls = tuple(_call(c, f"{turn}.{i}") for i, c in enumerate(parsed.tool_calls))
        return Action(parsed.content, calls)

    def assistant_message(self, sampled: Sequence[int], prompt: Sequence[int]) -> dict[str, Any]:
        """The sampled turn as a message, for `history`: its text verbatim, thinking apart (a template may drop it)."""
        text = self.decode(self._without_stop(sampled))
        opened = self.decode(prompt[-8:]).rstrip().endswith("<think>")
        if "</think>" in text and (opened or text.lstrip().startswith("<think>")):
            thought, _, said = text.partition("</think>")
            thought = thought.lstrip().removeprefix("<think>").strip("\n")
            return {"role": "assistant", "content": said.lstrip("\n"), "reasoning_content": thought}
        return {"role": "assistant", "content": text}

    def _without_stop(self, sampled: Sequence[int]) -> list[int]:
        return [t for t in sampled if t not in self._stops]

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> RenderedTokens:
        return self._renderer.render(
            cast(Any, list(messages)), tools=cast(Any, list(tools)) or None, add_generation_prompt=True
        )

    def _outside(self, message: Message) -> dict[str, Any]:
        """`message` with text that no tokenizer stumbles over and that holds no control token."""
        content = message.get("content", "")
        if not content.isascii():
            content = content.encode("utf-8", "replace").decode("utf-8")  # lone surrogates
        safe = self._control.sub(lambda m: m[0][0] + " " + m[0][1:], content)
        return {**message, "content": safe}


def _call(parsed: ParsedToolCall, id: str) -> ToolCall:
    good = (
        parsed.status is ToolCallParseStatus.OK and isinstance(parsed.name, str) and isinstance(parsed.arguments, dict)
    )
    name = parsed.name if isinstance(parsed.name, str) else ""
    return ToolCall(name, cast(dict[str, Any], parsed.arguments) if good else None, parsed.raw, id)


def _runs(owners: Sequence[int]) -> tuple[tuple[Origin, int], ...]:
    """Run lengths by origin: a message with its wrapping is "tool", what stands between is "template"."""
    runs: list[tuple[Origin, int]] = []
    for owner in owners:
        origin: Origin = "tool" if owner >= 0 else "template"
        if runs and runs[-1][0] == origin:
            runs[-1] = (origin, runs[-1][1] + 1)
        else:
            runs.append((origin, 1))
    return tuple(runs)


_CACHED_TEXTS = 1024
_CACHED_CHARS = 8192


class _Tokens:
    """The part of a tokenizer that `renderers` asks for, straight on `tokenizers`: no transformers, and fast.

    The ids of the last `_CACHED_TEXTS` texts of at most `_CACHED_CHARS` characters are kept: most of what is encoded is
    the template's own text and the start that a group shares.
    """

    unk_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer, name_or_path: str) -> None:
        self.name_or_path = name_or_path
        self._tokenizer = tokenizer
        self.eos_token_id: int | None = tokenizer.token_to_id("<|im_end|>")
        self._kept = lru_cache(maxsize=_CACHED_TEXTS)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str, *_: Any, **__: Any) -> list[int]:
        return list(self._kept(text) if len(text) <= _CACHED_CHARS else self._encode(text))

    def decode(self, token_ids: Any, *_: Any, **__: Any) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        return self._tokenizer.token_to_id(tokens)


def make_renderer(tokenizer_dir: Path, *, thinking: bool) -> ChatRenderer:
    """The renderer for the tokenizer in `tokenizer_dir` (tokenizer.json and a chat template).

    Qwen3-style templates are recognised by their text, some families by the model id that a Hugging Face cache folder
    carries; any other template is tried out (see `template`). Raises `RenderError` for one that cannot be extended turn
    by turn: it would have to be re-tokenised.
    """
    file = tokenizer_dir / "tokenizer.json"
    if not file.is_file():
        raise RenderError(
            f"{tokenizer_dir} holds no tokenizer.json; point policy.base at a folder with a fast tokenizer"
        )
    tokenizer = Tokenizer.from_file(str(file))
    template = _chat_template(tokenizer_dir)
    if "<args-json-object>" in template and all(tokenizer.token_to_id(t) is not None for t in _QWEN3_TOKENS):
        return _qwen3(tokenizer, tokenizer_dir, template, thinking)
    return _other(tokenizer, tokenizer_dir, template, thinking)


def _qwen3(tokenizer: Tokenizer, folder: Path, template: str, thinking: bool) -> ChatRenderer:
    from renderers.configs import Qwen3RendererConfig
    from renderers.qwen3 import Qwen3Renderer

    switch = "enable_thinking" in template
    if "assistant\\n<think>" in template:
        raise RenderError(
            f"{folder}: this template always thinks (Qwen3 Thinking-2507); use a hybrid or an instruct model"
        )
    if thinking and not switch:
        raise RenderError(f"{folder}: this model's template has no thinking mode; set episode.thinking = false")
    # Without the switch (Instruct-2507) the template adds nothing after "assistant": the renderer's thinking mode does
    # the same.
    config = Qwen3RendererConfig(enable_thinking=thinking or not switch)
    tokens = _Tokens(tokenizer, str(folder))
    return ChatRenderer(Qwen3Renderer(tokens, config), tokens, _control_tokens(tokenizer))


def _other(tokenizer: Tokenizer, folder: Path, template: str, thinking: bool) -> ChatRenderer:
    from renderers.base import load_tokenizer

    from .template import TemplateError, TemplateRenderer

    if not template:
        raise RenderError(f"{folder} holds no chat template; use an instruct model, or add its chat_template.jinja")
    loaded = load_tokenizer(str(folder))
    loaded.clean_up_tokenization_spaces = False  # a text is what its tokens say
    model = next((p.name[8:].replace("--", "/") for p in folder.resolve().parents if p.name.startswith("models--")), "")
    name = MODEL_RENDERER_MAP.get(model)
    try:
        if name is not None:
            renderer = _typed(loaded, name, thinking)
        elif thinking and "enable_thinking" not in template:
            raise TemplateError("has no thinking mode (set episode.thinking = false)")
        else:
            renderer = cast(Renderer, TemplateRenderer(loaded, thinking=thinking))
    except (TemplateError, AssertionError) as error:
        # an assertion: the tokenizer lacks what the family's renderer needs
        found = None if name is not None else _recognised(loaded, thinking)
        if found is None:
            raise RenderError(
                f"{folder}: its chat template {error}, so it cannot be trained turn by turn; docs/vllm.md says which "
                "models can"
            ) from None
        renderer = found
    return ChatRenderer(renderer, loaded, _control_tokens(tokenizer))


def _typed(loaded: Any, name: str, thinking: bool) -> Renderer:
    """The renderer that the package has for a family. Raises what it raises where the tokenizer is another's."""
    from renderers import config_from_name, create_renderer

    from .template import TemplateError

    config = config_from_name(name)
    if "enable_thinking" in type(config).model_fields:
        config = type(config).model_validate(
            {**config.model_dump(exclude_unset=True), "name": config.name, "enable_thinking": thinking}
        )
    elif thinking:
        raise TemplateError("has no thinking switch (set episode.thinking = false)")
    return create_renderer(loaded, config)


def _recognised(loaded: Any, thinking: bool) -> Renderer | None:
    """The family's renderer that writes a few conversations to the token as the tokenizer's own template does."""
    from .template import PROBES

    for name in sorted(set(MODEL_RENDERER_MAP.values())):
        try:
            renderer = _typed(loaded, name, thinking)
            for messages, tools in PROBES:
                whole = loaded.apply_chat_template(
                    messages, tools=tools, tokenize=True, return_dict=False, add_generation_prompt=True,
                    enable_thinking=thinking,
                )  # fmt: skip
                made = renderer.render(cast(Any, messages), tools=cast(Any, tools), add_generation_prompt=True)
                if list(whole) != made.token_ids:
                    break
            else:
                return renderer
        except Exception:  # another family's: it misses a token, or its template refuses a role
            continue
    return None


def _control_tokens(tokenizer: Tokenizer) -> list[str]:
    added = tokenizer.get_added_tokens_decoder().values()
    return [t.content for t in added if t.special or t.content in _QWEN3_TOKENS]


def _chat_template(folder: Path) -> str:
    """The template's text, from chat_template.jinja or tokenizer_config.json; empty when there is none."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    found = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else ""
