"""One of the processes that test_parallel.py starts: `peers.py losses|drift|run BASE OUT`."""

import json
import math
import os
import sys
from pathlib import Path

import torch
import toy
from espalier.configs.schema import RunConfig
from espalier.trainer.batch import Batch
from espalier.trainer.grpo.config import LOSS_TYPES
from espalier.trainer.grpo.trainer import build
from espalier.trainer.loop import train
from espalier.trainer.parallel import Shared, follows, shared_end, world
from random_rows import branching_rows, make_rows

STEPS = 3


class Fixed:
    """Batches of random rows, of which the processes get unequal numbers; those of the second step are trees."""

    def next(self, step):
        make = branching_rows if step == 2 else make_rows
        return Batch(step, tuple(make(11 + step, seed=step))) if step <= STEPS else None


def losses(base, out):
    """Train with every loss; the first process keeps adapters and numbers."""
    for loss in LOSS_TYPES:
        adapter, seen = fit(base, out, loss)
        if not follows():
            assert all(math.isfinite(v) for numbers in seen for v in numbers.values())
            torch.save(adapter, out / f"{loss}.pt")
            (out / f"{loss}.json").write_text(json.dumps(seen))


def drift(base, out):
    """The second process changes a weight after the second step."""
    fit(base, out, "dapo", drifting=True)


def fit(base, out, loss, drifting=False):
    """Train for some steps; returns the adapter's tensors and the numbers of each step."""
    torch.set_num_threads(1)
    config = RunConfig(
        policy={"base": str(base), "device": "cpu", "lora": {"rank": 4, "alpha": 16}},
        episode={"max_prompt_tokens": 32, "max_tokens": 64, "max_turn_tokens": 16},
        trainer={
            "steps": STEPS,
            "learning_rate": 1e-2,
            "micro_batch": 2,
            "minibatches": 2,
            "loss": loss,
            "importance_sampling_level": "sequence" if loss == "luspo" else "token",
            "beta": 0.1,
            "entropy_bonus": 0.05,
        },
    )
    seen = []

    def finished(batch, numbers):
        seen.append({k: v for k, v in numbers.items() if isinstance(v, float | int) and "seconds" not in k})
        return batch.step == STEPS

    def adapter():
        return [p for p in trainer.adapter.parameters() if p.requires_grad]

    source, ended = Fixed(), finished
    if world() > 1:
        ended = shared_end(adapter, None if follows() else finished)
        source = Shared(None if follows() else source)

    def drifted(batch, numbers):
        stop = ended(batch, numbers)
        if follows() and batch.step == 2:
            adapter()[0].data.add_(1e-3)
        return stop

    trainer = build(config, base, output=out / loss, source=source, finished=drifted if drifting else ended)
    trainer.train()
    return [p.detach().clone() for p in adapter()], seen


def run(base, out):
    """A whole run of the toy policy; the first process dies after step `DIE`."""
    config = toy.run_config(base, out, trainer={"steps": 4, "micro_batch": 3, "minibatches": 2})
    resume = (out / "toy" / "checkpoints").is_dir()

    def watch(row):
        if os.environ.get("DIE") == str(row.get("step")) and row["kind"] == "train":
            os._exit(9)

    result = train(config, resume=resume, on_event=watch)
    (out / f"result-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    {"losses": losses, "drift": drift, "run": run}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
