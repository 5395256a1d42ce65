"""Trees in transformers' models: which can run them, and how attention gets them, through the registry of attention
functions. Always true: without a tree the registered function is transformers' sdpa.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .attention import Backend, Layout, attend
from .core import TokenTree

NAME = "espalier_tree"
"""Its name in the registry."""


class Unsuitable(RuntimeError):
    """A model asks for attention that the tree does not have; the message names it."""


def why_flat(model: PreTrainedModel, aux_loss: bool = False) -> str | None:
    """What of a model keeps it from running as a tree; None: nothing that is known."""
    config = model.config.get_text_config()
    kinds = sorted(set(_layer_types(config)) - {"full_attention", "sliding_attention"})
    if kinds:
        return f"it has {kinds[0]} layers, and trees have full and sliding attention"
    if config._attn_implementation not in ("sdpa", NAME):
        return f'attention is "{config._attn_implementation}", and trees are built on "sdpa"'
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not take attention functions"
    if getattr(model, "_is_stateful", False):
        return "it has recurrent layers, whose state would have to fork where rows part"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps attention scores"
    if any("dynamic" in kind or kind == "longrope" for kind in _rope_types(config)):
        return "its position encoding depends on the longest row of a pass"
    if aux_loss:
        return "its router's loss counts a shared token once for every row"
    if any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules()):
        return "dropout draws for every row anew"
    if float(getattr(config, "attention_dropout", 0.0) or 0.0) > 0:
        return "attention dropout draws for every row anew"
    return None


def _layer_types(config: PreTrainedConfig) -> Sequence[str]:
    return getattr(config, "layer_types", None) or ()


def _rope_types(config: PreTrainedConfig) -> list[str]:
    """Of all layers, or for each kind of layer."""
    found: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return [str(rope.get("rope_type")) for rope in (found, *found.values()) if isinstance(rope, Mapping)]


def lay_out(tree: TokenTree, config: PreTrainedConfig, backend: Backend = "tiles") -> Layout:
    """A tree for the attention of a model."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return Layout(tree, 4 * heads * size, backend)


def no_mask(device: torch.device) -> torch.Tensor:
    """What to pass as `attention_mask` with a tree. Models take a mask of four dimensions as it is; with none they
    would read the jumps of `position_ids` as the ends of packed sequences.
    """
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def enable(model: PreTrainedModel) -> None:
    """Let `model`, which attends by sdpa, take a `tree` (a `Layout`) with a forward pass."""
    AttentionInterface.register(NAME, _registered)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def disable(model: PreTrainedModel) -> None:
    """Undo `enable`."""
    model.set_attn_implementation("sdpa")


def _registered(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    tree: Layout | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As transformers calls attention functions. Raises Unsuitable for what a tree has not."""
    if tree is None:
        if attention_mask is not None and attention_mask.numel() == 1 < query.size(2):
            raise Unsuitable("the model does not hand the tree down to its attention")
        result: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = sdpa_attention_forward
        return result(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
    asked = {name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None}
    if dropout:
        asked.add("dropout")
    if others.get("is_causal", getattr(module, "is_causal", True)) is False:
        asked.add("attention to what follows")
    if asked:
        raise Unsuitable(f"its attention has {', '.join(sorted(asked))}")
    return attend(query, key, value, tree, sliding_window, scaling), None
