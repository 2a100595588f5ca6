"""What others have made already: results from a DVC remote before a run, and to it after one."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pipeline.config import load_params
from pipeline.dvc_process import call
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.workspace import Workspace


def pull(workspace: Workspace) -> bool:
    """Fetch results and the run cache, and put in place what is missing here. What lies here is left as it is.

    Best effort: what the remote does not have is made. Returns whether all could be fetched.

    Raises:
        UserError: the project has no remote.
    """
    _require_remote(workspace)
    fetched = call(workspace.root, "fetch", "--run-cache")
    if fetched.returncode:
        say(f"  not everything could be fetched ({_said(fetched)}): what is missing is made")
    missing = [path for path in _tracked(workspace) if not (workspace.root / path).exists()]
    for path in missing:  # one by one: a folder that the remote lacks must not keep the others away
        call(workspace.root, "checkout", path)
    there = [path for path in missing if (workspace.root / path).exists()]
    say(f"  from the remote: {', '.join(there) if there else 'nothing that is missing here'}")
    return fetched.returncode == 0


def push(workspace: Workspace) -> None:
    """Send results and the run cache, of finished stages too whose followers failed.

    Raises:
        UserError: there is no remote, or it takes nothing.
    """
    _require_remote(workspace)
    pushed = call(workspace.root, "push", "--run-cache")
    if pushed.returncode:
        raise UserError(f"the results could not be pushed: {_said(pushed)}. They lie here, and the next push sends them")
    say(f"  to the remote: {_said(pushed) or 'everything'}")


def _tracked(workspace: Workspace) -> list[str]:
    """Outs that `dvc.lock` records, and the dataset where a `.dvc` file does."""
    paths = [out["path"] for stage in workspace.recorded().values() for out in stage.get("outs", [])]
    data = Path(load_params(workspace.params).dataset.path)
    noted = [p for p in (data, *data.parents) if (workspace.root / p.parent / f"{p.name}.dvc").is_file()]
    return [*map(str, noted), *paths]


def _require_remote(workspace: Workspace) -> None:
    if not call(workspace.root, "remote", "list").stdout.strip():
        raise UserError("there is no DVC remote to share with: `dvc remote add --default NAME URL` names one")


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """DVC's first error, which names the cause; without one, the last line."""
    lines = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ").removeprefix("unexpected error - ") for line in lines if line.startswith("ERROR: ")]
    useful = [line for line in lines if not line.startswith(("Collecting", "Fetching", "Pushing"))]
    return (errors[:1] or useful[-1:] or [""])[0][:300]
