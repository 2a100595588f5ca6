"""Going on from a training that differs in its length alone.

Under a constant schedule nothing that a step does depends on how many are to come: a training of 500 steps is the first half
of one of 1,000. Work directories are named by the fingerprint of all settings, the length among them; each also notes
its *kind*, the fingerprint without the length.
"""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

from pipeline.checkpoint import best_so_far, checkpoint_folders, latest_checkpoint
from pipeline.files import atomic_directory, write_bytes, write_text
from pipeline.progress import say

_KIND = "kind"
_CURVES = ("curve.jsonl", "held_out.jsonl")


def adopt(work: Path, kind: str, steps: int, keep_best: bool) -> None:
    """Copy into `work`, if it has no checkpoint yet, the furthest checkpoint of a training of the same kind.

    Args:
        work: this training's own folder; others lie beside it.
        kind: fingerprint of everything but the length.
        steps: this training's length; a checkpoint beyond it is of no use.
        keep_best: the best adapter so far is needed too, and must not be from later than the checkpoint.
    """
    write_text(work / _KIND, kind)
    if checkpoint_folders(work / "checkpoints"):
        return
    found = []
    for other in sorted(work.parent.iterdir()):
        note = other / _KIND
        if other == work or not note.is_file() or note.read_text(encoding="utf-8") != kind:
            continue
        best = best_so_far(other / "best.safetensors") if keep_best else None
        for step, folder in checkpoint_folders(other / "checkpoints"):
            if step <= steps and not (best and best[0] > step):
                found.append((step, folder, other))
    for step, folder, other in sorted(found, reverse=True):
        if _copied(folder, other, work):
            say(f"  going on from the {step} steps of an earlier training that differs in its length alone")
            return


def _copied(folder: Path, other: Path, work: Path) -> bool:
    """Copy one checkpoint with the curves up to it; False if it is in use or damaged."""
    with (other / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False  # it is running: what is copied could be deleted meanwhile
        (work / "checkpoints").mkdir(exist_ok=True)
        if (other / "snapshots").is_dir():
            shutil.copytree(other / "snapshots", work / "snapshots", dirs_exist_ok=True)
        for name in (*_CURVES, "best.safetensors"):
            if (other / name).is_file():
                write_bytes(work / name, (other / name).read_bytes())
        with atomic_directory(work / "checkpoints" / folder.name) as partial:
            shutil.copytree(folder, partial, dirs_exist_ok=True)
    return latest_checkpoint(work / "checkpoints") is not None
