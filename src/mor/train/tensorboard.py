"""The numbers of `metrics.jsonl` as TensorBoard scalars."""

from pathlib import Path
from typing import Any

from mor.errors import MissingExtraError


class TensorBoard:
    """The numbers of `metrics.jsonl` as TensorBoard scalars."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open the folder; what it holds after `step` is hidden, since it comes again."""
        self._writer = summary_writer()(str(folder), purge_step=step + 1)

    def append(self, row: dict[str, Any]) -> None:
        """Add a line of `metrics.jsonl`."""
        for name, value in row.items():
            if isinstance(value, (tuple, list)):
                for i, share in enumerate(value):
                    self._writer.add_scalar(f"{name}/{i}", share, row["step"])
            elif isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def summary_writer() -> Any:
    """TensorBoard's class.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "track") from error
    return SummaryWriter
