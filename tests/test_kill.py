"""Real kills: nothing is orphaned, nothing is lost, and the adapter comes out byte for byte as without them."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest
from PIL import Image
from project import Project, ended
from safetensors import safe_open

STEPS = 40


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> bytes:
    """The adapter of an uninterrupted run."""
    from project import make_project

    folders = [request.getfixturevalue(name) for name in ("sd_folder", "clip_folder", "pictures_folder")]
    project = make_project(tmp_path_factory.mktemp("whole") / "p", *folders)
    prepare(project)
    assert project.cli("run", "train-lora").returncode == 0
    return adapter(project)


def prepare(project: Project) -> None:
    project.set("train", steps=STEPS, ema_decay=0.95)
    project.set("runtime", checkpoint_every=3, micro_batch=2)


def adapter(project: Project) -> bytes:
    return project.path("build/adapter/adapter.safetensors").read_bytes()


def checkpoints(project: Project) -> list[str]:
    return sorted(p.name for p in project.path(".work/train-lora").glob("*/checkpoints/step-*"))


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def processes(project: Project) -> list[psutil.Process]:
    """Everything that runs in the project's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(project.root):
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def trainer(project: Project) -> int | None:
    for process in processes(project):
        try:
            if process.cmdline()[-2:] == ["stage", "train-lora"] and "python" in process.name():
                return process.pid
        except psutil.Error:
            continue
    return None


def slow_trainer(project: Project) -> None:
    """Tiny steps take milliseconds: make each wait a little, outside of what is computed."""
    path = project.path("pipeline/train.py")
    source = path.read_text()
    marked = re.sub(r"^( +)(members = batches.members\(step\)\n)", r"\1__import__('time').sleep(0.1)\n\1\2", source, flags=re.M)
    assert marked != source
    path.write_text(marked)


def start_and_wait(project: Project, *command: str, checkpoint: int = 2) -> subprocess.Popen[str]:
    prepare(project)
    slow_trainer(project)
    process = project.start(*command)
    wait_for(
        lambda: len(checkpoints(project)) >= min(checkpoint, 2) and checkpoints(project)[-1] >= f"step-{3 * checkpoint:08d}"
    )
    return process


def finish(project: Project, whole: bytes) -> str:
    done = project.cli("run", "train-lora")
    assert done.returncode == 0, done.stdout + done.stderr
    assert adapter(project) == whole
    return done.stdout


DVC = (sys.executable, "-m", "dvc", "repro", "train-lora")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_sigkill_of_the_trainer_at_a_random_step(project: Project, whole: bytes, seed: int) -> None:
    """With a moving average and accumulation on."""
    chance = random.Random(seed)
    process = start_and_wait(project, sys.executable, "cli.py", "run", "train-lora", checkpoint=chance.randint(1, 9))
    time.sleep(chance.random() * 0.5)
    pid = trainer(project)
    assert pid
    os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "train-lora                          killed" in output
    assert not project.path("build/adapter").exists()
    assert "going on from the checkpoint at step" in finish(project, whole)


def test_sigterm_to_dvc_leaves_no_orphan_and_saves(project: Project, whole: bytes) -> None:
    process = start_and_wait(project, *DVC)
    process.terminate()
    process.wait(timeout=60)
    wait_for(lambda: not processes(project), 30)
    told = process.stdout.read() if process.stdout else ""
    assert "is saved: run again to go on" in told
    assert "going on from the checkpoint at step" in finish(project, whole)


@pytest.mark.slow
def test_sigkill_to_dvc_leaves_no_orphan_and_saves(project: Project, whole: bytes) -> None:
    process = start_and_wait(project, *DVC)
    process.kill()
    process.wait(timeout=60)
    wait_for(lambda: not processes(project), 30)
    assert "going on from the checkpoint at step" in finish(project, whole)


