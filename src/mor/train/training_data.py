"""`TrainingData`: the open corpora of a run, its batches, and windows to evaluate on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mor.data.batches import Batches, TokenShards
from mor.data.corpus import build_from_documents
from mor.data.mixture import MixedBatches, spread_mixture
from mor.data.stdlib_corpus import stdlib_documents
from mor.errors import DataError
from mor.io.tokenizer import Tokenizer
from mor.train.config import STDLIB, TrainConfig

_STDLIB_VOCAB_SIZE = 4096  # of the standard library's tokenizer, where the model says none


@dataclass(frozen=True)
class TrainingData:
    """The batches, evaluation windows and tokenizer of a run."""

    batches: Batches | MixedBatches
    """(B, T + 1) batches of training text, B sequences of one forward pass."""
    valid: Tensor
    """(windows, T + 1) of the corpora's held-out text, shared out by the corpora's weights."""
    calibration: Tensor | None
    """(windows, T + 1) of training text; None with `calibration_windows=0`."""
    tokenizer: Tokenizer
    eos_id: int
    vocab_size: int
    """The least number of rows that an embedding of these corpora needs."""

    @classmethod
    def open(
        cls, config: TrainConfig, corpora: Sequence[tuple[Path, float]], batch_size: int
    ) -> "TrainingData":
        """Open the shards of all corpora.

        Args:
            corpora: folders with their weights in the mixture (`prepare_corpora`).
            batch_size: sequences of one forward pass.

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
        # The stream number gives each corpus another order from the same seed.
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


def prepare_corpora(config: TrainConfig, run: Path) -> list[tuple[Path, float]]:
    """Folders of the config's corpora with their weights.

    The standard library's corpus is built inside the run's folder, unless it is there already.

    Raises:
        DataError: the corpus cannot be built.
    """
    if config.data != STDLIB:
        return [(Path(path), weight) for path, weight in config.corpora]
    corpus = run / "data"
    if not (corpus / "index.json").is_file():
        vocab_size = int(config.model.get("vocab_size") or _STDLIB_VOCAB_SIZE)
        build_from_documents(stdlib_documents(), corpus, train_tokenizer=vocab_size)
    return [(corpus, 1.0)]
