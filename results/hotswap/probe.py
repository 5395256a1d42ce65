"""A stale-KV probe: adapters whose effect sits in the keys and values of the prompt, so that old ones show.

The prompt is one token, many times. In the first layer every position then has the same input to `v_proj`; an adapter of
rank 1 there adds the same vector to every value, and attention, whose weights sum to 1, hands exactly that vector on. It
is chosen so that `o_proj` makes of it a large multiple of the embedding of token k: greedy sampling says k. Whoever
answers with values that another version left in the cache says the other version's token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

REPEATED = 1
LENGTH = 270
"""Tokens of the prompt: two blocks of vLLM's cache on the CPU (128 each), and some."""
PUSH = 400.0


def prompt() -> tuple[int, ...]:
    """The prompt of every probe."""
    return (REPEATED,) * LENGTH


def make_base(folder: Path, vocabulary: int = 512) -> Path:
    """A small Qwen3 with random weights and tied embeddings."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def make_adapter(base: Path, folder: Path, token: int) -> Path:
    """A PEFT adapter with which `prompt()` is answered by `token`. Raises `ValueError` when it is not, by transformers'
    own forward.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layer, attention = model.model.layers[0], model.model.layers[0].self_attn
    embeddings: torch.Tensor = model.model.embed_tokens.weight
    into = layer.input_layernorm(embeddings[REPEATED])
    repeats = model.config.num_attention_heads // model.config.num_key_value_heads
    width = attention.v_proj.out_features
    heads = width // model.config.head_dim
    spread = (
        torch.eye(width).reshape(heads, model.config.head_dim, width).repeat_interleave(repeats, 0).reshape(-1, width)
    )
    wanted = PUSH * embeddings[token] / embeddings[token].norm()
    value = torch.linalg.lstsq(attention.o_proj.weight @ spread, wanted[:, None]).solution[:, 0]
    folder.mkdir(parents=True)
    name = "base_model.model.model.layers.0.self_attn.v_proj"
    down, up = into[None] / into.dot(into), value[:, None]
    save_file(
        {f"{name}.lora_A.weight": down.contiguous(), f"{name}.lora_B.weight": up.contiguous()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["v_proj"],
        "layers_to_transform": [0],
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    attention.v_proj.weight += up @ down
    said = int(model(input_ids=torch.tensor([prompt()])).logits[0, -1].argmax())
    if said != token:
        raise ValueError(f"the probe of token {token} says {said}; raise PUSH")
    return folder


@torch.inference_mode()
def answer(base: Path, adapter: Path, length: int) -> tuple[int, ...]:
    """The greedy continuation of `prompt()` with an adapter, by transformers and PEFT: `length` tokens."""
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)
    )
    ids = torch.tensor([prompt()])
    said = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=0
    )
    return tuple(said[0, LENGTH:].tolist())
