"""Two terminals, one project: the second is told who works there, and neither harms the other."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from project import Project, commit
from test_kill import adapter, slow_trainer, trainer, wait_for

from pipeline.errors import AlreadyRunning
from pipeline.lock import held

RUN = (sys.executable, "cli.py", "run", "train-lora")
DVC = (sys.executable, "-m", "dvc")


@pytest.fixture
def slow(project: Project) -> Project:
    """A committed project whose training takes some seconds."""
    slow_trainer(project)
    project.set("train", steps=40)
    commit(project.root)
    return project


def training(project: Project, *command: str) -> subprocess.Popen[str]:
    """Started, and now at its training."""
    process = project.start(*command)
    wait_for(lambda: trainer(project) or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]
    return process


def well_ended(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


def told_off(project: Project, *arguments: str) -> str:
    start = time.monotonic()
    second = project.cli(*arguments)
    assert second.returncode == 3, second.stdout + second.stderr
    assert "Traceback" not in second.stderr
    assert time.monotonic() - start < 15  # at once, on a machine that is busy with the first
    return second.stderr


def test_a_lock_names_its_holder_and_is_let_go(new_project: Callable[[], Project]) -> None:
    path = new_project().path(".work/some.lock")
    script = (
        f"from pipeline.lock import held\nfrom pathlib import Path\nwith held(Path({str(path)!r}), 'it runs'):\n    input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, "x"], cwd=path.parent.parent, stdin=subprocess.PIPE)
    wait_for(lambda: path.is_file() and path.read_text())
    with (
        pytest.raises(AlreadyRunning, match=rf"^it runs \(pid {holder.pid}: -c x\): wait for it, or stop it first$"),
        held(path, "it runs"),
    ):
        pass
    holder.kill()
    holder.wait()
    with held(path, "it runs"):
        pass


@pytest.mark.slow
def test_a_second_run_is_told_who_holds_the_project(slow: Project) -> None:
    first = training(slow, *RUN)
    params = slow.path("params.yaml").read_text()
    said = told_off(slow, "run", "--set", "train.steps=3")
    assert f"this project is already running (pid {first.pid}: cli.py run train-lora)" in said
    assert slow.path("params.yaml").read_text() == params
    assert f"(pid {first.pid}: cli.py run train-lora)" in told_off(slow, "apply", "some-experiment")
    assert f"(pid {first.pid}: cli.py run train-lora)" in told_off(slow, "status")  # DVC cannot tell while a stage writes
    well_ended(first)
    assert slow.executed().count("train-lora") == 1

    slow.set("train", steps=41)
    bare = training(slow, *DVC, "repro", "train-lora")
    said = told_off(slow, "run")
    assert f"this project is already running (pid {bare.pid}: dvc repro train-lora)" in said
    well_ended(bare)
    assert slow.executed() == ["train-lora"]


@pytest.mark.slow
def test_an_experiment_beside_a_run(slow: Project) -> None:
    """Other settings run side by side in the same `.work`; with the same settings the second is told."""
    slow.set("train", steps=150)
    assert slow.cli("run", "precompute-latents-and-embeddings").returncode == 0
    first = training(slow, *RUN)
    beside = slow.start(*DVC, "exp", "run", "--temp", "--set-param", "lora.rank=1", "train-lora")
    locks = slow.path(".work/train-lora")
    wait_for(lambda: len(list(locks.glob("*/checkpoints"))) == 2)
    assert trainer(slow), "the run is at its training still"
    well_ended(first)
    well_ended(beside)
    assert len(list(locks.iterdir())) == 2

    experiment = slow.start(*DVC, "exp", "run", "--temp", "--set-param", "train.steps=160", "train-lora")
    wait_for(lambda: len(list(locks.glob("*/checkpoints"))) == 3)
    said = told_off(slow, "run", "train-lora", "--set", "train.steps=160")
    assert "train-lora is already running with these settings (pid " in said
    well_ended(experiment)
    slow.executed()
    assert slow.cli("run", "train-lora").returncode == 0
    assert slow.executed() == []  # the experiment's result, out of the run cache
    assert adapter(slow)
