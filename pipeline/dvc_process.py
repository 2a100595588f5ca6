"""DVC as a process of its own: how it is called. Imports next to nothing: DVC starts first, and loads itself while we do."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

# DVC waits for its lock: else whoever holds it for more than three seconds when a stage ends makes it throw the result away
_ALWAYS = ("--wait-for-lock",)


def start(root: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """DVC in the project `root`, its output caught, not waited for. `more`: into its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", *_ALWAYS, *arguments],
        cwd=root,
        env=_environment() | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def call(root: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """As `start`, to its end; whether it went well is for the caller to ask."""
    process = start(root, *arguments, **more)
    out, err = answer(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def answer(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process said by its end; it does not outlive us where we are interrupted."""
    with process:
        try:
            return process.communicate()
        except BaseException:
            process.kill()
            raise


class Waiting:
    """A DVC that loads itself and waits to be told what to do, as a context: it ends with it, and does nothing if never told.

    A quarter of what a `dvc repro` without work takes is these imports, and ours go on beside them.
    """

    def __init__(self, root: Path, caught: bool) -> None:
        """`caught`: its output goes to `process.stdout`, and not where ours does."""
        reading, self._writing = os.pipe()
        waiting = Path(__file__).with_name("dvc_waiting.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(waiting), str(reading)],
            cwd=root,
            env=_environment() | ({"PYTHONUNBUFFERED": "1"} if caught else {}),  # what is watched must come without delay
            pass_fds=[reading],
            preexec_fn=_die_with_parent,
            stdout=subprocess.PIPE if caught else None,
            stderr=subprocess.STDOUT if caught else None,
            encoding="utf-8",
        )
        os.close(reading)

    def tell(self, *arguments: str, **more: str) -> None:
        """Let it work: DVC with these arguments, `more` in its environment. One that could not load ends as it would have."""
        writing, self._writing = self._writing, -1
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w", encoding="utf-8") as pipe:
            json.dump({"arguments": [*_ALWAYS, *arguments], "environment": more}, pipe)

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writing >= 0:  # never told, and nothing done: it need not load to its end
            os.close(self._writing)
            self.process.kill()
        self.process.wait()


def _environment() -> dict[str, str]:
    """Ours, with this interpreter first on the path: `dvc.yaml` says `python`."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def _die_with_parent() -> None:
    """Linux: when `run` is killed, DVC is told to end, and its stage notices that."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
