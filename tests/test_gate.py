"""The shipped gate on real trainings of the embedded base: it fails what is overfitted and what is broken. (That it passes the
demo, `test_demo.py` says.)"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from project import REPOSITORY, Project, make_project
from ruamel.yaml import YAML

pytestmark = pytest.mark.slow
STEPS = 40
SHIPPED = YAML(typ="safe").load((REPOSITORY / "params.yaml").read_text())


@pytest.fixture
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The demo with short trainings on 36 of its pictures."""
    assets, root = REPOSITORY / "assets", tmp_path_factory.mktemp("gate") / "p"
    pictures = tmp_path_factory.mktemp("pictures") / "data"
    pictures.mkdir()
    for i in range(1, 37):
        for file in (assets / "demo-dataset").glob(f"{i:03d}.*"):
            shutil.copy(file, pictures / file.name)
    project = make_project(root, assets / "tiny-sd", assets / "tiny-clip", pictures)
    params = {**SHIPPED, "tracking": {"enabled": False}, "runtime": {"device": "cpu"}}
    project.write(params)
    project.set("dataset", path="data", resolution=64, held_out_fraction=0.3)
    project.set("model", base="base")
    project.set("train", steps=STEPS, batch_size=4, warmup_steps=5)
    few = {"prompts": params["validate"]["prompts"][:6], "untriggered_prompts": [], "scales": [1.0], "inference_steps": 15}
    project.set("validate", clip_model="clip", **few)
    return project


def verdict(project: Project) -> tuple[int, dict, dict]:
    project.executed()
    done = project.cli("run", OMP_NUM_THREADS="2")
    assert done.returncode == 0 and "export-and-card" in project.executed(), done.stdout + done.stderr
    assert project.path("dist/adapter/gate.json").is_file(), done.stdout + done.stderr
    gate = json.loads(project.path("dist/adapter/gate.json").read_text())
    return project.cli("gate").returncode, gate, json.loads(project.path("reports/validate/metrics.json").read_text())


def test_a_short_sound_training_passes_and_a_tenfold_one_on_few_pictures_fails(project: Project) -> None:
    code, gate, sound = verdict(project)
    assert code == 0 and gate["passed"], gate
    lines = [json.loads(line) for line in project.path("build/dataset/manifest.jsonl").read_text().splitlines()]
    trained = [line["path"] for line in lines if line["split"] == "train"]
    for name in trained[4:]:
        for suffix in (".png", ".txt"):
            project.path(f"data/{name}").with_suffix(suffix).unlink()
    project.set("train", steps=10 * STEPS)
    code, gate, metrics = verdict(project)
    print(sound, metrics)
    assert code == 1 and not gate["passed"], metrics
    assert metrics["overfitting_gap"] > 2 * sound["overfitting_gap"]
    assert Path(project.root / "dist/adapter/pytorch_lora_weights.safetensors").is_file()  # written all the same


def test_a_hundredfold_learning_rate_fails(project: Project) -> None:
    # not longer: past 30 steps some processors already meet what is not finite, which ends a training before any gate
    project.set("train", steps=15, learning_rate=100 * SHIPPED["train"]["learning_rate"])
    code, gate, metrics = verdict(project)
    assert code == 1 and not gate["passed"], metrics
