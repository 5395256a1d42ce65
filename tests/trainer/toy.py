"""A base policy that can be trained in seconds, and an environment that it can get better at."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

import gymnasium
import torch
from espalier.configs.schema import RunConfig
from espalier.envs.core import Action, AgentEnv, Observation
from espalier.envs.tools import Tool, tool
from espalier.rollouts.render import make_renderer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
LETTERS = "abcdefgh"
ENV_ID = "Letters-v0"


@tool(effect="reads", context=False)
def look() -> str:
    """Look around."""
    return "nothing"


class Letters(AgentEnv):
    """Begin the answer with "a" or "b"; a base that says any of eight letters is right one time in four."""

    @property
    def tools(self) -> Sequence[Tool]:
        return (look,)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        task = (options or {})["task"]
        letter = LETTERS[crc32(task.id.encode()) % 2]
        return Observation(({"role": "user", "content": f"say {letter}"},)), {"task": task}

    def step(self, action: Action) -> Any:
        reward = float(action.text.startswith(("a", "b")))
        return Observation(), reward, True, False, {"tool_errors": 0, "soft": reward}


gymnasium.register(id="Letters-v0", entry_point=Letters, order_enforce=False, disable_env_checker=True)


def write_base(folder: Path) -> Path:
    """A Qwen3 of two layers that answers every prompt with a few letters and a stop token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates" / "qwen3.jinja"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([template.read_text("utf-8")], trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in MARKUP])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template.read_text("utf-8"), encoding="utf-8")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the embedded sampler is exact to the bit for multiples of 16, vLLM on the CPU begins at 32
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    draw = random.Random(0)
    ids = {c: tokenizer.token_to_id(c) for c in LETTERS}
    renderer = make_renderer(folder, thinking=False)
    leads = [
        list(renderer.first_prompt(({"role": "user", "content": f"say {c}"},), [look.to_openai(terse=False)]))
        for c in LETTERS[:2]
    ]
    end = tokenizer.token_to_id("<|im_end|>")
    for step in range(40):
        lead = leads[step % 2]
        rows, labels = [], []
        for _ in range(16):
            said = [ids[draw.choice(LETTERS)] for _ in range(3)] + [end]
            rows.append(lead + said)
            labels.append([-100] * len(lead) + said)
        loss = model(input_ids=torch.tensor(rows), labels=torch.tensor(labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def run_config(base: Path, out: Path, **changes: Any) -> RunConfig:
    """A run of a few seconds; `changes` are sections, merged key by key."""
    values: dict[str, Any] = {
        "name": "toy",
        "out": out,
        "policy": {"base": str(base), "device": "cpu", "lora": {"rank": 4, "alpha": 8}},
        "env": {"id": ENV_ID, "task_count": 40},
        "episode": {
            "max_turns": 2,
            "max_prompt_tokens": 400,
            "max_tokens": 440,
            "max_turn_tokens": 12,
            "max_seconds": 60.0,
            "turn_seconds": 30.0,
            "step_seconds": 10.0,
        },
        "sampler": {"slots": 32, "threads": 1},
        "trainer": {"steps": 3, "groups": 4, "group_size": 4, "learning_rate": 2e-2, "micro_batch": 8, "threads": 1},
        "schedule": {"checkpoint_every": 2},
        "eval": {"tasks": 12, "every": 2, "every_tasks": 8},
        "tracking": {"wandb": "off"},
    }
    for section, value in changes.items():
        values[section] = {**values[section], **value} if isinstance(value, dict) and section in values else value
    return RunConfig(**values)
