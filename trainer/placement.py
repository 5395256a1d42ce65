"""Which cards the sampler's engines stand on, and how much of its card each may use.

Always true: a card that is the sampler's alone is nearly all its own; on the trainer's card it gets what the memory
plan leaves it, for good or, where that is too little, by turns. A card here is its place in CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..configs.schema import RunConfig
from .errors import UserError

MOST = 0.9
"""Share of a card that an engine takes at most; the rest is for CUDA's context and fragmentation."""

SPARE = 0.02
"""Share of the trainer's card that the plan gives to nobody."""

UNPLANNED = 0.45
"""Share of the trainer's card where the model's shape, and so the plan, is unknown."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes on one card: the trainer's at its peak, those of them that stay while it waits (weights, optimizer), and
    the least with which vLLM can serve.
    """

    trainer: float
    resting: float
    sampler: float


@dataclass(frozen=True, slots=True)
class Placement:
    """`cards`: of each replica, none on the CPU. `memory`: share of its card that an engine may use. `sleeps`: whether
    it gives that back while the trainer works. `why`: for a person.
    """

    cards: tuple[int, ...] = ()
    memory: float = MOST
    sleeps: bool = False
    why: str = ""


def place(config: RunConfig, needs: Needs | None, *, visible: int, room: float, training: int) -> Placement:
    """Where the engines of a run stand on `visible` cards of `room` bytes, of which the first `training` train.

    `needs` None: unknown. Raises UserError when there are more replicas than cards for them.
    """
    section = config.sampler
    free = range(training, visible)
    if section.replicas > max(len(free), 1):
        raise UserError(
            f"sampler.replicas = {section.replicas}, but {len(free)} of {visible} cards are free of training; "
            f"set it to {max(len(free), 1)}"
        )
    if free:
        cards = tuple(free[: section.replicas])
        return Placement(cards, section.gpu_memory or MOST, why=f"card {', '.join(map(str, cards))}, its own")
    return _shared(config, needs, room)


def _shared(config: RunConfig, needs: Needs | None, room: float) -> Placement:
    """On the trainer's first card."""
    section = config.sampler
    if needs is None:
        share = section.gpu_memory or UNPLANNED
        return Placement((0,), share, section.sharing == "sleep", "beside the trainer; the model's shape is unknown")
    left, resting = (min(MOST, max(0.0, 1.0 - SPARE - used / room)) for used in (needs.trainer, needs.resting))
    fits = (section.gpu_memory or left) * room >= needs.sampler and (section.gpu_memory or 0.0) <= left
    by_turns = section.kind == "vllm" and config.schedule.kind == "sync"
    if section.sharing == "sleep" or (section.sharing == "auto" and by_turns and not fits):
        return Placement((0,), section.gpu_memory or resting, True, "asleep while the trainer works")
    least = min(MOST, needs.sampler / room)
    return Placement((0,), section.gpu_memory or max(left, least), why="beside the trainer")
