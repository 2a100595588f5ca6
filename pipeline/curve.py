"""The curves of a training: rows on disk as they come, and the CSV that DVC plots."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.files import write_text

CURVE_COLUMNS = ("step", "loss", "learning_rate", "grad_norm")
HELD_OUT_COLUMNS = ("step", "held_out_loss")
Row = dict[str, float]


class Curve:
    """A curve in a file, one JSON line a row.

    Args:
        rows: what it begins with; the file is cut back to them.
        path: None: it is kept in memory alone, where another process writes the file.
    """

    def __init__(self, rows: Sequence[Row], path: Path | None) -> None:
        self.path = path
        self.rows: list[Row] = list(rows)
        if path:
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, rows: list[Row]) -> None:
        """Add rows, on disk when this returns."""
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())
        self.rows += rows

    @property
    def smoothed(self) -> float:
        """Mean loss of the last 50 steps."""
        recent = self.rows[-50:]
        return sum(r["loss"] for r in recent) / max(1, len(recent))


def read_rows(path: Path) -> list[Row]:
    """The rows of a curve's file, none where there is none; a last line that was cut short by a kill is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [row for row in map(_parsed, lines) if row]


def read_curve(work: Path) -> list[Row]:
    """Losses of a finished or unfinished run."""
    return read_rows(work / "curve.jsonl")


def read_held_out(work: Path) -> list[Row]:
    """Held-out losses of a run; `step` counts the steps done before."""
    return read_rows(work / "held_out.jsonl")


def curve_csv(rows: list[Row], columns: Sequence[str] = CURVE_COLUMNS) -> str:
    """The curve as the CSV that DVC plots; a pure function of the rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "step": int(row["step"])} for row in rows)
    return text.getvalue()


def _parsed(line: str) -> Row | None:
    try:
        row: Row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row
