"""Whether rows that share prefixes are computed as a `TokenTree` or flat, and why.

The flat path (`OnlineGRPOTrainer`'s padded rows, of which those of a group share their prompt) works for every model.
Always true: a tree is used only where it saves tokens, after its gradient was compared with the flat path's on rows of
the run itself, in no more memory than training takes; where a model cannot, or the comparison fails, `state` says so;
all processes decide alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ...configs.schema import RunConfig
from ..batch import Row
from ..parallel import gathered, world
from .attention import Backend, Layout
from .core import TokenTree, grow
from .models import disable, enable, lay_out, why_flat
from .packing import cut, telling, unique_tokens

WORTH = 1.1
"""Tokens of an update's rows over those of its micro-batches' trees, from which on trees are used."""

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference between the two paths' gradients, over the largest gradient, by the dtype of the base. In float32
1e-6 is usual and what is wrong shows at 1e-2 and more; the deeper the model the more rounding.
"""

LIMIT_16_BIT = 5e-2
"""The same in 16 bit, where rows computed in another order differ by 1e-2 already."""

CHECKED_ROWS = 4
"""Rows that are compared, beside the longest."""

BACKENDS: dict[str, tuple[Backend, ...]] = {"cuda": ("flex", "tiles")}
"""Ways to compute attention over a tree that are compared, by kind of device: the first that passes is used."""

Gradient = Callable[[Sequence[Row], bool], torch.Tensor]
"""Rows, and whether they run as a tree: the adapter's gradient of what is predicted, weighted by `logprobs`."""


class Sharing:
    """Decides for a trainer. `reason` is None where trees are used, `refused`, whether they were asked for and cannot
    be. `compared` says whether the comparison was made, `error` what it found: the largest difference of the two
    gradients over the largest gradient, None where the tree's could not be computed; `failed` says which ways to
    compute attention were tried before `backend`, and why they are not taken.
    """

    def __init__(self, model: PeftModel, config: RunConfig, aux_loss: bool) -> None:
        self._model: PreTrainedModel = model.get_base_model()  # type: ignore[assignment]
        self._rows = config.trainer.micro_batch
        self.error: float | None = None
        self.limit = LIMITS.get(getattr(torch, config.policy.dtype), LIMIT_16_BIT)
        self.reason = self._not_asked(config) or why_flat(self._model, aux_loss=aux_loss)
        self.refused = self.reason is not None and config.trainer.shared_prefix == "tree"
        self._backends = BACKENDS.get(next(self._model.parameters()).device.type, ("tiles",))
        self.backend: Backend = self._backends[0]
        self.failed: list[str] = []
        self.compared = False
        self._ratio = WORTH
        if self.reason is None:
            enable(self._model)

    def _not_asked(self, config: RunConfig) -> str | None:
        asked, device = config.trainer.shared_prefix, next(self._model.parameters()).device.type
        if asked == "flat":
            return 'trainer.shared_prefix = "flat"'
        if asked == "auto" and device != "cpu":
            return f'on {device} trees are taken where trainer.shared_prefix = "tree"'
        return None

    @property
    def state(self) -> str:
        """For people: how the last update ran, "tree", or "flat" and why."""
        if self.reason is None and self._ratio < WORTH:
            return f"flat: rows share too little ({self._ratio:.2f} times)"
        return "tree" if self.reason is None else f"flat: {self.reason}"

    def trees(
        self, rows: Sequence[Row], processes: int = 1, gradient: Gradient | None = None
    ) -> list[list[Row]] | None:
        """An update's `rows` as micro-batches to run as trees, as many for each process; None where they are to run
        flat. A micro-batch is no larger than a flat one of `micro_batch` of the longest rows.

        The first time that trees are worth it, the two paths' `gradient`s are compared, on rows of the micro-batch that
        shares most; without `gradient`, where nothing is trained, nothing is compared and there are no trees before.
        """
        if self.reason is not None or not rows:
            return None
        parts = cut(rows, self._rows * max(len(row.tokens) for row in rows), processes)
        ratio = _tokens(rows) / sum(map(unique_tokens, parts))
        if gradient is not None:
            self._ratio = ratio
        if ratio < WORTH:
            return None
        if not self.compared and gradient is not None:
            self._compare(max(parts, key=lambda part: _tokens(part) - unique_tokens(part)), gradient)
        return parts if self.compared and self.reason is None else None

    def _compare(self, rows: Sequence[Row], gradient: Gradient) -> None:
        few = weighed(telling(rows, CHECKED_ROWS))
        self.compared = True
        for backend in self._backends:
            self.backend = backend
            said = self._why_not(few, gradient)
            everywhere = gathered(said) if world() > 1 else [said]
            wrong = next((what for what in everywhere if what is not None), None)
            if wrong is None:
                return
            self.failed.append(f"{backend}: {wrong}")
        self.reason = "; ".join(self.failed)
        disable(self._model)

    def _why_not(self, rows: Sequence[Row], gradient: Gradient) -> str | None:
        """What is wrong with the tree's gradient, or with making it; None: nothing."""
        self.error = None
        try:
            flat, tree = gradient(rows, False), gradient(rows, True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model or a machine does not bear: the flat path is always right
            return f"{type(error).__name__}: {error}"
        self.error = float((tree - flat).abs().max()) / (float(flat.abs().max()) or 1.0)
        return None if self.error <= self.limit else f"its gradient is off by {self.error:.1e} of the largest"

    def tree(self, rows: Sequence[Row], device: torch.device) -> TokenTree:
        """The tree of a micro-batch."""
        return grow(rows).to(device)

    def layout(self, tree: TokenTree) -> Layout:
        """A tree for one forward pass and its backward pass."""
        return lay_out(tree, self._model.config, self.backend)


def _tokens(rows: Iterable[Row]) -> int:
    """Tokens that a pass over whole rows computes."""
    return sum(len(row.tokens) - 1 for row in rows)


def weighed(rows: Iterable[Row]) -> list[Row]:
    """The rows with weights of both signs and many sizes in the place of recorded log-probabilities, so that no two
    errors cancel.
    """
    draw = random.Random(0)
    return [replace(row, logprobs=tuple(draw.gauss(0, 1) if m else 0.0 for m in row.mask)) for row in rows]
