"""Several processes train one adapter: what one process alone would make, written by one, ended together."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from project import Project
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
STEPS = 7


@pytest.fixture
def prepared(new_project: Callable[[], Project], tmp_path: Path) -> Callable[[], Project]:
    """Projects with two sizes of pictures, whose last batches are smaller than the team."""

    def make() -> Project:
        project = new_project()
        wide = tiny.make_pictures(tmp_path / f"{project.root.name}-wide", count=5, size=(48, 32), seed=5)
        for file in wide.iterdir():
            shutil.copy(file, project.path("data") / f"wide-{file.name}")
        project.set("dataset", buckets={"step": 8, "min_side": 16, "max_side": 64})
        project.set("train", batch_size=4, steps=STEPS, caption_dropout=0.2, held_out_every=3, ema_decay=0.9, schedule="cosine")
        project.set("encode", flip=True)
        for stage in ("prepare-dataset", "precompute-latents-and-embeddings"):
            done = project.cli("stage", stage)
            assert done.returncode == 0, done.stdout + done.stderr
        return project

    return make


def weights(project: Project) -> dict[str, torch.Tensor]:
    return load_file(project.path("build/adapter/adapter.safetensors"))


def off(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The worst layer's relative difference."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / a[k].norm()) for k in a)


def slowed(project: Project, first_alone: str = "pass") -> None:
    """Steps take a tenth of a second; `first_alone` is run by every process in each."""
    path = project.path("pipeline/train.py")
    pattern = r"^( +)(members = batches.members\(step\)\n)"
    marked = re.sub(pattern, rf"\1__import__('time').sleep(0.1)\n\1{first_alone}\n\1\2", path.read_text(), flags=re.M)
    assert marked != path.read_text()
    path.write_text(marked)


def workers(project: Project) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        line = process.info["cmdline"] or []
        if "pipeline.train_worker" in line and "--nproc-per-node=2" not in line and process.info["cwd"] == str(project.root):
            found.append(process)
    return found


def test_two_processes_train_what_one_trains(prepared: Callable[[], Project]) -> None:
    """Micro-batches or processes: 1 × 4 = 2 × 2 but for the order of float sums. Stated tolerance: 1e-4 of each layer's size."""
    alone, two = prepared(), prepared()
    two.set("runtime", processes=2)
    assert alone.cli("stage", "train-lora").returncode == 0
    done = two.cli("stage", "train-lora")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shared by 2 processes" in done.stdout and done.stdout.count("parameters to train") == 1
    assert off(weights(alone), weights(two)) < 1e-4
    for name in ("curve.csv", "held-out.csv"):
        rows = [
            [
                [float(value) for value in line.split(",")]
                for line in p.path(f"reports/train/{name}").read_text().split("\n")[1:-1]
            ]
            for p in (alone, two)
        ]
        torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]), rtol=1e-4, atol=1e-6)


def test_a_stopped_team_goes_on_to_the_same_bytes(prepared: Callable[[], Project]) -> None:
    whole, cut = prepared(), prepared()
    for project in (whole, cut):
        project.set("runtime", processes=2)
        project.set("train", steps=24)
        slowed(project)
    assert whole.cli("stage", "train-lora").returncode == 0
    process = cut.start(sys.executable, "cli.py", "stage", "train-lora")
    wait_for_checkpoint(cut)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert not workers(cut) and not cut.path("build/adapter").exists()
    done = cut.cli("stage", "train-lora")
    assert done.returncode == 0 and done.stdout.count("going on from the checkpoint at step") == 1, done.stdout + done.stderr
    for name in ("build/adapter/adapter.safetensors", "reports/train/curve.csv", "reports/train/held-out.csv"):
        assert cut.path(name).read_bytes() == whole.path(name).read_bytes()


def wait_for_checkpoint(project: Project) -> None:
    end = time.monotonic() + 90
    while not list(project.root.glob(".work/train-lora/*/checkpoints/step-*")):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_process_that_dies_takes_the_others_down(prepared: Callable[[], Project]) -> None:
    project = prepared()
    project.set("runtime", processes=2)
    project.set("train", steps=300)
    slowed(project)
    process = project.start(sys.executable, "cli.py", "stage", "train-lora")
    wait_for_checkpoint(project)
    found = workers(project)
    assert len(found) == 2
    os.kill(found[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and time.monotonic() - killed < 45, output
    assert "was ended by signal 9" in output and "one of the processes failed" in output
    assert not workers(project)


def test_an_error_of_one_process_is_told_before_anything_else(prepared: Callable[[], Project]) -> None:
    project = prepared()
    project.set("runtime", processes=2)
    slowed(project, "if team.rank == 1 and step == 2: raise UserError('the second one is unwell')")
    done = project.cli("stage", "train-lora")
    assert done.returncode == 2
    assert done.stderr.index("error: the second one is unwell") < done.stderr.index("one of the processes failed")
    assert done.stderr.count("is unwell") == 1


def test_what_all_run_into_is_told_once(prepared: Callable[[], Project]) -> None:
    project = prepared()
    project.set("runtime", processes=2)
    project.set("lora", alpha=1e30)  # no arithmetic takes its square, whatever the processor
    done = project.cli("stage", "train-lora")
    assert done.returncode == 2
    assert done.stderr.count("not finite") == 1 and "Traceback" not in done.stderr, done.stderr
    project.set("lora", alpha=4.0, dropout=0.1)
    done = project.cli("stage", "train-lora")
    assert done.returncode == 2 and done.stderr.count("lora.dropout: several processes would draw other masks") == 1


def test_two_machines_meet_and_both_have_the_adapter(prepared: Callable[[], Project]) -> None:
    """Each with a copy of the project, as machines without a common disk have; on loopback here."""
    one, other = prepared(), prepared()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank, project in enumerate((one, other)):
        project.set("runtime", machines=2, machine_rank=rank, main_address=f"127.0.0.1:{port}")
    started = [p.start(sys.executable, "cli.py", "stage", "train-lora") for p in (one, other)]
    for process in started:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    for name in ("build/adapter/adapter.safetensors", "build/adapter/training.json", "reports/train/curve.csv"):
        assert one.path(name).read_bytes() == other.path(name).read_bytes()
    alone = prepared()
    assert alone.cli("stage", "train-lora").returncode == 0
    assert off(weights(alone), weights(one)) < 1e-4


def test_an_accelerate_config_starts_the_training(prepared: Callable[[], Project]) -> None:
    plain, configured = prepared(), prepared()
    configured.path("one.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: 'no'\n"
        "num_machines: 1\nnum_processes: 1\nuse_cpu: true\n"
    )
    configured.set("runtime", accelerate_config="one.yaml")
    assert plain.cli("stage", "train-lora").returncode == 0
    done = configured.cli("stage", "train-lora")
    assert done.returncode == 0, done.stdout + done.stderr
    assert off(weights(plain), weights(configured)) < 1e-5
    configured.set("runtime", accelerate_config="none.yaml")
    configured.set("train", seed=1)
    done = configured.cli("stage", "train-lora")
    assert done.returncode == 2 and "runtime.accelerate_config: there is no file none.yaml" in done.stderr
