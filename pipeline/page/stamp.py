"""Whether the page still says what is so: told without drawing it, which takes seconds."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pipeline.files import hash_file, hash_json
from pipeline.workspace import Workspace

PAGE = Path("reports/index.html")


def stamped(workspace: Workspace, page: str) -> str:
    """The page with a last line that says what it was made of."""
    return f"{page.rstrip()}\n{_stamp(workspace)}\n"


def is_fresh(workspace: Workspace) -> bool:
    """Whether the page was made of the settings, results and commit that are here now."""
    page = workspace.root / PAGE
    return page.is_file() and page.read_text(encoding="utf-8").endswith(f"\n{_stamp(workspace)}\n")


def _stamp(workspace: Workspace) -> str:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=workspace.root, capture_output=True, text=True, check=False).stdout
    files = [hash_file(path) for path in (workspace.params, workspace.dvc_lock) if path.is_file()]
    return f"<!-- {hash_json([head, files])} -->"
