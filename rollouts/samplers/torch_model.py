"""Weights and layer arithmetic of a Qwen3 decoder, laid out for sampling: few large operations over flat rows of
tokens.

Matrices, keys and values are float32 or bfloat16; the residual stream, norms, rotations, scores and sums are float32.
One row is one token of one episode. What always holds: a row's numbers depend on that row, on its own cached keys and
values and on its own position; on nothing else in the batch. On the CPU in float32 that is exact to the bit, and rests
on four rules:

* every matrix product has at least 8 rows, a multiple of 8 (BLAS computes a row the same way whatever their number,
  except when very few);
* attention looks at each row's own keys, one after the other (`torch_attend`);
* everything else is elementwise or reduces over a row's own last dimension, of a width that is a multiple of 16;
* nothing is reduced over rows.

Source of the arithmetic: transformers' `Qwen3ForCausalLM` (RMSNorm, q/k-norm, rotary positions, grouped-query
attention, SwiGLU). It is the same function, rewritten: input norms' weights are folded into the next matrix, head
dimensions are permuted so that a rotary pair is one complex number, and the softmax scale is folded into the q-norm (in
base 2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from .base import SamplerError

_EXTRAS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
)  # what PEFT can add to LoRA that merging B @ A would leave out
_LAYER = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")),
)
_NARROWEST_HEAD = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model, from its `config.json`."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    tied: bool

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer, fused. `qkv` makes [q heads, k heads, v heads]; `out_t` and `down_t` stand transposed."""

    qkv: Tensor
    qk_norm: Tensor
    out_t: Tensor
    gate_up: Tensor
    down_t: Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model of one policy version; never changed once made."""

    shape: Shape
    embed: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Tensor


def read_shape(folder: Path) -> Shape:
    """Sizes from `folder/config.json`. Raises `SamplerError` for what this sampler cannot run.

    Heads narrower than 16 are among that: with them an episode's log-probabilities were seen to depend on the company
    it was sampled in (widths 4 and 8, by up to 3e-6 nats); from 16 on they are equal to the bit.
    """
    config = _read_json(folder / "config.json", "a model folder")
    kind = config.get("model_type")
    if kind != "qwen3":
        raise SamplerError(
            f"the embedded sampler runs Qwen3 decoders; {folder} holds model_type {kind!r}. Choose a Qwen3 base."
        )
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    refused = {
        "attention_bias": bool(config.get("attention_bias")),
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "rope type": rope.get("rope_type", rope.get("type", "default")) != "default",
        "quantization_config": config.get("quantization_config") is not None,
    }
    if wrong := [name for name, bad in refused.items() if bad]:
        raise SamplerError(
            f"the embedded sampler does not implement the {wrong[0]} set in {folder / 'config.json'}; "
            "choose a plain Qwen3 base."
        )
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    if head_dim < _NARROWEST_HEAD:
        raise SamplerError(
            f"the embedded sampler needs attention heads of at least {_NARROWEST_HEAD} dimensions to be exact; "
            f"{folder / 'config.json'} has head_dim {head_dim}. Choose a base with wider heads."
        )
    return Shape(
        vocab=int(config["vocab_size"]),
        hidden=int(config["hidden_size"]),
        intermediate=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        eps=float(config.get("rms_norm_eps", 1e-6)),
        theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder saved by transformers' `save_pretrained`, as stored."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index, "a weight index")["weight_map"].values()))
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        raise SamplerError(
            f"{folder} has no model.safetensors; save the base with save_pretrained(safe_serialization=True)."
        )
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors.update(_load(folder / name))
    return tensors


def merge_adapter(base: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """`base` with a PEFT LoRA adapter merged in: W + scale * B @ A, scale = alpha / r, or alpha / sqrt(r) for
    rank-stabilised LoRA.

    Sources: LoRA (arXiv:2106.09685, section 4.1), rsLoRA (arXiv:2312.03732). Only changed tensors are new; the others
    are `base`'s own. Raises `SamplerError` for an adapter that is more than that.
    """
    config = _read_json(folder / "adapter_config.json", "a PEFT adapter folder")
    _refuse_adapter(config, folder)
    adapter = _load(folder / "adapter_model.safetensors")
    merged = dict(base)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.items():
        module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        pairs.setdefault(module, {})[part] = tensor.float()
    for module, parts in pairs.items():
        name = f"{module}.weight"
        if set(parts) != {"A.weight", "B.weight"} or name not in base or ".layers." not in name:
            raise SamplerError(
                f"adapter {folder} changes {module!r} in a way the embedded sampler does not implement; "
                "train plain LoRA on the layers' linear modules."
            )
        down, up = parts["A.weight"], parts["B.weight"]
        old = base[name]
        if (up.shape[0], down.shape[1]) != tuple(old.shape):
            raise SamplerError(
                f"adapter {folder} was made for another base: {module} is {tuple(old.shape)}, "
                f"the adapter's {(up.shape[0], down.shape[1])}; give the sampler that base."
            )
        rank = down.shape[0]
        alpha = _pattern(config.get("alpha_pattern"), module, float(config["lora_alpha"]))
        merged[name] = old.float() + (up @ down) * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return merged


def build(shape: Shape, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> Weights:
    """Fuse a model's tensors into `Weights` on `device`, matrices in `dtype`.

    Raises `SamplerError` when one is missing.
    """
    try:
        layers = tuple(_layer(shape, tensors, f"model.layers.{i}.", device, dtype) for i in range(shape.layers))
        embed = tensors["model.embed_tokens.weight"].to(device, dtype)
        head = embed if shape.tied else tensors["lm_head.weight"].to(device, dtype)
        norm = tensors["model.norm.weight"]
    except KeyError as missing:
        raise SamplerError(f"the base has no tensor {missing}; it is not a complete Qwen3 checkpoint.") from None
    return Weights(shape, embed, layers, norm.float().to(device), head)


def rotations(shape: Shape, length: int, device: torch.device) -> Tensor:
    """cos + i sin of every position's rotary angles, (length, head_dim / 2) complex64, computed as transformers
    does."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    angles = torch.outer(torch.arange(length).float(), 1.0 / (shape.theta**exponents))
    return torch.complex(angles.cos(), angles.sin()).to(device)


