"""Publishing `dist/adapter/` on the Hub: only after the gate passed, only what the Hub does not have, the token from the environment."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.files import files_under, hash_file
from pipeline.workspace import DIST, Workspace

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_OWN_FOLDERS = ("samples/", "merged/")  # what is in them on the Hub and not here is of an earlier adapter


@dataclass(frozen=True)
class Publication:
    """What would go where."""

    repo: str
    private: bool
    files: Mapping[str, Path]
    message: str
    description: str


def plan(workspace: Workspace) -> Publication:
    """What `push` publishes; asks nobody.

    Raises:
        UserError: nothing is exported, no repository is set, or the gate failed.
    """
    settings, folder = load_params(workspace.params).export, workspace.root / DIST
    if not (folder / "gate.json").is_file() or not (folder / "lineage.json").is_file():
        raise UserError(f"there is nothing to publish in {DIST}: run the pipeline first")
    if settings.push_to_hub is None:
        raise UserError(
            "export.push_to_hub is null: name a repository first, as in push_to_hub: {repo: owner/name, private: true}"
        )
    gate = json.loads((folder / "gate.json").read_text(encoding="utf-8"))
    if not gate["passed"]:
        failed = [finding for finding in gate["findings"] if ": fails" in finding]
        raise UserError(f"the gate failed, so this adapter is not published: {'; '.join(failed or gate['findings'])}")
    lineage = json.loads((folder / "lineage.json").read_text(encoding="utf-8"))
    return Publication(
        settings.push_to_hub.repo,
        settings.push_to_hub.private,
        {path.relative_to(folder).as_posix(): path for path in files_under(folder)},
        f"{settings.name}, weights {lineage['weights'][:12]}",
        "\n".join(f"{link}: {value}" for link, value in lineage.items()),
    )


def push(publication: Publication) -> list[str]:
    """Publish. Does nothing the second time.

    Returns:
        One line per file that went there or was deleted there.

    Raises:
        UserError: no token, no permission, no Hub.
    """
    token = os.environ.get("HF_TOKEN", "")
    if not token:
        raise UserError("publishing needs a token with write access in the environment: HF_TOKEN")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi(token=token)
    try:
        api.create_repo(publication.repo, private=publication.private, exist_ok=True)
        if publication.private and not api.repo_info(publication.repo).private:  # it was there before, as a public one
            raise UserError(
                f"export.push_to_hub: {publication.repo} is public on the Hub, but private is true: nothing was sent. Make it private "
                "there, or set private to false"
            )
        there = _files_there(api, publication.repo)
        wanted = {name: path for name, path in publication.files.items() if not _same(there.get(name), path)}
        stale = sorted(name for name in there if name.startswith(_OWN_FOLDERS) and name not in publication.files)
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in wanted.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        if operations:
            api.create_commit(
                publication.repo, operations, commit_message=publication.message, commit_description=publication.description
            )
    except UserError:
        raise
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        told = str(error).replace(token, "(token)").strip() or type(error).__name__
        raise UserError(f"{publication.repo} could not be published: {told}") from None
    return [*wanted, *(f"{name} (deleted)" for name in stale)]


def _files_there(api: HfApi, repo: str) -> dict[str, Any]:
    return {file.path: file for file in api.list_repo_tree(repo, recursive=True) if hasattr(file, "blob_id")}


def _same(there: Any, path: Path) -> bool:
    """Large files are known by sha256, the others by git's hash of a blob."""
    if there is None:
        return False
    if there.lfs:
        return bool(there.lfs.sha256 == hash_file(path))
    content = path.read_bytes()
    return bool(there.blob_id == hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest())
