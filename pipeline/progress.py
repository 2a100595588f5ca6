"""Progress of long work: under `run` in a terminal a file that `run` draws from, one live bar in a terminal otherwise, and
elsewhere a plain line now and then."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

LIVE_FILE = "REPROLORA_LIVE"  # names the file that `run` reads
_LIVE_SECONDS = 0.25
_QUIET_SECONDS = 30.0  # how often a log file hears of us


class Bar(Protocol):
    """What long work reports to."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more items are done; `note` replaces the text at the end of the bar."""


def say(text: str) -> None:
    """One plain line on the screen, at once. Nobody listening any more must not keep a stage from saving its work."""
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0) -> Iterator[Bar]:
    """A bar over `total` items, `done` of them finished earlier; shows rate (`unit`/s) and remaining time."""
    if total <= done:
        yield _Silent()
    elif LIVE_FILE in os.environ:
        yield _Told(Path(os.environ[LIVE_FILE]), title, total, unit, done)
    elif sys.stdout.isatty():
        yield from _live(title, total, unit, done)
    else:
        bar = _Plain(title, total, unit, done)
        yield bar
        bar.finish()


def _live(title: str, total: int, unit: str, done: int) -> Iterator[Bar]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, refresh_per_second=4) as live:
        task = live.add_task(title, total=total, completed=done, rate="", note="")
        counter = _Counter(done)

        class LiveBar:
            def advance(self, count: int = 1, note: str = "") -> None:
                rate = counter.add(count)
                live.update(task, advance=count, rate=f"{rate:.1f} {unit}/s", note=note)

        yield LiveBar()


@dataclass
class _Counter:
    """Counts items and their rate, leaving out those that were done before the start."""

    done: int
    counted: int = 0
    start: float = field(default_factory=time.monotonic)

    def add(self, count: int) -> float:
        self.counted += count
        return self.counted / max(time.monotonic() - self.start, 1e-9)


class _Silent:
    def advance(self, count: int = 1, note: str = "") -> None:
        return


class _Told:
    """Writes how far it is, whole or not at all: `run` may read at any moment."""

    def __init__(self, file: Path, title: str, total: int, unit: str, done: int) -> None:
        self.file, self.title, self.total, self.unit = file, title, total, unit
        self.counter, self.told = _Counter(done), 0.0

    def advance(self, count: int = 1, note: str = "") -> None:
        rate = self.counter.add(count)
        if time.monotonic() - self.told < _LIVE_SECONDS:
            return
        self.told = time.monotonic()
        position = {"title": self.title, "done": self.counter.done + self.counter.counted, "total": self.total}
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps({**position, "unit": self.unit, "rate": rate, "note": note}), encoding="utf-8")
        partial.replace(self.file)


class _Plain:
    def __init__(self, title: str, total: int, unit: str, done: int) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.counter, self.said, self.rate, self.note = _Counter(done), time.monotonic(), 0.0, ""

    def advance(self, count: int = 1, note: str = "") -> None:
        self.rate, self.note = self.counter.add(count), note
        if time.monotonic() - self.said >= _QUIET_SECONDS:
            self.said = time.monotonic()
            left = (self.total - self._position()) / max(self.rate, 1e-9)
            say(
                f"  {self.title} {self._position()}/{self.total}, {self.rate:.1f} {self.unit}/s, {left:.0f} s left  {note}".rstrip()
            )

    def finish(self) -> None:
        say(f"  {self.title} {self._position()}/{self.total}, {self.rate:.1f} {self.unit}/s  {self.note}".rstrip())

    def _position(self) -> int:
        return self.counter.done + self.counter.counted
