"""TRL's configuration out of a run's, and what TRL's losses are."""

from __future__ import annotations

from typing import get_args

from trl.trainer.grpo_config import GRPOConfig

from ...configs.schema import Loss, RunConfig
from ..parallel import WAIT_SECONDS

LOSS_TYPES: tuple[str, ...] = get_args(Loss)

ROW_MEAN = frozenset({"grpo", "sapo", "luspo", "dr_grpo"})
"""Losses that TRL divides by the rows of a micro-batch. bnpo divides by its tokens, the others by
`num_items_in_batch`.
"""

CISPO_HIGH = 5.0
"""Upper clip of CISPO where none is configured, as ScaleRL (arXiv 2510.13786) and TRL's documentation advise."""


def grpo_config(config: RunConfig, output: str, updates: int, cpu: bool) -> GRPOConfig:
    """TRL's configuration of a run with `updates` optimizer updates to come."""
    section = config.trainer
    correction = section.off_policy_correction
    high = section.epsilon_high
    return GRPOConfig(
        output_dir=output,
        seed=config.seed,
        use_cpu=cpu,
        ddp_timeout=WAIT_SECONDS,
        bf16=False,  # the base is loaded in its dtype and the adapter stays fp32: no autocast
        max_steps=max(updates, 1),
        per_device_train_batch_size=2,  # of the placeholder data set; our rows are cut by `micro_batches`
        gradient_accumulation_steps=1,
        num_generations=2,
        max_completion_length=config.episode.max_tokens,
        temperature=config.sampling.temperature,
        loss_type=section.loss,
        importance_sampling_level=section.importance_sampling_level,
        epsilon=section.epsilon,
        epsilon_high=CISPO_HIGH if high is None and section.loss == "cispo" else high,
        beta=section.beta,
        entropy_coef=section.entropy_bonus,
        vllm_importance_sampling_correction=correction != "none",
        vllm_importance_sampling_mode="token_truncate" if correction == "none" else correction,
        vllm_importance_sampling_clip_max=section.off_policy_cap,
        vllm_importance_sampling_clip_min=section.off_policy_floor,
        off_policy_mask_threshold=section.off_policy_mask_threshold,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.lr_schedule,
        warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        optim="adamw_torch",
        gradient_checkpointing=config.policy.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        remove_unused_columns=False,
    )
