"""What a pass over a micro-batch computes: the hidden states that predict its sampled tokens, and nothing beyond.

Always true: rows are padded on the right only, so causal attention needs no mask; a prompt that all rows of a flat
micro-batch have in common runs once.
"""

from __future__ import annotations

from typing import Any

import torch

from ..batch import shared_prefix
from ..tree.core import TokenTree
from ..tree.models import no_mask

SHORTEST_SHARED = 16
"""Tokens of a common prompt from which on running it once is worth a second pass."""


def shared_tokens(tokens: torch.Tensor, mask: torch.Tensor) -> int:
    """How many leading tokens the rows (rows, width) of a flat micro-batch run once; `mask`: what is under the loss."""
    shared = shared_prefix(tokens, mask) if tokens.size(0) > 1 else 0
    return shared if shared >= SHORTEST_SHARED else 0


def hidden_flat(backbone: Any, tokens: torch.Tensor, shared: int) -> tuple[torch.Tensor, int]:
    """What predicts each token from `tokens[:, first + 1]` on: (rows, width - 1 - first, hidden), and `first`.

    The `shared` first tokens run once: their keys and values are repeated for the rows, and gradients add up on the way
    back.
    """
    if not shared:
        return backbone(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state, 0
    prompt = backbone(input_ids=tokens[:1, :shared], use_cache=True)
    last = prompt.last_hidden_state[:, -1:].expand(tokens.size(0), 1, -1)
    if shared == tokens.size(1) - 1:
        return last, shared - 1
    cache = prompt.past_key_values
    cache.batch_repeat_interleave(tokens.size(0))
    rest = backbone(input_ids=tokens[:, shared:-1], past_key_values=cache, use_cache=True).last_hidden_state
    return torch.cat([last, rest], dim=1), shared - 1


def hidden_tree(backbone: Any, tree: TokenTree, layout: Any) -> torch.Tensor:
    """What predicts each target of a tree, laid out for attention by `layout`: (targets, hidden)."""
    states: torch.Tensor = backbone(
        input_ids=tree.tokens[None],
        position_ids=tree.positions[None],
        attention_mask=no_mask(tree.tokens.device),
        use_cache=False,
        tree=layout,
    ).last_hidden_state
    return states[0, tree.predictors]
