"""The MLflow mirror against real MLflow: a sqlite store, a server on loopback, a server that is down."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from project import Project, make_project

from pipeline.config import Tracking
from pipeline.errors import UserError
from pipeline.tracking import connect, default_uri, sync
from pipeline.workspace import Workspace


def runs(uri: str) -> dict[str, list]:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("reprolora")
    found: dict[str, list] = {}
    if experiment:
        for run in client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]):
            found.setdefault(run.data.tags["reprolora.stage"], []).append(run)
    return found


def store(project: Project) -> str:
    return default_uri(Workspace(project.root, project.root))


def tracked(project: Project, **tracking: object) -> Project:
    project.set("tracking", enabled=True, **tracking)
    return project


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path, clip_folder: Path, pictures_folder: Path) -> Project:
    project = tracked(make_project(tmp_path_factory.mktemp("built") / "p", sd_folder, clip_folder, pictures_folder))
    done = project.cli("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MLflow:" not in done.stdout
    return project


def artifacts(client: MlflowClient, run_id: str) -> set[str]:
    found = set()
    for item in client.list_artifacts(run_id):
        found |= {a.path for a in client.list_artifacts(run_id, item.path)} if item.is_dir else {item.path}
    return found


def test_one_run_an_adapter_with_children_curves_and_artifacts(built: Project) -> None:
    found = runs(store(built))
    assert {stage: len(of) for stage, of in found.items()} == {"train-lora": 1, "validate": 1, "export-and-card": 1}
    parent = found["train-lora"][0]
    client = MlflowClient(tracking_uri=store(built))
    assert parent.data.params["train.learning_rate"] == "0.01" and parent.data.params["lora.rank"] == "2"
    assert parent.data.params["dataset.resolution"] == "32" and parent.data.params["encode.dtype"] == "float32"
    assert [m.step for m in client.get_metric_history(parent.info.run_id, "loss")] == list(range(6))
    assert {"learning_rate", "grad_norm", "steps_per_second", "peak_memory_mib", "final_loss"} <= set(parent.data.metrics)
    assert parent.info.status == "FINISHED"
    for stage in ("validate", "export-and-card"):
        assert found[stage][0].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert {"held_out_loss", "base_held_out_loss", "clip_score"} <= set(found["validate"][0].data.metrics)
    assert "adapter.safetensors" in artifacts(client, parent.info.run_id)
    pictures = artifacts(client, found["validate"][0].info.run_id)
    assert "before-after.png" in pictures and sum(p.startswith("samples/") for p in pictures) == 2
    assert {"README.md", "pytorch_lora_weights.safetensors"} <= artifacts(client, found["export-and-card"][0].info.run_id)


def test_sync_does_nothing_the_second_time(built: Project) -> None:
    before = runs(store(built))
    done = built.cli("sync")
    assert done.returncode == 0 and done.stdout == "MLflow has everything\n"
    after = runs(store(built))
    assert {s: [(r.info.run_id, r.data.metrics) for r in of] for s, of in before.items()} == {
        s: [(r.info.run_id, r.data.metrics) for r in of] for s, of in after.items()
    }


def test_sync_fills_an_empty_store_from_the_files(built: Project, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    workspace = Workspace(built.root, built.root)
    settings = Tracking(uri=uri)
    old = os.getcwd()
    os.chdir(tmp_path)  # artifacts of a store without a location of its own land in the working directory
    try:
        assert len(sync(workspace, settings)) == 3 + 1  # the runs, and a version of the registered model
        assert sync(workspace, settings) == []
    finally:
        os.chdir(old)
    found = runs(uri)
    assert set(found) == {"train-lora", "validate", "export-and-card"}
    history = MlflowClient(tracking_uri=uri).get_metric_history(found["train-lora"][0].info.run_id, "loss")
    assert [m.step for m in history] == list(range(6))


@pytest.mark.slow
def test_a_forced_retraining_is_a_new_run(built: Project) -> None:
    assert built.cli("run", "train-lora", "--force").returncode == 0
    trainings = runs(store(built))["train-lora"]
    assert len(trainings) == 2
    assert trainings[0].data.tags["reprolora.fingerprint"] == trainings[1].data.tags["reprolora.fingerprint"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real `mlflow server` on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}",
               "--artifacts-destination", str(tmp_path / "artifacts")]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    end = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert time.monotonic() < end and process.poll() is None, "mlflow server did not start"
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, 15)
    process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_a_server_that_is_down_costs_seconds_and_sync_fills_the_gap(project: Project, server: str) -> None:
    down = f"http://127.0.0.1:{free_port()}"
    tracked(project, uri=down)
    done = project.cli("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "does not answer" in done.stdout and "`reprolora sync` fills the gap later" in done.stdout
    failed = project.cli("sync")
    assert failed.returncode == 2 and f"the MLflow server {down} does not answer" in failed.stderr
    filled = project.cli("sync", MLFLOW_TRACKING_URI=server)
    assert filled.returncode == 0 and filled.stdout.count("logged ") == 3 + 1, filled.stdout + filled.stderr
    assert "Warning" not in filled.stderr and "View run" not in filled.stdout, filled.stdout + filled.stderr
    assert project.cli("sync", MLFLOW_TRACKING_URI=server).stdout == "MLflow has everything\n"
    found = runs(server)
    assert len(found["train-lora"]) == 1
    assert "adapter.safetensors" in artifacts(MlflowClient(tracking_uri=server), found["train-lora"][0].info.run_id)


def test_a_server_that_takes_connections_and_never_answers_is_given_up_within_seconds(tmp_path: Path) -> None:
    """The limit itself is what is tested: with MLflow's defaults minutes would pass."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = Tracking(uri=f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UserError, match="does not answer") as caught:
            connect(Workspace(tmp_path, tmp_path), settings)
    assert time.monotonic() - start < 10
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_tracking_required_fails_the_stage(project: Project) -> None:
    tracked(project, uri=f"http://127.0.0.1:{free_port()}", required=True)
    done = project.cli("run")
    assert done.returncode == 2
    assert "does not answer" in done.stderr
    assert not project.path("build/adapter").exists()


