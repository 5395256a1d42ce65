"""Loading the base into the trainer, and moving adapter weights between the model and disk.

Always true: the base is never changed; an adapter's folder is the same bytes for the same weights (its configuration is
written sorted).
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configs.schema import PolicySection
from .errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def resolve_device(name: str) -> str:
    """ "cpu" or "cuda". Raises UserError when CUDA is asked for and not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            'policy.device = "cuda", but this machine has no CUDA device that torch can use; set it to "cpu" or "auto"'
        )
    return name


def load_base(base: Path, section: PolicySection) -> PreTrainedModel:
    """The frozen base, as the section asks for it. Raises UserError when this machine cannot do that."""
    device = resolve_device(section.device)
    if section.attention == "sdpa":
        _refuse_capped_attention(base)
    kwargs: dict[str, Any] = {"dtype": getattr(torch, section.dtype), "attn_implementation": section.attention}
    if section.quantization == "4bit":
        if device != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                'policy.quantization = "4bit" needs a CUDA device and bitsandbytes (pip install bitsandbytes); '
                'set policy.quantization = "none" here'
            )
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, **kwargs)
    return model


def _refuse_capped_attention(base: Path) -> None:
    """Gemma 2 and its kin squash attention scores, which torch's sdpa cannot and leaves out without a word."""
    config = AutoConfig.from_pretrained(base, local_files_only=True).get_text_config()
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        raise UserError(
            f'{base} squashes attention scores (attn_logit_softcapping = {cap}), which policy.attention = "sdpa" '
            'ignores; set policy.attention = "eager"'
        )


def logit_rules(config: PreTrainedConfig) -> tuple[float | None, float]:
    """What a model does to the product of hidden state and output embedding: (cap, scale), for cap * tanh(scale * x /
    cap); a cap of None is none.

    The names under which transformers' models keep them are those that TRL's `add_fused_lm_head` reads.
    """
    text = config.get_text_config()
    cap: float | None = getattr(text, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (scale := getattr(text, name, None)) is not None:
            return cap, float(scale)
    divisor = getattr(text, "logits_scaling", None)
    if divisor is None:
        return cap, 1.0
    return cap, float(divisor) if text.model_type == "hyperclovax" else 1.0 / float(divisor)


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base, local_files_only=True)
    return tokenizer


def lora_config(section: PolicySection) -> LoraConfig:
    """The adapter to train: that of `from_adapter` where given, else a new one. Raises UserError for an adapter that
    is not LoRA.
    """
    if section.from_adapter is not None:
        folder = Path(section.from_adapter).expanduser()
        if not (folder / ADAPTER_CONFIG).is_file():
            raise UserError(f"policy.from_adapter = {folder} holds no {ADAPTER_CONFIG}, so it is not a PEFT adapter")
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            raise UserError(f"policy.from_adapter = {folder} is a {config.peft_type} adapter; Espalier trains LoRA")
        config.inference_mode = False
        return config
    lora = section.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT declares int and computes with any number
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights under PEFT's names, on the CPU, in the dtype they are trained in."""
    state = get_peft_model_state_dict(model)
    return {name: state[name].detach().cpu().contiguous() for name in sorted(state)}


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter in PEFT's format; the same weights give the same bytes."""
    save_file(adapter_tensors(model), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Sets, whose order differs from process to process, as sorted lists; enumerations and paths as text."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def read_adapter(model: PeftModel, folder: Path) -> None:
    """Load an adapter's weights into `model`. Raises UserError when they are not those of its adapter."""
    weights = load_file(folder / ADAPTER_WEIGHTS)
    expected = get_peft_model_state_dict(model)
    wrong = sorted(set(weights) ^ set(expected)) or [n for n in weights if weights[n].shape != expected[n].shape]
    if wrong:
        raise UserError(
            f"the adapter in {folder} does not fit the model: {wrong[0]} is missing, unknown or of another shape"
        )
    set_peft_model_state_dict(model, weights)
