"""Many settings tried: a DVC experiment each, in a copy of the project, with the encodings shared; the best first.

An experiment's name is settled by its settings, so a sweep that was cut off goes on with what is missing.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.config import load_params
from pipeline.dvc_process import call
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


def parse(assignment: str) -> tuple[str, str]:
    """`section.key=values` -> the key and the text of the values.

    Raises:
        UserError: it is not of that form.
    """
    key, equals, text = assignment.partition("=")
    if not equals or "." not in key or not text:
        raise UserError(f"--set {assignment}: expected section.key=value,value, as in --set lora.rank=4,8,16")
    return key, text


def values(text: str) -> list[Any]:
    """`4,8` -> the two numbers. A value that holds a comma is written as YAML: `[a, b]`."""
    loaded: list[Any] = YAML(typ="safe").load(f"[{text}]")
    return loaded


def setting(key: str, value: Any) -> str:
    """As `--set` and DVC's `--set-param` read it."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def combinations(assignments: list[str]) -> list[tuple[str, ...]]:
    """`lora.rank=4,8` and `train.seed=0,1` -> the four combinations.

    Raises:
        UserError: an assignment is none.
    """
    parsed = [parse(assignment) for assignment in assignments]
    return list(itertools.product(*([setting(key, value) for value in values(text)] for key, text in parsed)))


def sweep(workspace: Workspace, assignments: list[str], metric: str, jobs: int) -> list[Trial]:
    """Run every combination that has no experiment yet; returns all of them, the best first.

    Args:
        metric: of `pipeline.metrics.DEFINITIONS`, with a direction.
        jobs: experiments at once.

    Raises:
        UserError: an unknown metric or value, or a project without a commit.
    """
    refuse_unmeasured(workspace, metric)
    trials = combinations(assignments)
    for changes in trials:
        preview_values(workspace, list(changes))  # refuses what is not allowed, before anything runs
    head = commit_to_start_from(workspace)
    names = {changes: name_of(head, changes) for changes in trials}
    there = set(known(workspace))
    todo = [changes for changes in trials if names[changes] not in there]
    say(f"{len(trials)} combinations, {len(trials) - len(todo)} of them are there already")
    group = group_of(head, assignments)

    def run(changes: tuple[str, ...]) -> None:
        experiment(workspace, changes, names[changes], group)

    for changes in todo[:1]:  # alone: it makes what all share, and MLflow's store
        run(changes)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        list(pool.map(run, todo[1:]))
    for changes in [c for c in todo if not metrics_of(workspace, names[c])] if jobs > 1 else []:
        run(changes)  # two that share a stage get in each other's way: what fell over runs once more, alone
    return best_first([Trial(names[c], c, metrics_of(workspace, names[c])) for c in trials], metric)


def refuse_unmeasured(workspace: Workspace, metric: str) -> None:
    """Say what is wrong with a metric to be best by.

    Raises:
        UserError: there is none of that name, it has no better side, or it is not measured here.
    """
    if metric not in DEFINITIONS or DEFINITIONS[metric].better == "neither":
        raise UserError(f"--metric {metric}: there are {', '.join(n for n, d in DEFINITIONS.items() if d.better != 'neither')}")
    if fault := load_params(workspace.params).unmeasured(metric):
        raise UserError(f"--metric {metric}: it is not measured, since {fault}")


def commit_to_start_from(workspace: Workspace) -> str:
    """The present commit, with code.json in step with the installed code.

    Raises:
        UserError: there is none, or files differ from it.
    """
    for line in renew(workspace.root):
        say(line)
    head = _git(workspace, "rev-parse", "HEAD")
    if not head:
        raise UserError("a sweep needs a commit to start from: `git add --all && git commit`")
    if _git(workspace, "status", "--porcelain", "--untracked-files=no"):
        raise UserError(
            "there are changes that are not committed, and experiments start from the commit: commit or stash them first"
        )
    return head


def name_of(head: str, changes: tuple[str, ...]) -> str:
    """An experiment's name: of its commit and settings."""
    return f"sweep-{hash_json([head, list(changes)])[:10]}"


def group_of(head: str, assignments: list[str]) -> str:
    """What MLflow's runs of one sweep are tagged with."""
    return hash_json([head, sorted(assignments)])[:10]


def best_first(trials: list[Trial], metric: str) -> list[Trial]:
    """Sorted by the metric's better side; what has no value comes last."""
    lower = DEFINITIONS[metric].better == "lower"

    def place(trial: Trial) -> tuple[bool, float]:
        value = trial.metrics.get(metric)
        return (value is None, 0.0 if value is None else value if lower else -value)

    return sorted(trials, key=place)


def write_sweep(workspace: Workspace, trials: list[Trial], metric: str) -> Path:
    """Write `reports/sweep.html`: the table, and the grid of each, the best first."""
    shown = [t for t in trials if t.metrics]
    names = [metric, *(n for n in ("held_out_loss_ratio", "overfitting_gap", "clip_score", "style_shift") if n != metric)]
    heights = [t.metrics.get(metric) or 0.0 for t in shown]
    rows = [
        {
            "name": t.name,
            "changes": t.changes,
            "cells": [number(t.metrics[n]) if n in t.metrics else "–" for n in names],
            "share": round(100 * abs(value) / max(map(abs, heights))) if any(heights) else 0,
            "grid": picture(bytes_at(workspace, t.name, f"{VALIDATE_REPORT}/before-after.png"), 900),
        }
        for t, value in zip(shown, heights, strict=True)
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
    done = call(workspace.root, "exp", "apply", name)
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(
            f"{name} could not be applied: {told[-1] if told else 'no reason given'}; there are: {', '.join(known(workspace))}"
        )


def experiment(workspace: Workspace, changes: tuple[str, ...], name: str, group: str) -> None:
    """Run one; a failure is said, and its output kept."""
    say(f"  {', '.join(changes)}")
    log = workspace.work / "sweeps" / f"{name}.log"
    settings = [part for change in changes for part in ("--set-param", change)]
    done = call(workspace.root, "exp", "run", "--temp", "--name", name, *settings, REPROLORA_SWEEP=group)
    write_text(log, done.stdout + done.stderr)
    if done.returncode:
        say(f"  {name} FAILED, and the others go on: {log}")


def metrics_of(workspace: Workspace, name: str) -> dict[str, float | None]:
    """An experiment's; empty where there is no such experiment."""
    try:
        return metrics_at(workspace, name)
    except UserError:
        return {}


def known(workspace: Workspace) -> list[str]:
    """The names of all experiments."""
    listed = call(workspace.root, "exp", "list", "--all-commits", "--name-only").stdout.splitlines()
    return sorted(line.strip() for line in listed if line.strip())


def _git(workspace: Workspace, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=workspace.root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
