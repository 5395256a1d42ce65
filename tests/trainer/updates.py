"""Trainers of a tiny base, and the gradient of one update."""

import torch
from espalier.configs.schema import RunConfig
from espalier.trainer.batch import Batch
from espalier.trainer.grpo.trainer import build


class Fixed:
    """A source of the same rows for some steps."""

    def __init__(self, rows, steps=1):
        self.rows, self.steps = rows, steps

    def next(self, step):
        return Batch(step, tuple(self.rows)) if step <= self.steps else None


def config_of(base, *, policy=None, sampling=None, seed=0, **trainer):
    policy = {"base": str(base), "device": "cpu", "lora": {"rank": 4, "alpha": 16}, **(policy or {})}
    trainer = {"steps": 1, "groups": 2, "group_size": 4, "learning_rate": 1e-2, "micro_batch": 4, **trainer}
    episode = {"max_prompt_tokens": 32, "max_tokens": 64, "max_turn_tokens": 16}
    return RunConfig(policy=policy, trainer=trainer, sampling=sampling or {}, episode=episode, seed=seed)


def make(base, folder, rows=(), finished=lambda *_: False, **options):
    """A trainer whose adapter does something: in a new one B is zero, which hides the gradient of A."""
    config = config_of(base, **options)
    source = Fixed(rows, config.trainer.steps)
    trainer = build(config, base, output=folder, source=source, finished=finished)
    torch.manual_seed(1)
    for name, parameter in trainer.adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return trainer


def gradient(trainer, rows=None, window=None):
    """Loss and gradient of one update, before clipping and stepping."""
    windows = [window] if window else trainer.windows_of(Batch(1, tuple(rows)))
    trainer.model.zero_grad()
    loss = sum(float(trainer.training_step(trainer.model, {"window": w})) for w in windows)
    return loss, torch.cat([p.grad.flatten() for p in trainer.adapter.parameters() if p.requires_grad])


def changed(a, b):
    return float((a - b).abs().max() / b.abs().max())
