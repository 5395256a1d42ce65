"""The schema of a run, one docstring a field. Pure data: no torch, no other room.

Combinations that cannot work are refused here, when a configuration is parsed, with a sentence that names the keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class LoraSection(Section):
    """The adapter that is trained (PEFT)."""

    rank: PositiveInt = 16
    """Rank of the update matrices."""
    alpha: PositiveFloat = 32.0
    """Scale; the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input. Not 0 makes trainer and sampler differ."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Which linear layers get an adapter."""

    @model_validator(mode="after")
    def _refuse_the_head(self) -> Self:
        if "lm_head" in self.target_modules:
            raise ValueError("policy.lora.target_modules must not name lm_head: the loss reads its frozen weights")
        return self


class PolicySection(Section):
    """The model."""

    base: str = "tiny"
    """"tiny" or "tiny-code" (shipped: for spreadsheets, for coding), a folder with weights and tokenizer, or a model id
    in the Hugging Face cache.
    """
    from_adapter: Path | None = None
    """Start from this PEFT adapter instead of a new one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen base in the trainer."""
    quantization: Literal["none", "4bit"] = "none"
    """"4bit" loads the base with bitsandbytes NF4 (QLoRA); CUDA only."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more compute."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of the trainer's forward."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where the trainer's model stands."""
    lora: LoraSection = LoraSection()
    """The adapter."""

    @model_validator(mode="after")
    def _refuse_what_no_device_runs(self) -> Self:
        if self.quantization == "4bit" and self.device == "cpu":
            raise ValueError('policy.quantization = "4bit" needs policy.device = "cuda" (bitsandbytes)')
        if self.dtype == "float16" and self.device == "cpu":
            raise ValueError('policy.dtype = "float16" cannot be trained on policy.device = "cpu"; use "bfloat16"')
        if self.attention == "flash_attention_2" and (self.dtype == "float32" or self.device == "cpu"):
            raise ValueError(
                'policy.attention = "flash_attention_2" needs policy.device = "cuda" and a 16-bit policy.dtype'
            )
        return self


class EnvSection(Section):
    """The environment and its tasks."""

    id: str = "espalier/Spreadsheet-v0"
    """A registered Gymnasium id."""
    kwargs: dict[str, str | int | float | bool | list[str] | None] = Field(default_factory=dict)
    """Passed to the environment's constructor as they stand."""
    tasks: str = "generated"
    """"generated" (seeded families), a SpreadsheetBench folder, or a Spreadsheet-RL parquet file."""
    task_count: PositiveInt = 2000
    """How many training tasks to generate (or the most to take from a data set)."""
    tools: tuple[str, ...] = ()
    """Which tools the policy is shown, by name; empty: all of them."""
    terse: bool = False
    """Shortest tool schemas (names and types) instead of full descriptions."""
    system_prompt: str = ""
    """System message; empty: none beyond the tools that the template adds."""
    processes: NonNegativeInt = 0
    """Processes that the environments run in, so that their work and the sampler's do not wait for one interpreter
    lock; 0: threads of the sampler's own process."""
    draw: Literal["uniform", "difficulty"] = "uniform"
    """"difficulty" draws tasks in proportion to the variance of their reward, p(1-p), with a floor; p is what was
    observed of the task and of its family."""


Overflow = Literal["failure", "grade", "drop"]


class EpisodeSection(Section):
    """Budgets of one episode."""

    max_turns: PositiveInt = 20
    """Samples an episode may take."""
    max_prompt_tokens: PositiveInt = 4096
    """Longest first prompt; a longer one is a typed failure (overflow), never cut in silence."""
    max_tokens: PositiveInt = 32768
    """All tokens of a sequence: prompt, samples, tool results."""
    max_turn_tokens: PositiveInt = 4096
    """Tokens of one sample."""
    max_seconds: PositiveFloat = 1800.0
    """Wall time of one episode."""
    turn_seconds: PositiveFloat = 300.0
    """Deadline of one sample."""
    step_seconds: PositiveFloat = 180.0
    """Deadline of one environment step."""
    on_overflow: Overflow = "failure"
    """An episode that a budget cut: "failure" keeps it with reward 0, "grade" keeps it with the environment's verdict
    on what it left, "drop" makes it a typed failure that is counted and never trained on (an evaluation then counts it
    as a miss). Time that runs out while a sample is awaited is a failure of the sampler, never a reward of 0."""
    cut_turns: Literal["mask", "train"] = "mask"
    """The tokens of a turn that `max_turn_tokens` or `max_tokens` cut, where the episode is kept: "mask" records them
    without training on them, "train" trains them with the episode's reward, so that rambling is paid for."""
    thinking: bool = False
    """Let the template's thinking mode on."""


