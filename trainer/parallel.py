"""Training in several processes of one machine, a GPU each, as `accelerate launch --multi_gpu` or `torchrun` start
them.

The first process is the run: it samples, evaluates, stores and commits. The others follow: they hold the model and get
from the first what it decides. Always true: every process learns of every batch and of every decision to stop, in the
same order; the gradient of an update is the sum over all processes, so that its step is the one that a single process
would take; after each batch all hold the same adapter, or the run ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # the command line asks `follows` before anything heavy is loaded
    import torch

    from .batch import Batch, BatchSource

T = TypeVar("T")
Finished = Callable[["Batch", Mapping[str, float]], bool]

WAIT_SECONDS = 12 * 3600
"""How long processes wait for each other: followers wait while the first one samples and evaluates, whose own deadlines
are shorter. When a process ends, its launcher ends the others.
"""


def follows() -> bool:
    """Whether this process was started as another than the first."""
    return int(os.environ.get("RANK", "0")) > 0


def world() -> int:
    """How many processes train together, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share(value: T | None) -> T:
    """What the first process gives for `value`, in all of them, which must all call it."""
    found: list[T | None] = [value]
    if world() > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
    return found[0]  # type: ignore[return-value]  # the first process gave a T


class Shared:
    """A source of batches for all processes: in the first, `source` and its batches; in the others the same ones."""

    def __init__(self, source: BatchSource | None = None) -> None:
        self._source = source

    def next(self, step: int) -> Batch | None:
        """The first process's batch of `step`."""
        return share(None if self._source is None else self._source.next(step))


def shared_end(adapter: Callable[[], Iterable[torch.Tensor]], finished: Finished | None = None) -> Finished:
    """A `finished` for all processes: the first process's, and what it says in the others.

    `adapter` gives the trained tensors. The result raises RuntimeError when not all processes hold the same.
    """

    def end(batch: Batch, numbers: Mapping[str, float]) -> bool:
        sums = gathered(checksum(adapter()))
        if len(set(sums)) > 1:
            raise RuntimeError(f"after step {batch.step} the processes hold different adapters: {sums}")
        return share(None if finished is None else finished(batch, numbers))

    return end


def checksum(tensors: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Two sums over all elements, which differ when the tensors do."""
    each = [(float(t.double().sum()), float(t.double().square().sum())) for t in (t.detach() for t in tensors)]
    return sum(a for a, _ in each), sum(b for _, b in each)


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in one exchange."""
    import torch
    from accelerate.utils import reduce

    flat = reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), reduction="sum")
    for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def gathered(value: T) -> list[T]:
    """`value` of every process, in all of them."""
    from accelerate.utils import gather_object

    found: list[Any] = gather_object([value])
    return found
