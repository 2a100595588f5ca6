"""Does an adapter file come from this project as it is now? Every link is one of: matches, differs, cannot be checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.export.adapter_file import read_metadata
from pipeline.export.lineage import LINKS, present_link, stated_lineage
from pipeline.export.metadata import tensor_hash
from pipeline.safetensors_file import read_safetensors
from pipeline.workspace import Workspace

Verdict = Literal["matches", "differs", "cannot be checked"]
_WHAT = {
    "dataset": ("the dataset's manifest", "build/dataset is missing: run prepare-dataset"),
    "encodings": ("the encodings", "build/encoded is missing: run precompute-latents-and-embeddings"),
    "params": ("model, lora and train in params.yaml", "params.yaml does not tell"),
    "base": ("the base's files", "the base is neither here nor pinned"),
    "sources": ("the library's sources", "a source file that dvc.yaml lists is missing"),
    "weights": ("the trained weights", "build/adapter is missing: run train-lora"),
}


@dataclass(frozen=True)
class Finding:
    """One link, checked."""

    link: str
    verdict: Verdict
    note: str


def verify(workspace: Workspace, path: Path) -> list[Finding]:
    """Hold a file's header against its own tensors and against the project.

    Raises:
        UserError: no adapter file, or a foreign one, which states no lineage.
    """
    metadata = read_metadata(path)
    stated = stated_lineage(metadata)
    if not stated:
        raise UserError(
            f"{path} states no lineage: it was not exported here, or its header was removed; `show` prints what it tells"
        )
    found = [_content(metadata, path)]
    params = load_params(workspace.params)
    for link in LINKS:
        what, absent = _WHAT[link]
        now = present_link(workspace, params, link)
        if link not in stated:
            found.append(Finding(link, "cannot be checked", "the header does not state it"))
        elif now is None:
            found.append(Finding(link, "cannot be checked", absent))
        elif now == stated[link]:
            found.append(Finding(link, "matches", what))
        else:
            found.append(
                Finding(link, "differs", f"{what}: the file was made from {_short(stated[link])}, here is {_short(now)}")
            )
    return _excuse_sources(found)


def _content(metadata: dict[str, str], path: Path) -> Finding:
    stated = metadata.get("sshs_model_hash")
    if not stated:
        return Finding("content", "cannot be checked", "the header states no hash of the tensors")
    now = tensor_hash(read_safetensors(path))
    if now == stated:
        return Finding("content", "matches", "the tensors are those that the header was written for")
    return Finding(
        "content", "differs", f"the tensors were changed after the export: {_short(stated)} was written, here is {_short(now)}"
    )


def _excuse_sources(found: list[Finding]) -> list[Finding]:
    """Other sources that give the very same weights from the same inputs have not made another adapter."""
    by_link = {finding.link: finding for finding in found}
    if by_link["sources"].verdict == "differs" and by_link["weights"].verdict == "matches":
        excused = Finding(
            "sources", "cannot be checked", "the library has changed since; what it makes now has the same weights"
        )
        return [excused if finding.link == "sources" else finding for finding in found]
    return found


def _short(value: str) -> str:
    return f"{value[:19]}…" if len(value) > 20 else value
