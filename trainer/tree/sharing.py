"""Whether rows that share prefixes are computed as a `TokenTree` or flat, and why.

The flat path (`OnlineGRPOTrainer`'s padded rows, of which those of a group share their prompt) works for every model.
Always true: a tree is used only where it saves tokens, after its gradient was compared with the flat path's on rows of
the run itself; where a model cannot, or the comparison fails, `state` says so; all processes decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ...configs.schema import RunConfig
from ..batch import Row
from ..parallel import gathered, world
from .attention import Layout
from .core import grow
from .models import disable, enable, lay_out, why_flat
from .packing import cut, telling, unique_tokens

WORTH = 1.1
"""Tokens of the rows over tokens of their tree, from which on the tree is used."""

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference between the two paths' gradients, over the largest gradient, by the dtype of the base. In float32
1e-6 is usual and what is wrong shows at 1e-2 and more; the deeper the model the more rounding.
"""

LIMIT_16_BIT = 5e-2
"""The same in 16 bit, where rows computed in another order differ by 1e-2 already."""

CHECKED_ROWS = 4
"""Rows that are compared, beside the longest."""

Gradient = Callable[[Sequence[Row], bool], torch.Tensor]
"""Rows, and whether they run as a tree: a gradient of the adapter."""


class Sharing:
    """Decides for a trainer. `reason` is None where trees are used; `compared` says whether the comparison was made,
    `error` what it found: the largest difference of the two gradients over the largest gradient, None where the tree's
    could not be computed.
    """

    def __init__(self, model: PeftModel, config: RunConfig, aux_loss: bool) -> None:
        self._model: PreTrainedModel = model.get_base_model()  # type: ignore[assignment]
        self._rows = config.trainer.micro_batch
        self.error: float | None = None
        self.limit = LIMITS.get(getattr(torch, config.policy.dtype), LIMIT_16_BIT)
        self.reason = self._not_asked(config) or why_flat(self._model, aux_loss=aux_loss)
        self.compared = False
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
        """For people: "tree", or "flat" and why."""
        return "tree" if self.reason is None else f"flat: {self.reason}"

    @property
    def failed(self) -> bool:
        """Whether the comparison ended the use of trees."""
        return self.compared and self.reason is not None

    def wanted(self, rows: Sequence[Row], gradient: Gradient | None = None) -> bool:
        """Whether `rows` are to run as trees. The first time that they are, the two paths' `gradient`s are compared;
        without `gradient` nothing is compared, and nothing is wanted before.
        """
        if self.reason is not None or not rows:
            return False
        if sum(len(row.tokens) - 1 for row in rows) < WORTH * unique_tokens(rows):
            return False
        if not self.compared and gradient is not None:
            self._compare(rows, gradient)
        return self.compared and self.reason is None

    def _compare(self, rows: Sequence[Row], gradient: Gradient) -> None:
        few = telling(rows, CHECKED_ROWS)
        try:
            flat, tree = gradient(few, False), gradient(few, True)
            largest = float(flat.abs().max())
            self.error = float((tree - flat).abs().max()) / largest if largest else float((tree - flat).abs().max())
            said = None if self.error <= self.limit else f"its gradient is off by {self.error:.1e} of the largest"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does not bear: the flat path is always right
            said = f"{type(error).__name__}: {error}"
        everywhere = gathered(said) if world() > 1 else [said]
        self.compared = True
        self.reason = next((what for what in everywhere if what is not None), None)
        if self.reason is not None:
            disable(self._model)

    def parts(self, rows: Sequence[Row], processes: int) -> list[list[Row]]:
        """Micro-batches to run as trees: no larger than flat ones of `micro_batch` of the longest rows would be, and as
        many for each process.
        """
        return cut(rows, self._rows * max(len(row.tokens) for row in rows), processes)

    def layout(self, rows: Sequence[Row], device: torch.device) -> Layout:
        """The tree of a micro-batch."""
        return lay_out(grow(rows).to(device), self._model.config)


def weights_of(rows: Iterable[Row]) -> torch.Tensor:
    """Weights of both signs and many sizes for every trained token, so that no two errors cancel."""
    count = sum(row.trained for row in rows)
    return torch.randn(count, generator=torch.Generator().manual_seed(0))
