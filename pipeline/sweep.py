"""Many settings tried: a DVC experiment each, in a copy of the project, with the encodings shared; the best first.

An experiment's name is settled by its settings, so a sweep that was cut off goes on with what is missing.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.config import load_params
from pipeline.edit import preview_values
from pipeline.errors import UserError
from pipeline.files import hash_json, write_text
from pipeline.history import bytes_at, metrics_at
from pipeline.metrics import DEFINITIONS
from pipeline.page.html import number, picture, render
from pipeline.progress import say
from pipeline.renew import renew
from pipeline.workspace import VALIDATE_REPORT, Workspace

PAGE = Path("reports/sweep.html")


@dataclass(frozen=True)
class Trial:
    """One combination of settings."""

    name: str  # of the experiment
    changes: tuple[str, ...]  # section.key=value
    metrics: dict[str, float | None]  # empty: it failed


def combinations(assignments: list[str]) -> list[tuple[str, ...]]:
    """`lora.rank=4,8` and `train.seed=0,1` -> the four combinations. A value that holds a comma is written as YAML: `[a, b]`.

    Raises:
        UserError: an assignment is none.
    """
    axes = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or "." not in key or not text:
            raise UserError(f"--set {assignment}: expected section.key=value,value, as in --set lora.rank=4,8,16")
        values = YAML(typ="safe").load(f"[{text}]")
        axes.append([f"{key}={json.dumps(value, ensure_ascii=False)}" for value in values])
    return list(itertools.product(*axes))


def sweep(workspace: Workspace, assignments: list[str], metric: str, jobs: int) -> list[Trial]:
    """Run every combination that has no experiment yet; returns all of them, the best first.

    Args:
        metric: of `pipeline.metrics.DEFINITIONS`, with a direction.
        jobs: experiments at once.

    Raises:
        UserError: an unknown metric or value, or a project without a commit.
    """
    if metric not in DEFINITIONS or DEFINITIONS[metric].better == "neither":
        raise UserError(f"--metric {metric}: there are {', '.join(n for n, d in DEFINITIONS.items() if d.better != 'neither')}")
    if fault := load_params(workspace.params).unmeasured(metric):
        raise UserError(f"--metric {metric}: it is not measured, since {fault}")
    trials = combinations(assignments)
    for changes in trials:
        preview_values(workspace, list(changes))  # refuses what is not allowed, before anything runs
    for line in renew(workspace.root):
        say(line)
    head = _git(workspace, "rev-parse", "HEAD")
    if not head:
        raise UserError("a sweep needs a commit to start from: `git add --all && git commit`")
    if _git(workspace, "status", "--porcelain", "--untracked-files=no"):
        raise UserError(
            "there are changes that are not committed, and experiments start from the commit: commit or stash them first"
        )
    names = {changes: f"sweep-{hash_json([head, list(changes)])[:10]}" for changes in trials}
    known = set(_known(workspace))
    todo = [changes for changes in trials if names[changes] not in known]
    say(f"{len(trials)} combinations, {len(trials) - len(todo)} of them are there already")
    # the first alone: it makes what all share, and MLflow's store
    group = hash_json([head, sorted(assignments)])[:10]
    lock = threading.Lock()

    def run(changes: tuple[str, ...]) -> None:
        with lock:
            say(f"  {', '.join(changes)}")
        _experiment(workspace, changes, names[changes], group)

    for changes in todo[:1]:
        run(changes)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        list(pool.map(run, todo[1:]))
    for changes in [c for c in todo if not _metrics(workspace, names[c])] if jobs > 1 else []:
        run(changes)  # two that share a stage get in each other's way: what fell over runs once more, alone
    found = [Trial(names[changes], changes, _metrics(workspace, names[changes])) for changes in trials]
    lower = DEFINITIONS[metric].better == "lower"

    def place(trial: Trial) -> tuple[bool, float]:
        value = trial.metrics.get(metric)
        return (value is None, 0.0 if value is None else value if lower else -value)

    return sorted(found, key=place)


def write_sweep(workspace: Workspace, trials: list[Trial], metric: str) -> Path:
    """Write `reports/sweep.html`: the table, and the grid of each, the best first."""
    shown = [t for t in trials if t.metrics]
    names = [metric, *(n for n in ("held_out_loss_ratio", "overfitting_gap", "clip_score", "style_shift") if n != metric)]
    values = [t.metrics.get(metric) or 0.0 for t in shown]
    rows = [
        {
            "name": t.name,
            "changes": t.changes,
            "cells": [number(t.metrics[n]) if n in t.metrics else "–" for n in names],
            "share": round(100 * abs(value) / max(map(abs, values))) if any(values) else 0,
            "grid": picture(bytes_at(workspace, t.name, f"{VALIDATE_REPORT}/before-after.png"), 900),
        }
        for t, value in zip(shown, values, strict=True)
    ]
    failed = [t for t in trials if not t.metrics]
    title = load_params(workspace.params).export.name
    page = render("sweep.html.jinja", name=title, metric=metric, names=names, rows=rows, failed=failed)
    write_text(workspace.root / PAGE, page)
    return workspace.root / PAGE


def apply(workspace: Workspace, name: str) -> None:
    """Bring an experiment's settings and results into the workspace.

    Raises:
        UserError: there is no such experiment.
    """
    done = _dvc(workspace, {}, "exp", "apply", name)
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(
            f"{name} could not be applied: {told[-1] if told else 'no reason given'}; there are: {', '.join(_known(workspace))}"
        )


def _experiment(workspace: Workspace, changes: tuple[str, ...], name: str, group: str) -> None:
    log = workspace.work / "sweeps" / f"{name}.log"
    settings = [part for change in changes for part in ("--set-param", change)]
    done = _dvc(workspace, {"REPROLORA_SWEEP": group}, "exp", "run", "--temp", "--name", name, *settings)
    write_text(log, done.stdout + done.stderr)
    if done.returncode:
        say(f"  {name} FAILED, and the others go on: {log}")


def _metrics(workspace: Workspace, name: str) -> dict[str, float | None]:
    try:
        return metrics_at(workspace, name)
    except UserError:
        return {}


def _known(workspace: Workspace) -> list[str]:
    listed = _dvc(workspace, {}, "exp", "list", "--all-commits", "--name-only").stdout.splitlines()
    return sorted(line.strip() for line in listed if line.strip())


def _dvc(workspace: Workspace, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=workspace.root,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _git(workspace: Workspace, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=workspace.root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
