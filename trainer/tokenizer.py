"""The tiny policy's tokenizer, trained from a corpus: byte-level BPE with Qwen3's special tokens and chat template.

Always true: any text survives encode and decode; a column letter, a number below 100 and each digit of a longer number
are tokens of their own, so that a reference can be spelt in every role; the fixed text of the chat template, of tool
schemas and of a call's JSON folds into a few tokens. It is the same text that a Qwen3 model reads, only cut into fewer
pieces.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


@dataclass(frozen=True)
class Pieces:
    """How text is cut before pieces merge. `patterns`: the first that fits at a place wins; `spelt`: texts that must
    be spelt by tokens of their own wherever they stand.
    """

    patterns: tuple[str, ...]
    spelt: tuple[str, ...] = ()


CELLS = Pieces(
    (
        r"(?<!\d)\d{1,2}(?!\d)",  # a row number or a small value
        r"\d",  # longer numbers digit by digit
        r"@?[A-Z](?![A-Za-z])",  # a column letter, with the @ that ties it to its value
        r"[A-Z][a-z]+",  # a header, a key, a sheet name
        r" ?[a-z]+(?: [a-z]+)* ?",  # lower-case phrases may merge
        r"[A-Z]+",  # a function name
        r"[$@:]",  # what binds references
        r"\n",
        r" ",
        r"[^\sA-Za-z0-9$@:]+",  # punctuation in runs
        r"\s",
    ),
    (*(f"{n} " for n in range(100)), *(f"@{letter} " for letter in string.ascii_uppercase)),
)
"""For spreadsheets."""

CODE = Pieces(
    (
        r"\\n *",  # a line's end and the next one's indentation, in a JSON string
        r"\n *",  # and in a file
        r" [a-z]+(?![A-Za-z_(.])",  # a word of prose, or a small name
        r"[A-Za-z]+",  # part of a name: the same with and without a space before it, so that it can be copied
        r"\d",
        r" ",
        r"[^\sA-Za-z0-9\\_]+",  # punctuation in runs
        r"[\\_]",
        r"\s",
    )
)
"""For programs."""

_TOOLS_HEADER = (
    "system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_FOOTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def scaffolds(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fixed texts worth one token each: template parts, each tool's schema line, and the JSON around call arguments."""
    found = [_TOOLS_HEADER, _TOOLS_FOOTER, "user", "assistant\n", "\n\n", "\nAnswer: ", "\nSheets: "]
    found += ['"}}\n', "}}\n", "]}}\n", '"]}}\n', '"]]}}\n', "]]}}\n", '\\"', " ... ("]
    for tool in tools:
        function = tool["function"]
        name, properties = function["name"], function.get("parameters", {}).get("properties", {})
        found.append("\n" + json.dumps(tool, ensure_ascii=False))
        opening = f'\n{{"name": "{name}", "arguments": {{'
        if not properties:
            found.append(opening + "}}\n")
        for parameter in properties:
            for quote in ('"', ""):
                found.append(f'{opening}"{parameter}": {quote}')
                found += [f'", "{parameter}": {quote}', f', "{parameter}": {quote}', f'], "{parameter}": {quote}']
    found += [s + "=" for s in found if s.endswith('"formula_template": "')]
    return sorted(dict.fromkeys(found), key=len, reverse=True)


def build_tokenizer(
    corpus: Iterable[str], tools: Sequence[Mapping[str, Any]], vocab_size: int, pieces: Pieces = CELLS
) -> PreTrainedTokenizerFast:
    """Train on `corpus`; `vocab_size` counts bytes and merges (special tokens and scaffolds come on top)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(pieces.patterns)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fixed = scaffolds(tools)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(_chain(_without(corpus, fixed), list(pieces.spelt) * 50), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in (*MARKUP, *fixed)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_qwen3_chat_template(),
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )


def _chain(*streams: Iterable[str]) -> Iterable[str]:
    for stream in streams:
        yield from stream


def _without(corpus: Iterable[str], fixed: Sequence[str]) -> Iterable[str]:
    """The corpus as BPE will meet it: cut at added tokens."""
    cut = re.compile("|".join(re.escape(s) for s in (*SPECIAL, *MARKUP, *fixed)))
    for text in corpus:
        yield from (piece for piece in cut.split(text) if piece)


def _qwen3_chat_template() -> str:
    """Qwen3's own template, as the installed TRL ships it (read as data; TRL is not imported)."""
    spec = find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "Qwen3's chat template is read from the installed trl, which is missing: pip install trl==1.16.0"
        )
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
