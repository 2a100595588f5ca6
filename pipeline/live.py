"""What `run` shows in a terminal: every stage with its state, and how far the present one is, in one place that stays.

What DVC and the stages print goes by above it. A stage writes how far it is to a small file (`pipeline/progress.py`).
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_RUNNING = re.compile(r"Running stage '(?P<stage>[^']+)'")
_SKIPPED = re.compile(r"Stage '(?P<stage>[^']+)' (didn't change|is cached)")
_NOISE = re.compile(
    r"^(Running stage|> |Generating lock file|Updating lock file|To track the changes|\s+git add|To enable auto|\s+dvc config|$)"
)


def is_terminal() -> bool:
    """Whether the output goes to a terminal that understands escape sequences."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def can_be_live() -> bool:
    """Whether somebody looks on: not CI's imitation of a terminal."""
    return is_terminal() and not os.environ.get("CI")


class View:
    """The stages and what is known of each."""

    def __init__(self, names: Sequence[str], file: Path) -> None:
        """`file`: where the stages write how far they are."""
        self.names, self.file = list(names), file
        self.states: dict[str, str] = {}
        self.started: dict[str, float] = {}
        self.ended: dict[str, float] = {}

    def hear(self, line: str) -> None:
        """Learn from a line that DVC prints."""
        running, skipped = _RUNNING.search(line), _SKIPPED.search(line)
        if running or skipped:
            self._end()
        if running and running["stage"] in self.names:
            self.states[running["stage"]], self.started[running["stage"]] = "runs", time.monotonic()
            self.file.unlink(missing_ok=True)
        elif skipped and skipped["stage"] in self.names:
            self.states[skipped["stage"]] = "restored" if skipped[2] == "is cached" else "up to date"

    def _end(self) -> None:
        for name, state in self.states.items():
            if state == "runs":
                self.states[name], self.ended[name] = "ran", time.monotonic()

    def table(self) -> Table:
        """As it is now."""
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for name in self.names:
            state = self.states.get(name, "")
            if state == "runs":
                seconds = time.monotonic() - self.started[name]
                table.add_row(Spinner("dots"), Text(name, "bold"), clock(seconds), self._position())
            elif state == "ran":
                table.add_row(Text("✓", "green"), name, clock(self.ended[name] - self.started[name]), "")
            elif state:
                table.add_row(Text("✓", "green"), name, Text(state, "dim"), "")
            else:
                table.add_row("", Text(name, "dim"), "", "")
        return table

    def _position(self) -> str:
        try:
            told = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # nothing yet
            return ""
        return position(told)


def position(told: dict[str, Any]) -> str:
    """`training 120/450  8.1 steps/s  0:41 left  loss 0.12` of what a stage has written."""
    from rich.markup import escape

    left = (told["total"] - told["done"]) / told["rate"] if told["rate"] > 0 else None
    parts = [f"{told['title']} {told['done']}/{told['total']}", f"{told['rate']:.1f} {told['unit']}/s"]
    return escape("  ".join([*parts, *([f"{clock(left)} left"] if left is not None else []), told["note"]]).rstrip())


def clock(seconds: float) -> str:
    """`0:07`, `12:40`, `3:02:11`."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours}:{minutes % 60:02}:{int(seconds) % 60:02}" if hours else f"{minutes}:{int(seconds) % 60:02}"


def show(view: View, lines: Iterable[str]) -> None:
    """Draw the view until the lines end; those that say something go by above it."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with Live(get_renderable=view.table, console=console, refresh_per_second=8, transient=True) as live:
        for line in lines:
            view.hear(line)
            if not _NOISE.match(line):
                live.console.print(line.rstrip("\n"), markup=False, soft_wrap=True)
