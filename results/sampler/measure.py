"""Tokens per second of the embedded sampler against transformers' `generate`, at 1, 16 and 64 episodes at once.

Always true: both get the same prompts, the same adapter, the same limits, and give a log-probability for each token
that they sample; no prompt is met twice, so nothing is cached from an earlier round; contenders alternate within one
run, each at the thread setting that this run's sweep found best for it. `generate` runs with the adapter merged and
unmerged, and its better form counts. Only tokens up to an episode's stop token count. Where vLLM is installed it is a
contender too, the real one, with the adapter loaded beside its base; on the CPU at the fastest of `engine.SETTINGS`.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import _bench
import espalier.trainer
import torch
from engine import SETTINGS, Setting, fastest
from espalier.configs.load import load
from espalier.rollouts.digest import folder_digest
from espalier.rollouts.render import make_renderer
from espalier.rollouts.runner import env_factory
from espalier.rollouts.samplers.base import Sample, Sampler, SampleRequest
from espalier.rollouts.samplers.torch import TorchSampler
from espalier.rollouts.types import PolicyVersion
from espalier.trainer import tasks as tasklists
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Qwen3ForCausalLM

SEED = 0
GROUP = 8
SLOTS = 64
THREADS = (1, 2)

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A workload: `groups` prompts with `group` episodes each, `at_once` of them in flight.

    `fixed`: every episode samples just so many tokens; otherwise up to its stop token.
    """

    name: str
    at_once: int
    groups: int
    group: int = GROUP
    fixed: int = 0


CASES = (
    Case("1", 1, 1),
    Case("16", 16, 8),
    Case("64", 64, 32),
    Case("64_distinct", 64, 128, group=1),
    Case("64_fixed", 64, 16, fixed=32),
)


@dataclass(frozen=True)
class Policy:
    """What is sampled: the shipped policy, its stop tokens, and new prompts without end."""

    base: Path
    stop: tuple[int, ...]
    max_tokens: int
    prompts: Iterator[Prompt]


def shipped_policy() -> Policy:
    """The tiny policy with first prompts of the demo's training tasks, as an episode renders them."""
    config = load("spreadsheet-tiny")
    base = Path(next(iter(espalier.trainer.__path__))) / "policies" / "tiny"
    if not (base / "config.json").is_file():
        sys.exit(f"{base} holds no policy; make it with `espalier make-policy` first.")
    renderer = make_renderer(base, thinking=False)

    def prompts() -> Iterator[Prompt]:
        for seed in itertools.count(SEED):
            tasks = tasklists.load(config.env, "train", seed, 100)
            env = env_factory(config.env, **tasklists.environment_options(config.env, tasks))()
            for task in tasks:
                observation, _ = env.reset(seed=0, options={"task": task})
                tools = [tool.to_openai(terse=config.env.terse) for tool in env.tools]
                yield renderer.first_prompt(list(observation.messages), tools)
            env.close()

    return Policy(base, renderer.stop_ids, config.episode.max_turn_tokens, prompts())


