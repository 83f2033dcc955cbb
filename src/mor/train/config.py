"""`TrainConfig`: everything that defines a training run but its output folder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from mor.errors import ConfigError, nearest
from mor.model.config import MoRConfig
from mor.model.sharing import Initialization
from mor.train.budget import Budget
from mor.validation import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Rule,
    check_fields,
    check_keys,
)

STDLIB = "stdlib"
"""`data` of this name: the source of the running interpreter's standard library."""

Optimizer = Literal["adamw", "muon"]
Schedule = Literal["trapezoid", "cosine"]
Precision = Literal["fp32", "bf16"]
Parallel = Literal["auto", "none", "ddp", "fsdp"]
ActivationCheckpointing = Literal["none", "recursion", "full"]
FsdpReshard = Literal["auto", "recursion", "step"]

Fraction = Annotated[float, Range(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Defaults are the paper's recipe (arXiv 2507.10524, appendix).

    Raises:
        ConfigError: a value or a combination cannot work.
    """

    __no_type_check__ = True  # values come from users' files: __post_init__ checks them

    model: dict[str, Any] = field(default_factory=dict)
    """Fields of MoRConfig, and `preset` to start from one of the paper's shapes."""
    init_from: Path | None = None
    """Start from this checkpoint's weights. Without `model` the same model goes on; with `model`
    the checkpoint must be vanilla and gives its layers to the new model as `init` says."""
    init: Initialization = "stepwise"
    """Which of a vanilla checkpoint's layers the block starts from."""
    data: Annotated[str | list[dict[str, Any]], Rule("a text, or a list of paths with weights")] = (
        STDLIB
    )
    """Folder made by `mor data build`, or `stdlib`, or a mixture: [{path: .., weight: ..}, ..]."""
    verify_data: bool = True
    """Compare the shards' checksums before the first step."""
    mask_documents: bool = False
    """Attention stays inside documents, in training and in evaluation."""
    sequence_length: PositiveInt = 2048
    """T, tokens that a sequence predicts."""
    batch_size: PositiveInt = 1024
    """Sequences per optimizer step."""
    micro_batch_size: PositiveInt | None = None
    """Sequences per forward pass of one process. None: its whole part of the batch at once."""
    steps: PositiveInt = 10_000
    """Optimizer steps."""
    budget: Annotated[str, Rule("an amount with a unit, such as '300 steps'")] | None = None
    """Instead of `steps`: `300 steps`, `20M tokens`, `1e15 flops`, `5 minutes` of training."""

    optimizer: Optimizer = "adamw"
    """`muon`: Muon for the layers' matrices, AdamW for embedding, head, routers and norms."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    muon_lr: PositiveFloat | None = None
    """Peak learning rate of Muon, whose updates are as large as AdamW's at the same rate. None:
    `lr`."""
    muon_momentum: Fraction = 0.95
    """Share of Muon's momentum that is kept at each step."""
    schedule: Schedule = "trapezoid"
    """Course of the learning rate after the warm-up: constant and then linearly down, or a half
    cosine."""
    warmup_fraction: Fraction = 0.05
    """Share of all steps in which the learning rate rises linearly."""
    cooldown_fraction: Fraction = 0.2
    """Share of all steps in which it falls linearly, at the end (trapezoid only)."""
    final_lr_fraction: Fraction = 0.0
    """What the learning rate falls to, as a share of its peak."""
    beta1: Fraction = 0.9
    """Share of AdamW's mean of gradients that is kept at each step."""
    beta2: Fraction = 0.95
    """Share of AdamW's mean of squared gradients that is kept at each step."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of matrices; norms have none."""
    embedding_weight_decay: NonNegativeFloat | None = None
    """Weight decay of embedding and head. None: `weight_decay`."""
    clip: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 does not clip."""
    capacity_warmup_steps: NonNegativeInt = 0
    """Steps over which expert choice's capacities fall from 1 to the configured ones."""
    balancing_warmup_steps: NonNegativeInt = 0
    """Steps over which token choice's balancing rises linearly to the configured strength."""

    eval_every: NonNegativeInt = 500
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_windows: PositiveInt = 64
    """Sequences of the validation split that an evaluation reads."""
    calibration_windows: NonNegativeInt = 16
    """Training sequences on which routing thresholds are calibrated before an evaluation and a
    save; 0 leaves them as they are."""
    save_every: NonNegativeInt = 1000
    """Steps between checkpoints; 0 saves only at the end."""
    keep_checkpoints: NonNegativeInt = 2
    """Newest checkpoints to keep; 0 keeps all."""
    spike_threshold: NonNegativeFloat = 10.0
    """Stop when the loss is so many robust standard deviations above its latest values; 0: never
    (`mor.train.spike_detector`)."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard (extra `track`)."""

    seed: NonNegativeInt = 0
    """Of initial weights and of the order of the data."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`."""
    precision: Precision = "fp32"
    """`bf16`: autocast; weights and optimizer stay in fp32."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """What is computed again in the backward pass instead of kept: each `recursion` of the block,
    or every layer (`full`), which keeps least."""
    compile: bool = False
    """torch.compile for the layers; a C++ compiler (on a GPU triton) must be there."""
    parallel: Parallel = "auto"
    """How the processes of torchrun share the work: `ddp` keeps whole weights on each, `fsdp` a
    part; `auto` is ddp, and none for one process."""
    fsdp_reshard: FsdpReshard = "auto"
    """When fsdp frees the shared block's gathered weights: after each `recursion` or each `step`;
    auto: recursion, but step for token choice."""

    def __post_init__(self) -> None:
        if isinstance(self.init_from, str):
            object.__setattr__(self, "init_from", Path(self.init_from))
        check_fields(self, ConfigError)
        if self.warmup_fraction + self.cooldown_fraction > 1:
            raise ConfigError(
                f"warmup_fraction={self.warmup_fraction} and cooldown_fraction="
                f"{self.cooldown_fraction} are more than the whole run: their sum must be <= 1."
            )
        if not isinstance(self.data, str):
            _check_mixture(self.data)
        if self.budget is not None:
            Budget.parse(self.budget)
        if self.batch_size % self.micro_size:
            raise ConfigError(
                f"batch_size={self.batch_size} does not divide by micro_batch_size="
                f"{self.micro_size}: every optimizer step sums whole micro-batches."
            )

    @classmethod
    def from_dict(cls, values: Mapping[Any, Any]) -> "TrainConfig":
        """Build from plain data.

        Raises:
            ConfigError: an unknown key (the message names the nearest known one) or a bad value.
        """
        check_keys(values, cls, "training field", ConfigError)
        return cls(**values)

    @property
    def corpora(self) -> list[tuple[str, float]]:
        """The corpora to read, or `stdlib`, each with its weight."""
        if isinstance(self.data, str):
            return [(self.data, 1.0)]
        return [(part["path"], float(part.get("weight", 1))) for part in self.data]

    @property
    def micro_size(self) -> int:
        """Sequences per forward pass."""
        return self.micro_batch_size or self.batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens that an optimizer step predicts."""
        return self.batch_size * self.sequence_length

    def model_config(self) -> MoRConfig:
        """The model's config; long enough for this run's sequences.

        Raises:
            ConfigError: the model cannot work, or its positions end before the sequences do.
        """
        config = MoRConfig.from_dict(self.model)
        self.check_length(config)
        return config

    def check_length(self, config: MoRConfig) -> None:
        """Raise ConfigError if the model cannot take this run's sequences."""
        if self.sequence_length > config.max_position_embeddings:
            raise ConfigError(
                f"sequence_length={self.sequence_length} is more than the model's "
                f"max_position_embeddings={config.max_position_embeddings}: change one of them."
            )


def _check_mixture(parts: list[Any]) -> None:
    """Raise ConfigError if `data` is no list of paths with weights."""
    form = "a mixture is a list such as [{path: data/web, weight: 2}, {path: data/books}]"
    if not parts:
        raise ConfigError(f"data=[] names no corpus: {form}.")
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("path"), str):
            raise ConfigError(f"data holds {part!r}, which has no path: {form}.")
        for key in part:
            if key not in ("path", "weight"):
                hint = nearest(str(key), ("path", "weight"))
                raise ConfigError(f"data holds {part!r}: field {key!r} is unknown: {hint}")
        weight = part.get("weight", 1)
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise ConfigError(f"data: weight={weight!r} of {part['path']} must be above 0.")
    if any(part["path"] == STDLIB for part in parts):
        raise ConfigError(f"data: {STDLIB!r} cannot be mixed: build a corpus of it first.")
