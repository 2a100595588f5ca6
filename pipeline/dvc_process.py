"""DVC as a process of its own: how it is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def command(*arguments: str) -> list[str]:
    """DVC waits for its lock: else whoever holds it for more than three seconds when a stage ends makes it throw the result away."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]


def environment(**more: str) -> dict[str, str]:
    """Ours and `more`, with this interpreter first on the path: `dvc.yaml` says `python`."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}", **more}


def call(root: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """DVC in the project `root`, its output caught; whether it went well is for the caller to ask. `more`: into its environment."""
    return subprocess.run(command(*arguments), cwd=root, env=environment(**more), capture_output=True, text=True, check=False)