class Contenders:
    """The samplers, one for each thread setting, and the two forms of the model for `generate`."""

    def __init__(self, policy: Policy, adapter: Path, threads: Sequence[int], device: str) -> None:
        self.policy, self.threads, self._device = policy, tuple(threads), device
        self._loop = asyncio.new_event_loop()
        self._version = PolicyVersion(1, folder_digest(adapter), adapter, str(policy.base))
        self._samplers: dict[tuple[str, int], Sampler] = {}
        for n in threads:
            self._add("embedded", n, TorchSampler(policy.base, slots=SLOTS, threads=n, device=device))
        self.engine: Setting | None = None
        self.unmerged = _with_adapter(policy.base, adapter, device)
        merged: Any = _with_adapter(policy.base, adapter, device)
        self.merged: PreTrainedModel = merged.merge_and_unload().eval()

    def _add(self, name: str, threads: int, sampler: Sampler) -> None:
        self._samplers[name, threads] = sampler
        self._loop.run_until_complete(sampler.publish(self._version))

    def start_engine(self, setting: Setting) -> None:
        """vLLM joins, run so, in the place of the engine that was there."""
        from espalier.rollouts.samplers.vllm import VllmSampler

        self.stop_engine()
        with setting.set():
            sampler = VllmSampler(
                self.policy.base,
                slots=SLOTS,
                threads=setting.threads,
                max_tokens=512,
                rank=16,
                card=0 if self._device == "cuda" else None,
                eager=self._device == "cpu",
            )
            self._add("vllm", setting.threads, sampler)
        self.engine = setting

    def stop_engine(self) -> None:
        """vLLM leaves."""
        if self.engine is not None:
            sampler = self._samplers.pop(("vllm", self.engine.threads))
            self._loop.run_until_complete(sampler.close())
            self.engine = None

    def sweep_engine(self, case: Case, rounds: int) -> list[tuple[str, list[float]]]:
        """Start vLLM at the fastest of `SETTINGS` in `case`; what was found of each."""

        def speeds(setting: Setting) -> list[float]:
            self.start_engine(setting)
            found = [self.sampler("vllm", case, self.episodes(case), setting.threads)[0] for _ in range(rounds)]
            print(f"vLLM ({setting}): {median(found):,.0f} tok/s", flush=True)
            return found

        best, rows = fastest(speeds)
        self.start_engine(best)
        return rows

    def close(self) -> None:
        """Stop the samplers."""
        for sampler in self._samplers.values():
            self._loop.run_until_complete(sampler.close())
        self._loop.close()

    def episodes(self, case: Case) -> list[Prompt]:
        """New prompts, one an episode."""
        drawn = itertools.islice(self.policy.prompts, case.groups)
        return [prompt for prompt in drawn for _ in range(case.group)]

    def sampler(self, name: str, case: Case, prompts: list[Prompt], threads: int) -> tuple[float, list[Sample]]:
        """Tokens per second of a sampler, and the samples."""
        sampler = self._samplers[name, threads]
        stop, most = ((), case.fixed) if case.fixed else (self.policy.stop, self.policy.max_tokens)
        samples: list[Sample | None] = [None] * len(prompts)
        todo = iter(enumerate(prompts))

        async def work() -> None:
            for i, prompt in todo:  # shared by all workers
                samples[i] = await sampler.sample(SampleRequest(f"e{i}", prompt, 1, i, most, stop, deadline_s=600.0))
                await sampler.end_session(f"e{i}")

        async def run() -> None:
            await asyncio.gather(*(work() for _ in range(case.at_once)))

        started = time.perf_counter()
        self._loop.run_until_complete(run())
        seconds = time.perf_counter() - started
        done = [sample for sample in samples if sample is not None]
        return sum(len(sample.tokens) for sample in done) / seconds, done

    def generate(self, case: Case, prompts: list[Prompt], threads: int, model: Any) -> float:
        """Tokens per second of `generate`, `at_once` episodes a batch, with the log-probabilities of what it sampled."""
        torch.set_num_threads(threads)
        started = time.perf_counter()
        sampled = sum(
            self._batch(case, prompts[at : at + case.at_once], model) for at in range(0, len(prompts), case.at_once)
        )
        return sampled / (time.perf_counter() - started)

    @torch.inference_mode()
    def _batch(self, case: Case, prompts: list[Prompt], model: Any) -> int:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        ends: dict[str, Any] = {"max_new_tokens": self.policy.max_tokens, "eos_token_id": list(self.policy.stop)}
        if case.fixed:
            ends = {"min_new_tokens": case.fixed, "max_new_tokens": case.fixed}
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **ends,
        )
        new = out.sequences[:, width:]
        table = torch.log_softmax(torch.stack(out.logits, 1).float(), -1)
        table.gather(-1, new[..., None]).tolist()
        if case.fixed:
            return int(new.numel())
        over = torch.isin(new, torch.tensor(self.policy.stop, device=new.device)).cumsum(-1)
        return int((over == 0).sum() + (over.amax(-1) > 0).sum())  # up to the stop token, and that

    def largest_difference(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> float:
        """max |log-probability of the sampler - of a trainer's forward (transformers, adapter unmerged)|, nats."""
        worst = 0.0
        with torch.inference_mode():
            for prompt, sample in zip(prompts, samples, strict=True):
                ids = torch.tensor([prompt + sample.tokens], device=self._device)
                table = torch.log_softmax(self.unmerged(input_ids=ids).logits[0].float(), -1)
                found = table[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
                worst = max(worst, float((found - torch.tensor(sample.logprobs)).abs().max()))
        return worst


def _with_adapter(base: Path, adapter: Path, device: str) -> Any:
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval().to(device)


def make_adapter(base: Path, folder: Path) -> Path:
    """A LoRA adapter of the demo's rank whose update is small, but not zero."""
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.002 * torch.randn_like(parameter))
    tuned.save_pretrained(str(folder))
    return folder


def compare(contenders: Contenders, case: Case, rounds: int) -> dict[str, Any]:
    """Sweep the thread settings, then alternate all contenders at their best: one entry of `runs`."""

    def generate(model: Any, threads: int) -> float:
        return contenders.generate(case, contenders.episodes(case), threads, model)

    def sampler(name: str, threads: int) -> float:
        return contenders.sampler(name, case, contenders.episodes(case), threads)[0]

    forms: dict[str, Callable[[int], float]] = {
        "embedded": partial(sampler, "embedded"),
        "generate_merged": partial(generate, contenders.merged),
        "generate_adapter": partial(generate, contenders.unmerged),
    }
    sweeps = {name: _bench.sweep_threads(speed, contenders.threads, rounds) for name, speed in forms.items()}
    best = {name: partial(speed, sweeps[name].best) for name, speed in forms.items()}
    threads: dict[str, Any] = {name: sweep.best for name, sweep in sweeps.items()}
    if contenders.engine is not None:
        best["vllm"] = partial(sampler, "vllm", contenders.engine.threads)
        threads["vllm"] = str(contenders.engine)
    return {
        "case": case.name,
        "at_once": case.at_once,
        "episodes": case.groups * case.group,
        "group": case.group,
        "threads": threads,
        "sweep": {name: sweep.rows for name, sweep in sweeps.items()},
        "tok_s": _bench.alternate(best, rounds),
    }


def start_vllm(contenders: Contenders, case: Case, bench: _bench.Bench) -> list[tuple[str, list[float]]]:
    """Let vLLM take part where it is installed; what was found of its settings."""
    if find_spec("vllm") is None:
        return []
    if bench.device == "cuda" or bench.quick:
        contenders.start_engine(SETTINGS[0])
        return []
    return contenders.sweep_engine(case, 3)


def measure(
    contenders: Contenders, cases: Sequence[Case], rounds: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures and the runs behind them."""
    figures: dict[str, float] = {}
    runs: list[dict[str, Any]] = []
    for case in cases:
        runs.append(compare(contenders, case, rounds))
        middle = {name: median(values) for name, values in runs[-1]["tok_s"].items()}
        figures[f"tok_s_embedded_{case.name}"] = middle["embedded"]
        figures[f"tok_s_generate_{case.name}"] = max(middle["generate_merged"], middle["generate_adapter"])
        figures[f"ratio_generate_{case.name}"] = middle["embedded"] / figures[f"tok_s_generate_{case.name}"]
        if "vllm" in middle:
            figures[f"tok_s_vllm_{case.name}"] = middle["vllm"]
            figures[f"ratio_vllm_{case.name}"] = middle["embedded"] / middle["vllm"]
        print(
            f"{case.name:>12}: " + ", ".join(f"{name} {speed:,.0f} tok/s" for name, speed in middle.items()), flush=True
        )
    case = next(case for case in cases if case.name == "64")
    prompts = contenders.episodes(case)
    samples = contenders.sampler("embedded", case, prompts, contenders.threads[0])[1]
    figures["logprob_max_diff"] = contenders.largest_difference(prompts, samples)
    figures["prompt_tokens_mean"] = sum(map(len, prompts)) / len(prompts)
    figures["sampled_tokens_mean"] = sum(len(sample.tokens) for sample in samples) / len(samples)
    return figures, runs


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write figures.json, report.md and plot.png."""
    bench = _bench.start(__file__, "tokens/s of the embedded sampler", argv)
    cases = [Case("64", 16, 4), Case("64_fixed", 16, 2, fixed=4)] if bench.quick else CASES
    rounds, threads = (1, (1,)) if bench.quick else (7, THREADS)
    with tempfile.TemporaryDirectory() as folder:
        policy = shipped_policy()
        contenders = Contenders(policy, make_adapter(policy.base, Path(folder)), threads, bench.device)
        try:
            tried = start_vllm(contenders, next(case for case in cases if case.name == "64"), bench)
            figures, runs = measure(contenders, cases, rounds)
        finally:
            contenders.close()
    if bench.folder is not None:
        from page import plot, report

        plot(figures, bench.folder / "plot.png")
        (bench.folder / "report.md").write_text(report(figures, runs, rounds, bench.device), encoding="utf-8")
    claim = (
        "The embedded sampler makes at least 3 times the tokens per second of transformers' generate at 64 episodes."
    )
    bench.finish(claim, [SEED], figures, [{"device": bench.device, "vllm_tok_s": tried}, *runs])


if __name__ == "__main__":
    main(sys.argv[1:])
