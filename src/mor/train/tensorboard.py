"""`TensorBoard`: the numbers of `metrics.jsonl` as TensorBoard scalars."""

from pathlib import Path
from typing import Any

from mor.errors import MissingExtraError


class TensorBoard:
    """Writes lines of `metrics.jsonl` as scalars of the same names."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open the folder and hide its scalars after `step`, which a resumed run writes again."""
        self._writer = summary_writer()(str(folder), purge_step=step + 1)

    def append(self, row: dict[str, Any]) -> None:
        """Write the numbers of a line; those of a list become `name/0`, `name/1`, ..."""
        for name, value in row.items():
            if isinstance(value, (tuple, list)):
                for i, item in enumerate(value):
                    self._writer.add_scalar(f"{name}/{i}", item, row["step"])
            elif isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered, and close the file."""
        self._writer.close()


def summary_writer() -> Any:
    """TensorBoard's `SummaryWriter` class.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "track") from error
    return SummaryWriter
