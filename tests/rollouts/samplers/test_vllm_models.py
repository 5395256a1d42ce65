"""Model families that transformers, PEFT and vLLM share, made small here: the log-probabilities are the trainer's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import small_policy as small
import torch
from espalier.rollouts.samplers.base import SampleRequest, SamplerError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm sets it up in an environment of its own")

from espalier.rollouts.samplers.vllm import VllmSampler

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "qwen2.5": Qwen2Config(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "gemma": Gemma2Config(**SIZES, head_dim=32, query_pre_attn_scalar=32),
}
EXPERTS = Qwen3MoeConfig(**SIZES, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)


def make(name: str, folder: Path) -> tuple[Path, Path]:
    """A model with random weights, and an adapter for it."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    base = folder / "base"
    model.save_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.05)
    adapter = folder / "adapter"
    tuned.save_pretrained(adapter)
    return base, adapter


@pytest.mark.parametrize("name", list(MODELS))
async def test_logprobs_are_those_of_the_trainers_forward(tmp_path: Path, name: str) -> None:
    base, adapter = make(name, tmp_path)
    sampler = await asyncio.to_thread(VllmSampler, base, slots=4, max_versions=2, max_tokens=200, rank=8)
    try:
        await sampler.publish(small.version(0, base, base))
        await sampler.publish(small.version(1, adapter, base))
        for number in (0, 1):
            # Gemma's capped attention is in transformers' eager form only; the trainer refuses the other
            model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
            if number:
                model = PeftModel.from_pretrained(model, adapter)
            prompt = tuple(range(3, 60))
            sample = await sampler.sample(SampleRequest("s", prompt, number, 0, 24, ()))
            with torch.inference_mode():
                ids = torch.tensor([[*prompt, *sample.tokens]])
                table = torch.log_softmax(model.eval()(ids).logits[0, len(prompt) - 1 : -1], -1)
            wanted = table.gather(1, ids[0, len(prompt) :, None])[:, 0]
            assert (torch.tensor(sample.logprobs) - wanted).abs().max() < 1e-4
    finally:
        await sampler.close()


def test_a_mixture_of_experts_is_refused_on_the_cpu_and_says_why(tmp_path: Path) -> None:
    EXPERTS.save_pretrained(tmp_path)
    with pytest.raises(SamplerError, match=r"mixture of experts.*Triton"):
        VllmSampler(tmp_path)
