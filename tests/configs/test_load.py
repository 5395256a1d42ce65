import json
import re

import pytest
from espalier.configs.load import ConfigError, is_override, keys, load, shipped
from espalier.configs.schema import RunConfig
from hypothesis import given
from hypothesis import strategies as st


def test_every_shipped_configuration_loads_and_says_what_it_is():
    names = shipped()
    assert {"spreadsheet-tiny", "spreadsheet-qwen3-4b"} <= set(names)
    for name, about in names.items():
        assert load(name).name == name
        assert len(about) > 20


def test_the_paper_run_has_the_model_cards_hyper_parameters():
    config = load("spreadsheet-qwen3-4b")
    trainer, episode, sampling = config.trainer, config.episode, config.sampling
    assert (trainer.groups, trainer.group_size, trainer.steps) == (64, 16, 60)
    assert (trainer.learning_rate, trainer.weight_decay, trainer.max_grad_norm, trainer.beta) == (
        1e-6,
        0.01,
        1.0,
        0.001,
    )
    assert trainer.groups // trainer.minibatches == 32
    assert (episode.max_prompt_tokens, episode.max_tokens - episode.max_prompt_tokens) == (4096, 27648)
    assert (episode.max_turns, sampling.temperature, sampling.top_p, sampling.top_k) == (20, 0.6, 0.95, 20)
    assert config.policy.dtype == "bfloat16" and config.policy.gradient_checkpointing


def test_overrides_are_typed_by_the_schema():
    config = load(
        "spreadsheet-tiny",
        [
            *("--trainer.steps", "10", "--policy.base=Qwen/Qwen3-4B", "--env.tools", "submit,write_range"),
            *("--eval.greedy", "--policy.lora", "rank = 8", "--policy.lora.alpha", "4", "--eval.early_stop", "none"),
            *("--env.kwargs.engine", "formualizer", "--env.kwargs.perturbed", "false", "--seed", "7", "--out", "else"),
        ],
    )
    assert config.trainer.steps == 10 and config.policy.base == "Qwen/Qwen3-4B"
    assert config.env.tools == ("submit", "write_range") and config.eval.greedy is True
    assert (config.policy.lora.rank, config.policy.lora.alpha) == (8, 4.0)
    assert config.eval.early_stop is None and config.seed == 7 and str(config.out) == "else"
    assert config.env.kwargs == {"stop_at_failure": True, "engine": "formualizer", "perturbed": False}


def test_an_override_leaves_the_rest_of_its_section():
    plain, changed = load("spreadsheet-tiny"), load("spreadsheet-tiny", ["--trainer.steps", "3"])
    assert changed.trainer.model_copy(update={"steps": plain.trainer.steps}) == plain.trainer


def test_a_list_can_be_written_as_toml_and_a_literal_beside_a_list_as_a_word():
    listed = load("spreadsheet-tiny", ["--policy.lora.target_modules", '["q_proj", "v_proj"]'])
    assert listed.policy.lora.target_modules == ("q_proj", "v_proj")
    assert load("spreadsheet-tiny", ["--policy.lora.target_modules", "all-linear"]).policy.lora.target_modules


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--trainer.stpes", "3"], ["command line", "trainer.stpes", "did you mean 'trainer.steps'"]),
        (["--steps.x", "3"], ["command line", "steps.x"]),
        (["--trainer.learnign_rate", "3"], ["trainer.learning_rate"]),
        (["--policy.learning_rate", "3"], ["policy.learning_rate", "trainer.learning_rate"]),
        (["--trainer.steps", "many"], ["command line", "trainer.steps", "'many'", "integer"]),
        (["--trainer.steps"], ["--trainer.steps needs a value"]),
        (["--policy.dtype", "bf16"], ["policy.dtype", "'float32', 'bfloat16', 'float16'", "'bfloat16'"]),
        (["--policy.lora", "rank 8"], ["--policy.lora", "TOML"]),
        (["--env.draw.x", "1"], ["env.draw", "has no parts"]),
        (["trainer.steps"], ["'trainer.steps'", "--trainer.steps"]),
        (["--sampling.temperature", "0"], ["command line", "sampling.temperature = 0"]),
        (["--trainer.learning_rate", "inf"], ["trainer.learning_rate", "finite"]),
        (["--trainer.group_size", "1"], ["trainer.group_size", "2"]),
        (["--trainer.loss", "gppo"], ["command line: trainer.loss = 'gppo'", "'bnpo', 'dr_grpo'", "mean 'grpo'"]),
        (
            ["--trainer.loss", "vespo", "--trainer.off_policy_correction", "sequence_mask"],
            ["command line: trainer.loss", '"token_mask" or "none"'],
        ),
        (
            ["--trainer.loss", "vespo", "--trainer.importance_sampling_level", "sequence"],
            ["command line: trainer.loss", 'trainer.importance_sampling_level to "token"'],
        ),
        (["--trainer.off_policy_floor", "3"], ["off_policy_floor must be smaller than trainer.off_policy_cap"]),
        (["--policy.lora.target_modules", "q_proj,lm_head"], ["must not name lm_head"]),
    ],
)
def test_mistakes_on_the_command_line_are_sentences(overrides, words):
    with pytest.raises(ConfigError) as caught:
        load("spreadsheet-tiny", overrides)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and "pydantic" not in message and message.endswith((".", "?"))


