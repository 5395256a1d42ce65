"""What a run will need, said before it begins: memory on the card, and what is missing.

Nothing is loaded, so a plan for a 4B model takes no memory. Sizes are bytes; GB is 1e9 bytes. Estimates err on the high
side: fragmentation, CUDA's context (about 0.5 GB) and libraries are counted in `OVERHEAD`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from ..configs.schema import RunConfig
from ..rollouts.render import RenderError, make_renderer
from ..rollouts.samplers.vllm_limits import INSTALL_VLLM
from .placement import Needs, Placement, place
from .shapes import Shape, find_model, find_shape
from .shipped import SHIPPED
from .speed import UTILISATION, find_card, sampled_limit, trained_limit

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGIT_TILE = 32768
"""Vocabulary entries that the trainer projects at once (`grpo.VOCAB_TILE`, which cannot be imported without torch)."""

CACHE_TOKENS = 65536
"""Tokens whose keys and values the embedded sampler keeps besides its slots' (its `cache_tokens`)."""

CPU = "the CPU"
NO_CARD = "a CUDA card (none here)"

OVERHEAD = 1.0e9
"""Bytes for CUDA's context, kernels' workspace and fragmentation; on the CPU for Python and its libraries."""


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the memory plan."""

    name: str
    bytes: float
    how: str


@dataclass(frozen=True, slots=True)
class Missing:
    """Something a run needs and this machine lacks, and the command that mends it."""

    what: str
    mend: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory plan (empty when the model's shape is unknown), the device it is for, what is missing, and in words
    how fast that device can be at most (empty where that is unknown).
    """

    device: str
    room: float
    parts: tuple[Part, ...]
    missing: tuple[Missing, ...]
    speed: str = ""

    @property
    def total(self) -> float:
        """Bytes of all parts together."""
        return sum(part.bytes for part in self.parts)


def make_plan(config: RunConfig) -> Plan:
    """Resolve a configuration on this machine without loading a model."""
    shape = find_shape(config.policy.base)
    device, room = _device(config)
    missing = _missing(config, shape)
    parts: tuple[Part, ...] = ()
    if shape:
        on_card = device != CPU and room > 0 and config.sampler.kind != "torch"
        placement = engine_placement(config, training=1) if on_card else None
        parts = tuple(memory(config, shape, 0.0 if device == CPU else room, placement))
    total = sum(part.bytes for part in parts)
    if parts and room and total > room:
        missing.append(
            Missing(
                f"memory: {total / 1e9:.1f} GB wanted, {room / 1e9:.1f} GB on {device}",
                "lower --trainer.micro_batch, --sampler.slots or --episode.max_tokens, "
                "set --policy.gradient_checkpointing true, or --policy.quantization 4bit",
            )
        )
    return Plan(device, room, parts, tuple(missing), expected_speed(config, shape, device) if shape else "")


def memory(config: RunConfig, shape: Shape, room: float = 0.0, placement: Placement | None = None) -> list[Part]:
    """The parts of the plan for the trainer's card; every formula stands in its `how`. `room`: bytes of the card, 0
    where there is none; `placement`: of the engines, where they are vLLM's.
    """
    held, passing = _trainer(config, shape)
    if config.sampler.kind == "torch":
        sampler = _embedded_sampler(config, shape)
    elif placement is not None and room:
        sampler = _vllm_on_a_card(config, shape, room, placement, sum(part.bytes for part in passing))
    else:
        sampler = _vllm_on_the_cpu(config, shape)
    return [*held, *passing, *sampler, Part("overhead", OVERHEAD, "context, workspace, fragmentation")]


def expected_speed(config: RunConfig, shape: Shape, device: str) -> str:
    """How fast `device` can sample and train at most; for a run that wants a card where there is none, of an H100."""
    card = find_card("H100" if config.policy.device == "cuda" and device == NO_CARD else device)
    if card is None:
        return ""
    length, slots = config.episode.max_tokens // 2, config.sampler.slots
    weights = float(BYTES[config.sampler.dtype]) * shape.active_parameters()
    sampled = sampled_limit(card, weights, float(length * _kv_bytes(config, shape)), slots)
    trained = trained_limit(card, shape.active_parameters(), config.policy.gradient_checkpointing)
    return (
        f"{card.name}: at most {sampled:,.0f} sampled tokens a second (its memory's bandwidth, {slots} episodes of "
        f"{length:,} tokens) and about {trained:,.0f} trained ({UTILISATION:.0%} of its operations)"
    )


