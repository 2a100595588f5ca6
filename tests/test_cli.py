"""The command line as a user meets it: messages, exit codes, no traceback for what is the user's to mend."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from project import Project
from ruamel.yaml import YAML


def refused(project: Project, *arguments: str) -> str:
    done = project.cli(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def break_params(project: Project) -> None:
    project.set("train", learning_rat=1)


def break_type(project: Project) -> None:
    project.set("train", steps="many")


def break_folder(project: Project) -> None:
    project.set("dataset", path="nowhere")


def empty_folder(project: Project) -> None:
    (project.path("none")).mkdir()
    (project.path("none") / "notes.md").write_text("hello")
    project.set("dataset", path="none")


def truncate(project: Project) -> None:
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    image.save(project.path("data") / "photo.jpg")
    (project.path("data") / "photo.txt").write_text("a photo")
    data = (project.path("data") / "photo.jpg").read_bytes()
    (project.path("data") / "photo.jpg").write_bytes(data[: len(data) // 2])


def orphan_caption(project: Project) -> None:
    (project.path("data") / "lonely.txt").write_text("no picture")


def orphan_picture(project: Project) -> None:
    Image.new("RGB", (40, 40)).save(project.path("data") / "silent.png")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (break_params, "unknown key train.learning_rat: did you mean train.learning_rate?"),
        (break_type, 'train.steps is "many"'),
        (break_folder, "nowhere"),
        (empty_folder, "no picture in"),
        (truncate, "photo.jpg: is damaged"),
        (orphan_caption, "lonely.txt: is a caption without a picture"),
        (orphan_picture, "silent.png: has no caption"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_input_is_one_message_and_exit_2(project: Project, spoil: object, said: str) -> None:
    spoil(project)  # type: ignore[operator]
    assert said in refused(project, "run", "prepare-dataset")
    assert not project.path("build").exists()


@pytest.mark.parametrize(
    ("name", "text"), [("params.yaml", "a: [1\nb: 2\n"), ("dvc.lock", "<<<<<<< HEAD\na: 1\n"), ("dvc.yaml", None)]
)
def test_status_of_what_cannot_be_read_is_one_message(project: Project, name: str, text: str | None) -> None:
    if text is None:
        project.path(name).unlink()
    else:
        project.path(name).write_text(text)
    assert name in refused(project, "status")


def test_a_base_that_is_no_model(project: Project) -> None:
    project.set("model", base="data")
    message = refused(project, "run", "precompute-latents-and-embeddings")
    assert "model.base: data is no model: neither model_index.json" in message


def test_check_looks_at_everything_before_anything_runs(project: Project) -> None:
    done = project.cli("check")
    assert done.returncode == 0, done.stdout + done.stderr
    for title in ("params.yaml", "project", "packages", "device", "disk", "pictures", "base", "CLIP", "steps", "memory"):
        assert any(line.split()[:2] == ["ok", title] for line in done.stdout.splitlines()), title
    assert "not known before a first training here" in done.stdout
    project.set("model", base="data")
    assert "FAULT  base         model.base: data is no model" in refused(project, "check")


def test_pin_fills_in_what_run_then_holds_to(project: Project) -> None:
    done = project.cli("pin")
    assert done.returncode == 0 and done.stdout.count("sha256:") == 2
    assert project.cli("pin").stdout == "params.yaml: every model is pinned already\n"
    assert project.cli("run", "precompute-latents-and-embeddings", REPROLORA_STRICT="1").returncode == 0
    config = project.path("base/vae/config.json")
    config.write_text(config.read_text() + " ")
    project.set("encode", flip=True)
    assert "are not the pinned ones" in refused(project, "run", "precompute-latents-and-embeddings")


@pytest.mark.slow
def test_generate_draws_with_and_without_the_adapter(project: Project) -> None:
    assert "run the pipeline first" in refused(project, "generate", "a red circle")
    assert project.cli("run").returncode == 0
    done = project.cli("generate", "a red circle", "-n", "2", "--seed", "5", "--out", "pictures")
    assert done.returncode == 0, done.stderr
    paths = [project.path(line) for line in done.stdout.splitlines() if line.endswith(".png")]
    assert len(paths) == 2 and all(Image.open(p).size == (32, 32) for p in paths)
    bare = project.cli("generate", "a red circle", "--seed", "5", "--adapter", "none", "--out", "pictures")
    assert bare.returncode == 0
    without = next(project.path(line) for line in bare.stdout.splitlines() if line.endswith(".png"))
    assert without.read_bytes() != paths[0].read_bytes()
    Path(project.path("evil.bin")).write_bytes(b"x")
    assert "a pickle can run code" in refused(project, "generate", "x", "--adapter", "evil.bin")


@pytest.mark.slow
def test_ui_serves_the_projects_store(project: Project) -> None:
    assert "there is nothing to show yet" in refused(project, "ui")
    project.path("mlruns").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = project.start(sys.executable, "cli.py", "ui", "--port", str(port))
    try:
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2) as answer:
                    assert b"MLflow" in answer.read()
                    break
            except OSError:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.5)
    finally:
        import os

        os.killpg(process.pid, 15)
        process.wait(30)
    assert project.path("mlruns/mlflow.db").is_file()


def test_an_unknown_stage_or_option_is_named(project: Project) -> None:
    assert "did you mean validate?" in refused(project, "run", "valdate")
    assert "did you mean prepare-dataset?" in refused(project, "stage", "prepare-datasets")
    assert "--set steps=1: expected section.key=value" in refused(project, "run", "--set", "steps=1")


def test_set_writes_the_value_and_says_so(project: Project) -> None:
    done = project.cli("run", "prepare-dataset", "--set", "dataset.trigger=zyx")
    assert done.returncode == 0 and 'params.yaml: dataset.trigger "" → "zyx"' in done.stdout
    assert YAML(typ="safe").load(project.path("params.yaml").read_text())["dataset"]["trigger"] == "zyx"


def test_a_terminal_sees_bars_and_a_pipe_does_not(project: Project) -> None:
    """`script` gives the command a terminal of its own."""
    command = f"{sys.executable} cli.py stage prepare-dataset"
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        cwd=project.root,
        env=project.environment({"TERM": "xterm"}),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert b"\x1b[" in done.stdout and "reading pictures" in done.stdout.decode()


def test_run_in_a_terminal_shows_all_stages_in_one_place(project: Project) -> None:
    command = f"{sys.executable} cli.py run precompute-latents-and-embeddings"
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        cwd=project.root,
        env=project.environment({"TERM": "xterm", "CI": ""}) | {"COLUMNS": "120"},
        capture_output=True,
        check=False,
    )
    seen = done.stdout.decode()
    assert done.returncode == 0, seen
    view = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in seen.splitlines()]
    assert any(
        "precompute-latents-and-embeddings" in line and re.search(r"encoding (pictures|captions) \d+/\d+", line)
        for line in view
    )
    assert "encoded" in seen and "Generating lock file" not in seen  # what stages say goes by, DVC's own talk does not