def test_mistakes_in_a_file_name_the_file_and_every_key(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[trainer]\nstpes = 3\nsteps = "a"\n[policy]\ndtype = "fp16"\nlora = 3\n[policyy]\nx = 1\n')
    with pytest.raises(ConfigError) as caught:
        load(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5 and all(line.startswith(f"{path}: ") for line in lines)
    found = "\n".join(lines)
    for word in ("trainer.stpes", "trainer.steps = 'a'", "policy.dtype", "policy.lora is a section", "'policyy'"):
        assert word in found


@pytest.mark.parametrize(
    ("text", "place"),
    [("[trainer]\nsteps =\n", "line 2"), ("[trainer\n", "line 1"), ("a = 1\na = 2\n", "line 2"), ('x = "', "line 1")],
)
def test_a_toml_syntax_error_gives_the_line(tmp_path, text, place):
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {place}")):
        load(path)


def test_bytes_that_are_not_text_and_json_that_is_not_json(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"x = 1\n\xff\xfe")
    (tmp_path / "b.json").write_text('{"seed": 1,\n oops}')
    (tmp_path / "c.json").write_text("[1]")
    for name, word in (("a.toml", "line 2: not UTF-8"), ("b.json", "line 2, column"), ("c.json", "one JSON object")):
        with pytest.raises(ConfigError, match=word):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "words"), [("spreadshet-tiny", "did you mean 'spreadsheet-tiny'"), ("zzz", "shipped are")]
)
def test_an_unknown_configuration_tells_which_there_are(name, words):
    with pytest.raises(ConfigError, match=words):
        load(name)


@pytest.mark.parametrize(
    "overrides",
    [
        ["--sampling.top_k", "1"],
        ["--episode.max_prompt_tokens", "512"],
        ["--episode.max_turn_tokens", "513"],
        ["--policy.quantization", "4bit"],
        ["--policy.dtype", "float16"],
        ["--policy.attention", "flash_attention_2"],
        ["--trainer.minibatches", "7"],
        ["--eval.early_stop", "3", "--eval.every", "0"],
        ["--env.tools", "submit,submit"],
        ["--sampler.max_versions", "1"],
        ["--policy.lora.dropout", "1"],
    ],
)
def test_combinations_that_cannot_work_are_refused_when_parsed(overrides):
    key = overrides[0][2:]
    with pytest.raises(ConfigError, match=re.escape(key)):
        load("spreadsheet-tiny", overrides)


def test_the_resolved_configuration_loads_back_the_same(tmp_path):
    config = load("spreadsheet-tiny", ["--trainer.learning_rate", "3e-4", "--eval.deadline_s", "12.5"])
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert load(tmp_path / "config.json") == config


def test_a_file_without_a_name_is_named_after_itself(tmp_path):
    path = tmp_path / "my first run.toml"
    path.write_text("seed = 1\n")
    assert load(path).name == "my-first-run"


def test_every_key_has_a_docstring():
    assert [name for name, field in keys() if not field.description] == []


def test_overrides_are_told_from_other_words():
    assert is_override("--trainer.steps") and is_override("--seed") and is_override("--seed=3")
    assert not any(map(is_override, ("--resume", "--policy", "trainer.steps", "--json", "--tasks")))


def _values():
    """(key, value) pairs that the schema must accept through the command line."""
    return st.one_of(
        st.tuples(st.just("trainer.steps"), st.integers(1, 10**6)),
        st.tuples(st.just("trainer.learning_rate"), st.floats(1e-9, 1.0)),
        st.tuples(st.just("eval.greedy"), st.booleans()),
        st.tuples(st.just("sampling.top_p"), st.floats(0.01, 1.0)),
        st.tuples(st.just("env.system_prompt"), st.text(st.characters(codec="utf-8"), max_size=40)),
    )


@given(_values())
def test_what_is_written_on_the_command_line_arrives(pair):
    key, value = pair
    section, name = key.split(".")
    config = load("spreadsheet-tiny", [f"--{key}={value}"])
    assert getattr(getattr(config, section), name) == value


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*RunConfig.model_fields, "steps", "lora", "x"]), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_no_value_at_all_gives_anything_but_a_configuration_or_sentences(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("any") / "config.json"
    path.write_text(json.dumps(value))
    try:
        assert isinstance(load(path), RunConfig)
    except ConfigError as error:
        assert str(error) and all(line.startswith(str(path)) for line in str(error).splitlines())
