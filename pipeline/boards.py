"""Further mirrors of curves and grids: TensorBoard and Weights & Biases, through Accelerate's trackers.

They show what MLflow shows; nothing reads them back. Like it they fail open: a board that cannot be reached costs a line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import Tracking
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.workspace import VALIDATE_REPORT, Workspace

Row = dict[str, float]
_PICTURES = ("before-after.png", "scales.png")


def mirrored_curves(workspace: Workspace, settings: Tracking, name: str, params: dict[str, Any]) -> Callable[[list[Row]], None]:
    """What hands rows of a curve, each with its `step`, to the boards that are asked for.

    The boards are opened with the first rows: Accelerate's state must be the training's own.
    """
    trackers: list[Any] = []
    waiting = bool(settings.tensorboard or settings.wandb_project)

    def observe(rows: list[Row]) -> None:
        nonlocal waiting
        if waiting:
            waiting = False
            trackers.extend(_open(workspace, settings, name, params))
        for tracker in list(trackers):
            try:
                for row in rows:
                    tracker.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))
            except Exception as error:  # a mirror must not hurt the training
                say(f"  {tracker.name}: {_brief(error)}; the training goes on without it")
                trackers.remove(tracker)

    return observe


def mirror_pictures(workspace: Workspace, settings: Tracking, name: str) -> None:
    """Hand the grids of the last validation to the boards."""
    import numpy as np
    from PIL import Image

    for tracker in _open(workspace, settings, name, {}):
        for file in _PICTURES:
            picture = np.asarray(Image.open(workspace.root / VALIDATE_REPORT / file).convert("RGB"))
            try:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({Path(file).stem: picture[None]}, step=0, **layout)
            except Exception as error:
                say(f"  {tracker.name}: {_brief(error)}; the files are complete")
        try:
            tracker.finish()
        except Exception as error:
            say(f"  {tracker.name}: {_brief(error)}; the files are complete")


def _logged_in() -> bool:
    return (Path.home() / ".netrc").is_file() and "api.wandb.ai" in (Path.home() / ".netrc").read_text(encoding="utf-8")


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _open(workspace: Workspace, settings: Tracking, name: str, params: dict[str, Any]) -> list[Any]:
    """The trackers that are asked for, started.

    Raises:
        UserError: the library is not installed, and `tracking.required` is set.
    """
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()
    asked: list[tuple[str, Callable[[], Any]]] = []
    if settings.tensorboard:
        folder = workspace.home / "tensorboard"
        asked.append(("tensorboard", lambda: TensorBoardTracker(name, folder)))
    if settings.wandb_project:
        project = settings.wandb_project
        asked.append(("wandb", lambda: WandBTracker(project, name=name, dir=str(workspace.work))))
    trackers = []
    for library, make in asked:
        try:
            if library == "wandb" and not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") or _logged_in()):
                raise UserError("no WANDB_API_KEY")  # it would ask on the terminal, and the training would wait
            tracker = make()
            tracker.start()
            if params:
                tracker.store_init_configuration(
                    {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in params.items()}
                )
            trackers.append(tracker)
        except Exception as error:
            told = f"{library} cannot be used ({_brief(error)}): pip install 'reprolora[boards]', or look at its key"
            if settings.required:
                raise UserError(f"{told}; tracking.required is set, so the stage fails") from error
            say(f"  {told}; the work goes on without it")
    return trackers