def _trainer(config: RunConfig, shape: Shape) -> tuple[list[Part], list[Part]]:
    """What the trainer keeps, and what it needs besides while it works."""
    policy, trainer, episode = config.policy, config.trainer, config.episode
    rows = min(trainer.micro_batch, trainer.groups * trainer.group_size)
    tokens = rows * episode.max_tokens
    tile = min(LOGIT_TILE, shape.vocab_size)
    lora = shape.lora_parameters(policy.lora)
    held = [
        _weights(config, shape, "trainer's base, frozen"),
        Part("LoRA and optimizer", 16.0 * lora, f"{lora:,} parameters x 16 bytes (fp32 weight, gradient, two moments)"),
    ]
    passing = [
        _activations(config, shape, tokens, BYTES[policy.dtype]),
        Part(
            "logits, in tiles",
            float(tokens) * tile * 8,
            f"{tokens:,} tokens x {tile:,} of the vocabulary x 8 bytes (fp32, and its gradient)",
        ),
    ]
    return held, passing


def engine_placement(config: RunConfig, *, training: int) -> Placement:
    """Where this machine's cards have room for the run's engines while `training` of them train. Raises UserError."""
    cuda = import_module("torch").cuda
    room = float(cuda.get_device_properties(0).total_memory)
    return placement_in(config, find_shape(config.policy.base), cuda.device_count(), room, training)


def placement_in(config: RunConfig, shape: Shape | None, visible: int, room: float, training: int) -> Placement:
    """`place` with what the plan says that trainer and vLLM need."""
    needs = None
    if shape is not None:
        held, passing = (sum(part.bytes for part in parts) for parts in _trainer(config, shape))
        least = _vllm_fixed(config, shape) + config.episode.max_tokens * _kv_bytes(config, shape)
        needs = Needs(held + passing + OVERHEAD, held + OVERHEAD, least)
    return place(config, needs, visible=visible, room=room, training=training)


def _embedded_sampler(config: RunConfig, shape: Shape) -> list[Part]:
    slots, versions, served = config.sampler.slots, config.sampler.max_versions, BYTES[config.sampler.dtype]
    longest, per_token = config.episode.max_tokens, shape.kv_bytes_per_token(served)
    return [
        Part(
            "sampler's versions",
            float(served) * shape.parameters() * versions,
            f"{versions} resident x {shape.parameters():,} merged weights x {served} bytes",
        ),
        Part(
            "sampler's KV cache",
            float(slots) * longest * per_token,
            f"{slots} slots x {longest:,} tokens x {per_token:,} bytes",
        ),
        Part(
            "sampler's kept prompts",
            float(CACHE_TOKENS) * per_token,
            f"at most {CACHE_TOKENS:,} tokens x {per_token:,} bytes",
        ),
    ]


def _vllm_fixed(config: RunConfig, shape: Shape) -> float:
    """Bytes of vLLM's weights, adapters and workspace on a card."""
    width = BYTES[config.sampler.dtype]
    adapters = shape.lora_parameters(config.policy.lora) * config.sampler.max_versions
    return float(width) * (shape.parameters() + adapters) + OVERHEAD


def _kv_bytes(config: RunConfig, shape: Shape) -> int:
    return shape.kv_bytes_per_token(BYTES[config.sampler.dtype])


def _vllm_on_a_card(config: RunConfig, shape: Shape, room: float, placement: Placement, passing: float) -> list[Part]:
    """What an engine takes of the trainer's card: its whole share, of which keys and values are what the weights leave;
    by turns only what the trainer does not give back. `passing`: bytes that the trainer needs only while it works.
    """
    share = placement.memory * room
    tokens = max(0.0, share - _vllm_fixed(config, shape)) / _kv_bytes(config, shape)
    how = f"{placement.why}: {placement.memory:.2f} of the card, about {tokens:,.0f} tokens of keys and values"
    if config.sampler.url or 0 not in placement.cards:
        return [Part("vLLM", 0.0, "a server of its own" if config.sampler.url else how)]
    return [Part("vLLM", max(0.0, share - passing) if placement.sleeps else share, how)]


def _vllm_on_the_cpu(config: RunConfig, shape: Shape) -> list[Part]:
    section, width = config.sampler, BYTES[config.sampler.dtype]
    if section.url:
        return []
    adapters = float(width) * shape.lora_parameters(config.policy.lora) * section.max_versions
    count = section.replicas
    return [
        Part(
            "vLLM's base",
            count * float(width) * shape.parameters(),
            f"{shape.parameters():,} parameters x {width} bytes",
        ),
        Part("vLLM's adapters", count * adapters, f"{section.max_versions} resident"),
        Part("vLLM's KV cache", count * section.cache_gb * 2.0**30, f"sampler.cache_gb = {section.cache_gb}"),
    ]


def _weights(config: RunConfig, shape: Shape, name: str) -> Part:
    width = BYTES[config.policy.dtype]
    if config.policy.quantization == "4bit":
        rest = shape.parameters() - shape.linear_parameters()
        size = 0.53 * shape.linear_parameters() + width * rest
        return Part(
            name, size, f"{shape.linear_parameters():,} at 0.53 bytes (NF4 with its scales), the rest at {width}"
        )
    return Part(name, float(width) * shape.parameters(), f"{shape.parameters():,} parameters x {width} bytes")


