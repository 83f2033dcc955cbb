"""`MetricsFile`: `metrics.jsonl`, one JSON object per optimizer step."""

import json
import math
from pathlib import Path
from typing import Any

from mor.io.atomic_files import storage_error, write_file


class MetricsFile:
    """Appends, reads and cuts back `metrics.jsonl`; each line has `step`, `loss` and `tokens`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Add a line; NaN and infinity become null, since JSON has neither.

        Raises:
            CapacityError: the disk is full.
        """
        clean = {k: None if _is_not_json(v) else v for k, v in row.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
        except OSError as error:
            raise storage_error(self.path, error) from error

    def rows(self) -> list[dict[str, Any]]:
        """All lines that are JSON; one that a killed run left half-written is skipped."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def truncate_after(self, step: int) -> None:
        """Remove the lines after `step`, which a resumed run writes again.

        Raises:
            CapacityError: the disk is full.
        """
        if not self.path.exists():
            return
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        try:
            write_file(self.path, "".join(kept).encode())
        except OSError as error:
            raise storage_error(self.path, error) from error


def _is_not_json(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