Attend = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, q and k heads (rows, heads + kv_heads, head_dim), values (rows, kv_heads * head_dim)) ->
(rows, heads * head_dim)"""


def forward(weights: Weights, tokens: Tensor, angles: Tensor, attend: Attend) -> Tensor:
    """Hidden states after the last layer, (rows, hidden), before the final norm.

    `tokens` (rows,) int64, rows a multiple of 8; `angles` (rows, 1, head_dim / 2) complex, the rotations of the rows'
    positions; `attend` stores keys and values and looks up what each row may see.
    """
    shape = weights.shape
    heads, width = shape.heads + shape.kv_heads, (shape.heads + shape.kv_heads) * shape.head_dim
    eps = torch.full((), shape.eps, device=tokens.device)
    x = weights.embed.index_select(0, tokens).float()
    kind = weights.embed.dtype
    exact = kind == torch.float32
    for number, layer in enumerate(weights.layers):
        fused = F.linear(_unit(x, eps, kind), layer.qkv)
        qk = fused[:, :width].view(-1, heads, shape.head_dim)
        qk = _unit(qk if exact else qk.float(), eps).mul_(layer.qk_norm)
        pairs = torch.view_as_complex(qk.view(-1, heads, shape.head_dim // 2, 2)) * angles
        seen = attend(number, torch.view_as_real(pairs).view(-1, heads, shape.head_dim), fused[:, width:])
        _add_product(x, seen, layer.out_t)
        gate_up = F.linear(_unit(x, eps, kind), layer.gate_up)
        gate = F.silu(gate_up[:, : shape.intermediate]).mul_(gate_up[:, shape.intermediate :])
        _add_product(x, gate, layer.down_t)
    return x


def logits(weights: Weights, x: Tensor) -> Tensor:
    """(rows, vocab) from `forward`'s result."""
    eps = torch.full((), weights.shape.eps, device=x.device)
    return F.linear(_unit(x, eps).mul_(weights.norm).to(weights.head.dtype), weights.head)


