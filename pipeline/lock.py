"""One at a time: whoever comes second is told who holds the lock, and leaves."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import AlreadyRunning


@contextmanager
def held(path: Path, told: str) -> Iterator[None]:
    """Hold the lock file `path`; the kernel lets go when the process ends, however it ends.

    Args:
        told: the beginning of what a second one is told: "train-lora is already running".

    Raises:
        AlreadyRunning: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise refusal(told, file.read() or "unknown") from None
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}: {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}")
        file.flush()
        yield


def refusal(told: str, holder: str) -> AlreadyRunning:
    """`holder` is a process id and what the process is."""
    return AlreadyRunning(f"{told} (pid {holder}): wait for it, or stop it first")