class GraphSection(Section):
    """The operation graph: environment work that was done once is not done again, in this epoch or a later one."""

    enabled: bool = True
    """Share the outcomes of turns between episodes that stand in the same state of the same task."""
    path: Path | None = None
    """File that keeps them; none: graph.sqlite in the run's folder."""
    memory_mb: PositiveInt = 256
    """MiB of outcomes in memory."""
    disk_mb: NonNegativeInt = 1024
    """MiB of outcomes in the file, the least recently used tasks go first; 0: nothing is written."""
    kept_mb: PositiveInt = 256
    """MiB of environment states that are kept to go on from."""
    live: NonNegativeInt = 0
    """Environments alive at once; 0: as many as there are episodes. Fewer save memory; where episodes seldom meet in
    one state, they then wait for each other."""
    verify_share: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of the episodes whose every turn is carried out again afterwards and compared: a tool that then gives
    something else is no longer shared in that task, and the graph of that task is dropped."""


class BranchingSection(Section):
    """Groups that grow as trees: some episodes begin at the start, others leave one of those at a turn."""

    roots: NonNegativeInt = 0
    """Episodes of a group that begin at the start; the rest of `trainer.group_size` leave one of them. 0: all of them
    begin there, and there are no trees."""
    at: Literal["random", "entropy", "value"] = "random"
    """Where trajectories are left: at any turn; at the turn whose tokens were least likely; at the turn behind which
    outcomes vary most."""
    rounds: PositiveInt = 1
    """Rounds that the branches are dealt over; each looks at what ended before it."""
    advantage: Literal["tree", "group"] = "tree"
    """"tree": episodes are compared within their tree and, between trees, with the whole group (Tree-GRPO); "group":
    with the whole group only."""
    max_tokens: NonNegativeInt = 0
    """Sampled tokens of a group; a branch that is not expected to fit is not begun. 0: no bound."""
    max_turns: NonNegativeInt = 0
    """Turns of a group, each of which is a step of an environment; as `max_tokens`."""


class SamplingSection(Section):
    """How training episodes are drawn."""

    temperature: NonNegativeFloat = 1.0
    """Softmax temperature; 0 is greedy (evaluation only)."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus mass."""
    top_k: NonNegativeInt = 0
    """Keep the k likeliest tokens; 0: all."""


class SamplerSection(Section):
    """Who makes the tokens."""

    kind: Literal["torch", "vllm", "vllm-server"] = "torch"
    """"torch": the embedded sampler. "vllm": a vLLM engine of the run's own. "vllm-server": a vLLM server."""
    url: str = Field(default="", pattern=r"^(https?://.+)?$")
    """vLLM server only: where it answers; empty: Espalier starts one on this machine, watches and stops it."""
    slots: PositiveInt = 64
    """Episodes decoded at once."""
    threads: PositiveInt = 2
    """CPU threads of the sampler."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the sampler's weights and cache; only float32 on the CPU is batch-invariant to the bit."""
    max_versions: int = Field(default=4, ge=2)
    """Versions resident at once: the latest, leased ones, spare."""
    replicas: PositiveInt = 1
    """Engines side by side, each on a card that no training process uses; a group stays with one of them."""
    gpu_memory: float | None = Field(default=None, gt=0.0, lt=1.0)
    """vLLM only: share of its card's memory that an engine may use (weights, keys and values); none: what the memory
    plan leaves."""
    sharing: Literal["auto", "split", "sleep"] = "auto"
    """vLLM on the trainer's card: "split" the memory for good, or "sleep" (kind "vllm", synchronous): the engine gives
    it back while the trainer works. "auto": split where both fit."""
    cache_gb: PositiveInt = 1
    """vLLM on the CPU only: GiB of keys and values."""
    eager: bool = False
    """vLLM only: no compiled graphs; starts faster, decodes slower. On the CPU adapters are always served so."""

    @model_validator(mode="after")
    def _refuse_a_url_that_nobody_asks(self) -> Self:
        if self.url and self.kind != "vllm-server":
            raise ValueError(f'sampler.url is only for sampler.kind = "vllm-server", not {self.kind!r}')
        if self.url and self.replicas > 1:
            raise ValueError("sampler.url names one server, so sampler.replicas must be 1")
        if self.sharing == "sleep" and self.kind != "vllm":
            raise ValueError(f'sampler.sharing = "sleep" is only for sampler.kind = "vllm", not {self.kind!r}')
        return self


Loss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
"""Every loss type of the installed TRL's GRPOConfig (a test reads TRL's source and compares)."""


