"""The sampler and the runner that a configuration describes: made here, for whoever needs episodes.

Always true: two runners made from one configuration draw the same tokens for the same episode (the random key is that
of run name, seed, episode and turn).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..configs.schema import RunConfig
from ..envs.core import Task
from ..rollouts.envpool import EnvPool, ThreadEnvPool
from ..rollouts.envprocess import ProcessEnvPool
from ..rollouts.recipe import env_recipe
from ..rollouts.render import make_renderer
from ..rollouts.runner import RolloutRunner
from ..rollouts.samplers.base import Sampler
from ..rollouts.store import TrajectoryStore
from . import tasks as tasklists
from .errors import UserError


def make_sampler(config: RunConfig, base: Path, device: str | None = None) -> Sampler:
    """The embedded sampler on `device` (default: where the policy stands), with nothing published yet."""
    from ..rollouts.samplers.torch import TorchSampler
    from .model import resolve_device

    return TorchSampler(
        base,
        slots=config.sampler.slots,
        threads=config.sampler.threads,
        max_versions=config.sampler.max_versions,
        max_tokens=config.episode.max_tokens,
        device=device or resolve_device(config.policy.device),
        dtype=config.sampler.dtype,
    )


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
