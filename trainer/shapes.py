"""The sizes of a model, known without loading it: from its config.json, on disk or in the Hugging Face cache, or from
the table of known shapes; and where a model is on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..configs.schema import LoraSection
from .shipped import SHIPPED

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture in place of an MLP, in `layers` of the blocks: `count` gated MLPs and a router, which sends a token to
    `chosen` of them. `names`: what PEFT calls an expert's gate, up and down projection.
    """

    layers: int
    count: int
    chosen: int
    intermediate_size: int
    names: tuple[str, str, str]

    def linears(self, hidden_size: int) -> list[tuple[str, tuple[int, int, int]]]:
        """(in, out, how many) of what PEFT adapts, by target name; gate and up are one stacked weight, of which each
        name gets as much as the rank.
        """
        gate, up, down = self.names
        wide, each = 2 * self.intermediate_size, self.layers * self.count
        return [
            ("gate", (hidden_size, self.count, self.layers)),
            (gate, (hidden_size, wide, each)),
            (up, (hidden_size, wide, each)),
            (down, (self.intermediate_size, hidden_size, each)),
        ]


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with grouped-query attention and gated MLPs, as its config.json names the sizes.

    `norms` as wide as the hidden state stand in a block; with `qk_norm` queries and keys have one each; `biased` names
    the linear layers that have a bias.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    norms: int = 2
    qk_norm: bool = True
    biased: tuple[str, ...] = ()
    experts: Experts | None = None

    def linears(self) -> dict[str, tuple[int, int, int]]:
        """(in, out, blocks that have it) of each linear layer, by PEFT target name; a mixture's experts apart."""
        h, q, kv = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        blocks = self.num_hidden_layers
        dense = blocks - (self.experts.layers if self.experts else 0)
        return {
            "q_proj": (h, q, blocks),
            "k_proj": (h, kv, blocks),
            "v_proj": (h, kv, blocks),
            "o_proj": (q, h, blocks),
            "gate_proj": (h, self.intermediate_size, dense),
            "up_proj": (h, self.intermediate_size, dense),
            "down_proj": (self.intermediate_size, h, dense),
        }

    def linear_parameters(self) -> int:
        """Weights of all blocks' linear layers, experts apart (what 4-bit quantisation shrinks)."""
        return sum(i * o * blocks for i, o, blocks in self.linears().values())

    def expert_parameters(self, count: int | None = None) -> int:
        """Weights of the mixtures: their routers, and all experts or `count` of each."""
        if self.experts is None:
            return 0
        each = 3 * self.experts.intermediate_size
        held = self.experts.count if count is None else count
        return self.experts.layers * self.hidden_size * (self.experts.count + held * each)

    def parameters(self) -> int:
        """All weights: linears with their biases, experts, norms (the blocks' and the last one), embedding, head if
        untied.
        """
        linears = self.linears()
        biases = sum(linears[name][1] * linears[name][2] for name in self.biased)
        block = self.norms * self.hidden_size + 2 * self.head_dim * self.qk_norm
        norms = self.num_hidden_layers * block + self.hidden_size
        tables = 1 if self.tie_word_embeddings else 2
        rest = biases + norms + tables * self.vocab_size * self.hidden_size
        return self.linear_parameters() + self.expert_parameters() + rest

    def active_parameters(self) -> int:
        """The weights that one token goes through: of a mixture, the chosen experts only."""
        if self.experts is None:
            return self.parameters()
        return self.parameters() - self.expert_parameters() + self.expert_parameters(self.experts.chosen)

    def mlp_width(self) -> int:
        """Intermediate elements of one token in the widest block."""
        mixture = self.experts.chosen * self.experts.intermediate_size if self.experts else 0
        dense = self.intermediate_size if self.linears()["up_proj"][2] else 0
        return max(mixture, dense)

    def kv_bytes_per_token(self, width: int) -> int:
        """Key and value of one token in all layers; `width` bytes an element."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * width

    def lora_parameters(self, lora: LoraSection) -> int:
        """rank * (in + out) for each targeted linear layer, and for each expert of a mixture (beside which PEFT leaves
        dense MLPs as they are).
        """
        every = lora.target_modules == "all-linear"
        names = {name.rpartition(".")[2] for name in lora.target_modules}
        found = list(self.linears().items())
        if self.experts:
            found = found[: len(_ATTENTION)] + self.experts.linears(self.hidden_size)
        return lora.rank * sum((i + o) * count for name, (i, o, count) in found if every or name in names)


KNOWN: Mapping[str, Shape] = {
    "Qwen/Qwen3-0.6B": Shape(1024, 28, 16, 8, 128, 3072, 151936, True),
    "Qwen/Qwen3-1.7B": Shape(2048, 28, 16, 8, 128, 6144, 151936, True),
    "Qwen/Qwen3-4B": Shape(2560, 36, 32, 8, 128, 9728, 151936, True),
    "Qwen/Qwen3-4B-Thinking-2507": Shape(2560, 36, 32, 8, 128, 9728, 151936, True),
    "Qwen/Qwen3-4B-Instruct-2507": Shape(2560, 36, 32, 8, 128, 9728, 151936, True),
    "Qwen/Qwen3-8B": Shape(4096, 36, 32, 8, 128, 12288, 151936, False),
    "Qwen/Qwen3-14B": Shape(5120, 40, 40, 8, 128, 17408, 151936, False),
}
"""Shapes by model id, from the models' published config.json, for when the model is not on disk."""


