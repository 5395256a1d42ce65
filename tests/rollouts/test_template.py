"""Models whose chat template is tried out: what is sampled stays, what follows is the template's own text."""

import json

import adding
import pytest
from espalier.rollouts.render import Extension, RenderError, make_renderer
from hypothesis import given, settings
from hypothesis import strategies as st
from renderers.base import load_tokenizer

TOOLS = [adding.add.to_openai()]
USER = [{"role": "user", "content": "reach 7"}]
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
NAMED = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
MODELS = {
    "qwen2_5": {"markup": ("<tool_call>", "</tool_call>")},
    "llama3_1": {"special": LLAMA, "markup": (), **NAMED},
    "llama3_2": {"special": LLAMA, "markup": (), **NAMED},
}
CALLS = {
    "qwen2_5": adding.call("add", n=3),
    "llama3_1": json.dumps({"name": "add", "parameters": {"n": 3}}),
    "llama3_2": json.dumps({"name": "add", "parameters": {"n": 3}}),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def family(request, tmp_path_factory):
    """Its name, its renderer, and transformers' tokenizer of the same folder."""
    folder = adding.write_tokenizer(tmp_path_factory.mktemp("model"), request.param, **MODELS[request.param])
    return request.param, make_renderer(folder, thinking=False), load_tokenizer(str(folder))


def written(tokenizer, messages, tools):
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
    )


said = st.text(st.characters(codec="ascii", exclude_characters="<>"), min_size=1, max_size=30).map(
    lambda t: "x" + t + "x"
)
replies = st.one_of(
    st.lists(st.tuples(st.just("tool"), said), min_size=1, max_size=3),
    st.tuples(st.just("user"), said).map(lambda t: [t]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(said, replies), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_an_extended_conversation_reads_as_the_template_writes_it(family, turns, system, with_tools):
    _, renderer, tokenizer = family
    tools = TOOLS if with_tools else []
    messages = [{"role": "system", "content": "Be brief."}] * system + USER
    prompt = renderer.first_prompt(messages, tools)
    assert renderer.decode(prompt) == written(tokenizer, messages, tools or None)
    for text, reply in turns:
        new = [{"role": role, "content": content} for role, content in reply]
        sampled = (*renderer.encode(text), renderer.stop_ids[0])
        extension = renderer.extend(prompt, sampled, new, tools)
        assert isinstance(extension, Extension)
        prompt = (*prompt, *sampled, *extension.tokens)
        messages = [*messages, {"role": "assistant", "content": text}, *new]
    assert renderer.decode(prompt) == written(tokenizer, messages, tools or None)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_extending_never_touches_what_was_sampled(family, data):
    """Any ids at all, with and without the end of the turn; what follows is the same whatever they were."""
    _, renderer, _ = family
    sampled = tuple(data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=30)))
    sampled = tuple(t for t in sampled if t not in renderer.stop_ids)
    prompt, new = renderer.first_prompt(USER, TOOLS), [{"role": "tool", "content": data.draw(st.text(max_size=20))}]
    closed = renderer.extend(prompt, (*sampled, renderer.stop_ids[0]), new, TOOLS)
    left_open = renderer.extend(prompt, sampled, new, TOOLS)
    assert left_open.tokens == (renderer.stop_ids[0], *closed.tokens)
    for extension in (closed, left_open):
        assert sum(length for _, length in extension.runs) == len(extension.tokens)
        assert extension.runs[-1][0] == "template" and any(origin == "tool" for origin, _ in extension.runs)
    assert renderer.parse(sampled, prompt) is not None


def test_calls_are_read_as_the_model_writes_them(family):
    name, renderer, _ = family
    prompt = renderer.first_prompt(USER, TOOLS)
    sampled = (*renderer.encode(CALLS[name]), renderer.stop_ids[0])
    (call,) = renderer.parse(sampled, prompt).tool_calls
    assert (call.name, call.arguments) == ("add", {"n": 3})
    assert renderer.parse((*renderer.encode("seven"), renderer.stop_ids[0]), prompt).tool_calls == ()


def test_text_from_outside_cannot_forge_a_turn(family):
    _, renderer, _ = family
    prompt, stop = renderer.first_prompt(USER, TOOLS), renderer.stop_ids[0]
    forged = renderer.decode([stop])
    one, harmless = (
        renderer.extend(prompt, (*renderer.encode("x"), stop), [{"role": "tool", "content": text}], TOOLS).tokens
        for text in (forged, "harmless")
    )
    assert one.count(stop) == harmless.count(stop) and renderer.encode(forged) == (stop,)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "message.role + '\\n' + message.content",
            "message.role + '\\n' + message.content[:3]",
            "rewrites an assistant",
        ),
        ("{{- message.content }}", "{{- message.content }}{{ loop.index0 }}", "otherwise behind other turns"),
        (
            "message.role + '\\n' + message.content",
            "message.role + '\\n' + (message.content if loop.index0 + 4 > messages | length else '')",
            "rewrites",
        ),
        ('elif message.role == "tool"', 'elif message.role == "observation"', "leaves out a message of the role tool"),
        ("{{- tool | tojson }}", "", "which tools there are"),
        ('\'\\n<tool_call>\\n{"name": "\'', "'\\n<tool_call>\\ncall \"'", "which nothing here reads"),
        ("{%- if add_generation_prompt %}", "{%- if messages | length > 1 %}", "assistant|otherwise|rewrites"),
    ],
)
def test_a_template_that_cannot_be_extended_is_refused_and_says_why(tmp_path, old, new, said):
    folder = adding.write_tokenizer(tmp_path, "qwen2_5", **MODELS["qwen2_5"])
    make_renderer(folder, thinking=False)  # the control: as it is, it works
    file = folder / "chat_template.jinja"
    assert old in file.read_text("utf-8")
    file.write_text(file.read_text("utf-8").replace(old, new), "utf-8")
    with pytest.raises(RenderError, match=said):
        make_renderer(folder, thinking=False)


@pytest.mark.parametrize("template", ["llama3", "gemma"])
def test_a_template_without_tools_is_refused(tmp_path, template):
    special = {"llama3": LLAMA, "gemma": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")}[template]
    named = {"llama3": NAMED, "gemma": {"bos_token": "<bos>", "eos_token": "<eos>"}}[template]
    folder = adding.write_tokenizer(tmp_path, template, special, (), **named)
    with pytest.raises(RenderError, match=r"which tools there are.*docs/vllm\.md"):
        make_renderer(folder, thinking=False)


def test_thinking_is_refused_where_a_template_has_none(tmp_path):
    folder = adding.write_tokenizer(tmp_path, "qwen2_5", **MODELS["qwen2_5"])
    with pytest.raises(RenderError, match=r"episode\.thinking = false"):
        make_renderer(folder, thinking=True)


def test_a_plain_folder_of_a_known_family_is_recognised_by_its_template(tmp_path):
    """Qwen3.5 writes calls as XML, which only the family's own renderer reads."""
    markup = (*adding.MARKUP, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    folder = adding.write_tokenizer(tmp_path, "qwen3_5_nothink", markup=markup)
    renderer = make_renderer(folder, thinking=False)
    prompt = renderer.first_prompt(USER, TOOLS)
    text = "<tool_call>\n<function=add>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>"
    (call,) = renderer.parse((*renderer.encode(text), renderer.stop_ids[0]), prompt).tool_calls
    assert call.name == "add"
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text("utf-8").replace("You have access", "Here you have access"), "utf-8")
    with pytest.raises(RenderError, match="nothing here reads"):
        make_renderer(folder, thinking=False)  # another template: no renderer is taken for its own
