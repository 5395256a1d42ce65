"""A base of random weights with the exact sizes of a real model, which the run takes as it would take that model.

Always true: it is made in the dtype and on the device asked for, so that a 4B base never stands anywhere in float32; it
has the tokenizer shipped with the tiny policy. Rows of the embedding behind that tokenizer's tokens are padding and
zero, as are those of the tokens that end a turn: with top-k 20 neither is ever among the likeliest, so that every turn
is made of known tokens and as long as it may be.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from espalier.rollouts.render import make_renderer
from espalier.trainer.model import load_tokenizer
from espalier.trainer.policy import resolve_base
from espalier.trainer.shapes import Shape
from transformers import AutoModelForCausalLM, Qwen3Config

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def make_base(folder: Path, shape: Shape, dtype: str, device: str) -> None:
    """Write a Qwen3 of `shape` with random weights to `folder`."""
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tie_word_embeddings,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    shipped = resolve_base("tiny")
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[len(load_tokenizer(shipped)) :] = 0.0
        embedding[list(make_renderer(shipped, thinking=True).stop_ids)] = 0.0
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(shipped / name, folder)
