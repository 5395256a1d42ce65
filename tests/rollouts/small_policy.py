"""A small Qwen3, adapters for it, and versions made of them, for the tests of samplers."""

from __future__ import annotations

from pathlib import Path

import torch
from espalier.rollouts.digest import folder_digest
from espalier.rollouts.types import PolicyVersion
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB = 96


def make_base(
    folder: Path,
    *,
    norm_scale: float = 1.0,
    tied: bool = True,
    head_dim: int = 16,
    hidden_size: int = 64,
    vocab: int = VOCAB,
) -> Path:
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                scale = norm_scale if "q_norm" in name or "k_norm" in name else 1.0
                parameter.copy_(scale * (1 + 0.3 * torch.randn_like(parameter)))
            else:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, seed: int, **config: object) -> Path:
    torch.manual_seed(seed)
    settings_ = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(Qwen3ForCausalLM.from_pretrained(base), LoraConfig(**settings_))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def version(number: int, path: Path, base: Path, digest: str = "") -> PolicyVersion:
    return PolicyVersion(number, digest or folder_digest(path), path, str(base))
