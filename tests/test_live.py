"""The view of the stages, by what DVC prints and a stage writes."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from pipeline.live import View, clock


def drawn(view: View) -> list[str]:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(view.table())
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def test_each_stage_has_its_state_and_the_present_one_its_position(tmp_path: Path) -> None:
    file = tmp_path / "live.json"
    file.write_text("left by the run before")
    view = View(["prepare-dataset", "train-lora", "validate"], file)
    view.hear("Stage 'prepare-dataset' is cached - skipping run, checking out outputs\n")
    view.hear("Running stage 'train-lora':\n")
    assert drawn(view)[0] == "✓ prepare-dataset restored"
    assert drawn(view)[1].endswith("train-lora 0:00") and drawn(view)[2] == "validate"
    told = {"title": "training", "done": 30, "total": 120, "unit": "steps", "rate": 1.5, "note": "loss 0.1 [base]"}
    file.write_text(json.dumps(told))
    assert drawn(view)[1].endswith("training 30/120 1.5 steps/s 1:00 left loss 0.1 [base]")
    view.hear("Stage 'validate' didn't change, skipping\n")
    assert drawn(view)[1:] == ["✓ train-lora 0:00", "✓ validate up to date"]


def test_a_clock_counts_hours_where_there_are_any() -> None:
    assert [clock(7.9), clock(760), clock(10931)] == ["0:07", "12:40", "3:02:11"]
