"""What other commits and experiments of the project hold: settings from git, metrics and pictures through DVC."""

from __future__ import annotations

import json

from ruamel.yaml import YAML

from pipeline.config import Params, check_params
from pipeline.errors import UserError
from pipeline.workspace import VALIDATE_REPORT, Workspace


def metrics_at(workspace: Workspace, revision: str) -> dict[str, float | None]:
    """The validation's metrics of a commit, tag, branch or experiment, from DVC's cache or remote.

    Raises:
        UserError: there is no such revision, or its metrics are nowhere.
    """
    loaded: dict[str, float | None] = json.loads(bytes_at(workspace, revision, f"{VALIDATE_REPORT}/metrics.json"))
    return loaded


def params_at(workspace: Workspace, revision: str) -> Params:
    """`params.yaml` of a revision.

    Raises:
        UserError: there is none, or it is not valid for the code as it is now.
    """
    text = bytes_at(workspace, revision, "params.yaml").decode("utf-8")
    return check_params(YAML(typ="rt").load(text), where=f"params.yaml at {revision}")


def bytes_at(workspace: Workspace, revision: str, path: str) -> bytes:
    """A tracked file's content at a revision."""
    import dvc.api

    try:
        with dvc.api.open(path, repo=str(workspace.root), rev=revision, mode="rb") as file:
            content: bytes = file.read()
    except Exception as error:  # of git, DVC, its remotes and the file system, many kinds
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} at {revision} cannot be had: {first[:300]}. Was that run's dvc.lock committed, and its result pushed? "
            "`dvc fetch` brings what a remote has"
        ) from error
    return content
