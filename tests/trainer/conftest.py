"""A tiny random Qwen3 and its tokenizer on disk, and rows to train it on."""

import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# importlib mode puts no test folder on sys.path; helpers of this one live beside the tests
sys.path.insert(0, str(Path(__file__).parent))

import random_rows
from random_rows import VOCAB


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a random Qwen3 with 2 layers."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    vocab = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_rows():
    """The maker of rows, deterministic by seed."""
    return random_rows.make_rows


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory):
    """The folder of toy.py's policy."""
    import toy

    return toy.write_base(tmp_path_factory.mktemp("toy"))
