"""Makes the shipped base policies from nothing, by seed: `espalier make-policy`.

Two steps: train the tokenizer on demonstrations; imitate the faulty expert. Hidden matrices are trained by Muon,
embeddings and norms by AdamW: with AdamW alone, copying by content does not form within the time, and nothing else
helps without it. It forms sooner where it is needed often, so the first part of the training is rich in demonstrations
that copy a word of the instruction into a cell or a formula.

Always true: the same recipe and number of threads give the same policy on the same machine and torch build.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..envs.core import AgentEnv
from ..rollouts.render import make_renderer
from .demonstrations import Demonstration, corpus, demonstrate
from .lessons import Spreadsheets, Subject
from .muon import Muon
from .tokenizer import build_tokenizer

IGNORE = -100
WINDOW = 8


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the policy."""

    seed: int = 0
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    feed_forward: int = 384
    merges: int = 1024
    demonstrations: int = 28_000
    steps: int = 2_800
    early_steps: int = 800
    early_copies: float = 0.8
    """Share of demonstrations that copy a word, in the first `early_steps`."""
    batch: int = 32
    muon_lr: float = 0.02
    adam_lr: float = 1e-3
    threads: int = 1


RECIPES: Mapping[str, Recipe] = {"spreadsheet": Recipe(), "code": Recipe(demonstrations=12_000, steps=1_500)}
"""How the shipped policies were made, by subject."""


def make_policy(
    out: Path, subject: Subject | None = None, recipe: Recipe | None = None, say: Callable[[str], None] = print
) -> Path:
    """Write model, tokenizer and `policy.json` (the recipe) to `out`; the subject is spreadsheets unless another is
    given. Raises `FileExistsError` if it is there.
    """
    recipe, subject = recipe or Recipe(), subject or Spreadsheets()
    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another folder or remove it")
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    env = subject.environment()
    try:
        tokenizer = train_tokenizer(env, subject, recipe)
        tokenizer.save_pretrained(work)
        model = Qwen3ForCausalLM(architecture(recipe, len(tokenizer)))
        say(f"tokenizer: {len(tokenizer)} tokens; model: {model.num_parameters():,} parameters")
        learner = Learner(model, recipe)
        data = list(demonstrations(env, work, subject, recipe))
    finally:
        env.close()
    say(f"demonstrations: {len(data)}, {sum(len(d.tokens) for d in data) / len(data):.0f} tokens each")
    teach(learner, data, recipe, say)
    model.save_pretrained(work)
    _write_card(work, subject, recipe, model.num_parameters(), time.monotonic() - started)
    work.rename(out)
    say(f"wrote {out} after {time.monotonic() - started:.0f} s")
    return out


def train_tokenizer(env: AgentEnv, subject: Subject, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer, from lessons of all kinds alike."""
    texts = corpus(env, subject.samples(recipe.seed, 2_000))
    return build_tokenizer(texts, [tool.to_openai(terse=True) for tool in env.tools], recipe.merges, subject.pieces)


def architecture(recipe: Recipe, vocab_size: int) -> Qwen3Config:
    """Qwen3's, small, embeddings tied."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.02,
    )


