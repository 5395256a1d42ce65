"""Stock TRL on Espalier's tasks: `trl.GRPOTrainer` with `environment_factory`, nothing of it patched.

`measure.py` runs this file in a process of its own: `contender_trl.py JOB`, a JSON file (see `Job`); it leaves adapters
and `log.json` beside it. Always true: TRL gets what Espalier gets (base, LoRA, loss, learning rate, groups, budgets,
tasks in the same order, environment), and prompts that are Espalier's token for token, which is checked before training
begins; the clock runs from `trainer.train()` on and stands still only while an adapter is saved.

What a user of TRL writes stands here: the environment's class, whose public methods are the tools; a reward function; a
chat template; a response template. The last ends an episode at `submit`: TRL's loop samples again after every tool
call and gives an environment no way to end an episode, so a turn that submits is parsed as plain text, which does, and
the reward function carries its calls out before it grades.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from espalier.configs.load import load
from espalier.configs.schema import RunConfig
from espalier.envs.core import Action, AgentEnv, Task, ToolCall, ToolError
from espalier.envs.tools import Tool
from espalier.rollouts.episode import environment_seed
from espalier.rollouts.render import ChatRenderer, Extension, make_renderer
from espalier.rollouts.runner import env_factory
from espalier.trainer import tasks as tasklists
from espalier.trainer.model import load_base, load_tokenizer, lora_config, resolve_device, write_adapter
from espalier.trainer.policy import resolve_base
from tokenizers import normalizers
from transformers import TrainerCallback
from transformers.utils import logging
from trl.chat_template_utils import qwen3_template, qwen3_training_chat_template
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

CHECKED = 8
"""Tasks whose prompts are compared with Espalier's before training."""

CALL = "<tool_call>"
ROLE_MARK = "\ue000"
SUBMITS = r'"name":\s*"submit"'


@dataclass(frozen=True)
class Job:
    """What is asked for. `save_every`: steps between adapters; `cap_s`: seconds of training after which it stops.

    TRL's own settings: `threads` of torch, `rows` of one forward and backward, `at_once` episodes generated together.
    """

    config: str
    save_every: int
    cap_s: float
    threads: int
    rows: int
    at_once: int


# ---- the environment, as TRL wants it


class Episode:
    """One episode; TRL makes a subclass's public methods its tools, `reset` begins an episode."""

    def __init__(self, make_env: Callable[[], AgentEnv], tasks: Sequence[Task], seed: int) -> None:
        self._env, self._tasks, self._seed = make_env(), tasks, seed
        self._reward: float | None = None

    def reset(self, task: int, **_: Any) -> str:
        """Begin the task of a row of the data set; what is returned ends the prompt."""
        chosen = self._tasks[task]
        seed = environment_seed(self._seed, chosen.id)
        observation, _info = self._env.reset(seed=seed, options={"task": chosen})
        self._reward = None
        return observation.messages[0]["content"]

    def _act(self, action: Action) -> list[str]:
        """Carry out a turn; the answers to its calls."""
        if self._reward is not None:
            return [ToolError("episode_over", "the episode is over", retryable=False).to_json()]
        try:
            observation, reward, terminated, truncated, _ = self._env.step(action)
        except Exception:  # a failure of the environment's: no verdict, and the run goes on, as in Espalier
            self._reward = math.nan
            return [ToolError("failed", "the environment failed", retryable=False).to_json()]
        if terminated or truncated:
            self._reward = reward
        return [message["content"] for message in observation.messages]

    def _grade(self, last: Action | None) -> float | None:
        """Carry out what was not carried out yet and hand in; None where there is no verdict."""
        for action in (last, Action()):
            if action is not None and self._reward is None:
                self._act(action)
        return None if self._reward is None or math.isnan(self._reward) else self._reward


def episode_class(tools: Sequence[Tool]) -> type[Episode]:
    """`Episode` with one method a tool."""
    return type("SpreadsheetEpisode", (Episode,), {tool.name: _method(tool) for tool in tools})


def _method(tool: Tool) -> Callable[..., str]:
    """A method with the tool's name and parameters; what they may hold is the environment's to check."""

    def call(self: Episode, **arguments: Any) -> str:
        return self._act(Action("", (ToolCall(tool.name, arguments),)))[0]

    names = list(tool.model.model_fields)
    call.__name__ = call.__qualname__ = tool.name
    call.__doc__ = f"{tool.name}.\n\nArgs:\n" + "".join(f"    {name}: See the environment.\n" for name in names)
    call.__annotations__ = dict.fromkeys(names, Any)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Any) for n in names]
    call.__signature__ = inspect.Signature([own, *given])  # type: ignore[attr-defined]
    return call


