"""The three ways to train the same rows that are compared: packed and flat, TRL's own padded path, the tree.

Always true: one model, one adapter, one loss (TRL's) for all; only which tokens are computed, and how often, differs.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from espalier.configs.schema import RunConfig
from espalier.trainer.batch import Batch, Row, collate
from espalier.trainer.grpo.config import grpo_config
from espalier.trainer.grpo.trainer import OnlineGRPOTrainer, Window
from espalier.trainer.model import load_tokenizer, lora_config
from espalier.trainer.policy import resolve_base
from espalier.trainer.tree.core import TokenTree, grow
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.grpo_trainer import GRPOTrainer
from workloads import VOCAB

AT_ONCE = {"packed": (1280, 2560, 5120), "padded": (8, 2), "tree": (0,)}
"""What a contender may run at once, the first where nothing was tried: tokens of the packed path, rows of TRL's. How
the tree is cut is the trainer's own choice.
"""

SIGMA = 0.25
"""How far recorded log-probabilities are from the policy's (nats), so that clipping takes part."""

NAMES = ("packed", "padded", "tree")


@dataclass(frozen=True, order=True)
class Settings:
    """How a contender runs: torch's threads, and what it runs `at_once` (see `AT_ONCE`)."""

    threads: int
    at_once: int

    def __str__(self) -> str:
        return f"threads {self.threads}" + (f", {self.at_once:,} at once" if self.at_once else "")


