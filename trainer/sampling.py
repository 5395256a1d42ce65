"""The sampler and the runner that a configuration describes: made here, for whoever needs episodes.

Always true: two runners made from one configuration draw the same tokens for the same episode (the random key is that
of run name, seed, episode and turn).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..configs.schema import RunConfig
from ..envs.core import Task
from ..rollouts.envpool import EnvPool, ThreadEnvPool
from ..rollouts.envprocess import ProcessEnvPool
from ..rollouts.recipe import env_recipe
from ..rollouts.render import make_renderer
from ..rollouts.runner import RolloutRunner
from ..rollouts.samplers.base import Sampler
from ..rollouts.samplers.vllm_limits import INSTALL_VLLM, check_base, cpu_environment, server_options
from ..rollouts.samplers.vllm_process import VllmProcess
from ..rollouts.samplers.vllm_server import VllmServerSampler
from ..rollouts.store import TrajectoryStore
from . import tasks as tasklists
from .errors import UserError


def make_sampler(config: RunConfig, base: Path, device: str | None = None) -> Sampler:
    """The configured sampler on `device` (default: where the policy stands), with nothing published yet.

    Raises `UserError` when it is not installed, and `SamplerError` when it cannot serve `base`.
    """
    from .model import resolve_device

    section, place = config.sampler, device or resolve_device(config.policy.device)
    sizes: dict[str, Any] = {
        "slots": section.slots,
        "max_versions": section.max_versions,
        "max_tokens": config.episode.max_tokens,
    }
    if section.kind == "torch":
        from ..rollouts.samplers.torch import TorchSampler

        return TorchSampler(base, **sizes, threads=section.threads, device=place, dtype=section.dtype)
    rank, eager = _largest_rank(config), section.eager or place == "cpu"
    if section.url:
        return VllmServerSampler(section.url, base, **sizes, rank=rank, api_key=os.environ.get("VLLM_API_KEY"))
    if find_spec("vllm") is None:
        raise UserError(f'sampler.kind = "{section.kind}" needs vLLM, which is not installed: {INSTALL_VLLM}')
    if section.kind == "vllm-server":
        check_base(base, place)
        options = server_options(
            **sizes,
            rank=rank,
            dtype=section.dtype,
            memory=None if place == "cpu" else section.gpu_memory,
            eager=eager,
            seed=config.seed,
        )
        environment = cpu_environment(section.threads, section.cache_gb) if place == "cpu" else {}
        process = VllmProcess(base, options, environment, config.out / config.name / "vllm.log")
        return VllmServerSampler(process.url, base, **sizes, rank=rank, process=process)
    from ..rollouts.samplers.vllm import VllmSampler

    return VllmSampler(
        base,
        **sizes,
        rank=rank,
        threads=section.threads,
        device=place,
        dtype=section.dtype,
        memory=section.gpu_memory,
        cache_gb=section.cache_gb,
        eager=eager,
        seed=config.seed,
    )


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
    """The environments, in threads or in processes as `env.processes` says; nothing is started yet.

    Raises `UserError` for an unknown environment, and for one that no other process can make.
    """
    processes, deadline_s, terse = config.env.processes, config.episode.step_seconds, config.env.terse
    # every episode names its task, so a process need not hold all of them
    known = tasks[:1] if processes else tasks
    try:
        recipe = env_recipe(config.env, **tasklists.environment_options(config.env, known))
        if processes:
            return ProcessEnvPool(recipe, processes=processes, deadline_s=deadline_s, terse=terse)
        return ThreadEnvPool(recipe.make, deadline_s=deadline_s, terse=terse)
    except ValueError as error:
        raise UserError(str(error)) from error


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
        concurrency=config.sampler.slots,
        store=store,
        env_id=config.env.id,
        system_prompt=config.env.system_prompt,
    )