def create(folder: str, barrier: object) -> None:
    barrier.wait()
    connect(Workspace(Path(folder), Path(folder)), Tracking())


def test_first_use_in_parallel_makes_one_sound_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    workers = [context.Process(target=create, args=(str(tmp_path), barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [w.exitcode for w in workers] == [0, 0, 0, 0]
    uri = default_uri(Workspace(tmp_path, tmp_path))
    names = [e.name for e in MlflowClient(tracking_uri=uri).search_experiments()]
    assert sorted(names) == ["Default", "reprolora"]


@pytest.mark.slow
def test_a_resumed_training_appends_to_its_run(new_project: Callable[[], Project]) -> None:
    project = tracked(new_project())
    project.set("train", steps=12)
    project.set("runtime", checkpoint_every=3)
    path = project.path("pipeline/train.py")
    source = path.read_text()
    assert project.cli("run", "precompute-latents-and-embeddings").returncode == 0
    cut = r"\1if step == 8 and first == 0:\n\1    raise RuntimeError('power cut')\n\1\2"
    marked = re.sub(r"^( +)(members = batches.members\(step\)\n)", cut, source, flags=re.M)
    assert marked != source
    path.write_text(marked)
    assert project.cli("stage", "train-lora").returncode == 1
    assert project.cli("stage", "train-lora").returncode == 0
    trainings = runs(store(project))["train-lora"]
    assert len(trainings) == 1
    history = MlflowClient(tracking_uri=store(project)).get_metric_history(trainings[0].info.run_id, "loss")
    assert sorted({m.step for m in history}) == list(range(12))
