"""Training from a configuration to a result, and collecting alone: what a run needs is opened, and closed again.

Always true: the folder of a run is written by one process at a time; what a user can mend is one sentence.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..configs.load import load as load_config
from ..configs.schema import RunConfig
from ..envs.core import Task
from ..rollouts.render import RenderError
from ..rollouts.runner import GroupSpec
from ..rollouts.samplers.base import SamplerError
from ..rollouts.store import StoreError, TrajectoryStore
from . import tasks as tasklists
from .batch import BatchSource
from .checkpoint import Checkpoint, CheckpointStore, Progress, trained
from .durable import unwritable
from .errors import UserError
from .metrics import Recorder, Row
from .parallel import Shared, follows, share, shared_end, world
from .policy import PolicyStore, resolve_base
from .resume import refuse_changes
from .rollout_side import RolloutSide, open_rollouts
from .rounds import ReplaySource, batch_source, describe, grown
from .run import Run, RunResult
from .runs import claim, clear, read_run

Listener = Callable[[Row], None]
SourceMaker = Callable[[RunConfig, RolloutSide, Sequence[Task], Progress], BatchSource]
"""Makes the source of a run's batches out of the configuration, the rollout side, the training tasks, the progress."""


def train(
    config: RunConfig | Path | str,
    *,
    resume: bool = False,
    from_trajectories: Path | None = None,
    on_event: Listener | None = None,
    make_source: SourceMaker = batch_source,
) -> RunResult:
    """Train as `config` (a path, a shipped name, or a parsed configuration) says, in `config.out / config.name`.

    Started several times by `accelerate launch` or `torchrun`, the processes train together and all return the result.
    `resume` continues a killed run with the configuration that it began with; what does not change what is trained may
    differ (`resume.FREE`: more steps, evaluation, tracking, sampler, ...). `from_trajectories` trains on what an
    earlier run stored and samples nothing. `on_event` gets every row of metrics.jsonl as it is written. `make_source`
    makes what decides which groups are sampled and trained on. Raises UserError for what a user can mend.
    """
    if not isinstance(config, RunConfig):
        config = load_config(str(config))
    if follows():
        return follow(config)
    with claim(config.out / config.name, resume=resume):
        return train_claimed(
            config, resume=resume, from_trajectories=from_trajectories, on_event=on_event, make_source=make_source
        )


def train_claimed(
    config: RunConfig,
    *,
    resume: bool = False,
    from_trajectories: Path | None = None,
    on_event: Listener | None = None,
    make_source: SourceMaker = batch_source,
) -> RunResult:
    """`train`, for callers that hold the run's folder already."""
    folder = config.out / config.name
    base = resolve_base(config.policy.base)
    began = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(_said_in_one_sentence())
        stack.enter_context(_torch(config.trainer.threads))
        if not resume:
            clear(folder)
        checkpoint = CheckpointStore(folder / "checkpoints").newest() if resume else None
        if checkpoint is not None:
            refuse_changes(folder, checkpoint.state["config"], config)
        elif resume:
            refuse_changes(folder, read_run(folder).config.model_dump(mode="json"), _settled(config))
        progress = checkpoint.progress if checkpoint else Progress()
        recorder = Recorder(folder, config, on_event, progress.metrics_bytes)
        stack.callback(recorder.close)
        write_config(folder, config)
        recorder.emit("phase", phase="loading", processes=world())
        run = Run(config, folder, base, progress, recorder)
        source = stack.enter_context(_source(run, from_trajectories, make_source))
        run.build(source, checkpoint)
        result = run.carry_out(time.monotonic() - began)
    result["peak_gb"] = peak_gb(config.env.processes)
    return share(result)


def follow(config: RunConfig) -> RunResult:
    """Train in a process that is not the run's first, on what the first one gives it, until that ends the run."""
    from .grpo.trainer import build

    base = resolve_base(config.policy.base)
    with _torch(config.trainer.threads):
        trainer = build(
            config,
            base,
            output=config.out / config.name,
            source=Shared(),
            finished=shared_end(lambda: (tensor for _, tensor in trained(trainer.adapter))),
        )
        checkpoint: Checkpoint | None = share(None)
        if checkpoint is not None:
            checkpoint.restore(trainer.adapter, trainer.optimizer, trainer.lr_scheduler)
        if share(False):
            trainer.train()
        result: RunResult | None = share(None)
    if result is None:
        raise RuntimeError("the run's first process gave no result")
    return result