class TrainerSection(Section):
    """GRPO, by TRL."""

    steps: PositiveInt = 60
    """Optimizer steps (one batch of fresh groups each)."""
    groups: PositiveInt = 32
    """Groups (tasks) a step."""
    group_size: int = Field(default=8, ge=2)
    """Episodes a group."""
    loss: Loss = "grpo"
    """TRL's `loss_type`."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """"sequence" with loss "grpo" is GSPO."""
    off_policy_correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "token_truncate"
    )
    """How recorded behaviour log-probabilities enter: truncated (TIS) or masked (MIS) importance weights, by token
    or by sequence."""
    off_policy_cap: PositiveFloat = 3.0
    """Largest importance weight."""
    off_policy_floor: PositiveFloat | None = None
    """Smallest importance weight, where there is one."""
    off_policy_mask_threshold: PositiveFloat | None = None
    """Mask sequences of negative advantage whose mean log-ratio to the behaviour policy exceeds it (DeepSeek-V3.2)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the batch, or not (Dr. GRPO)."""
    beta: NonNegativeFloat = 0.0
    """Weight of the KL to the frozen base."""
    entropy_bonus: float = 0.0
    """Weight of the entropy term."""
    epsilon: PositiveFloat = 0.2
    """Clip range of the importance ratio."""
    epsilon_high: PositiveFloat | None = None
    """Upper clip range where it differs (DAPO)."""
    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient clipping."""
    minibatches: PositiveInt = 1
    """Optimizer updates a batch of groups is split into."""
    micro_batch: PositiveInt = 32
    """Rows of one forward and backward pass."""
    shared_prefix: Literal["auto", "tree", "flat"] = "auto"
    """What rows have in common: "tree" computes it once, among all rows of an update (exact: the first step that shares
    anything compares its gradient with the other path's), "flat" only a group's prompt; "auto" is "tree" on the CPU,
    where it was measured, and "flat" elsewhere.
    """
    drop_no_signal: bool = True
    """Drop groups whose rewards are all equal, and refill."""
    max_refills: NonNegativeInt = 2
    """Groups that a dropped one may be replaced by, one after another, and rounds of episodes that stand in for
    those of a group that failed (trees have none); then the step trains on what there is."""
    threads: PositiveInt = 2
    """CPU threads of the trainer."""

    @model_validator(mode="after")
    def _refuse_what_trl_cannot(self) -> Self:
        if self.loss == "vespo" and self.off_policy_correction.startswith("sequence"):
            raise ValueError(
                'trainer.loss = "vespo" weighs sequences itself; set trainer.off_policy_correction to '
                '"token_truncate", "token_mask" or "none"'
            )
        if self.loss == "vespo" and self.importance_sampling_level == "sequence":
            raise ValueError(
                'trainer.loss = "vespo" weighs sequences itself; set trainer.importance_sampling_level to "token"'
            )
        if self.off_policy_floor is not None and self.off_policy_floor >= self.off_policy_cap:
            raise ValueError("trainer.off_policy_floor must be smaller than trainer.off_policy_cap")
        return self


class ScheduleSection(Section):
    """How sampling and training take turns, and what is kept."""

    kind: Literal["sync", "async"] = "sync"
    """"sync": sample, train, publish, repeat. "async": sampling goes on while the trainer works."""
    max_staleness: NonNegativeInt = 1
    """async only: how many steps older than the policy that is trained a sampling version may be. Work that would grow
    older is begun later instead of thrown away."""
    checkpoint_every: PositiveInt = 10
    """Steps between commit records."""
    keep_recent: PositiveInt = 2
    """Policy versions kept besides the best and the leased ones."""


class EvalSection(Section):
    """Held-out evaluation."""

    tasks: PositiveInt = 400
    """Held-out tasks of the first and the last evaluation."""
    every: NonNegativeInt = 0
    """Steps between evaluations in training; 0: only before and after."""
    every_tasks: PositiveInt = 100
    """Tasks of an evaluation within training."""
    greedy: bool = True
    """Report greedy pass@1 beside the sampled one."""
    early_stop: PositiveInt | None = None
    """Stop after so many evaluations in training without a new best."""
    deadline_s: PositiveFloat | None = None
    """Stop training after so many seconds of training, then evaluate."""


class AlarmSection(Section):
    """Bounds whose crossing is said aloud; `stop` ends the run instead."""

    min_entropy: NonNegativeFloat = 0.005
    """Mean token entropy in nats."""
    max_kl: PositiveFloat = 2.0
    """Mean k3 estimate of KL(behaviour || policy) a token, nats."""
    max_length_ratio: PositiveFloat = 4.0
    """Mean sampled tokens an episode, over that of the first step."""
    max_invalid_calls: float = Field(default=0.9, ge=0.0, le=1.0)
    """Share of calls answered by a ToolError."""
    max_logprob_gap: PositiveFloat = 0.1
    """Mean |log-probability of the trainer - of the sampler| of a token just sampled, nats (asynchronously: of a few
    sampled by each version as it is published); crossing it always ends the run: sampler and trainer no longer compute
    the same policy."""
    stop: bool = False
    """End the run when one of them is crossed."""