def find_shape(base: str) -> Shape | None:
    """The shape of a base: the shipped one, a folder's, a cached model's, or a known one's; None when none of these."""
    folder = find_model(base)
    if folder is None:
        return KNOWN.get(base)
    try:
        return shape_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError):
        return KNOWN.get(base)


@dataclass(frozen=True, slots=True)
class _Family:
    """What a model_type means besides its sizes; `biased` always, what `attention_bias` and `mlp_bias` name if so."""

    norms: int = 2
    qk_norm: bool = False
    biased: tuple[str, ...] = ()
    tied: bool = False
    mixture: bool = False


_FAMILIES: Mapping[str, _Family] = {
    "qwen2": _Family(biased=_ATTENTION[:3]),
    "qwen3": _Family(qk_norm=True),
    "qwen3_moe": _Family(qk_norm=True, mixture=True),
    "llama": _Family(),
    "mistral": _Family(),
    "mixtral": _Family(mixture=True),
    "gemma": _Family(tied=True),
    "gemma2": _Family(norms=4, tied=True),
    "gemma3_text": _Family(norms=4, qk_norm=True, tied=True),
}


def shape_of(values: Mapping[str, Any]) -> Shape:
    """A `Shape` from the members of a config.json. Raises `KeyError` for a model_type that is not known here, and for
    a size that is not given.
    """
    family = _FAMILIES[values["model_type"]]
    heads = int(values["num_attention_heads"])
    biased = family.biased
    biased += _ATTENTION if values.get("attention_bias") else ()
    biased += _MLP if values.get("mlp_bias") else ()
    tied = values.get("tie_word_embeddings")
    return Shape(
        hidden_size=int(values["hidden_size"]),
        num_hidden_layers=int(values["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(values.get("num_key_value_heads") or heads),
        head_dim=int(values.get("head_dim") or values["hidden_size"] // heads),
        intermediate_size=int(values["intermediate_size"]),
        vocab_size=int(values["vocab_size"]),
        tie_word_embeddings=family.tied if tied is None else bool(tied),
        norms=family.norms,
        qk_norm=family.qk_norm,
        biased=biased,
        experts=_experts(values) if family.mixture else None,
    )


def _experts(values: Mapping[str, Any]) -> Experts:
    """Every `decoder_sparse_step`-th block has a mixture, those of `mlp_only_layers` excepted (all of Mixtral's do)."""
    blocks, step = range(int(values["num_hidden_layers"])), int(values.get("decoder_sparse_step") or 1)
    dense = set(values.get("mlp_only_layers") or ())
    return Experts(
        layers=sum((block + 1) % step == 0 and block not in dense for block in blocks),
        count=int(values["num_experts"] if "num_experts" in values else values["num_local_experts"]),
        chosen=int(values["num_experts_per_tok"]),
        intermediate_size=int(values.get("moe_intermediate_size") or values["intermediate_size"]),
        names=("w1", "w3", "w2") if values["model_type"] == "mixtral" else _MLP,
    )


def find_model(base: str) -> Path | None:
    """The folder that holds a base's config.json and weights; None when it is not on this machine."""
    if base in SHIPPED:
        folder, _ = SHIPPED[base]
        return folder if _has_weights(folder) else None
    if Path(base).is_dir():
        return Path(base) if _has_weights(Path(base)) else None
    hub = import_module("huggingface_hub")
    try:
        found = hub.try_to_load_from_cache(base, "config.json")
    except hub.errors.HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) and _has_weights(Path(found).parent) else None


def _has_weights(folder: Path) -> bool:
    """Whether config.json is there, and every file the weights' index names (or one file of weights)."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError):
            return False
        return all((folder / name).is_file() for name in names)
    return any(folder.glob("*.safetensors"))
