"""Longer, shorter and timed trainings, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from project import Project

pytestmark = pytest.mark.slow


def prepared(project: Project, **train: object) -> Project:
    project.set("train", schedule="constant", **train)
    for stage in ("prepare-dataset", "precompute-latents-and-embeddings"):
        done = project.cli("stage", stage)
        assert done.returncode == 0, done.stdout + done.stderr
    return project


def adapter(project: Project) -> bytes:
    return project.path("build/adapter/adapter.safetensors").read_bytes()


def test_raising_the_steps_goes_on_and_gives_the_long_runs_bytes(new_project: Callable[[], Project]) -> None:
    long = prepared(new_project(), steps=7, held_out_every=2, keep="best")
    assert long.cli("stage", "train-lora").returncode == 0
    short = prepared(new_project(), steps=4, held_out_every=2, keep="best")
    assert short.cli("stage", "train-lora").returncode == 0
    before = adapter(short)
    short.set("train", steps=7)
    done = short.cli("stage", "train-lora")
    assert done.returncode == 0 and "going on from the 4 steps of an earlier training" in done.stdout, done.stdout + done.stderr
    assert adapter(short) == adapter(long) and adapter(short) != before
    for name in ("curve.csv", "held-out.csv", "metrics.json"):
        assert short.path(f"reports/train/{name}").read_bytes() == long.path(f"reports/train/{name}").read_bytes()
    assert len(short.path("reports/train/held-out.csv").read_text().splitlines()) == 1 + 4  # steps 0, 2, 4, 6
    short.set("train", learning_rate=0.02, steps=8)
    done = short.cli("stage", "train-lora")
    assert done.returncode == 0 and "going on" not in done.stdout
    short.set("train", schedule="cosine", steps=9)  # every step of a cosine depends on its end
    done = short.cli("stage", "train-lora")
    assert done.returncode == 0 and "going on" not in done.stdout


def test_when_the_minutes_are_over_it_is_saved_and_goes_on(project: Project) -> None:
    prepared(project, steps=6)
    project.set("runtime", max_minutes=0.0001)
    done = project.cli("stage", "train-lora")
    assert done.returncode == 75, done.stdout + done.stderr
    assert "runtime.max_minutes: 0.0001 minutes are over; step" in done.stdout + done.stderr
    project.set("runtime", max_minutes=None)
    assert project.cli("stage", "train-lora").returncode == 0
    first = json.loads(project.path("build/adapter/training.json").read_text())
    assert first["steps"] == 6 and first["lora"]["targets"] == ["to_q", "to_k", "to_v", "to_out.0"]
