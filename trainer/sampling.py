"""The sampler and the runner that a configuration describes: made here, for whoever needs episodes.

Always true: two runners made from one configuration draw the same tokens for the same episode (the random key is that
of run name, seed, episode and turn).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

from ..configs.schema import RunConfig
from ..envs.core import Task
from ..rollouts.envpool import EnvPool
from ..rollouts.envprocess import ProcessEnvPool
from ..rollouts.graph.core import OperationGraph
from ..rollouts.graph.identity import identity
from ..rollouts.graph.pool import GraphPool
from ..rollouts.graph.statepool import StatePool, ThreadStatePool
from ..rollouts.graph.store import GraphStore, GraphStoreError
from ..rollouts.recipe import EnvRecipe, env_recipe
from ..rollouts.render import make_renderer
from ..rollouts.runner import RolloutRunner
from ..rollouts.samplers.base import Sampler
from ..rollouts.samplers.replicas import ReplicatedSampler
from ..rollouts.samplers.vllm_limits import (
    INSTALL_VLLM,
    card_environment,
    check_base,
    cpu_environment,
    server_options,
)
from ..rollouts.samplers.vllm_process import VllmProcess
from ..rollouts.samplers.vllm_server import VllmServerSampler
from ..rollouts.snapshots import SnapshotPool
from ..rollouts.store import TrajectoryStore
from . import tasks as tasklists
from .errors import UserError
from .placement import Placement
from .plan import engine_placement
from .runs import graph_path


def make_sampler(config: RunConfig, base: Path, training: int = 0) -> Sampler:
    """The configured sampler, with nothing published yet, where `training` processes train beside it.

    Raises `UserError` when it is not installed or placed, and `SamplerError` when it cannot serve `base`.
    """
    from .model import resolve_device

    where = resolve_device(config.policy.device)
    placement = engine_placement(config, training=training) if where == "cuda" else Placement()
    count = config.sampler.replicas
    cards: Sequence[int | None] = placement.cards or [None] * count
    with ExitStack() as stack:  # those that did start stop when another one does not
        samplers = []
        for place, card in enumerate(cards):
            samplers.append(_one_sampler(config, base, where, card, placement, f"-{place}" if count > 1 else ""))
            stack.callback(_close, samplers[-1])
        stack.pop_all()
    return samplers[0] if count == 1 else ReplicatedSampler(samplers)


def _one_sampler(
    config: RunConfig, base: Path, where: str, card: int | None, placement: Placement, suffix: str
) -> Sampler:
    """A sampler on one card, or on the CPU. `suffix`: of the file that a server of its own writes to."""
    section = config.sampler
    sizes: dict[str, Any] = {
        "slots": section.slots,
        "max_versions": section.max_versions,
        "max_tokens": config.episode.max_tokens,
    }
    if section.kind == "torch":
        from ..rollouts.samplers.torch import TorchSampler

        device = where if card is None else f"cuda:{card}"
        return TorchSampler(base, **sizes, threads=section.threads, device=device, dtype=section.dtype)
    rank, eager = _largest_rank(config), section.eager or where == "cpu"
    if section.url:
        return VllmServerSampler(section.url, base, **sizes, rank=rank, api_key=os.environ.get("VLLM_API_KEY"))
    if find_spec("vllm") is None:
        raise UserError(f'sampler.kind = "{section.kind}" needs vLLM, which is not installed: {INSTALL_VLLM}')
    sizes |= {"rank": rank, "dtype": section.dtype, "eager": eager, "seed": config.seed}
    if section.kind == "vllm-server":
        check_base(base, where)
        environment = cpu_environment(section.threads, section.cache_gb) if card is None else card_environment(card)
        options = server_options(**sizes, memory=None if card is None else placement.memory)
        process = VllmProcess(base, options, environment, config.out / config.name / f"vllm{suffix}.log")
        return VllmServerSampler(
            process.url,
            base,
            slots=section.slots,
            max_versions=section.max_versions,
            max_tokens=config.episode.max_tokens,
            rank=rank,
            process=process,
        )
    from ..rollouts.samplers.vllm import VllmSampler

    return VllmSampler(
        base,
        **sizes,
        threads=section.threads,
        cache_gb=section.cache_gb,
        card=card,
        memory=placement.memory,
        sleeps=placement.sleeps,
    )


def _close(sampler: Sampler) -> None:
    """Close a sampler from outside any event loop, or from inside one."""
    closing = Thread(target=lambda: asyncio.run(sampler.close()))
    closing.start()
    closing.join()


def _largest_rank(config: RunConfig) -> int:
    """Of the adapters that the run serves: its own, and the one that it starts from."""
    given = config.policy.from_adapter
    if given is None:
        return config.policy.lora.rank
    try:
        found = json.loads((given / "adapter_config.json").read_text("utf-8"))
        return max(config.policy.lora.rank, int(found["r"]), *map(int, (found.get("rank_pattern") or {}).values()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"policy.from_adapter: {given} is no PEFT adapter ({error})") from error


def make_pool(config: RunConfig, tasks: Sequence[Task]) -> EnvPool:
    """The environments, in threads or in processes as `env.processes` says, behind the operation graph where `graph`
    says so; nothing is started yet.

    Raises `UserError` for an unknown environment, and for one that no other process can make.
    """
    processes, deadline_s, terse = config.env.processes, config.episode.step_seconds, config.env.terse
    # every episode names its task, so a process need not hold all of them
    known = tasks[:1] if processes else tasks
    try:
        recipe = env_recipe(config.env, **tasklists.environment_options(config.env, known))
        pool: ProcessEnvPool | ThreadStatePool
        if processes:
            pool = ProcessEnvPool(recipe, processes=processes, deadline_s=deadline_s, terse=terse)
        else:
            pool = ThreadStatePool(recipe.make, deadline_s=deadline_s, terse=terse)
        if config.graph.enabled:
            return _with_graph(config, recipe, pool)
        return SnapshotPool(pool) if config.branching.roots else pool
    except (ValueError, GraphStoreError) as error:
        raise UserError(str(error)) from error


def _with_graph(config: RunConfig, recipe: EnvRecipe, pool: StatePool) -> GraphPool:
    section = config.graph
    # an evaluation leaves a run's folder as it is: what has none keeps nothing
    wanted = section.disk_mb and (section.path is not None or (config.out / config.name).is_dir())
    store = GraphStore(graph_path(config), most_bytes=section.disk_mb << 20) if wanted else None
    return GraphPool(
        pool,
        OperationGraph(store, most_bytes=section.memory_mb << 20),
        env_id=config.env.id,
        identity=identity(recipe, terse=config.env.terse),
        live=section.live,
        verify_share=section.verify_share,
        kept_bytes=section.kept_mb << 20,
        patience_s=config.episode.max_seconds,
    )


def make_runner(
    config: RunConfig,
    base: Path,
    sampler: Sampler,
    pool: EnvPool,
    store: TrajectoryStore | None = None,
) -> RolloutRunner:
    """The runner in environments of `pool`, which it closes. To be called within the event loop that it will run in;
    without `store` nothing is recorded.
    """
    return RolloutRunner(
        sampler=sampler,
        renderer=make_renderer(base, thinking=config.episode.thinking),
        pool=pool,
        episode=config.episode,
        run=f"{config.name}:{config.seed}",
        seed=config.seed,
        concurrency=config.sampler.slots * config.sampler.replicas,
        store=store,
        env_id=config.env.id,
        system_prompt=config.env.system_prompt,
        branching=config.branching,
    )