def _add_product(x: Tensor, a: Tensor, b: Tensor) -> None:
    """x += a @ b; the residual stream x is float32 whatever the precision of the matrices."""
    if b.dtype == x.dtype:
        x.addmm_(a, b)
    else:
        x += a.to(b.dtype) @ b


def _unit(x: Tensor, eps: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension: RMSNorm without its weight (arXiv:1910.07467, equation 4)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = x * torch.addcmul(eps, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    return unit if kind == torch.float32 else unit.to(kind)


def _layer(shape: Shape, stored: Mapping[str, Tensor], at: str, device: torch.device, dtype: torch.dtype) -> Layer:
    d, kv = shape.head_dim, shape.kv_heads
    tensors = {name: stored[name].float() for name in (at + part for part in _LAYER)}
    order = torch.arange(d).view(2, d // 2).t().reshape(-1)  # (0, d/2, 1, d/2 + 1, ...): a rotary pair side by side
    before, after = tensors[at + "input_layernorm.weight"], tensors[at + "post_attention_layernorm.weight"]
    q = tensors[at + "self_attn.q_proj.weight"].view(shape.heads, d, -1)[:, order]
    k = tensors[at + "self_attn.k_proj.weight"].view(kv, d, -1)[:, order]
    v = tensors[at + "self_attn.v_proj.weight"]
    qkv = torch.cat([part.reshape(-1, shape.hidden) for part in (q, k, v)]) * before
    scale = math.log2(math.e) / math.sqrt(d)
    q_norm, k_norm = tensors[at + "self_attn.q_norm.weight"][order], tensors[at + "self_attn.k_norm.weight"][order]
    gate_up = torch.cat([tensors[at + "mlp.gate_proj.weight"], tensors[at + "mlp.up_proj.weight"]])
    return Layer(
        qkv=qkv.to(device, dtype),
        qk_norm=torch.cat([(q_norm * scale).expand(shape.heads, d), k_norm.expand(kv, d)]).to(device),
        out_t=tensors[at + "self_attn.o_proj.weight"].t().to(device, dtype).contiguous(),
        gate_up=(gate_up * after).to(device, dtype),
        down_t=tensors[at + "mlp.down_proj.weight"].t().to(device, dtype).contiguous(),
    )


def _refuse_adapter(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise SamplerError(
            f"adapter {folder} is {config.get('peft_type')}; the embedded sampler merges LoRA adapters only."
        )
    wrong = [name for name in _EXTRAS if config.get(name)]
    wrong += ["bias"] if config.get("bias", "none") != "none" else []
    start = config.get("init_lora_weights", True)
    # PiSSA and its kin rewrite the base as well, so that the adapter alone does not say what the model is.
    wrong += ["init_lora_weights"] if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal") else []
    if wrong:
        raise SamplerError(
            f"adapter {folder} sets {wrong[0]}, which the embedded sampler does not implement; "
            "train plain LoRA or rsLoRA."
        )


def _pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: a pattern's key is a whole tail of the module's name, at a dot."""
    for key, value in (patterns or {}).items():
        if module == key or module.endswith("." + key):
            return float(value)
    return default


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise SamplerError(f"{path} is missing; {what} is expected there.") from None
    except (OSError, ValueError) as error:
        raise SamplerError(f"{path} cannot be read: {error}") from None
    return loaded


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own type, OSError and others
        raise SamplerError(f"{path} cannot be read: {error}") from None