def _activations(config: RunConfig, shape: Shape, tokens: int, width: int) -> Part:
    """Tensors kept for backward.

    A token in one block keeps, in elements: 5 hidden (two norms' in- and outputs, the sum), 3 query and 5 key/value
    widths (before and after norm and rope, attention's output), 4 intermediate (gate, up, activation, product; in a
    mixture, of each chosen expert).
    Counted as in Korthikanti et al. 2022 (arXiv 2205.05198, section 4), for a gated MLP and an attention that never
    stores its matrix. With checkpointing: one hidden a block, and one block in full.
    """
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    block = 5 * shape.hidden_size + 3 * q + 5 * kv + 4 * shape.mlp_width()
    layers = shape.num_hidden_layers
    if config.policy.gradient_checkpointing:
        elements, how = layers * shape.hidden_size + block, f"{layers} x {shape.hidden_size} + {block:,}"
    else:
        elements, how = layers * block, f"{layers} x {block:,}"
    return Part("activations", float(tokens) * elements * width, f"{tokens:,} tokens x ({how}) x {width} bytes")


def _device(config: RunConfig) -> tuple[str, float]:
    """The device the run would use, in words, and its memory in bytes."""
    torch = import_module("torch")
    if config.policy.device != "cpu" and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return str(card.name), float(card.total_memory)
    if config.policy.device == "cuda":
        return NO_CARD, 0.0
    return CPU, float(import_module("psutil").virtual_memory().available)


def _missing(config: RunConfig, shape: Shape | None) -> list[Missing]:
    found: list[Missing] = []
    policy = config.policy
    folder = find_model(policy.base)
    if folder is None:
        found.append(missing_model(policy.base))
    elif shape is None:
        found.append(
            Missing(f"a memory plan: the sizes of {policy.base} are not known", "check that the card is large")
        )
    if folder is not None:
        try:
            make_renderer(folder, thinking=config.episode.thinking)
        except RenderError as error:
            found.append(Missing(f"a chat template for episodes: {error}", "name another model in --policy.base"))
    if policy.device == "cuda" and not import_module("torch").cuda.is_available():
        found.append(Missing("CUDA: torch sees no GPU", "run on a machine with one (espalier doctor says more)"))
    if policy.quantization == "4bit" and find_spec("bitsandbytes") is None:
        found.append(Missing("bitsandbytes, for policy.quantization = 4bit", "pip install bitsandbytes"))
    if policy.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        found.append(Missing("flash-attn, for policy.attention", "pip install flash-attn, or --policy.attention sdpa"))
    if policy.from_adapter is not None and not (policy.from_adapter / "adapter_config.json").is_file():
        found.append(Missing(f"an adapter in {policy.from_adapter}", "name a folder that holds adapter_config.json"))
    if config.sampler.kind != "torch" and not config.sampler.url and find_spec("vllm") is None:
        found.append(Missing(f'vLLM, for sampler.kind = "{config.sampler.kind}"', INSTALL_VLLM))
    for engine in ("ironcalc", "formualizer"):
        try:
            metadata.version(engine)
        except metadata.PackageNotFoundError:
            found.append(Missing(f"the recalculation engine {engine}", f"pip install {engine}"))
    if config.env.tasks != "generated" and not Path(config.env.tasks).exists():
        found.append(Missing(f"data: {config.env.tasks}", "name an existing folder or parquet file in env.tasks"))
    return found


def missing_model(base: str) -> Missing:
    """What to say about a base that `find_model` does not find."""
    if base in SHIPPED:
        return Missing(f"the shipped policy {base}", "espalier make-policy, or install the package again")
    if Path(base).exists() or base.startswith((".", "/")):
        return Missing(f"the model: no config.json and weights in {base}", "name a folder that holds both")
    return Missing(f"the model {base}: not in the Hugging Face cache", f"hf download {base}")


def plan_text(config: RunConfig, plan: Plan) -> str:
    """The plan for a person to read."""
    lines = [f"{config.name}: {config.policy.base} on {plan.device}", ""]
    lines += [f"  {part.name:<24}{part.bytes / 1e9:9.2f} GB   {part.how}" for part in plan.parts]
    if plan.parts:
        room = f" of {plan.room / 1e9:.1f} GB" if plan.room else ""
        lines += [f"  {'together':<24}{plan.total / 1e9:9.2f} GB{room}", ""]
    else:
        lines += ["  no memory plan: the model's sizes are unknown until it is here", ""]
    lines += [f"  {plan.speed}", ""] if plan.speed else []
    if plan.missing:
        lines.append("missing:")
        lines += [f"  {missing.what}\n    -> {missing.mend}" for missing in plan.missing]
    else:
        lines.append("nothing is missing; run it without --dry-run")
    return "\n".join(lines)
