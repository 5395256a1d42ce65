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


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3-shaped decoder (grouped-query attention, gated MLP), as its config.json names the sizes."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of one block, by PEFT target name."""
        h, q, kv = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (h, q),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (q, h),
            "gate_proj": (h, self.intermediate_size),
            "up_proj": (h, self.intermediate_size),
            "down_proj": (self.intermediate_size, h),
        }

    def linear_parameters(self) -> int:
        """Weights of all blocks' linear layers (what 4-bit quantisation shrinks)."""
        return self.num_hidden_layers * sum(i * o for i, o in self.linears().values())

    def parameters(self) -> int:
        """All weights: linears, norms (a block's two and its q/k-norms, the last one), embedding, head if untied."""
        norms = self.num_hidden_layers * (2 * self.hidden_size + 2 * self.head_dim) + self.hidden_size
        tables = 1 if self.tie_word_embeddings else 2
        return self.linear_parameters() + norms + tables * self.vocab_size * self.hidden_size

    def kv_bytes_per_token(self, width: int) -> int:
        """Key and value of one token in all layers; `width` bytes an element."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * width

    def lora_parameters(self, lora: LoraSection) -> int:
        """rank * (in + out) for each targeted linear layer."""
        linears = self.linears()
        names = linears if lora.target_modules == "all-linear" else lora.target_modules
        sizes = (sum(linears[name.rpartition(".")[2]]) for name in names if name.rpartition(".")[2] in linears)
        return self.num_hidden_layers * lora.rank * sum(sizes)


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


def shape_of(values: Mapping[str, Any]) -> Shape:
    """A `Shape` from the members of a config.json. Raises `KeyError` for a model that is not shaped so."""
    heads = int(values["num_attention_heads"])
    return Shape(
        hidden_size=int(values["hidden_size"]),
        num_hidden_layers=int(values["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(values.get("num_key_value_heads") or heads),
        head_dim=int(values.get("head_dim") or values["hidden_size"] // heads),
        intermediate_size=int(values["intermediate_size"]),
        vocab_size=int(values["vocab_size"]),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
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
