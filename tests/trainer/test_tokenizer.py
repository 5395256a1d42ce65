"""The tiny tokenizer: nothing is lost, references are spelt out, fixed text folds."""

import json

import pytest
from espalier.rollouts.render import make_renderer
from espalier.trainer.demonstrations import corpus
from espalier.trainer.lessons import Spreadsheets
from espalier.trainer.tokenizer import MARKUP, SPECIAL, build_tokenizer
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def env():
    return Spreadsheets().environment()


@pytest.fixture(scope="module")
def tokenizer(env):
    texts = corpus(env, Spreadsheets().samples(0, 120))
    return build_tokenizer(texts, [tool.to_openai(terse=True) for tool in env.tools], 900)


@given(text=st.text(max_size=60))
def test_any_text_survives(tokenizer, text):
    text = text.encode("utf-8", "ignore").decode()  # no lone surrogates: they are no text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False)]


@given(column=st.sampled_from("ABCDEFGHIJKL"), row=st.integers(1, 99), value=st.integers(100, 99_999))
def test_letters_rows_and_digits_are_tokens_of_their_own(tokenizer, column, row, value):
    assert pieces(tokenizer, f"=SUM({column}{row}:{column}${row})")[-7:] == [
        column,
        str(row),
        ":",
        column,
        "$",
        str(row),
        ")",
    ]
    assert pieces(tokenizer, f"{value}@{column}{row}") == [*str(value), f"@{column}", str(row)]


def test_a_call_and_the_tool_block_fold_into_few_tokens(tokenizer, env):
    call = (
        '<tool_call>\n{"name": "fill_formula", "arguments": {"start_cell": "D12", "formula_template": "=MAX(C4:C9)"}}'
    )
    call += "\n</tool_call><|im_end|>"
    assert len(tokenizer.encode(call, add_special_tokens=False)) <= 16
    tools = [tool.to_openai(terse=True) for tool in env.tools]
    block = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tools=tools, tokenize=True)
    assert len(block["input_ids"] if isinstance(block, dict) or hasattr(block, "input_ids") else block) <= 24
    # control: a tool that was not there when it was trained does not fold
    strange = {"type": "function", "function": {"name": "strange", "parameters": {"type": "object", "properties": {}}}}
    assert len(tokenizer.encode(json.dumps(strange), add_special_tokens=False)) > 24


def test_it_renders_as_qwen3_does(tokenizer, env, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    renderer = make_renderer(tmp_path, thinking=False)
    tools = [tool.to_openai(terse=True) for tool in env.tools]
    messages = [{"role": "user", "content": "Total of Units in D12.\nAnswer: Data!D12\nSheets: Data B3:E11"}]
    text = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert renderer.decode(renderer.first_prompt(messages, tools)) == text
    for token in (*SPECIAL, *MARKUP):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
