"""The contenders of `bench versus-trl` get the same, and the benchmark runs end to end."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from espalier.configs.load import load
from espalier.envs.core import Action
from espalier.envs.spreadsheet.env import SpreadsheetEnv
from espalier.envs.spreadsheet.expert import expert
from espalier.envs.spreadsheet.families import generate
from espalier.rollouts.render import make_renderer
from espalier.trainer.demonstrations import said
from espalier.trainer.model import load_tokenizer
from espalier.trainer.policy import resolve_base

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "results" / "versus-trl"
CONFIG = load("spreadsheet-tiny")
PROMPT = "<|im_start|>user\nSum it<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
LOOK = '<tool_call>\n{"name": "inspect_range", "arguments": {"range": "A1:B2"}}\n</tool_call>'
SUBMIT = '<tool_call>\n{"name": "submit", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def comparison():
    sys.path.insert(0, str(ROOT / "results"))  # where `espalier bench` finds _curves
    try:
        spec = importlib.util.spec_from_file_location("versus_trl_comparison", HERE / "comparison.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "results"))
    return module


@pytest.fixture(scope="module")
def contender():
    spec = importlib.util.spec_from_file_location("versus_trl_contender", HERE / "contender_trl.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base():
    return resolve_base("tiny")


@pytest.fixture(scope="module")
def renderer(base):
    return make_renderer(base, thinking=False)


@pytest.fixture(scope="module")
def tasks():
    return [generate(7, index, "train") for index in range(6)]


# ---- the target


def test_the_target_is_reached_on_the_line_between_two_adapters(comparison):
    points = [(0.0, 0.2), (10.0, 0.4), (30.0, 0.3), (50.0, 0.8)]
    assert comparison.time_to(points, 0.3) == pytest.approx(5.0)
    assert comparison.time_to(points, 0.4) == 10.0
    assert comparison.time_to(points, 0.55) == pytest.approx(40.0)
    assert comparison.time_to(points, 0.2) == 0.0 and comparison.time_to(points, 0.9) is None


def test_the_target_is_the_middle_between_the_base_and_the_weaker_end(comparison):
    curves = {"espalier": [(0.0, 0.2), (10.0, 0.8)], "trl": [(0.0, 0.2), (60.0, 0.6)]}
    found = comparison.outcome(0, curves)
    assert found.target == pytest.approx(0.4)
    assert found.seconds == {"espalier": pytest.approx(10 / 3), "trl": pytest.approx(30.0)}
    assert found.ratio == pytest.approx(9.0)


def test_without_progress_of_both_there_is_no_ratio(comparison):
    found = comparison.outcome(0, {"espalier": [(0.0, 0.2), (10.0, 0.8)], "trl": [(0.0, 0.2), (60.0, 0.2)]})
    assert found.ratio is None and found.seconds == {"espalier": None, "trl": None}


def test_what_else_the_machine_did_for_a_while_does_not_count(comparison):
    steps = [
        {"step": n, "seconds": s, "reward": 0.0, "failed": 0} for n, s in ((1, 2.0), (2, 4.0), (3, 90.0), (4, 92.0))
    ]
    assert comparison.Arm("trl", 0, {}, steps, {}).seconds_a_step == 2.0


def test_a_step_counts_as_the_steps_around_it(comparison):
    """Steps that grow dearer count as what they cost; one that took long by chance does not."""
    cheap, dear = [1.0] * 20, [3.0] * 20
    spent = [*cheap[:5], 50.0, *cheap[6:], *dear]
    steps = [comparison.Step(step=n + 1, seconds=sum(spent[: n + 1]), reward=0.0, failed=0) for n in range(40)]
    clock = comparison.Arm("trl", 0, {}, steps, {}).clock
    assert [clock[n] for n in (1, 10, 20, 40)] == [1.0, 10.0, 20.0, 80.0]


# ---- what TRL is given


def calls_of(contender, base, text):
    tokenizer = load_tokenizer(base)
    parsed = tokenizer.parse_response(text + "<|im_end|>", contender.response_template(), prefix=PROMPT)
    return parsed, [call["function"]["name"] for call in parsed.get("tool_calls", ())]


def test_trl_reads_calls_but_none_in_a_turn_that_submits(contender, base):
    assert calls_of(contender, base, f"{LOOK}\n{LOOK}")[1] == ["inspect_range", "inspect_range"]
    for text in (SUBMIT, f"{LOOK}\n{SUBMIT}", f"{SUBMIT}\n{LOOK}"):
        parsed, names = calls_of(contender, base, text)
        assert names == [] and parsed["content"].removesuffix("<|im_end|>") == text


def test_with_trls_own_response_template_a_submit_would_be_answered(contender, base):
    parsed = load_tokenizer(base).parse_response(SUBMIT + "<|im_end|>", contender.qwen3_template, prefix=PROMPT)
    assert [call["function"]["name"] for call in parsed["tool_calls"]] == ["submit"]


def episode(contender, tasks):
    def make_env():
        return SpreadsheetEnv(tasks, tools=CONFIG.env.tools, terse=True)

    return contender.episode_class(make_env().tools)(make_env, tasks, 0)


def play(contender, renderer, tasks, number, actions):
    """What TRL's loop does with `actions`, and the reward."""
    env = episode(contender, tasks)
    assert tasks[number].instruction in env.reset(task=number, prompt=[])
    answers, messages = [], []
    for action in actions[:-1]:
        answers += [getattr(env, call.name)(**call.arguments) for call in action.tool_calls]
        messages += [{"role": "assistant", "content": "", "tool_calls": [1]}, {"role": "tool", "content": answers[-1]}]
    text = said(actions[-1])
    grader = contender.Grader(renderer, CONFIG.episode.max_turns)
    final = {"role": "assistant", "content": text.removesuffix("<|im_end|>")}
    ids = renderer.encode(text)
    whole = grader(completions=[[*messages, final]], completion_ids=[ids], environments=[env])
    env.reset(task=number)
    cut = grader(completions=[[*messages, final]], completion_ids=[ids[:-1]], environments=[env])
    return answers, whole[0], cut[0]


