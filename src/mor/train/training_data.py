"""`TrainingData`: the open corpora of a run: its batches, and windows to evaluate on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mor.data.batches import Batches, TokenShards
from mor.data.mixture import MixedBatches, spread_mixture
from mor.errors import DataError
from mor.io.tokenizer import Tokenizer
from mor.train.config import TrainConfig


@dataclass(frozen=True)
class TrainingData:
    """All that a run reads."""

    batches: Batches | MixedBatches
    valid: Tensor
    """(windows, T + 1) to evaluate on: each corpus's held-out text by its weight."""
    calibration: Tensor | None
    """(windows, T + 1) of training text; None if the config wants none."""
    tokenizer: Tokenizer
    eos_id: int
    vocab_size: int

    @classmethod
    def open(
        cls, config: TrainConfig, corpora: Sequence[tuple[Path, float]], batch_size: int
    ) -> "TrainingData":
        """Open corpora, each with its weight.

        Raises:
            DataError: one cannot be read, is too small, or has another tokenizer than the first.
        """
        paths, weights = [path for path, _ in corpora], [weight for _, weight in corpora]
        length = config.sequence_length
        train = [TokenShards.open(path, "train", verify=config.verify_data) for path in paths]
        valid = [TokenShards.open(path, "valid", verify=config.verify_data) for path in paths]
        tokenizer = Tokenizer.load(paths[0])
        for path in paths[1:]:
            if Tokenizer.load(path).to_json() != tokenizer.to_json():
                raise DataError(
                    f"{path}: made with another tokenizer than {paths[0]}: build it again with "
                    f"`mor data build --tokenizer {paths[0]}`."
                )
        parts = [
            Batches(
                shards,
                sequence_length=length,
                batch_size=batch_size,
                seed=config.seed,
                stream=stream,
            )
            for stream, shards in enumerate(train)
        ]
        mixed = MixedBatches(parts, weights, batch_size=batch_size, seed=config.seed)
        num = config.calibration_windows
        return cls(
            batches=mixed if len(parts) > 1 else parts[0],
            valid=spread_mixture(valid, weights, length, config.eval_windows),
            calibration=spread_mixture(train, weights, length, num) if num else None,
            tokenizer=tokenizer,
            eos_id=train[0].eos_id,
            vocab_size=max(shards.vocab_size for shards in train),
        )