@dataclass(frozen=True)
class Shape:
    """A Qwen3 of random weights; `what` it is, for people."""

    what: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int = VOCAB
    dtype: str = "float32"

    def config(self) -> Qwen3Config:
        """For transformers."""
        return Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )

    def linear(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's matrices."""
        queries, keys = self.heads * self.head, self.key_heads * self.head
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        return [*attention, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]


MID = Shape("four layers of Qwen3-0.6B", layers=4, hidden=1024, intermediate=3072, heads=16, key_heads=8, head=128)
TINY = Shape("two tiny layers", layers=2, hidden=64, intermediate=128, heads=4, key_heads=2, head=16)
WHOLE = {
    "0_6b": Shape("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151_936, "bfloat16"),
    "4b": Shape("Qwen3-4B", 36, 2560, 9728, 32, 8, 128, 151_936, "bfloat16"),
}
"""Whole models, for a GPU."""

RANK = 16


def operations(tree: TokenTree, shape: Shape) -> float:
    """Floating-point operations of a forward and backward pass: through the frozen matrices twice, through the adapter's
    three times, attention (two products forward, five backward) by pairs of tokens, the vocabulary by predictions.
    """
    matrices = sum(4 * a * b + 6 * RANK * (a + b) for a, b in shape.linear())
    pairs = float((tree.positions + 1).sum())
    attention = 14 * shape.heads * shape.head * pairs
    return (
        shape.layers * (tree.unique * matrices + attention) + 6 * shape.hidden * shape.vocabulary * tree.targets.numel()
    )


class _Nothing:
    def next(self, step: int) -> Batch | None:
        return None


class _Trainer(OnlineGRPOTrainer):
    """The product's trainer, which can also run TRL's own forward pass."""

    def _score(self, model: Any, micro: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        if "prompt" not in micro:
            return super()._score(model, micro)
        ids = torch.cat([micro["prompt_ids"], micro["completion_ids"]], 1)
        real = torch.cat([micro["prompt_mask"], micro["completion_mask"]], 1)
        keep = ids.size(1) - micro["prompt"]
        logps, entropies, _ = GRPOTrainer._get_per_token_logps_and_entropies(
            self, model, ids, real, keep, compute_entropy=True
        )
        mask = micro["tool_mask"][:, -keep:]
        wide = (micro["prompt"] - 1, 0)
        return (
            torch.nn.functional.pad(logps * mask, wide),
            torch.nn.functional.pad(entropies * mask, wide),
        )


class Contenders:
    """The trainer of one shape on one device."""

    def __init__(self, shape: Shape, device: str) -> None:
        config = RunConfig.model_validate(
            {
                "policy": {"device": device, "dtype": shape.dtype, "lora": {"rank": RANK, "alpha": 2 * RANK}},
                "trainer": {"off_policy_correction": "none", "shared_prefix": "tree"},
            }
        )
        torch.manual_seed(0)
        self.shape = shape
        dtype = getattr(torch, shape.dtype)
        self._folder = tempfile.TemporaryDirectory()
        self.trainer = _Trainer(
            model=Qwen3ForCausalLM._from_config(shape.config(), attn_implementation="sdpa", dtype=dtype),
            tokenizer=load_tokenizer(resolve_base("tiny")),
            lora=lora_config(config.policy),
            config=config,
            args=grpo_config(config, self._folder.name, 1, cpu=device == "cpu"),
            source=_Nothing(),
            finished=lambda *_: False,
        )
        for name, parameter in self.trainer.adapter.named_parameters():
            if "lora_B" in name:  # a new adapter's B is zero, which would hide the gradient of A
                torch.nn.init.normal_(parameter, std=0.02)
        self.device = self.trainer.accelerator.device

    def recorded(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with log-probabilities near those of the policy."""
        draw, found = random.Random(0), []
        for part in packs(rows, AT_ONCE["packed"][0]):
            with torch.no_grad():
                logps, _ = self.trainer._score(self.trainer.model, self.trainer._collate(part, True))
            for i, row in enumerate(part):
                near = [0.0, *logps[i, : len(row.tokens) - 1].tolist()]
                kept = (value + draw.gauss(0, SIGMA) if m else 0.0 for value, m in zip(near, row.mask, strict=True))
                found.append(replace(row, logprobs=tuple(kept)))
        return found

    def window(self, name: str, rows: Sequence[Row], at_once: int) -> Window:
        """The micro-batches of a contender; see `AT_ONCE`."""
        if name == "tree":
            return self.trainer.windows_of(Batch(1, tuple(rows)))[0]
        if name == "padded":
            ordered = sorted(rows, key=lambda row: -len(row.tokens))
            parts = [ordered[i : i + at_once] for i in range(0, len(rows), at_once)]
            micro = [self._padded(part) for part in parts]
        else:
            micro = [self._packed(part) for part in packs(rows, at_once)]
        trained = sum(row.trained for row in rows)
        return Window(micro, trained, float(len(rows)), True, True, Batch(1, tuple(rows)))

    def _padded(self, rows: list[Row]) -> dict[str, Any]:
        return {**collate(rows, 0, self.device), "prompt": min(row.mask.index(True) for row in rows)}

    def _packed(self, rows: list[Row], share: bool = False) -> dict[str, Any]:
        tree = grow(rows, share).to(self.device)
        return {**collate(rows, 0, self.device), "tree": tree}

    def forced(self, rows: Sequence[Row]) -> Window:
        """All rows as one tree, whether that saves anything or not."""
        trained = sum(row.trained for row in rows)
        micro = [self._packed(list(rows), True)]
        return Window(micro, trained, float(len(rows)), True, True, Batch(1, tuple(rows)))

    def step(self, name: str, rows: Sequence[Row], at_once: int = 0) -> tuple[float, float, torch.Tensor]:
        """Seconds of one update (micro-batches made, forward, backward), those of the processor in it, and its
        gradient on the CPU. `at_once` 0: the first of `AT_ONCE`.
        """
        model = self.trainer.adapter
        model.train()
        model.zero_grad()
        began, worked = self._now(), time.process_time()
        window = self.forced(rows) if name == "forced" else self.window(name, rows, at_once or AT_ONCE[name][0])
        self.trainer.training_step(self.trainer.model, {"window": window})
        seconds, worked = self._now() - began, time.process_time() - worked
        grads = [p.grad.flatten() for p in self.trainer.adapter.parameters() if p.grad is not None]
        return seconds, worked, torch.cat(grads).cpu()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def processed(self, rows: Sequence[Row]) -> int:
        """Tokens that the tree's passes compute."""
        return sum(self.trainer._processed(micro) for micro in self.window("tree", rows, 0).micro)

    def saved(self, rows: Sequence[Row], share: bool) -> int:
        """Bytes that a forward pass over all rows keeps for backward, storages counted once, weights and inputs left out.
        Rows that share nothing are run some at a time and added up: nothing is kept for two of them together.
        """
        parts = [list(rows)] if share else packs(rows, AT_ONCE["packed"][0])
        return sum(self._saved(self._packed(part, share)) for part in parts)

    def _saved(self, micro: dict[str, Any]) -> int:
        known = {p.untyped_storage().data_ptr() for p in self.trainer.adapter.parameters()}
        known |= {t.untyped_storage().data_ptr() for t in micro.values() if isinstance(t, torch.Tensor)}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # a node's own result would be a reference cycle, never freed

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = self.trainer._score(self.trainer.model, micro)
        found = sum(kept.values())
        del result
        return found


def packs(rows: Sequence[Row], at_once: int) -> list[list[Row]]:
    """Rows in order, at most `at_once` tokens together (a row alone may have more)."""
    found: list[list[Row]] = []
    room = 0
    for row in rows:
        if len(row.tokens) > room:
            found.append([])
            room = at_once
        found[-1].append(row)
        room -= len(row.tokens)
    return found