class Learner:
    """The model and its two optimizers; a step has a position in 0..1 that sets the learning rate (trapezoid)."""

    def __init__(self, model: Qwen3ForCausalLM, recipe: Recipe) -> None:
        self.model = model
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self._optimizers = (
            (Muon(matrices, lr=recipe.muon_lr), recipe.muon_lr),
            (torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0), recipe.adam_lr),
        )

    def step(self, tokens: torch.Tensor, labels: torch.Tensor, scale: float) -> tuple[float, float]:
        """One update; `tokens`, `labels`: (batch, length) int64. Returns loss (nats a token) and accuracy."""
        hidden = self.model.model(tokens).last_hidden_state
        wanted = labels[:, 1:] != IGNORE
        logits, target = self.model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted]
        loss = cross_entropy(logits, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rate in self._optimizers:
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()
        return loss.item(), (logits.argmax(-1) == target).float().mean().item()


def demonstrations(env: AgentEnv, tokenizer: Path, subject: Subject, recipe: Recipe) -> Iterator[Demonstration]:
    """Demonstrations, each of its own task."""
    renderer = make_renderer(tokenizer, thinking=False)
    for lesson in subject.lessons(recipe.seed, recipe.demonstrations):
        yield demonstrate(env, renderer, lesson)


def teach(learner: Learner, data: Sequence[Demonstration], recipe: Recipe, say: Callable[[str], None]) -> None:
    """Imitation, in epochs. The learning rate rises over 50 steps and falls to zero over the last half."""
    rng = np.random.default_rng(recipe.seed)
    every, copying = _endless(data, rng), _endless([d for d in data if d.copies] or data, rng)
    early = _batches(_mixed(copying, every, recipe.early_copies, rng), recipe.batch, rng)
    late = _batches(every, recipe.batch, rng)
    for step in range(recipe.steps):
        scale = min(1.0, (step + 1) / 50, 2.0 * (1.0 - step / recipe.steps))
        loss, accuracy = learner.step(*next(early if step < recipe.early_steps else late), scale)
        if step % 50 == 0 or step == recipe.steps - 1:
            say(f"imitation: step {step}/{recipe.steps}, loss {loss:.3f}, next token right {accuracy:.3f}")


def continue_imitation(base: Path, out: Path, subject: Subject, seed: int, seconds: float, count: int = 8_000) -> int:
    """Train the policy in `base` for `seconds` more on `count` fresh demonstrations and write it to `out`; steps done.

    The control that any gain by reinforcement learning is held against. The learning rate falls to zero over the time.
    """
    recipe = Recipe(seed=seed, demonstrations=count)
    model = Qwen3ForCausalLM.from_pretrained(base)
    learner = Learner(model, recipe)
    with closing(subject.environment()) as env:
        batches = epochs(list(demonstrations(env, base, subject, recipe)), recipe.batch, seed)
    steps, began = 0, time.monotonic()
    while (spent := time.monotonic() - began) < seconds:
        learner.step(*next(batches), 0.25 * (1.0 - spent / seconds))
        steps += 1
    shutil.copytree(base, out)
    model.save_pretrained(out)
    return steps


def epochs(data: Sequence[Demonstration], batch: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of (tokens, labels), every demonstration once an epoch."""
    rng = np.random.default_rng(seed)
    return _batches(_endless(data, rng), batch, rng)


def _endless(data: Sequence[Demonstration], rng: np.random.Generator) -> Iterator[Demonstration]:
    """Epochs of `data` without end, each in an order of its own."""
    while data:
        for i in rng.permutation(len(data)):
            yield data[i]


def _mixed(
    first: Iterator[Demonstration], second: Iterator[Demonstration], share: float, rng: np.random.Generator
) -> Iterator[Demonstration]:
    """One after another, `share` of them from the first."""
    while True:
        yield next(first if rng.random() < share else second)


def _batches(
    data: Iterator[Demonstration], batch: int, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of like lengths (sorted within a window of `WINDOW` batches, then shuffled): little is padding."""
    while window := sorted(islice(data, WINDOW * batch), key=lambda d: len(d.tokens)):
        for i in rng.permutation(range(0, len(window), batch)):
            yield _padded(window[i : i + batch])


def _padded(picked: Sequence[Demonstration]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(d.tokens) for d in picked)
    tokens = torch.zeros((len(picked), longest), dtype=torch.int64)
    labels = torch.full((len(picked), longest), IGNORE)
    for row, d in enumerate(picked):
        ids = torch.tensor(d.tokens)
        tokens[row, : len(ids)] = ids
        labels[row, : len(ids)] = torch.where(torch.tensor(d.said), ids, IGNORE)
    return tokens, labels


def _write_card(folder: Path, subject: Subject, recipe: Recipe, parameters: int, seconds: float) -> None:
    card = {
        "recipe": asdict(recipe),
        **subject.card(),
        "tools": list(subject.tools),
        "parameters": parameters,
        "seconds": round(seconds),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "ironcalc")},
    }
    (folder / "policy.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
