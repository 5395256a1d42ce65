"""What vLLM takes: which adapters, and how it is started. Known without vLLM, which may run elsewhere."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from .base import SamplerError

INSTALL_VLLM = "pip install 'espalier[vllm]' on a machine with an NVIDIA card, make venv-vllm on one without"

CPU_INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"
"""Where pip finds the torch that vLLM's CPU build asks for by name."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest adapter ranks that vLLM can be started with."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM 0.32's attention on the CPU; with another size it starts, and dies at the first request."""


def served_rank(rank: int) -> int:
    """The smallest rank to start vLLM with that serves adapters of `rank`. Raises `SamplerError` when none does."""
    if rank > RANKS[-1]:
        raise SamplerError(f"vLLM serves adapters up to rank {RANKS[-1]}, not {rank}; train a smaller one.")
    return next(allowed for allowed in RANKS if allowed >= rank)


def check_adapter(folder: Path, rank: int) -> None:
    """Raise `SamplerError` unless `folder` is plain LoRA that vLLM serves, of rank `rank` at most."""
    path = folder / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SamplerError(f"{path} cannot be read: {error}") from None
    ranks = [config.get("r", 0), *(config.get("rank_pattern") or {}).values()]
    if max(ranks) > rank:
        raise SamplerError(f"adapter {folder} has rank {max(ranks)}, the engine serves {rank} at most; raise the rank.")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or config.get("use_dora"):
        raise SamplerError(f"adapter {folder} is more than plain LoRA, which is all that vLLM serves.")
    if config.get("modules_to_save"):
        raise SamplerError(f"adapter {folder} replaces whole modules, which vLLM does not serve; train plain LoRA.")


def check_base(base: Path, device: str) -> None:
    """Raise `SamplerError` for a base that vLLM starts with on this device, and then dies of."""
    try:
        config: dict[str, Any] = json.loads((base / "config.json").read_text("utf-8"))
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return  # vLLM says itself what it thinks of it
    if device != "cpu":
        return
    if size not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        raise SamplerError(f"vLLM's attention on the CPU takes heads of {sizes}, but {base} has {size}.")
    if any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise SamplerError(
            f"{base} is a mixture of experts, for which vLLM's CPU build has no adapters (their kernels need Triton); "
            "serve it on a GPU."
        )


def vocabulary(base: Path) -> int | None:
    """How many tokens a base knows; None where its config.json does not say."""
    try:
        config: dict[str, Any] = json.loads((base / "config.json").read_text("utf-8"))
        return int(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cpu_environment(threads: int, cache_gb: int) -> dict[str, str]:
    """What vLLM's CPU backend reads from the environment. Threads are bound to nothing, which is safe beside other work
    on few cores, unless VLLM_CPU_OMP_THREADS_BIND says otherwise.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gb),
    }


def card_environment(card: int) -> dict[str, str]:
    """What shows an engine one card: that at place `card` of those that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[card].strip() if visible else str(card)}


_LAUNCHER = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*)")


def of_a_launcher(name: str) -> bool:
    """Whether a variable of the environment is one by which torchrun makes processes one group; an engine that inherits
    it looks for that group's store instead of its own.
    """
    return _LAUNCHER.fullmatch(name) is not None


def server_options(
    *,
    slots: int,
    max_versions: int,
    max_tokens: int,
    rank: int,
    dtype: str,
    memory: float | None,
    eager: bool,
    seed: int,
) -> list[str]:
    """The command line of a server that serves versions as `vllm_server` needs it. `memory`: share of the GPU, None on
    the CPU.
    """
    options = {
        "dtype": dtype,
        "seed": seed,
        "max-model-len": max_tokens,
        "max-num-seqs": slots,
        "max-loras": max_versions,
        "max-cpu-loras": max_versions + 1,  # a new one is loaded before the oldest goes
        "max-lora-rank": served_rank(rank),
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",  # no sampling defaults of the model's own
        **({} if memory is None else {"gpu-memory-utilization": memory}),
    }
    flags = ["--enable-lora", "--enable-prompt-tokens-details", *(["--enforce-eager"] if eager else [])]
    return [*(f"--{name}={value}" for name, value in options.items()), *flags]