@dataclass
class Grader:
    """The reward function: ends every episode and grades it.

    For the record `means` collects mean rewards, `failed` counts episodes without a verdict.
    """

    renderer: ChatRenderer
    max_turns: int
    __name__: str = "graded"
    means: list[float] = field(default_factory=list)
    failed: int = 0

    def __call__(
        self,
        completions: Sequence[Sequence[Mapping[str, Any]]],
        completion_ids: Sequence[Sequence[int]],
        environments: Sequence[Episode],
        **_: Any,
    ) -> list[float | None]:
        """One reward an episode, None where there is no verdict."""
        rewards = [
            environment._grade(self.last_action(messages, ids))
            for messages, ids, environment in zip(completions, completion_ids, environments, strict=True)
        ]
        self.failed += rewards.count(None)
        self.means.append(fmean([r for r in rewards if r is not None] or [0.0]))
        return rewards

    def last_action(self, messages: Sequence[Mapping[str, Any]], ids: Sequence[int]) -> Action | None:
        """The last turn, where TRL has not carried it out: it submits, cannot be parsed, or is the last one allowed.

        A turn that a limit cut short was never an action, here as in Espalier.
        """
        last = messages[-1]
        if last["role"] != "assistant" or not ids or ids[-1] not in self.renderer.stop_ids:
            return None
        if not last.get("tool_calls"):
            return self.renderer.parse(self.renderer.encode(last["content"]), ())
        if sum(m["role"] == "assistant" for m in messages) < self.max_turns:
            return None
        calls = [call["function"] for call in last["tool_calls"]]
        return Action("", tuple(ToolCall(call["name"], call["arguments"]) for call in calls))


# ---- prompts


def chat_template(tools: Sequence[Mapping[str, Any]], tool_role: str = "user") -> str:
    """TRL's own training template of Qwen3, with Espalier's tool schemas in the place of those TRL derives.

    `tool_role` is written where a tool's answer begins.
    """
    head, loop, rest = qwen3_training_chat_template.partition("    {%- for tool in tools %}\n")
    _, end, tail = rest.partition("    {%- endfor %}\n")
    before, role, after = tail.partition("'<|im_start|>user'")
    if not (loop and end and role):
        raise RuntimeError("this TRL's template of Qwen3 lists tools in another way; the benchmark is for trl 1.16")
    listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    return f"{head}    {{{{- {json.dumps(listed)} }}}}\n{before}'<|im_start|>{tool_role}'{after}"


def cut_as_espalier_does(tokenizer: Any, renderer: ChatRenderer) -> str:
    """What to write for the role of a tool's answer so that `tokenizer` cuts it as the renderer does.

    The renderer encodes "user" and the line end behind it apart. Where the vocabulary holds them as one token, a
    template's text would be cut otherwise, so a mark is written which the tokenizer's normaliser turns into "user"
    after the vocabulary's fixed tokens have been found.
    """
    if renderer.encode("user\n") == renderer.encode("user") + renderer.encode("\n"):
        return "user"
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(ROLE_MARK, "user")
    return ROLE_MARK


def response_template() -> dict[str, Any]:
    """TRL's own for Qwen3, but a turn that submits holds no calls for TRL: it is the last one."""
    standard: dict[str, Any] = qwen3_template
    fields = dict(standard["fields"])
    calls = {key: value for key, value in fields["tool_calls"].items() if key != "open"}
    fields["tool_calls"] = {"open_pattern": rf"(?<!{SUBMITS}.*){CALL}(?!.*{SUBMITS})", **calls}
    return {**standard, "fields": fields}


def check_prompts(
    trainer: GRPOTrainer,
    renderer: ChatRenderer,
    env: AgentEnv,
    tools: Sequence[Mapping[str, Any]],
    tasks: Sequence[Task],
) -> None:
    """Raises RuntimeError where TRL's tokens differ from Espalier's.

    Compared are the first prompts of `tasks`, and what stands between two turns after one call and after two.
    """
    for task in tasks:
        opening, _ = env.reset(seed=0, options={"task": task})
        ours = list(renderer.first_prompt(opening.messages, tools))
        _same(task, "first prompt", ours, _prompt_ids(trainer, opening.messages[0]["content"]))
        said = renderer.encode('<tool_call>\n{"name": "submit", "arguments": {}}\n</tool_call><|im_end|>')
        for count in (1, 2):
            calls = tuple(ToolCall("inspect_range", {"range": f"A{n}:D9"}) for n in range(1, count + 1))
            answers = env.step(Action("", calls))[0].messages
            extension = renderer.extend(ours, said, answers, tools)
            if not isinstance(extension, Extension):
                raise RuntimeError("this template rewrites earlier turns; TRL would train on other tokens")
            told = [{"role": "tool", "name": "inspect_range", "content": m["content"]} for m in answers]
            theirs = trainer._get_tool_suffix_ids(told)
            _same(task, f"answer to {count} calls", extension.tokens, theirs)


def _prompt_ids(trainer: GRPOTrainer, content: str) -> list[int]:
    """The prompt as `GRPOTrainer._tokenize_prompts` renders it."""
    processor: Any = trainer.processing_class
    kwargs: dict[str, Any] = trainer.chat_template_kwargs  # type: ignore[assignment]
    found = processor.apply_chat_template(
        conversation=[[{"role": "user", "content": content}]],
        tools=trainer.tools,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **kwargs,
    )
    return list(found["input_ids"][0])


def _same(task: Task, what: str, ours: Sequence[int], theirs: Sequence[int]) -> None:
    if list(ours) != list(theirs):
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise RuntimeError(f"task {task.id}: TRL's {what} differs from Espalier's from token {at} on")