def test_trls_tools_and_reward_are_the_environments(contender, renderer, tasks):
    env = SpreadsheetEnv(tasks, tools=CONFIG.env.tools, terse=True)
    for number, task in enumerate(tasks):
        actions = expert(task)
        env.reset(seed=0, options={"task": task})
        expected = [message["content"] for action in actions[:-1] for message in env.step(action)[0].messages]
        answers, reward, cut = play(contender, renderer, tasks, number, actions)
        assert answers == expected
        assert reward == 1.0 and cut == 0.0  # a turn that a limit cut short is not carried out


def test_a_mistake_is_answered_as_espalier_answers_it(contender, tasks):
    env = episode(contender, tasks)
    env.reset(task=0)
    assert json.loads(env.inspect_range(range="A0:B2"))["error"]["code"] == "bad_range"
    assert "error" in json.loads(env.inspect_range(nonsense=1))
    assert env._grade(Action()) == 0.0
    assert json.loads(env.submit())["error"]["code"] == "episode_over"


def test_a_failure_of_the_environment_is_no_verdict(contender, renderer, tasks):
    """The run goes on, and TRL is told nothing that it could take for a reward."""

    class Broken(SpreadsheetEnv):
        def step(self, action):
            raise ValueError("the engine broke")

    def make_env():
        return Broken(tasks, tools=CONFIG.env.tools, terse=True)

    env = contender.episode_class(make_env().tools)(make_env, tasks, 0)
    env.reset(task=0)
    assert "failed" in env.inspect_range(range="A1")
    grader = contender.Grader(renderer, 6)
    final = {"role": "assistant", "content": SUBMIT}
    ids = renderer.encode(SUBMIT + "<|im_end|>")
    assert grader(completions=[[final]], completion_ids=[ids], environments=[env]) == [None]
    assert grader.failed == 1


@pytest.mark.long
def test_prompts_are_compared_before_training(contender, tmp_path, tasks, renderer):
    """The real trainer passes; one whose template lists TRL's own schemas is refused."""
    config = load("spreadsheet-tiny", ["--env.task_count", "8", "--trainer.steps", "1", "--trainer.groups", "2"])
    (tmp_path / "config.json").write_text(config.model_dump_json())
    job = contender.Job(str(tmp_path / "config.json"), 1, 60.0, threads=1, rows=16, at_once=16)
    trainer, _ = contender.build(job, tmp_path)
    env = SpreadsheetEnv(tasks, tools=CONFIG.env.tools, terse=True)
    tools = [tool.to_openai(terse=True) for tool in env.tools]
    contender.check_prompts(trainer, renderer, env, tools, tasks)
    trainer.processing_class.chat_template = contender.qwen3_training_chat_template
    with pytest.raises(RuntimeError, match="first prompt differs"):
        contender.check_prompts(trainer, renderer, env, tools, tasks)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_quick_run_trains_both_and_measures_them(bench_alone):
    folder = bench_alone("versus-trl")
    command = [
        sys.executable,
        "-P",
        "-m",
        "espalier.trainer.cli",
        "bench",
        "versus-trl",
        "--quick",
        "--json",
        "out.json",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "out.json").read_text())
    assert {"base_pass1", "final_pass1_espalier", "final_pass1_trl", "steps"} <= set(found["figures"])
    assert found["figures"]["steps_espalier"] == found["figures"]["steps_trl"] == 2
    arms = {run["contender"]: run for run in found["runs"]}
    assert set(arms) == {"espalier", "trl"}
    for run in arms.values():
        first, second = (step["seconds"] for step in run["steps"])
        assert 0 < first < second
        by_median = [0.0, second / 2, second]  # of two steps, each is their mean
        assert [point[0] for point in run["curve"]] == pytest.approx(by_median)
    assert str(folder) not in json.dumps(found)
    assert not (HERE.parent / "versus-trl" / "out.json").exists()

    again = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "training:" in done.stdout and "training:" not in again.stdout