class TrackingSection(Section):
    """Where metrics go besides metrics.jsonl."""

    wandb: Literal["off", "offline", "online"] = "offline"
    """Weights & Biases mode."""
    project: str = "espalier"
    """Its project."""


class RunConfig(Section):
    """Everything about a run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder name under `out`."""
    seed: NonNegativeInt = 0
    """Of everything random."""
    out: Path = Path("runs")
    """Where runs are written."""
    policy: PolicySection = PolicySection()
    """The model."""
    env: EnvSection = EnvSection()
    """The environment and its tasks."""
    episode: EpisodeSection = EpisodeSection()
    """Budgets of one episode."""
    graph: GraphSection = GraphSection()
    """Environment work done once."""
    branching: BranchingSection = BranchingSection()
    """Groups that grow as trees."""
    sampling: SamplingSection = SamplingSection()
    """How training episodes are drawn."""
    sampler: SamplerSection = SamplerSection()
    """Who makes the tokens."""
    trainer: TrainerSection = TrainerSection()
    """GRPO."""
    schedule: ScheduleSection = ScheduleSection()
    """How sampling and training take turns."""
    eval: EvalSection = EvalSection()
    """Held-out evaluation."""
    alarms: AlarmSection = AlarmSection()
    """What is worth an alarm."""
    tracking: TrackingSection = TrackingSection()
    """Where metrics go."""

    @model_validator(mode="after")
    def _refuse_degenerate(self) -> Self:
        if self.sampling.temperature == 0 or self.sampling.top_k == 1:
            key = "sampling.temperature = 0" if self.sampling.temperature == 0 else "sampling.top_k = 1"
            raise ValueError(f"{key} makes every episode of a group the same, so nothing can be learnt")
        if self.episode.max_prompt_tokens >= self.episode.max_tokens:
            raise ValueError(
                "episode.max_prompt_tokens must be smaller than episode.max_tokens, or no token is left to sample"
            )
        if self.episode.max_turn_tokens > self.episode.max_tokens:
            raise ValueError("episode.max_turn_tokens must not exceed episode.max_tokens")
        if (self.trainer.groups * self.trainer.group_size) % self.trainer.minibatches:
            raise ValueError("trainer.minibatches must divide trainer.groups * trainer.group_size")
        needed = self.schedule.max_staleness + 2
        if self.schedule.kind == "async" and self.sampler.max_versions < needed:
            raise ValueError(
                f"schedule.max_staleness = {self.schedule.max_staleness} keeps {needed} versions in use, "
                f"sampler.max_versions is {self.sampler.max_versions}"
            )
        if self.schedule.kind == "async" and self.sampler.sharing == "sleep":
            raise ValueError(
                'sampler.sharing = "sleep" stops sampling while the trainer works, which schedule.kind = "async" is '
                "there to avoid; set one of them to another value"
            )
        if self.eval.early_stop is not None and self.eval.every == 0:
            raise ValueError("eval.early_stop counts evaluations in training, so eval.every must not be 0")
        if len(set(self.env.tools)) < len(self.env.tools):
            raise ValueError("env.tools names a tool twice")
        return self

    @model_validator(mode="after")
    def _refuse_what_no_tree_can(self) -> Self:
        section, trainer = self.branching, self.trainer
        if not section.roots:
            return self
        if section.roots >= trainer.group_size:
            raise ValueError(
                f"branching.roots = {section.roots} leaves none of trainer.group_size = {trainer.group_size} episodes "
                "to branch off"
            )
        if section.rounds > trainer.group_size - section.roots:
            raise ValueError(
                f"branching.rounds = {section.rounds} are more than the {trainer.group_size - section.roots} branches"
            )
        if self.episode.max_turns < 2:
            raise ValueError("branching needs episodes of two turns: episode.max_turns = 1 has none to leave one at")
        refused = why_no_trees(trainer)
        if refused is not None:
            raise ValueError(f"branching: {refused}")
        return self


def why_no_trees(trainer: TrainerSection) -> str | None:
    """What keeps a trainer from training groups that grew as trees; None: nothing."""
    correction = trainer.off_policy_correction
    weighs_sequences = {
        'trainer.loss = "vespo"': trainer.loss == "vespo",
        'trainer.importance_sampling_level = "sequence"': trainer.importance_sampling_level == "sequence",
        f'trainer.off_policy_correction = "{correction}"': correction.startswith("sequence"),
        "trainer.off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
    }
    for said, is_set in weighs_sequences.items():
        if is_set:
            return (
                f"{said} weighs whole sequences, but a branch trains only its own part of one, each turn with an "
                "advantage of its own; choose what weighs tokens"
            )
    return None