def peak_gb(processes: int) -> float:
    """Gigabytes that this process and `processes` others which it started, and which have ended, held at most.

    An upper bound: as if all had been largest at once, and each as large as the largest.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    own, largest = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (own + processes * largest) * unit / 1e9


def collect(config: RunConfig, *, episodes: int | None = None, on_event: Listener | None = None) -> dict[str, Any]:
    """Sample groups of training tasks with the run's latest version (the base, if it has none) and store them.

    For callers that hold the run's folder. `episodes` is rounded up to whole groups; default: one step's. Returns the
    numbers of a "train" row that are about episodes, and the version.
    """
    folder = config.out / config.name
    base = resolve_base(config.policy.base)
    with _said_in_one_sentence(), _torch(config.trainer.threads), _open_side(config, base, folder) as (side, data):
        write_config(folder, config)
        version = PolicyStore(folder / "policies", base).latest()
        side.publish(version)
        size, begun = config.trainer.group_size, len(side.store.group_ids())
        count = config.trainer.groups if episodes is None else -(-episodes // size)
        drawn = tasklists.draw(data.tasks, count, seed=config.seed, step=begun)
        if on_event is not None:
            on_event({"kind": "tasks", **tasklists.account(train=data), "time": time.time()})
            on_event({"kind": "phase", "phase": "sampling", "time": time.time()})
        started = time.perf_counter()
        specs = [GroupSpec(f"{config.name}/collect-{begun}/{i}", task, size) for i, task in enumerate(drawn)]
        groups = side.groups(specs, version.number)
        trees = {"branching": grown(groups)} if config.branching.roots else {}
        numbers = {**describe(groups), **trees, **side.graph_figures()}
        seconds = time.perf_counter() - started
        return {"version": version.number, **numbers, "seconds": seconds, "tok_s": numbers["sampled_tokens"] / seconds}


def _settled(config: RunConfig) -> RunConfig:
    """`config` with what this machine chose for the environment."""
    kwargs = {**config.env.kwargs, **tasklists.chosen_here(config.env)}
    return config.model_copy(update={"env": config.env.model_copy(update={"kwargs": kwargs})})


def write_config(folder: Path, config: RunConfig) -> None:
    """The resolved configuration, where `inspect`, `export` and `report` look for it."""
    config = _settled(config)
    try:
        (folder / "config.json").write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise unwritable(folder / "config.json", error) from error


@contextmanager
def _said_in_one_sentence() -> Iterator[None]:
    """What other rooms raise for something a user can mend, as a UserError: their messages say how."""
    try:
        yield
    except (StoreError, SamplerError, RenderError) as error:
        raise UserError(str(error)) from error


@contextmanager
def _open_side(
    config: RunConfig, base: Path, folder: Path, training: int = 0
) -> Iterator[tuple[RolloutSide, tasklists.Data]]:
    """The rollout side of a run, beside which `training` processes train, and its training tasks."""
    data = tasklists.read(config.env, "train", config.seed, config.env.task_count)
    with open_rollouts(config, base, data.tasks, folder, training) as side:
        yield side, data


@contextmanager
def _source(run: Run, trajectories: Path | None, make: SourceMaker) -> Iterator[BatchSource]:
    """Where the run's batches come from; opens the rollout side of the run unless it only replays."""
    config = run.config
    if trajectories is None:
        most = max(config.eval.tasks, config.eval.every_tasks)
        held_out = tasklists.read(config.env, "test", config.seed, most)
        run.held_out = held_out.tasks
        with _open_side(config, run.base, run.folder, world()) as (side, data):
            run.side = side
            if not run.progress.metrics_bytes:
                run.recorder.emit("tasks", **tasklists.account(train=data, held_out=held_out))
            yield make(config, side, data.tasks, run.progress)
        return
    inner = trajectories / "trajectories"
    store = TrajectoryStore(inner if inner.is_dir() else trajectories, readonly=True)
    try:
        yield ReplaySource(config, store, run.progress)
    finally:
        store.close()


@contextmanager
def _torch(threads: int) -> Iterator[None]:
    """Torch's threads for the trainer, and transformers' chatter off; both set back afterwards. A card that is full is
    a UserError.
    """
    import torch
    from transformers.utils import logging

    before, verbosity, bars = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the card's memory is full ({str(error).split('. GPU', 1)[0].rstrip('.')}); lower trainer.micro_batch, "
            'set policy.gradient_checkpointing = true or policy.quantization = "4bit" (--dry-run shows what fits), '
            "and continue with --resume"
        ) from error
    finally:
        torch.set_num_threads(before)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
