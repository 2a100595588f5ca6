"""The harness: what a stage is told, what it refuses, and that nothing is lost."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
from project import PARAMS, Project
from ruamel.yaml import YAML

from pipeline.errors import AlreadyRunning, Interrupted, UserError
from pipeline.stage import Stage, run_stage, value_changes

DVC_YAML = """
stages:
  first:
    cmd: python cli.py stage first
    deps: ["${dataset.path}"]
    params: [dataset, train]
    outs: [build/first]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one stage."""
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a")
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def write(folder: Path, **train: object) -> None:
    params = {**PARAMS, "train": {**PARAMS["train"], **train}}
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(params, file)


def body(stage: Stage) -> None:
    (stage.out(Path("build/first")) / "out.txt").write_text("made")


def noting(seen: list[str]):
    """A body that notes its fingerprint."""

    def run(stage: Stage) -> None:
        seen.append((stage.work.name, stage.identity))
        body(stage)

    return run


def published(folder: Path) -> bool:
    return (folder / "build/first/out.txt").is_file()


def outcomes(folder: Path) -> list[str]:
    import json

    lines = [json.loads(line)["outcome"] for line in (folder / ".work/journal.jsonl").read_text().splitlines()]
    assert lines[::2] == ["started"] * len(lines[::2])
    return lines[1::2]


def test_outs_appear_when_the_body_is_through_and_replace_the_old(here: Path) -> None:
    (here / "build/first").mkdir(parents=True)
    (here / "build/first/stale.txt").write_text("old")
    run_stage("first", body)
    assert published(here) and not (here / "build/first/stale.txt").exists()
    assert outcomes(here) == ["done"]


def test_a_bug_shows_a_traceback_and_leaves_the_old_outs(here: Path) -> None:
    (here / "build/first").mkdir(parents=True)
    (here / "build/first/old.txt").write_text("old")

    def broken(stage: Stage) -> None:
        body(stage)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_stage("first", broken)
    assert (here / "build/first/old.txt").is_file() and not published(here)
    assert outcomes(here) == ["failed"]


@pytest.mark.parametrize("edit", ["params", "dep changed", "dep added", "dep gone"])
def test_inputs_edited_meanwhile_are_refused(here: Path, edit: str) -> None:
    def edited(stage: Stage) -> None:
        body(stage)
        if edit == "params":
            write(here, learning_rate=0.5)
        elif edit == "dep gone":
            (here / "data" / "a.txt").unlink()
        else:
            (here / "data" / ("a.txt" if "changed" in edit else "b.txt")).write_text("b")

    with pytest.raises(UserError, match="its inputs were edited while it ran") as caught:
        run_stage("first", edited)
    assert ("train.learning_rate 0.01 → 0.5" in str(caught.value)) == (edit == "params")
    assert ("data: " in str(caught.value)) == (edit != "params")
    assert not published(here) and outcomes(here) == ["refused"]


def test_a_comment_or_a_section_it_does_not_read_may_change(here: Path) -> None:
    def edited(stage: Stage) -> None:
        body(stage)
        text = (here / "params.yaml").read_text()
        (here / "params.yaml").write_text("# hello\n" + text.replace("rank: 2", "rank: 3"))

    run_stage("first", edited)
    assert published(here)


def test_the_work_directory_is_named_by_all_that_matters(here: Path) -> None:
    seen = []

    def run() -> None:
        run_stage("first", noting(seen))

    run()
    run()
    assert seen[0] == seen[1]
    write(here, learning_rate=0.02)
    run()
    (here / "data" / "a.txt").write_text("other")
    run()
    assert len(set(seen)) == 3
    assert (here / ".work/first" / seen[0][0]).is_dir()


def test_a_full_disk_is_told_in_words(here: Path) -> None:
    """/dev/full is the kernel's own full disk."""

    def full(stage: Stage) -> None:
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    with pytest.raises(UserError, match=r"the disk is full(.|\n)*make room"):
        run_stage("first", full)


def test_a_missing_dataset_names_the_setting(here: Path) -> None:
    (here / "data" / "a.txt").unlink()
    (here / "data").rmdir()
    with pytest.raises(UserError, match=r"data is missing: set dataset\.path"):
        run_stage("first", body)
    assert outcomes(here) == ["refused"]


def hold(folder: str, ready: object) -> None:
    os.chdir(folder)

    def wait(stage: Stage) -> None:
        body(stage)
        ready.set()
        time.sleep(60)

    run_stage("first", wait)


def test_one_at_a_time_and_the_lock_dies_with_its_holder(here: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(str(here), ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(AlreadyRunning, match=rf"first is already running with these settings \(pid {holder.pid}: "):
        run_stage("first", body)
    write(here, learning_rate=0.3)  # other settings have another work directory
    run_stage("first", body)
    write(here)
    holder.kill()
    holder.join()
    run_stage("first", body)
    assert published(here)


def test_a_request_to_stop_reaches_the_body_and_is_journalled(here: Path) -> None:
    import signal

    def long(stage: Stage) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        stage.stop.check("three of nine are saved")

    with pytest.raises(Interrupted, match="SIGTERM; three of nine are saved: run again to go on"):
        run_stage("first", long)
    assert outcomes(here) == ["interrupted"] and not published(here)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_force_empties_the_work_directory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves(stage: Stage) -> None:
        body(stage)
        (stage.work / "checkpoint").mkdir(exist_ok=True)
        seen.append(sorted(p.name for p in stage.work.iterdir()))

    seen: list[list[str]] = []
    run_stage("first", leaves)
    run_stage("first", body)
    monkeypatch.setenv("REPROLORA_FORCE", "1")
    run_stage("first", lambda s: (seen.append(sorted(p.name for p in s.work.iterdir())), body(s))[1])
    assert "checkpoint" in seen[0] and "checkpoint" not in seen[1]


def test_local_models_are_part_of_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC does not see the base's files: a checkpoint must not be resumed on another base all the same."""
    (tmp_path / "dvc.yaml").write_text(DVC_YAML.replace("[dataset, train]", "[model]"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a")
    write(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    seen = []
    run_stage("first", noting(seen))
    (tmp_path / "base" / "config.json").write_text("{ }")
    run_stage("first", noting(seen))
    assert seen[0] != seen[1]


def test_value_changes_name_every_leaf() -> None:
    before = {"train": {"rate": 1e-4, "seeds": [1], "name": "a"}, "same": 1}
    after = {"train": {"rate": 2e-4, "seeds": [1, 2], "new": True}, "same": 1}
    assert value_changes(before, after) == [
        "train.rate 0.0001 → 0.0002",
        "train.seeds [1] → [1, 2]",
        'train.name "a" → (unset)',
        "train.new (unset) → true",
    ]


def test_nothing_is_said_about_progress_twice_when_not_a_terminal(project: Project) -> None:
    done = project.cli("stage", "prepare-dataset")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    assert done.stdout.splitlines()[0] == "prepare-dataset: reading its inputs"
    assert len(done.stdout.splitlines()) == 3