# ---- training


class Clock(TrainerCallback):
    """Reads the training time at every step, saves adapters outside of it, stops at the cap."""

    def __init__(self, job: Job, folder: Path, grader: Grader) -> None:
        self._job, self._folder, self._grader = job, folder, grader
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._resumed = 0.0

    def start(self) -> None:
        """Training begins."""
        self._resumed = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Once an optimizer step is done."""
        self.seconds += time.perf_counter() - self._resumed
        step, over = state.global_step, self.seconds >= self._job.cap_s
        adapter = None
        if step % self._job.save_every == 0 or over or step == state.max_steps:
            adapter = f"adapters/{step:04d}"
            (self._folder / adapter).mkdir(parents=True)
            write_adapter(model, self._folder / adapter)
        reward, failed = fmean(self._grader.means), self._grader.failed
        self.rows.append(
            {"step": step, "seconds": self.seconds, "reward": reward, "failed": failed, "adapter": adapter}
        )
        self._grader.means, self._grader.failed = [], 0
        control.should_training_stop = control.should_training_stop or over
        self._resumed = time.perf_counter()


def grpo_config(job: Job, config: RunConfig, folder: Path, room: int) -> GRPOConfig:
    """TRL's configuration: what the run says, and otherwise what is fastest for TRL (nothing logged or saved)."""
    section, episode = config.trainer, config.episode
    per_step = section.groups * section.group_size
    return GRPOConfig(
        output_dir=str(folder),
        seed=config.seed,
        use_cpu=resolve_device(config.policy.device) == "cpu",
        bf16=False,
        max_steps=section.steps,
        per_device_train_batch_size=job.rows,
        gradient_accumulation_steps=per_step // job.rows,
        generation_batch_size=job.at_once,
        num_generations=section.group_size,
        shuffle_dataset=False,  # the rows stand in the order in which Espalier draws tasks
        max_completion_length=room,
        generation_kwargs={"max_new_tokens": episode.max_turn_tokens},
        max_tool_calling_iterations=episode.max_turns - 1,
        chat_template_kwargs={"enable_thinking": episode.thinking},
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
        top_k=config.sampling.top_k,
        loss_type=section.loss,
        importance_sampling_level=section.importance_sampling_level,
        scale_rewards=section.scale_rewards,
        epsilon=section.epsilon,
        epsilon_high=section.epsilon_high,
        beta=section.beta,
        entropy_coef=section.entropy_bonus,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.lr_schedule,
        warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        optim="adamw_torch",
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def rows(config: RunConfig, tasks: Sequence[Task]) -> Dataset:
    """A row a group, in the order in which Espalier draws them (`task`: place in `tasks`)."""
    place = {task.id: number for number, task in enumerate(tasks)}
    drawn = [
        task
        for step in range(1, config.trainer.steps + 1)
        for task in tasklists.draw(tasks, config.trainer.groups, seed=config.seed, step=step)
    ]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": ""}], "task": place[t.id]} for t in drawn])


def build(job: Job, folder: Path) -> tuple[GRPOTrainer, Clock]:
    """TRL's trainer, ready to train; its prompts have been compared with Espalier's."""
    config = load(job.config)
    base = resolve_base(config.policy.base)
    tasks = tasklists.load(config.env, "train", config.seed, config.env.task_count)
    make_env = env_factory(config.env, **tasklists.environment_options(config.env, tasks))
    env, renderer = make_env(), make_renderer(base, thinking=config.episode.thinking)
    tools = [tool.to_openai(terse=config.env.terse) for tool in env.tools]

    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = chat_template(tools, cut_as_espalier_does(tokenizer, renderer))
    tokenizer.response_template = response_template()
    model = load_base(base, config.policy)
    if model.generation_config is None:
        raise RuntimeError("the base cannot generate")
    model.generation_config.eos_token_id = list(renderer.stop_ids)

    # Espalier limits the whole sequence, TRL what follows the prompt: no TRL episode has less room than Espalier's
    shortest = min(len(renderer.first_prompt(_opening(env, task), tools)) for task in tasks[:CHECKED])
    grader = Grader(renderer, config.episode.max_turns)
    factory: Any = partial(episode_class(env.tools), make_env, tasks, config.seed)
    clock = Clock(job, folder, grader)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[grader],
        args=grpo_config(job, config, folder, config.episode.max_tokens - shortest),
        train_dataset=rows(config, tasks),
        processing_class=tokenizer,
        peft_config=lora_config(config.policy),
        environment_factory=factory,
        callbacks=[clock],
    )
    check_prompts(trainer, renderer, env, tools, tasks[:CHECKED])
    return trainer, clock


def _opening(env: AgentEnv, task: Task) -> Any:
    return env.reset(seed=0, options={"task": task})[0].messages


def main(path: Path) -> None:
    """Do the job in the file at `path`."""
    job = Job(**json.loads(path.read_text(encoding="utf-8")))
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(job.threads)
    trainer, clock = build(job, path.parent)
    clock.start()
    trainer.train()
    (path.parent / "log.json").write_text(json.dumps({"rows": clock.rows}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
