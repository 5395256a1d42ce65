"""`OnlineGRPOTrainer`: TRL's GRPOTrainer, fed with finished batches of agent trajectories.

TRL gives every loss, its clipping, KL, entropy and metrics; Hugging Face's Trainer owns the loop, optimizer and
scheduler. Replaced is only what ties TRL to sampling by itself: where batches come from, how rows become micro-batches,
and the forward pass. Always true here:

* the loss of an optimizer update is that of all its rows, however they are cut into micro-batches, and rows without a
  sampled token (filler) change nothing;
* a trajectory counts once, forked or not: a loss that averages over sequences takes the mean over all its trained
  tokens (of the KL term a fork's rows count one each, as TRL adds it); a turn that branches have in common is trained
  in one row, with an advantage that stands for all of them (TRL takes advantages of (rows, width) by token);
* behaviour log-probabilities are the recorded ones; no forward pass is spent to guess them;
* only sampled positions are projected to the vocabulary.

This folder alone knows TRL. `tests/trainer/test_trl_contract.py` pins the methods that are overridden or
relied upon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.optimization import get_scheduler
from transformers.trainer_callback import PrinterCallback
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from ...configs.schema import RunConfig
from ..batch import TOKEN_MEAN, Batch, BatchSource, Row, collate, dealt, micro_batches, minibatches
from ..correction import Mode, importance_ratio
from ..memory import hand_back, keep_freed_memory
from ..model import load_base, load_tokenizer, logit_rules, lora_config, read_adapter, resolve_device
from ..parallel import add_up, gathered
from ..tally import Tally
from ..tree.core import TokenTree
from ..tree.packing import unique_tokens
from ..tree.sharing import Gradient, Sharing
from .config import ROW_MEAN, grpo_config
from .forward import hidden_flat, hidden_tree, shared_tokens

VOCAB_TILE = 32768
"""Vocabulary entries projected at once."""

Tensors = dict[str, Any]


@dataclass
class Window:
    """The micro-batches of one optimizer update that this process runs. `tokens` and `rows` count what is under the
    loss in those of all processes, a row of a forked trajectory as its share.
    """

    micro: list[Tensors]
    tokens: int
    rows: float
    first: bool
    last: bool
    batch: Batch


class _Windows(IterableDataset):  # type: ignore[type-arg]
    """What Hugging Face's loop iterates over: the updates of the batches of a source, each in the dictionary that it
    expects.
    """

    def __init__(self, make: Callable[[], Iterator[Window]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[dict[str, Window]]:
        return ({"window": window} for window in self._make())


class _AfterUpdate(TrainerCallback):
    """Tells the trainer that an update is done, with what was logged about it."""

    def __init__(self, done: Callable[[Mapping[str, float]], bool]) -> None:
        self._done = done

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs and self._done(logs):
            control.should_training_stop = True


def _same(value: Any) -> Any:
    return value


def _tokens(micro: Tensors) -> torch.Tensor:
    """The rows of a micro-batch: (rows, width)."""
    return torch.cat([micro["prompt_ids"], micro["completion_ids"]], dim=1)


def _rewards_come_with_the_batch(*_: Any, **__: Any) -> list[float | None]:
    """TRL wants a reward function; ours is the environment, long before."""
    raise RuntimeError("rewards come with the batch")


class OnlineGRPOTrainer(GRPOTrainer):
    """GRPO on batches from a `BatchSource`.

    `finished(batch, numbers)` is called after the last update of each batch and says whether to stop. `numbers`: loss,
    grad_norm, learning_rate, entropy (nats a token), kl (k3 estimate of KL(behaviour || policy) a token, arXiv-free:
    joschu.net/blog/kl-approx.html), logprob_gap (|policy - recorded| before the first update, nats: largest, _mean,
    _p99), trained_tokens, seconds_train, tokens_total (of all rows), tokens_unique (of their trees), tokens_processed
    (by a pass over them, padding included), and TRL's own clip ratios.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        lora: LoraConfig,
        config: RunConfig,
        args: GRPOConfig,
        source: BatchSource,
        finished: Callable[[Batch, Mapping[str, float]], bool],
        start: int = 0,
    ) -> None:
        super().__init__(
            model=model,
            reward_funcs=[_rewards_come_with_the_batch],
            args=args,
            train_dataset=Dataset.from_list([{"prompt": ""}] * 2),
            processing_class=tokenizer,
            peft_config=lora,
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(_AfterUpdate(self._after_update))
        self._section = config.trainer
        self._seed = config.seed
        self._source = source
        self._finished = finished
        self._batch_step = start
        self._corrects = config.trainer.off_policy_correction != "none"
        # recomputing activations and continuing from a cache exclude each other in transformers
        self._shares = not config.policy.gradient_checkpointing
        # TRL multiplies the loss by `importance_sampling_ratio` exactly where this is set; after construction it means
        # nothing else to the methods that are left (generation is never reached), and no vLLM is started.
        self.use_vllm = self._corrects
        self.current_gradient_accumulation_steps = (
            1  # as the loop will say: what it takes for one batch is a whole update
        )
        self._window: Window | None = None
        self._keeps_memory = self.accelerator.device.type == "cpu" and keep_freed_memory()
        self._micro: Tensors | None = None
        self._tally = Tally()
        self.sharing = Sharing(self.adapter, config, self.aux_loss_enabled)

    @property
    def adapter(self) -> PeftModel:
        """The model with its adapter, unwrapped."""
        return cast(PeftModel, self.accelerator.unwrap_model(self.model))

    # ---- where batches come from

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The updates of the source's batches, one at a time, as the optimizer asks for them."""
        # a generator of its own: the loader draws from it, and torch's own random state is part of the checkpoint
        own = torch.Generator()
        return DataLoader(_Windows(self._windows), batch_size=None, collate_fn=_same, num_workers=0, generator=own)

    def _windows(self) -> Iterator[Window]:
        while (batch := self._source.next(self._batch_step + 1)) is not None:
            self._batch_step = batch.step
            self._tally = Tally()
            windows = self.windows_of(batch)
            if not windows and self._finished(batch, {}):
                break
            yield from windows
        self.control.should_training_stop = True

    def windows_of(self, batch: Batch) -> list[Window]:
        """Cut a batch into optimizer updates and these into micro-batches. Rows without a sampled token are left
        out.
        """
        rows = [row for row in batch.rows if row.trained]
        if self.loss_type in TOKEN_MEAN:  # these are linear in the advantage, so it can carry the share
            rows = [row.by_share() for row in rows]
        parts = minibatches(rows, self._section.minibatches, seed=self._seed * 1_000_003 + batch.step)
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        windows = [
            Window(
                self.micro(part, rank, count, self._check_gradient),
                sum(row.trained for row in part),
                math.fsum(row.share for row in part),
                first=i == 0,
                last=i == len(parts) - 1,
                batch=batch,
            )
            for i, part in enumerate(parts)
        ]
        self._count(parts, windows)
        if len(windows) > 1 and self._corrects:
            self._fill_old(windows)
        return windows

    def micro(self, rows: list[Row], rank: int = 0, count: int = 1, gradient: Gradient | None = None) -> list[Tensors]:
        """The micro-batches of `rows` that process `rank` of `count` runs, as trees or flat; `gradient` as
        `Sharing.trees` takes it.
        """
        trees = self.sharing.trees(rows, count, gradient)
        parts = self._flat(rows) if trees is None else trees
        return [self._collate(part, trees is not None) for part in dealt(parts, rank, count)]

    def _flat(self, rows: Sequence[Row]) -> list[list[Row]]:
        return micro_batches(rows, self._section.micro_batch, by_group=self._shares)

    def _collate(self, rows: list[Row], tree: bool) -> Tensors:
        device = self.accelerator.device
        micro: Tensors = {**collate(rows, self._tokenizer.pad_token_id, device)}
        if tree:
            micro["tree"] = self.sharing.tree(rows, device)
        return micro

    def _count(self, updates: Sequence[Sequence[Row]], windows: Sequence[Window]) -> None:
        """Tokens of all rows, of their trees, and those that a pass over this process's micro-batches computes."""
        if self.accelerator.process_index == 0:
            total = sum(len(row.tokens) - 1 for rows in updates for row in rows)
            self._tally.count(tokens_total=total, tokens_unique=sum(map(unique_tokens, updates)))
        self._tally.count(tokens_processed=sum(self._processed(micro) for w in windows for micro in w.micro))

    def _processed(self, micro: Tensors) -> int:
        """Tokens that a pass over a micro-batch computes, padding included."""
        if "tree" in micro:
            tree: TokenTree = micro["tree"]
            return tree.unique
        rows, width = micro["completion_ids"].shape
        shared = self._shared(_tokens(micro), micro["tool_mask"])
        return int(shared + rows * (width - shared))

    def _check_gradient(self, rows: Sequence[Row], tree: bool) -> torch.Tensor:
        """What the tree and the flat path are compared by: the adapter's gradient of log-probabilities and entropies,
        weighted by the rows' `logprobs` and their squares, computed as training computes it.
        """
        parameters = [p for p in self.adapter.parameters() if p.requires_grad]
        total = torch.zeros((), device=self.accelerator.device)
        with self._mode(training=True):
            for part in [list(rows)] if tree else self._flat(rows):
                micro = self._collate(part, tree)
                weights = micro["sampling_per_token_logps"]
                logps, entropies = self._score(self.model, micro)
                value = (logps * weights).sum() + (entropies * weights.square()).sum()
                found = torch.autograd.grad(value, parameters, allow_unused=True)
                total = total + torch.cat([g.flatten() for g in found if g is not None])
        return total

    @contextmanager
    def _mode(self, training: bool) -> Iterator[None]:
        """The model in training or evaluation mode; afterwards as it was."""
        model, before = self.adapter, self.adapter.training
        model.train(training)
        try:
            yield
        finally:
            model.train(before)

    def _fill_old(self, windows: list[Window]) -> None:
        """The policy as it stands before the first of several updates: the proximal policy of decoupled PPO (arXiv
        2110.00641).
        """
        with torch.no_grad():
            for window in windows:
                for micro in window.micro:
                    micro["old_per_token_logps"] = self._score(self.model, micro)[0]

    def _prepare_inputs(self, generation_batch: Tensors) -> Tensors:
        """Micro-batches arrive ready."""
        return generation_batch

    def _generate_and_score_completions(self, inputs: Any) -> Tensors:
        raise RuntimeError("OnlineGRPOTrainer is fed by its source and never generates")

    def begin(self, updates: int) -> None:
        """Make optimizer and schedule for `updates` updates in all, so that a checkpoint can be restored before
        training.
        """
        optimizer = self.create_optimizer()
        self.lr_scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=int(self.args.warmup_steps),
            num_training_steps=updates,
        )

    # ---- one update

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over all micro-batches of one update (`inputs["window"]`); returns the loss of the
        update.
        """
        window: Window = inputs["window"]
        self._window = window
        total = torch.zeros((), device=self.accelerator.device)
        for micro in window.micro:
            total = total + super().training_step(model, micro, None)  # type: ignore[no-untyped-call]
            if self._keeps_memory:
                hand_back()
        if self.accelerator.num_processes > 1:
            add_up([p.grad for p in self.adapter.parameters() if p.grad is not None])
        return total

    def _compute_loss(self, model: Any, inputs: Tensors) -> torch.Tensor:
        """TRL's loss of one micro-batch, weighted so that the micro-batches of an update add up to the loss of the
        whole update.
        """
        window = self._window
        if window is None:
            raise RuntimeError("a loss is computed within a training step only")
        mask = inputs["tool_mask"]
        tokens, rows = int(mask.sum()), mask.size(0)
        weight = self._weight(tokens, rows, window)
        self._micro = inputs
        # TRL divides this by the number of processes, whose gradients it expects to be averaged; ours are added up
        items = float(window.tokens * self.accelerator.num_processes)
        inputs["num_items_in_batch"] = torch.tensor(items, device=mask.device)
        if not self._corrects:
            inputs["old_per_token_logps"] = inputs["sampling_per_token_logps"]
        if self.beta != 0.0:
            inputs["ref_per_token_logps"] = self._reference(model, inputs)
        bonus = self.entropy_coef
        try:
            # TRL's entropy is a mean over the tokens of the micro-batch: give it the share of these tokens instead of
            # `weight`
            self.entropy_coef = bonus * (tokens / max(window.tokens, 1)) / weight if weight else 0.0
            loss: torch.Tensor = super()._compute_loss(model, inputs) * weight  # type: ignore[no-untyped-call]
        finally:
            self.entropy_coef = bonus
            self._micro = None
        return loss

    def _weight(self, tokens: int, rows: int, window: Window) -> float:
        """What a micro-batch counts: TRL divides by its own rows or tokens, meant is to divide by those of the update
        (a forked trajectory's rows being one together).
        """
        if not tokens:
            return 0.0
        if self.loss_type in ROW_MEAN:
            return rows / window.rows
        if self.loss_type == "bnpo":
            return tokens / window.tokens
        return 1.0  # dapo, cispo, vespo divide by `num_items_in_batch`

    def _reference(self, model: Any, micro: Tensors) -> torch.Tensor:
        """Log-probabilities of the frozen base: the adapter switched off."""
        with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            return self._score(model, micro)[0]

    # ---- the forward pass

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """TRL's forward, over the micro-batch at hand; also fills in what the loss reads next: the importance
        weights.
        """
        micro = self._micro
        if micro is None:
            raise RuntimeError("the forward pass belongs to a micro-batch")
        aux = None
        if compute_aux_loss:  # mixture of experts: the router's loss needs TRL's whole forward
            logps, entropies, aux = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, None, True, True
            )
        else:
            logps, entropies = self._score(model, micro)
        mask, recorded = micro["tool_mask"], micro["sampling_per_token_logps"]
        fresh = self._window is not None and self._window.first
        self._tally.add(logps, entropies, recorded, mask, fresh)
        if self._corrects:
            old = micro.get("old_per_token_logps", logps.detach())
            micro["importance_sampling_ratio"] = importance_ratio(
                old,
                recorded,
                mask,
                cast(Mode, self.vllm_importance_sampling_mode),
                self.vllm_importance_sampling_clip_max,
                self.vllm_importance_sampling_clip_min,
            )
        return logps, entropies, aux

    def _score(self, model: Any, micro: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies (nats) of the sampled tokens: both (rows, width - 1), zero elsewhere."""
        tokens, mask = _tokens(micro), micro["tool_mask"].bool()
        causal = self.accelerator.unwrap_model(model).get_base_model()
        with self.accelerator.autocast():
            if "tree" in micro:
                tree: TokenTree = micro["tree"]
                predicting, targets = hidden_tree(causal.base_model, tree, self.sharing.layout(tree)), tree.targets
            else:
                hidden, first = hidden_flat(causal.base_model, tokens, self._shared(tokens, mask))
                predicting, targets = hidden[mask[:, first:]], tokens[:, 1:][mask]
            logps, entropies = self._project(causal, predicting, targets)
        if "tree" in micro:
            logps, entropies = logps[tree.expand], entropies[tree.expand]
        blank = logps.new_zeros(mask.shape)
        return blank.masked_scatter(mask, logps), blank.masked_scatter(mask, entropies)

    def _project(self, causal: Any, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of `targets` (n,) and entropies where `hidden` (n, size) predicts them."""
        cap, scale = logit_rules(causal.config)
        head = causal.get_output_embeddings()
        logps, entropies, *_ = ChunkedLogProbFunction.apply(
            hidden,
            head.weight,
            head.bias,
            targets,
            self.temperature,
            min(head.weight.size(0), VOCAB_TILE),
            cap,
            scale,
            ("entropy",),
        )
        return logps, entropies

    def _shared(self, tokens: torch.Tensor, mask: torch.Tensor) -> int:
        return shared_tokens(tokens, mask) if self._shares else 0

    def gap(self, rows: list[Row]) -> dict[str, float]:
        """|policy - recorded| at the sampled tokens of `rows`, in nats: the members of `finished`'s numbers that begin
        with logprob_gap. Trains nothing.
        """
        tally = Tally()
        with self._mode(training=False), torch.no_grad():
            for micro in self.micro(rows):
                logps, entropies = self._score(self.model, micro)
                tally.add(logps, entropies, micro["sampling_per_token_logps"], micro["tool_mask"])
        return tally.gap()

    # ---- after an update

    def _after_update(self, logs: Mapping[str, float]) -> bool:
        window = self._window
        if window is None:
            return False
        # the loop logs the mean over processes of what is each process's share of one sum
        self._tally.logs.append({**logs, "loss": logs["loss"] * self.accelerator.num_processes})
        if not window.last:
            return False
        if self.accelerator.num_processes > 1:
            self._tally.add_all(gathered(self._tally.on_cpu()))
        return self._finished(window.batch, self._tally.read())

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the count of Hugging Face's Trainer knows nothing of masks and prefixes."""
        return 0


def build(
    config: RunConfig,
    base: Path,
    *,
    output: Path,
    source: BatchSource,
    finished: Callable[[Batch, Mapping[str, float]], bool],
    start: int = 0,
) -> OnlineGRPOTrainer:
    """The trainer of a run whose `start` first steps are done. Raises UserError for what the configuration or machine
    cannot do.
    """
    section = config.trainer
    cpu = resolve_device(config.policy.device) == "cpu"
    trainer = OnlineGRPOTrainer(
        model=load_base(base, config.policy),
        tokenizer=load_tokenizer(base),
        lora=lora_config(config.policy),
        config=config,
        args=grpo_config(config, str(output), (section.steps - start) * section.minibatches, cpu),
        source=source,
        finished=finished,
        start=start,
    )
    if config.policy.from_adapter is not None:
        read_adapter(trainer.adapter, Path(config.policy.from_adapter).expanduser())
    trainer.begin(section.steps * section.minibatches)
    return trainer
