"""A search over settings: what ranges mean, that it goes on as if it had not been killed, and that it runs nothing twice."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from project import Project, commit
from test_kill import wait_for

from pipeline import search as module
from pipeline.errors import UserError
from pipeline.search import Range, axes
from pipeline.workspace import Workspace


def test_ranges_and_lists() -> None:
    found = axes(["lora.rank=4..32", "train.learning_rate=1e-5..1e-3", "train.optimiser=adamw,lion", "lora.targets=[a, b],[c]"])
    assert found == {
        "lora.rank": Range(4, 32),
        "train.learning_rate": Range(1e-5, 1e-3),
        "train.optimiser": ("adamw", "lion"),
        "lora.targets": (["a", "b"], ["c"]),
    }


@pytest.mark.parametrize(
    ("text", "whole", "log"),
    [
        ("1e-5..1e-3", False, True),
        ("0.1..1.0", False, True),
        ("0.2..1.0", False, False),  # less than a factor of ten
        ("0.0..1.0", False, False),
        ("-1.0..1.0", False, False),
        ("1..100", True, False),
        ("1..100.0", False, True),
    ],
)
def test_which_ranges_are_whole_and_which_logarithmic(text: str, whole: bool, log: bool) -> None:
    axis = axes([f"a.b={text}"])["a.b"]
    assert isinstance(axis, Range) and (axis.whole, axis.log) == (whole, log)


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["lora.rank=32..4"], "32 is not below 4"),
        (["lora.rank=4..4"], "4 is not below 4"),
        (["rank=4..8"], "expected section.key=value,value"),
        (["lora.rank=4..8", "lora.rank=1,2"], "lora.rank is given twice"),
    ],
)
def test_what_is_no_range_is_refused(assignments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        axes(assignments)


def test_without_optuna_it_says_what_to_install(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'reprolora\[search\]'"):
        module.search(Workspace(project.root, project.root), ["lora.rank=1..4"], "clip_score", 1, 3)


class Experiments:
    """Stands in for DVC: an experiment's metric is the learning rate's distance from 0.003, and some fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: Callable[[int], bool] = lambda n: False) -> None:
        self.ran: list[tuple[str, ...]] = []
        self.done: dict[str, dict[str, float | None]] = {}
        self.fail = fail
        monkeypatch.setattr(module, "experiment", self.experiment)
        monkeypatch.setattr(module, "metrics_of", lambda workspace, name: self.done.get(name, {}))
        monkeypatch.setattr(module, "known", lambda workspace: list(self.done))
        monkeypatch.setattr(module, "commit_to_start_from", lambda workspace: "head")

    def experiment(self, workspace: Any, changes: tuple[str, ...], name: str, group: str) -> None:
        self.ran.append(changes)
        if self.fail(len(self.ran)):
            raise KeyboardInterrupt
        rate = json.loads(changes[0].partition("=")[2])
        assert 1e-5 <= rate <= 1e-1 and changes[1].partition("=")[2] in "12345678"
        self.done[name] = {"held_out_loss_ratio": abs(rate - 0.003)}


SPACE = ["train.learning_rate=1e-5..1e-1", "lora.rank=1..8"]


def test_a_search_that_was_killed_proposes_what_the_whole_one_does(
    new_project: Callable[[], Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")

    def search(project: Project, count: int) -> list[Any]:
        return module.search(Workspace(project.root, project.root), SPACE, "held_out_loss_ratio", 1, count)

    whole = Experiments(monkeypatch)
    project = new_project()
    best = search(project, 14)
    assert len(best) == len(whole.ran) == len(set(whole.ran)) == 14
    assert [t.metrics["held_out_loss_ratio"] for t in best] == sorted(t.metrics["held_out_loss_ratio"] for t in best)
    assert search(project, 14) == best and len(whole.ran) == 14  # asked again: nothing runs
    (project.root / ".work/sweeps").rename(project.root / "elsewhere")
    assert search(project, 14) == best and len(whole.ran) == 14  # the study is lost, the experiments are not

    killed = Experiments(monkeypatch, fail=lambda n: n == 12)
    project = new_project()
    with pytest.raises(KeyboardInterrupt):
        search(project, 14)
    assert search(project, 14) == best
    assert killed.ran == [*whole.ran[:12], *whole.ran[11:]]  # what it was at is tried again, and nothing else


def test_several_at_once_and_few_choices(new_project: Callable[[], Project], monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer combinations than trials none runs twice."""
    pytest.importorskip("optuna")
    experiments, project = Experiments(monkeypatch), new_project()
    space = ["train.learning_rate=0.001,0.003", "lora.rank=1..2"]
    found = module.search(Workspace(project.root, project.root), space, "held_out_loss_ratio", 3, 20)
    assert len(experiments.ran) == len(found) == 4 and "train.learning_rate=0.003" in found[0].changes


@pytest.mark.slow
def test_a_search_with_real_experiments_is_killed_goes_on_and_runs_nothing_twice(project: Project) -> None:
    pytest.importorskip("optuna")

    commit(project.root)
    refused = project.cli("sweep", "--search", "3", "--set", "lora.rank=0..2")
    assert refused.returncode == 2 and "lora.rank" in refused.stderr
    command = ("sweep", "--search", "3", "--set", "train.learning_rate=1e-5..1e-1", "--set", "lora.rank=1,2")
    process = project.start(sys.executable, "cli.py", *command)
    journal = project.path(".work/journal.jsonl")
    wait_for(lambda: journal.is_file() and journal.read_text().count('"stage": "export-and-card"') >= 2)  # the first is through
    wait_for(lambda: journal.read_text().count('"stage": "train-lora"') >= 3)  # the second has begun
    second = project.cli(*command)
    assert second.returncode == 3 and f"this search is already running (pid {process.pid}: cli.py sweep" in second.stderr
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    project.executed()
    done = project.cli(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 trials, 1 of them are there already" in done.stdout
    assert project.executed().count("precompute-latents-and-embeddings") == 0
    rows = [line for line in done.stdout.splitlines() if "train.learning_rate=" in line and "sweep-" in line]
    assert len(rows) == 3
    ratios = [float(row.split()[2]) for row in rows]
    assert ratios == sorted(ratios)
    assert project.path("reports/sweep.html").read_text().count("<h2>") == 3
    again = project.cli(*command)
    assert again.returncode == 0 and "3 trials, 3 of them are there already" in again.stdout
    assert project.executed() == []
    assert Path(rows[0].split()[-1]).name in again.stdout
