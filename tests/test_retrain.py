"""The scheduled retraining: the workflow's own shell lines, step by step, on clean clones of a bare repository with a DVC remote.

GitHub's part (its runner, its actions, `gh`) is played by this file: conditions are those that stand in the workflow.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from project import REPOSITORY, Project, git
from ruamel.yaml import YAML

pytestmark = pytest.mark.slow
WORKFLOW = YAML(typ="safe").load((REPOSITORY / ".github/workflows/retrain.yml").read_text())
STEPS = WORKFLOW["jobs"]["retrain"]["steps"]


@dataclass
class Runner:
    """What a job leaves: outputs of steps, the summary, calls of `gh`."""

    project: Project
    outputs: dict[str, dict[str, str]]
    summary: str
    calls: list[str]
    code: int = 0


@pytest.fixture
def origin(new_project: Callable[[], Project], tmp_path: Path) -> Path:
    """A bare repository whose main holds an accepted adapter, its results in a DVC remote beside it."""
    project = new_project()
    project.set("model", revision=None)
    assert project.cli("pin").returncode == 0
    project.write({**project.params(), "gate": {"held_out_loss_ratio": {"max": 0.9999}}})
    project.set("train", steps=40, learning_rate=0.02, batch_size=4)
    assert project.dvc("add", "data").returncode == 0
    assert project.dvc("remote", "add", "--default", "shared", str(tmp_path / "remote")).returncode == 0
    done = project.cli("run", "--push")
    assert done.returncode == 0, done.stdout + done.stderr
    bare = tmp_path / "origin.git"
    git(project.root, "add", "-A")
    git(project.root, "commit", "-qm", "accepted")
    git(project.root, "branch", "-M", "main")
    git(tmp_path, "init", "-q", "--bare", "-b", "main", str(bare))
    git(project.root, "remote", "add", "origin", str(bare))
    git(project.root, "push", "-q", "origin", "main")
    return bare


def change(origin: Path, tmp_path: Path, edit: Callable[[Path], None]) -> None:
    """Somebody changes the pictures and pushes them."""
    work = tmp_path / "somebody"
    shutil.rmtree(work, ignore_errors=True)
    git(tmp_path, "clone", "-q", str(origin), str(work))
    project = Project(work)
    assert project.dvc("pull", "data.dvc").returncode == 0
    edit(work / "data")
    assert project.dvc("add", "data").returncode == 0
    assert project.dvc("push", "data.dvc").returncode == 0
    git(work, "commit", "-qam", "pictures")
    git(work, "push", "-q", "origin", "main")


def job(origin: Path, tmp_path: Path, name: str, minutes: str = "5", work: Path | None = None) -> Runner:
    """Run the workflow's steps in a fresh clone; `work` are checkpoints that the cache action brings."""
    root = tmp_path / name
    git(tmp_path, "clone", "-q", str(origin), str(root))
    if work:
        shutil.copytree(work, root / ".work" / "train-lora")
    fake = tmp_path / f"{name}-bin"
    fake.mkdir()
    # there is no pull request yet; nothing else is asked back
    (fake / "gh").write_text(f'#!/bin/sh\n[ "$1 $2" = "pr view" ] && exit 1\necho "$@" >> {fake}/calls\n')
    (fake / "gh").chmod(0o755)
    project = Project(root)
    runner = Runner(project, {}, "", [])
    files = {key: tmp_path / f"{name}-{key}" for key in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for step in STEPS:
        if "run" not in step or step["name"] == "Install" or not condition(step.get("if", ""), runner.outputs):
            continue
        if runner.code and step.get("if") != "always()":
            continue  # as on GitHub: after a failure only what always runs
        files["GITHUB_OUTPUT"].write_text("")
        environment = project.environment({**{k: str(v) for k, v in files.items()}, "MINUTES": minutes})
        environment["PATH"] = f"{fake}{os.pathsep}{environment['PATH']}"
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        lines = files["GITHUB_OUTPUT"].read_text().splitlines()
        runner.outputs[step.get("id", step["name"])] = dict(line.split("=", 1) for line in lines)
        if done.returncode:
            runner.code = runner.code or done.returncode
            runner.summary += done.stdout + done.stderr
    if files["GITHUB_STEP_SUMMARY"].is_file():
        runner.summary += files["GITHUB_STEP_SUMMARY"].read_text()
    if (fake / "calls").is_file():
        runner.calls = (fake / "calls").read_text().splitlines()
    return runner


def condition(text: str, outputs: dict[str, dict[str, str]]) -> bool:
    """`steps.X.outputs.Y == 'Z'` and `always()`, the forms that the workflow uses."""
    if not text or text == "always()":
        return True
    match = re.fullmatch(r"steps\.(\w+)\.outputs\.(\w+) == '(\w+)'", text)
    assert match, text
    return outputs.get(match[1], {}).get(match[2]) == match[3]


def branches(origin: Path) -> list[str]:
    return [line.strip("* ") for line in git(origin, "branch", "--list", "retrain/*").splitlines()]


def three_more(data: Path) -> None:
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(data / f"new{i}.png")
        (data / f"new{i}.txt").write_text(f"a new picture {i}")


def test_nothing_new_runs_nothing_and_new_pictures_are_proposed(origin: Path, tmp_path: Path) -> None:
    quiet = job(origin, tmp_path, "quiet")
    assert quiet.code == 0 and quiet.outputs["compare"]["changed"] == "false", quiet.summary
    assert quiet.project.executed() == [] and not quiet.calls and not branches(origin)
    change(origin, tmp_path, three_more)
    new = job(origin, tmp_path, "new")
    assert new.code == 0 and new.outputs["compare"] == {"changed": "true", "passed": "true"}, new.summary
    assert new.project.executed()[0] == "prepare-dataset" and "train-lora" in (tmp_path / "new/dvc.lock").read_text()
    journal = (tmp_path / "new" / ".work" / "store").glob("*.safetensors")
    assert list(journal)
    [branch] = branches(origin)
    assert new.calls == [f"pr create --head {branch} --title Retrain: the gate passed --body-file summary.md"]
    assert "the gate passes" in new.summary
    lock = YAML(typ="safe").load(git(origin, "show", f"{branch}:dvc.lock"))
    assert set(lock["stages"]) == {
        "prepare-dataset",
        "precompute-latents-and-embeddings",
        "train-lora",
        "validate",
        "export-and-card",
    }
    metrics = json.loads(git(origin, "show", f"{branch}:docs/retrain/metrics.json"))
    assert metrics["held_out_loss_ratio"] < 0.9999


def test_bad_data_fails_the_gate_and_publishes_nothing(origin: Path, tmp_path: Path) -> None:
    def spoil(data: Path) -> None:
        for i, path in enumerate(sorted(data.glob("*.png"))):
            Image.fromarray(np.random.default_rng(50 + i).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)

    change(origin, tmp_path, spoil)
    strict = tmp_path / "somebody" / "params.yaml"
    strict.write_text(strict.read_text().replace("max: 0.9999", "max: 0.5"))
    git(tmp_path / "somebody", "commit", "-qam", "a stricter gate")
    git(tmp_path / "somebody", "push", "-q", "origin", "main")
    bad = job(origin, tmp_path, "bad")
    assert bad.code == 1 and bad.outputs["compare"] == {"changed": "true", "passed": "false"}, bad.summary
    assert not branches(origin) and any(call.startswith("issue create") for call in bad.calls)
    assert "the gate fails" in bad.summary


def test_a_job_out_of_time_goes_on_in_the_next(origin: Path, tmp_path: Path) -> None:
    change(origin, tmp_path, three_more)
    train = tmp_path / "somebody" / "pipeline" / "train.py"
    pattern = r"^( +)(members = batches.members\(step\)\n)"
    train.write_text(re.sub(pattern, r"\1__import__('time').sleep(0.5)\n\1\2", train.read_text(), flags=re.M))
    git(tmp_path / "somebody", "commit", "-qam", "slow")
    git(tmp_path / "somebody", "push", "-q", "origin", "main")
    cut = job(origin, tmp_path, "cut", minutes="0.5")
    assert cut.code == 0 and cut.outputs["train"] == {"finished": "false"} and "Time is up" in cut.summary, cut.summary
    assert not cut.calls and not branches(origin)
    done = job(origin, tmp_path, "done", work=tmp_path / "cut" / ".work" / "train-lora")
    assert done.code == 0 and done.outputs["compare"]["passed"] == "true", done.summary
    journal = [json.loads(line) for line in (tmp_path / "done" / ".work" / "journal.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in journal if entry["outcome"] == "done"][:1] == ["train-lora"]  # the rest was pushed
    assert len(branches(origin)) == 1


def test_the_workflow_is_one() -> None:
    """Against the parts of GitHub's schema that are used here."""
    assert set(WORKFLOW) <= {"name", "on", True, "concurrency", "permissions", "jobs"}
    job_ = WORKFLOW["jobs"]["retrain"]
    assert {"runs-on", "timeout-minutes", "env", "steps"} == set(job_)
    for step in STEPS:
        assert ("uses" in step) != ("run" in step)
        assert set(step) <= {"name", "id", "if", "uses", "with", "run"}
        if "run" in step:
            subprocess.run(["bash", "-n", "-c", step["run"]], check=True)
    ids = {step["id"] for step in STEPS if "id" in step}
    used = set(re.findall(r"steps\.(\w+)\.", " ".join(step.get("if", "") for step in STEPS)))
    assert used <= ids
