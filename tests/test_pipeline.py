"""The promise of what runs when, with real DVC: each line of the table in docs/architecture.md is a test here."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from project import PARAMS, Project, make_project

from pipeline.files import hash_tree

PREPARE, ENCODE, TRAIN, VALIDATE, EXPORT = ALL = [
    "prepare-dataset",
    "precompute-latents-and-embeddings",
    "train-lora",
    "validate",
    "export-and-card",
]
OUTS = ("build", "reports", "dist")


def outs(project: Project) -> dict[str, str]:
    found = {f"{top}/{name}": digest for top in OUTS for name, digest in hash_tree(project.path(top)).items()}
    return {name: digest for name, digest in found.items() if name != "reports/index.html"}  # the page is tracked by nothing


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path, clip_folder: Path, pictures_folder: Path) -> Project:
    """A project after its first run; tests restore what they change."""
    project = make_project(tmp_path_factory.mktemp("built") / "p", sd_folder, clip_folder, pictures_folder)
    done = project.cli("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert project.executed() == ALL
    return project


@pytest.fixture
def project(built: Project) -> Iterator[Project]:  # shadows the fresh one: here all tests share a project
    text = built.path("params.yaml").read_text()
    kept = hash_tree(built.path("data")), hash_tree(built.path("pipeline"))
    yield built
    built.path("params.yaml").write_text(text)
    assert kept == (hash_tree(built.path("data")), hash_tree(built.path("pipeline"))), "a test left its edits behind"
    assert built.dvc("repro", "-q").returncode == 0
    built.executed()


def runs(project: Project) -> list[str]:
    done = project.dvc("repro", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    return project.executed()


def test_nothing_changed_nothing_runs(project: Project) -> None:
    before = outs(project)
    assert runs(project) == []
    done = project.cli("run")
    assert project.executed() == [] and done.returncode == 0
    assert len(re.findall(r"^  [a-z-]+ +up to date$", done.stdout, re.M)) == 5
    assert outs(project) == before


def test_comments_key_order_number_notation_runtime_and_tracking_run_nothing(project: Project) -> None:
    params = {section: dict(reversed(values.items())) for section, values in reversed(project.params().items())}
    params["runtime"] |= {"checkpoint_every": 5, "micro_batch": 2}
    params["tracking"] |= {"experiment": "another"}
    project.write(params)
    path = project.path("params.yaml")
    text = "# a comment\n" + path.read_text()
    assert "learning_rate: 0.01" in text
    path.write_text(text.replace("learning_rate: 0.01", "learning_rate: 1e-2 # the same"))
    assert runs(project) == []


def test_export_and_gate_run_export(project: Project) -> None:
    project.set("export", title="Another title")
    assert runs(project) == [EXPORT]
    project.set("gate", held_out_loss={"max": 0.5})
    assert runs(project) == [EXPORT]
    assert "FAILED" in project.path("dist/adapter/README.md").read_text()
    project.set("gate", no_such_metric={"max": 1.0})
    done = project.cli("run")
    assert done.returncode == 2 and "gate.no_such_metric" in done.stderr and "held_out_loss_ratio" in done.stderr


@pytest.mark.slow
def test_validate_runs_validate_and_export(project: Project) -> None:
    project.set("validate", prompts=["a blue circle"])
    assert runs(project) == [VALIDATE, EXPORT]


def test_train_and_lora_run_the_last_three_and_the_way_back_runs_nothing(project: Project) -> None:
    before = outs(project)
    project.set("train", learning_rate=0.02)
    assert runs(project) == [TRAIN, VALIDATE, EXPORT]
    assert outs(project) != before
    project.set("train", learning_rate=0.01)
    done = project.cli("run")
    assert project.executed() == []  # DVC's run cache restores
    assert len(re.findall(r"^  [a-z-]+ +restored$", done.stdout, re.M)) == 3
    assert outs(project) == before
    project.set("lora", rank=1)
    assert runs(project) == [TRAIN, VALIDATE, EXPORT]


@pytest.mark.slow
def test_encode_and_model_run_the_last_four(project: Project) -> None:
    project.set("encode", dtype="float16")
    assert runs(project) == [ENCODE, TRAIN, VALIDATE, EXPORT]
    project.set("encode", dtype="float32")
    assert runs(project) == []
    assert project.cli("pin").returncode == 0  # changes model.revision and validate.clip_revision
    # the encodings come out byte for byte the same, but train-lora reads the model section itself
    assert runs(project) == [ENCODE, TRAIN, VALIDATE, EXPORT]


def test_dataset_settings_and_early_cutoff(project: Project) -> None:
    project.set("dataset", max_rejected=5)
    assert runs(project) == [PREPARE]  # its outs come out the same: nothing else is touched
    project.set("dataset", trigger="zyx")
    assert runs(project) == ALL


@pytest.mark.slow
def test_a_picture_added_a_caption_edited_a_file_renamed(project: Project) -> None:
    data = project.path("data")
    kept = {p: p.read_bytes() for p in data.iterdir()}
    try:
        (data / "000.png").rename(data / "renamed.png")
        (data / "000.txt").rename(data / "renamed.txt")
        assert runs(project) == [PREPARE, ENCODE, EXPORT]  # same encodings: no training; the card's lineage names the dataset
        Image.new("RGB", (32, 32), (1, 200, 100)).save(data / "new.png")
        (data / "new.txt").write_text("a green square")
        assert runs(project) == ALL
        (data / "new.txt").write_text("a red square")
        assert runs(project)[:3] == [PREPARE, ENCODE, TRAIN]
    finally:
        for path in data.iterdir():
            path.unlink()
        for path, content in kept.items():
            path.write_bytes(content)


@pytest.mark.slow
def test_a_source_file_runs_the_stages_that_use_it_and_no_others(project: Project) -> None:
    expected = {
        "pipeline/export/card.md.jinja": [EXPORT],
        "pipeline/evaluate/clip.py": [VALIDATE],
        "pipeline/optim.py": [TRAIN],
        "pipeline/dataset/report.py": [PREPARE],
        "pipeline/families/sdxl.py": [],
        "pipeline/generate.py": [],
        "cli.py": [],
    }
    for name, stages in expected.items():
        path = project.path(name)
        source = path.read_bytes()
        mark = b"{# changed #}" if name.endswith(".jinja") else b"\n# changed\n"
        try:
            path.write_bytes(source + mark)
            assert runs(project) == stages, name
        finally:
            path.write_bytes(source)
        assert runs(project) == [], f"{name} changed back"


def test_status_and_dry_run_say_why(project: Project) -> None:
    project.set("train", learning_rate=0.02)
    project.set("validate", seeds=[1])
    (project.path("data") / "extra.txt").write_text("x")
    caption = sorted(project.path("data").glob("*.txt"))[0]
    written = caption.read_text()
    caption.write_text("another")
    try:
        told = project.cli("status").stdout
        dry = project.cli("run", "--dry-run", "--set", "lora.rank=3").stdout
    finally:
        (project.path("data") / "extra.txt").unlink()
        caption.write_text(written)
    assert "prepare-dataset: 2 changes\n" in told
    assert "  data/extra.txt added" in told and f"  data/{caption.name} edited" in told
    assert "  train.learning_rate 0.01 → 0.02" in told and "  after precompute-latents-and-embeddings" in told
    assert "  validate.seeds [0] → [1]" in told or "  validate.seeds (unset) → [1]" in told
    assert "  lora.rank 2 → 3" in dry and project.params()["lora"]["rank"] == 2
    assert project.executed() == []


@pytest.mark.slow
def test_run_one_stage_stops_there_and_an_unknown_one_is_named(project: Project) -> None:
    project.set("train", seed=5)
    assert project.cli("run", "train-lora").returncode == 0
    assert project.executed() == [TRAIN]
    done = project.cli("run", "train-lorra")
    assert done.returncode == 2 and "did you mean train-lora?" in done.stderr


@pytest.mark.slow
def test_force_runs_from_scratch_and_gives_the_same_bytes(project: Project) -> None:
    before = outs(project)
    done = project.cli("run", "--force")
    assert done.returncode == 0 and project.executed() == ALL
    assert "going on from the checkpoint" not in done.stdout
    assert outs(project) == before


def test_outs_that_were_deleted_are_restored_without_running(project: Project) -> None:
    before = outs(project)
    shutil.rmtree(project.path("build/adapter"))
    shutil.rmtree(project.path("dist"))
    assert project.cli("run").returncode == 0
    assert project.executed() == [] and outs(project) == before


def test_tracked_outs_hold_nothing_of_this_machine_or_moment(project: Project) -> None:
    import socket
    import time

    for top in OUTS:
        for path in sorted(project.path(top).rglob("*")):
            if path.is_file() and path.suffix in (".json", ".jsonl", ".csv", ".md"):
                text = path.read_text(encoding="utf-8")
                host = re.escape(socket.gethostname())
                for foreign in (re.escape(str(project.root)), rf"\b{host}\b", time.strftime("%Y-%m-%d")):
                    assert not re.search(foreign, text), (path, foreign)


@pytest.mark.slow
def test_a_clean_clone_with_the_cache_runs_nothing(project: Project, tmp_path: Path) -> None:
    """What a colleague or a CI runner gets: the code, dvc.lock, and the remote."""
    assert project.dvc("remote", "add", "-f", "-d", "store", str(tmp_path / "remote")).returncode == 0
    assert project.dvc("push", "-q", "--run-cache").returncode == 0
    clone = Project(tmp_path / "clone")
    shutil.copytree(project.root, clone.root, ignore=shutil.ignore_patterns(*OUTS, ".work", "cache", "tmp", "__pycache__"))
    done = clone.dvc("pull", "-q")
    assert done.returncode == 0, done.stderr
    assert runs(clone) == [] and outs(clone) == outs(project)
    assert clone.params()["train"] == PARAMS["train"]