@pytest.mark.slow
def test_a_shell_between_dvc_and_the_stage_hides_nothing(project: Project, whole: bytes) -> None:
    path = project.path("dvc.yaml")
    text = path.read_text()
    path.write_text(text.replace("cmd: python cli.py stage train-lora", "cmd: python cli.py stage train-lora; true"))
    process = start_and_wait(project, *DVC)
    process.kill()
    process.wait(timeout=60)
    wait_for(lambda: trainer(project) is None, 30)
    path.write_text(text)
    assert "going on from the checkpoint at step" in finish(project, whole)


@pytest.mark.slow
def test_ctrl_c_to_the_group_of_run(project: Project, whole: bytes) -> None:
    process = start_and_wait(project, sys.executable, "cli.py", "run", "train-lora")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "is saved: run again to go on" in output and "Traceback" not in output
    assert "train-lora                          interrupted" in output
    wait_for(lambda: not processes(project), 30)
    assert "going on from the checkpoint at step" in finish(project, whole)


@pytest.mark.slow
def test_sigterm_to_run_ends_everything(project: Project, whole: bytes) -> None:
    process = start_and_wait(project, sys.executable, "cli.py", "run", "train-lora")
    process.terminate()
    process.wait(timeout=60)
    wait_for(lambda: not processes(project), 30)
    finish(project, whole)


def test_params_edited_while_training_are_refused_and_never_recorded(project: Project, whole: bytes) -> None:
    process = start_and_wait(project, sys.executable, "cli.py", "run", "train-lora")
    project.set("train", learning_rate=0.5)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "train-lora: its inputs were edited while it ran:\n  train.learning_rate 0.01 → 0.5\n" in output
    assert "Nothing was recorded, and nothing is lost" in output
    assert "train-lora" not in project.path("dvc.lock").read_text()
    assert not project.path("build/adapter").exists()
    project.set("train", learning_rate=0.01)
    told = finish(project, whole)  # changed back: the finished work is taken, not repeated
    assert f"going on from the checkpoint at step {STEPS}" in told


@pytest.mark.slow
def test_a_change_that_no_stage_reads_is_let_pass(project: Project, whole: bytes) -> None:
    process = start_and_wait(project, sys.executable, "cli.py", "run", "train-lora")
    project.set("export", title="meanwhile")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.mark.slow
def test_a_second_runner_is_told_who_runs(project: Project) -> None:
    process = start_and_wait(project, *DVC)
    pid = trainer(project)
    second = project.cli("stage", "train-lora")
    assert second.returncode == 3
    assert f"train-lora is already running with these settings (pid {pid}: cli.py stage train-lora)" in second.stderr
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigkill_of_the_encoding_keeps_what_is_done(project: Project, processes: int) -> None:
    """Killed between two segments of the store: the next run encodes the rest and no more."""
    for i in range(150):
        image = Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8))
        image.save(project.path(f"data/more{i:03d}.png"))
        project.path(f"data/more{i:03d}.txt").write_text("noise")
    project.set("runtime", processes=processes)
    path = project.path("pipeline/encoders.py")
    pattern = r"^( +)(posterior = self.family.encode_pixels\(self.vae.*\n)"
    marked = re.sub(pattern, r"\1__import__('time').sleep(0.4)\n\1\2", path.read_text(), flags=re.M)
    assert marked != path.read_text()
    path.write_text(marked)
    assert project.cli("stage", "prepare-dataset").returncode == 0
    process = project.start(sys.executable, "cli.py", "stage", "precompute-latents-and-embeddings")

    def latents() -> int:
        found = 0
        for segment in project.path(".work/store").glob("*.safetensors"):
            with safe_open(segment, framework="pt") as file:
                found += sum(name.endswith(".mean") for name in file.keys())
        return found

    wait_for(lambda: latents() >= 64)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    wait_for(lambda: not processes_left(project), 45)  # the workers notice
    done_already = latents()
    assert 64 <= done_already < 160
    done = project.cli("stage", "precompute-latents-and-embeddings")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"encoded {160 - done_already} pictures" in done.stdout


def processes_left(project: Project) -> list[psutil.Process]:
    return [p for p in processes(project) if not ended(p)]
