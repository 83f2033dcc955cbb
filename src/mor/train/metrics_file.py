"""`metrics.jsonl`: what a run measures, one JSON object a line."""

import json
import math
from pathlib import Path
from typing import Any

from mor.io.atomic_files import storage_error, write_file


class MetricsFile:
    """`metrics.jsonl` of a run: one object a line, with at least `step`, `loss` and `tokens`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            CapacityError: the disk is full.
        """
        clean = {k: None if _broken(v) else v for k, v in row.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
        except OSError as error:
            raise storage_error(self.path, error) from error

    def rows(self) -> list[dict[str, Any]]:
        """All whole lines; a last line that a killed run left half-written is passed over."""
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
        """Drop the lines after `step`, which a resumed run writes again."""
        if not self.path.exists():
            return
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        try:
            write_file(self.path, "".join(kept).encode())
        except OSError as error:
            raise storage_error(self.path, error) from error


def _broken(value: Any) -> bool:
    """NaN and infinity are not JSON."""
    return isinstance(value, float) and not math.isfinite(value)
