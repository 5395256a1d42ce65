"""A run under way: measure, then sample, train, publish, repeat, then measure again.

Always true: what a step has done is committed by a checkpoint or done again after a crash, with the same result; a
version that was sampled from is on the disk; every number that is reported stands in metrics.jsonl.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..configs.schema import RunConfig
from ..envs.core import Task
from ..rollouts.samplers.base import SamplerError
from . import alarms
from .batch import Batch, BatchSource, sampled_row
from .checkpoint import Checkpoint, CheckpointStore, Progress, trained
from .errors import UserError
from .evaluate import EvalResult
from .metrics import Recorder, Row
from .parallel import Shared, share, shared_end, world
from .policy import PolicyStore
from .rollout_side import RolloutSide

if TYPE_CHECKING:
    import torch

    from .grpo.trainer import OnlineGRPOTrainer

GAP_PROMPTS = 4
"""Prompts on which a version just published is compared with the trainer, where older versions sample the batches."""


class RunResult(TypedDict):
    """What a run came to. `before` and `after`: pass@1 by mode ("sampled", "greedy"), empty without an environment.

    `peak_gb`: see the function of that name.
    """

    run: str
    steps: int
    version: int
    best_version: int | None
    stopped: str | None
    before: dict[str, Any]
    after: dict[str, Any]
    seconds: float
    seconds_training: float
    peak_gb: float


class Run:
    """A run under way. `carry_out` is its story; the trainer calls `finished` after every batch."""

    side: RolloutSide | None = None
    trainer: OnlineGRPOTrainer
    held_out: Sequence[Task] = ()
    _said_sharing = False
    _told_of_chains = False

    def __init__(self, config: RunConfig, folder: Path, base: Path, progress: Progress, recorder: Recorder) -> None:
        self.config, self.folder, self.base = config, folder, base
        self.progress, self.recorder = progress, recorder
        self.policies = PolicyStore(folder / "policies", base)
        self.checkpoints = CheckpointStore(folder / "checkpoints")
        self._committed: list[int] = [progress.version]
        self._said_turning = self._seconds_committing = 0.0

    def build(self, source: BatchSource, checkpoint: Checkpoint | None) -> None:
        """Load the model and put it where the checkpoint left it."""
        from .grpo.trainer import build

        self.trainer = build(
            self.config,
            self.base,
            output=self.folder,
            source=Shared(source) if world() > 1 else source,
            finished=shared_end(self._adapter, self.finished) if world() > 1 else self.finished,
            start=self.progress.step,
        )
        share(checkpoint)
        if checkpoint is not None:
            checkpoint.restore(self.trainer.adapter, self.trainer.optimizer, self.trainer.lr_scheduler)
        elif self.config.policy.from_adapter is not None:
            self.progress.version = self._store_policy()
        self._serve(self.progress.version)

    def carry_out(self, startup: float) -> RunResult:
        """Measure, train, measure."""
        began = time.monotonic()
        before: dict[str, Any] = {}
        if self.progress.step == 0 and not self.checkpoints.list():
            before = self._measure("evaluating the base", self.config.eval.tasks)
            self._commit()
        if share(self.progress.step < self.config.trainer.steps and self.progress.stopped is None):
            self.recorder.emit("phase", phase="training")
            self.trainer.train()
            self._commit()
        if self.side is not None:
            self.side.abandon()
        chosen = self.progress.version
        if self.progress.stopped == "early_stop" and self.progress.best_version is not None:
            chosen = self.progress.best_version
            self._serve(chosen)
        after = self._measure("evaluating the result", self.config.eval.tasks, chosen)
        self.recorder.emit("phase", phase="done")
        return RunResult(
            run=str(self.folder),
            steps=self.progress.step,
            version=chosen,
            best_version=self.progress.best_version,
            stopped=self.progress.stopped,
            before=before or self._first_measure(),
            after=after,
            seconds=startup + time.monotonic() - began,
            seconds_training=self.progress.seconds,
            peak_gb=0.0,  # known once the environments' processes have ended
        )

    # ---- after every batch

    def finished(self, batch: Batch, numbers: Mapping[str, float]) -> bool:
        """Store and serve the new version, write the row, evaluate and commit when it is time. Returns whether to
        stop.
        """
        progress = self.progress
        progress.step = batch.step
        progress.consumed.extend(batch.consumed)
        publishing = 0.0
        if numbers:  # empty: there was nothing to train on, so the policy is what it was
            publishing = self._publish()
            numbers = self._with_served_gap(batch, numbers)
        row = self._train_row(batch, numbers, publishing)
        self._say_what_is_shared()
        self._say_when_nothing_branches(row)
        progress.seconds += row["seconds_rollout"] + row["seconds_train"]
        self._watch(row)
        self._evaluate_within()
        self.policies.retain(
            self.config.schedule.keep_recent,
            best=[v for v in [progress.best_version] if v],
            leased=[*range(progress.version - self._behind(), progress.version + 1), *self._committed],
        )
        if progress.step % self.config.schedule.checkpoint_every == 0:
            self._commit()
        return progress.stopped is not None or progress.step >= self.config.trainer.steps

    def _with_served_gap(self, batch: Batch, numbers: Mapping[str, float]) -> Mapping[str, float]:
        """Asynchronously, where older policies sampled the batch: its gap between sampler and trainer replaced by that
        on a few tokens sampled by the version just published; by none where the sampler gives none now.
        """
        if self.side is None or not self._behind():
            return numbers
        others = {name: value for name, value in numbers.items() if not name.startswith("logprob_gap")}
        prompts = [row.tokens[: row.mask.index(True)] for row in batch.rows if row.trained][:GAP_PROMPTS]
        try:
            samples = self.side.probe(prompts, self.progress.version)
        except (SamplerError, TimeoutError):
            return others
        return {**others, **self.trainer.gap([sampled_row(*pair) for pair in zip(prompts, samples, strict=True)])}

    def _behind(self) -> int:
        """How many versions before the latest may still be sampled from."""
        schedule = self.config.schedule
        return schedule.max_staleness if schedule.kind == "async" else 0

    def _publish(self) -> float:
        """Store and serve the policy as it is now; the seconds that took, the sampler's waking apart."""
        began, turned = time.perf_counter(), self._turning()
        self.progress.version = self._store_policy()
        self._serve(self.progress.version)
        return time.perf_counter() - began - (self._turning() - turned)

    def _turning(self) -> float:
        return 0.0 if self.side is None else self.side.seconds_turning

    def _train_row(self, batch: Batch, numbers: Mapping[str, float], publishing: float) -> Row:
        """Turning and committing are those since the row before, so that rows together have all of them."""
        turning, committing = self._turning() - self._said_turning, self._seconds_committing
        self._said_turning, self._seconds_committing = self._turning(), 0.0
        stats = dict(batch.stats)
        rollout = float(stats.get("seconds_rollout", 0.0))
        row = {
            "step": batch.step,
            "version": self.progress.version,
            **stats,
            "rows": len(batch.rows),
            "tok_s": stats.get("sampled_tokens", 0) / rollout if rollout else 0.0,
            "seconds_train": 0.0,
            "trained_tokens": 0,
            **numbers,
            "seconds_turning": turning,
            "seconds_publish": publishing,
            "seconds_checkpoint": committing,
            "shared_prefix": self.trainer.sharing.state,
        }
        return self.recorder.emit("train", **row)

    def _say_what_is_shared(self) -> None:
        """Once: how near the token tree is to the flat path; an alarm where it is not, and where it was asked for and
        cannot be.
        """
        sharing = self.trainer.sharing
        if self._said_sharing or not (sharing.compared or sharing.refused):
            return
        self._said_sharing = True
        if sharing.reason is None:
            failed = "".join(f"; not by {what}" for what in sharing.failed)
            said = f"training (the token tree's gradient is the flat path's to {sharing.error:.1e}{failed})"
            self.recorder.emit("phase", phase=said, tree_error=sharing.error)
            return
        said = f"the token tree is not used, training goes on flat: {sharing.reason}"
        values = {"alarm": "token_tree", "value": sharing.error, "bound": sharing.limit, "message": said}
        self.recorder.emit("alarm", step=self.progress.step, **values, stops=False)

    def _say_when_nothing_branches(self, row: Row) -> None:
        """Once: that groups which should grow as trees do not."""
        grown = row.get("branching")
        if not grown or grown["branches"] or not grown["trees"] or self._told_of_chains:
            return
        self._told_of_chains = True
        said = (
            "no episode was left at a turn, so groups are chains: the environment keeps no states to branch from "
            "(capability rollback), episodes end in their first turn, or no branch fits into branching.max_tokens and "
            "branching.max_turns"
        )
        values = {"alarm": "branching", "value": 0, "bound": 1, "message": said}
        self.recorder.emit("alarm", step=self.progress.step, **values, stops=False)

    def _watch(self, row: Row) -> None:
        progress = self.progress
        if progress.first_length is None:
            progress.first_length = row.get("sampled_tokens_mean")
        for alarm in alarms.check(row, self.config.alarms, progress.first_length, replayed=self.side is None):
            self.recorder.emit("alarm", step=progress.step, **asdict(alarm))
            if alarm.stops:
                progress.stopped = "alarm"

    def _evaluate_within(self) -> None:
        """The evaluation of every k-th step; keeps the best version and stops when none gets better."""
        section, progress = self.config.eval, self.progress
        if not section.every or progress.step % section.every or progress.step >= self.config.trainer.steps:
            return
        if self.side is None:
            return
        result = self._evaluate(section.every_tasks, greedy=False)
        if result.pass1 > progress.best_pass1:
            progress.best_pass1, progress.best_version, progress.stale_evaluations = result.pass1, progress.version, 0
        else:
            progress.stale_evaluations += 1
        if section.early_stop is not None and progress.stale_evaluations >= section.early_stop:
            progress.stopped = progress.stopped or "early_stop"

    # ---- parts

    def _adapter(self) -> Iterator[torch.Tensor]:
        return (tensor for _, tensor in trained(self.trainer.adapter))

    def _store_policy(self) -> int:
        from .model import write_adapter

        parent = self.progress.version
        adapter = self.trainer.adapter
        return self.policies.publish(
            lambda folder: write_adapter(adapter, folder), parent=parent, number=parent + 1
        ).number

    def _serve(self, number: int) -> None:
        if self.side is not None:
            self.side.publish(self.policies.open(number))

    def _evaluate(self, count: int, greedy: bool, version: int | None = None) -> EvalResult:
        if self.side is None:
            raise RuntimeError("there is no environment to evaluate in")
        number = self.progress.version if version is None else version
        result = self.side.evaluate(self.held_out[:count], number, self.progress.step, greedy)
        event = {**result.event(), **self.side.graph_figures()}
        self.recorder.emit(event.pop("kind"), **event)
        if not result.n:
            said = ", ".join(f"{count} {kind}" for kind, count in result.failures.items())
            raise UserError(
                f"none of {result.asked} held-out tasks got a verdict ({said}), so there is nothing to compare; "
                "espalier doctor checks the installation"
            )
        return result

    def _measure(self, phase: str, count: int, version: int | None = None) -> dict[str, Any]:
        """Sampled and, if asked for, greedy pass@1."""
        if self.side is None:
            return {}
        self.recorder.emit("phase", phase=phase)
        modes = [False, True] if self.config.eval.greedy else [False]
        results = [self._evaluate(count, greedy, version) for greedy in modes]
        return {r.mode: {"pass1": r.pass1, "low": r.low, "high": r.high, "n": r.n} for r in results}

    def _first_measure(self) -> dict[str, Any]:
        """What an earlier process of this run measured before it trained."""
        found: dict[str, Any] = {}
        for line in self.recorder.path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["kind"] == "eval" and row["step"] == 0:
                found.setdefault(row["mode"], {name: row[name] for name in ("pass1", "low", "high", "n")})
        return found

    def _commit(self) -> None:
        began = time.perf_counter()
        self.progress.metrics_bytes = self.recorder.position
        config = self.config.model_dump(mode="json")
        trainer = self.trainer
        self.checkpoints.save(self.progress, trainer.adapter, trainer.optimizer, trainer.lr_scheduler, config)
        self._committed = [*self._committed[-1:], self.progress.version]
        self._seconds_committing += time.perf_counter() - began
