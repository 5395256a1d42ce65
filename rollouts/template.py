"""Any chat template that leaves earlier turns as they are: rendered by transformers, extended turn by turn.

Always true: what follows a sampled turn is what the template writes behind it, tokenised behind the token that closes a
turn, so that nothing before it is tokenised again. Whether the template allows that is tried out on short conversations
before it is used: it must keep what went before, write the same behind a turn whatever that was, name the tools it is
given, and write calls as a known parser reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, cast

from renderers.base import ParsedResponse, RenderedTokens, ToolCallParseStatus
from renderers.configs import DefaultRendererConfig
from renderers.default import DefaultRenderer
from renderers.parsers import TOOL_PARSERS
from renderers.parsing import parse_llama_3

_Messages = Sequence[Mapping[str, Any]]
_Tools = Sequence[Mapping[str, Any]]

_TURN = "espalier turn"
_ASK: Mapping[str, Any] = {"role": "user", "content": "espalier asks"}
_ARGUMENTS = {"number": 3, "word": 'a "b"\n'}
_PROBE_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Probe.",
        "parameters": {
            "type": "object",
            "properties": {"number": {"type": "integer"}, "word": {"type": "string"}},
            "required": ["number", "word"],
        },
    },
}


class TemplateError(ValueError):
    """What a template does that an episode cannot be made with, as the rest of a sentence that it begins."""


class TemplateRenderer:
    """What `ChatRenderer` asks of a renderer, for a tokenizer with a chat template. Raises `TemplateError`.

    `thinking` is the template's switch `enable_thinking`, where it has one. A template's date is pinned.
    """

    def __init__(self, tokenizer: Any, *, thinking: bool) -> None:
        self._tokenizer = tokenizer
        self._options = {"enable_thinking": thinking, "date_string": "26 Jul 2024"}
        opening = self._text([_ASK], (), begin=True)
        if not opening.startswith(self._text([_ASK], ())):
            raise TemplateError("does not just add something where the assistant begins")
        self._begin = opening[len(self._text([_ASK], ())) :]
        self._close, self._close_id = self._closing()
        self._parser = self._reading()
        for system, tools, reply, turn in product((False, True), ((), (_PROBE_TOOL,)), _REPLIES, _turns(thinking)):
            self._try([{"role": "system", "content": "Be brief."}] * system + [_ASK], tools, turn, reply)

    def render(
        self, messages: list[Any], *, tools: list[Any] | None = None, add_generation_prompt: bool = False
    ) -> RenderedTokens:
        """The whole conversation."""
        ids = self._encode(self._text(messages, tools or (), begin=add_generation_prompt))
        return RenderedTokens(token_ids=ids, message_indices=[-1] * len(ids))

    def bridge_to_next_turn(
        self, prompt: list[int], sampled: list[int], new: list[Any], *, tools: list[Any] | None = None
    ) -> RenderedTokens:
        """`prompt + sampled`, the end of the turn where it was not sampled, `new`, and where the assistant begins."""
        before = [*prompt, *sampled]
        closed = sampled[-1:] == [self._close_id]
        ids = self._encode(self._behind([_ASK], new, tools or ()))[closed:]
        begin = self._encode(self._begin)
        own = len(ids) - len(begin) if ids[-len(begin) :] == begin else len(ids)
        lead = 0 if closed else 1
        owners = [-1] * (len(before) + lead) + [0] * (own - lead) + [-1] * (len(ids) - own)
        return RenderedTokens(token_ids=[*before, *ids], message_indices=owners)

    def parse_response(self, token_ids: list[int], *, prompt_ids: list[int] | None = None) -> ParsedResponse:
        """Text and calls of a sampled turn."""
        ids = [token for token in token_ids if token != self._close_id]
        return cast(ParsedResponse, self._parser(ids, prompt_ids=prompt_ids))

    def get_stop_token_ids(self) -> list[int]:
        """What closes a turn, then the tokenizer's end of text."""
        end = self._tokenizer.eos_token_id
        return [self._close_id, *([end] if end not in (None, self._close_id) else [])]

    def _text(self, messages: _Messages, tools: _Tools, *, begin: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=begin, **self._options
            )
        except Exception as error:  # whatever a template raises of its own
            roles = ", ".join(str(message["role"]) for message in messages)
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise TemplateError(f"refuses the roles {roles}{' with tools' if tools else ''}: {said}") from None
        return str(text)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _behind(self, before: _Messages, new: _Messages, tools: _Tools) -> str:
        """What the template writes behind an assistant's turn when `new` follows."""
        turn = {"role": "assistant", "content": _TURN}
        return self._text([*before, turn, *new], tools, begin=True).partition(_TURN)[2]

    def _closing(self) -> tuple[str, int]:
        """The control token that closes an assistant's turn."""
        _, found, behind = self._text([_ASK, {"role": "assistant", "content": _TURN}], ()).partition(_TURN)
        if not found:
            raise TemplateError("rewrites an assistant's turn")
        first = self._encode(behind)[:1]
        text = self._tokenizer.decode(first, skip_special_tokens=False) if first else ""
        control = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        if text not in control or not behind.startswith(text):
            raise TemplateError("does not close an assistant's turn by a special token of the tokenizer")
        return text, first[0]

    def _reading(self) -> Any:
        """The parser that reads a call as the template writes it."""
        if "probe_tool" not in self._text([_ASK], (_PROBE_TOOL,)):
            raise TemplateError("does not tell the model which tools there are")
        call = {"type": "function", "function": {"name": "probe_tool", "arguments": _ARGUMENTS}}
        turns = [_ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]
        asked = self._text([_ASK], (_PROBE_TOOL,))
        written = self._text(turns, (_PROBE_TOOL,)).removeprefix(asked).rpartition(self._close)[0]
        begin = self._begin
        while begin and not written.startswith(begin):  # a header that ends in a new line may lack it before a call
            begin = begin[:-1]
        written = written[len(begin) :].lstrip("\n")
        defaults = [DefaultRenderer(self._tokenizer, DefaultRendererConfig(tool_parser=name)) for name in TOOL_PARSERS]
        llama = partial(_llama, self._tokenizer, {self._close_id})
        for parser in (*(one.parse_response for one in defaults), llama):
            found = parser(self._encode(written), prompt_ids=None).tool_calls
            if [(one.status, one.name, one.arguments) for one in found] == [
                (ToolCallParseStatus.OK, "probe_tool", _ARGUMENTS)
            ]:
                return parser
        raise TemplateError(f"writes a tool call as {written[:80]!r}, which nothing here reads")

    def _try(self, opening: _Messages, tools: _Tools, turn: str, reply: _Messages) -> None:
        """Two turns of a conversation, each with its reply, as the template writes them and as they are extended."""
        told = [*opening]
        kept = self._text(told, tools)
        for _ in range(2):
            told += [{"role": "assistant", "content": turn}]
            whole = self._text([*told, *reply], tools, begin=True)
            if not whole.startswith(kept):
                raise TemplateError(f"rewrites earlier turns when {_roles(reply)} follows")
            header, found, behind = whole[len(kept) :].partition(turn)
            if not found or not self._begin.startswith(header):
                raise TemplateError(f"rewrites an assistant's turn ({turn[:20]!r}) when {_roles(reply)} follows")
            if not all(message["content"] in behind for message in reply):
                raise TemplateError(f"leaves out {_roles(reply)}")
            if behind != self._behind([_ASK], reply, tools):
                raise TemplateError(f"writes {_roles(reply)} otherwise behind other turns")
            ids = self._encode(behind)
            if ids[:1] != [self._close_id] or self._tokenizer.decode(ids, skip_special_tokens=False) != behind:
                raise TemplateError(f"cannot be tokenised from the end of a turn on, when {_roles(reply)} follows")
            told += reply
            kept = whole[: len(whole) - len(self._begin)]


