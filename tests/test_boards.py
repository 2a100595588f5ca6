"""TensorBoard and Weights & Biases as further mirrors, through Accelerate's trackers; with the extra `boards`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.boards import mirror_pictures, mirrored_curves
from pipeline.config import Tracking
from pipeline.errors import UserError
from pipeline.workspace import VALIDATE_REPORT, Workspace

ROWS = [{"step": float(i), "loss": 1.0 / (i + 1), "learning_rate": 1e-4} for i in range(5)]


def workspace(root: Path) -> Workspace:
    (root / VALIDATE_REPORT).mkdir(parents=True)
    for name in ("before-after.png", "scales.png"):
        Image.fromarray(np.full((8, 12, 3), 90, np.uint8)).save(root / VALIDATE_REPORT / name)
    return Workspace(root, root)


def test_tensorboard_holds_curve_and_grids(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install '.[boards]'; .ci/run does, for this test")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    here, settings = workspace(tmp_path), Tracking(tensorboard=True)
    observe = mirrored_curves(here, settings, "train-lora abc", {"train.steps": 5, "lora.targets": ["to_q"]})
    observe(ROWS[:3])
    observe(ROWS[3:])
    mirror_pictures(here, settings, "validate abc")
    folders = {p.parent for p in (tmp_path / "tensorboard" / "train-lora abc").rglob("*tfevents*")}
    scalars = {}
    for folder in folders:
        events = EventAccumulator(str(folder)).Reload()
        scalars |= {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["loss"] == [(int(r["step"]), pytest.approx(r["loss"])) for r in ROWS]
    pictures = EventAccumulator(str(tmp_path / "tensorboard" / "validate abc")).Reload()
    assert set(pictures.Tags()["images"]) == {"before-after", "scales"}


def test_wandb_writes_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install '.[boards]'; .ci/run does, for this test")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    here = workspace(tmp_path)
    (tmp_path / ".work").mkdir()
    observe = mirrored_curves(here, Tracking(wandb_project="tiny"), "train-lora abc", {"train.steps": 5})
    observe(ROWS)
    import wandb

    assert wandb.run is not None and wandb.run.config["train.steps"] == 5
    assert wandb.run.summary["loss"] == pytest.approx(ROWS[-2]["loss"])  # the last step is written when the next one comes
    wandb.finish()
    assert list((tmp_path / ".work").rglob("*.wandb"))


def test_a_board_that_is_not_there_costs_a_line_or_fails_if_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(self: object) -> None:
        raise ImportError("No module named 'tensorboard'")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", missing)
    here = workspace(tmp_path)
    mirrored_curves(here, Tracking(tensorboard=True), "x", {})(ROWS)
    assert "tensorboard cannot be used" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"tracking.required"):
        mirrored_curves(here, Tracking(tensorboard=True, required=True), "x", {})(ROWS)
    mirrored_curves(here, Tracking(), "x", {})(ROWS)
    assert not capsys.readouterr().out
