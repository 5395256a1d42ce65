"""What Espalier relies on inside TRL and transformers, pinned: a change there must be looked at before training.

To accept a new version: read the difference of the methods named in the failure, re-check what stands beside them
below, run tests/trainer/test_grpo.py, then put the new digests here and the new pins into pyproject.toml.
"""

import hashlib
import importlib.metadata
import inspect

import pytest
from espalier.trainer.grpo.trainer import OnlineGRPOTrainer
from transformers import Trainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.grpo_trainer import GRPOTrainer

RELIED_ON = {
    GRPOTrainer._compute_loss: "the names read from `inputs`; which normaliser each loss uses (see "
    "OnlineGRPOTrainer._weight); that importance_sampling_ratio is applied exactly if use_vllm; that entropy_coef "
    "scales a mean over the micro-batch",
    GRPOTrainer._get_per_token_logps_and_entropies: "its parameters and its three results",
    GRPOTrainer._generate_and_score_completions: "the formulas of importance weights (trainer/correction.py) and of "
    "advantages (trainer/advantage.py)",
    GRPOTrainer._prepare_inputs: "that nothing else happens there than generating, shuffling and splitting",
    GRPOTrainer.training_step: "that it only counts and times around Trainer.training_step",
    GRPOTrainer.get_train_dataloader: "that what we replace only batches and repeats prompts",
    GRPOTrainer.get_off_policy_mask: "that it reads the log-probabilities of the sampler",
    GRPOTrainer.log: "that metrics are averaged and cleared there",
    Trainer.training_step: "that it calls _prepare_inputs, compute_loss, backward once and scales by nothing",
    Trainer._run_epoch: "that each item of the loader is one update, logged once, with control looked at after",
    Trainer._prepare_for_training: "that optimizer and schedule made before are kept",
    Trainer.create_optimizer: "that an optimizer made before is kept",
}

PINNED = {
    "GRPOTrainer._compute_loss": "80295546bbdbf6f7",
    "GRPOTrainer._get_per_token_logps_and_entropies": "ea73c3909275851d",
    "GRPOTrainer._generate_and_score_completions": "1fa48922792dcd5c",
    "GRPOTrainer._prepare_inputs": "f824e7fb07147956",
    "GRPOTrainer.training_step": "9e18632f7dd8e8d8",
    "GRPOTrainer.get_train_dataloader": "2bffe5a57c539e17",
    "GRPOTrainer.get_off_policy_mask": "8ee1e196461141a7",
    "GRPOTrainer.log": "1e7772819cc8cf09",
    "Trainer.training_step": "e9760c8ee10308d5",
    "Trainer._run_epoch": "ebe374933064ecd6",
    "Trainer._prepare_for_training": "f55950593d7e10c0",
    "Trainer.create_optimizer": "c798977d9dca3601",
}


def digest(function):
    return hashlib.sha256(inspect.getsource(inspect.unwrap(function)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("function", RELIED_ON, ids=lambda f: f.__qualname__)
def test_what_we_rely_on_is_what_we_read(function):
    name = function.__qualname__
    assert digest(function) == PINNED[name], f"{name} has changed; re-check: {RELIED_ON[function]}"


def test_versions():
    assert importlib.metadata.version("trl").startswith("1.16.")
    assert importlib.metadata.version("transformers") == "5.19.0"


def test_every_override_overrides_something_pinned():
    """A method of TRL or transformers that we replace must be pinned above, or be public and documented as a hook."""
    public = {"__init__", "floating_point_ops"}
    ours = {name for name, value in vars(OnlineGRPOTrainer).items() if inspect.isfunction(value)}
    theirs = {name for name in ours if hasattr(GRPOTrainer, name)}
    assert theirs - public <= {name.rsplit(".", 1)[1] for name in PINNED}


@pytest.mark.parametrize("name", sorted({"training_step", "_prepare_inputs", "_compute_loss", "get_train_dataloader"}))
def test_overrides_take_what_is_passed(name):
    theirs = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
    ours = list(inspect.signature(getattr(OnlineGRPOTrainer, name)).parameters)
    assert ours == theirs


def test_the_head_takes_what_we_pass():
    names = list(inspect.signature(ChunkedLogProbFunction.forward).parameters)
    assert names == [
        "ctx",
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ]


def test_control_a_changed_method_is_noticed():
    class Changed(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    assert digest(Changed._compute_loss) != PINNED["GRPOTrainer._compute_loss"]