_CALL: Mapping[str, Any] = {
    "type": "function",
    "function": {"name": "probe_tool", "arguments": {"number": 3, "word": "x"}},
}
_ACTED: _Messages = [
    _ASK,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "4"},
]
PROBES: Sequence[tuple[list[Mapping[str, Any]], list[Mapping[str, Any]] | None]] = [
    ([*system, *told], tools)
    for system in ([], [{"role": "system", "content": "Be brief."}])
    for told, tools in (([_ASK], None), ([_ASK], [_PROBE_TOOL]), (_ACTED, [_PROBE_TOOL]))
]
"""Conversations by which a template is recognised."""

_REPLIES: tuple[_Messages, ...] = (
    ({"role": "tool", "content": "4 rows"},),
    ({"role": "tool", "content": "4 rows"}, {"role": "tool", "content": "no error"}),
    ({"role": "user", "content": "go on"},),
)


def _turns(thinking: bool) -> tuple[str, ...]:
    if thinking:
        return ("<think>\nthree\n</think>\n\nDone.",)
    return ("Done.", '<tool_call>\n{"name": "probe_tool", "arguments": {}}\n</tool_call>', '{"name": "probe_tool"}')


def _roles(messages: _Messages) -> str:
    return " and ".join(f"a message of the role {message['role']}" for message in messages)


def _llama(tokenizer: Any, stop: set[int], ids: list[int], *, prompt_ids: list[int] | None = None) -> ParsedResponse:
    return parse_llama_3(tokenizer, ids, stop_ids=stop)
