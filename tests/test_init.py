"""A project of one's own, made from pictures outside the repository; tests/test_wheel.py runs one."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import hub as stand_in
import pytest
from PIL import Image
from project import REPOSITORY, Project
from ruamel.yaml import YAML

import pipeline.renew
import pipeline.shipped
import pipeline.sources
from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.export.lineage import sources_hash
from pipeline.files import hash_tree, write_json
from pipeline.init_project import PRESETS, init_project
from pipeline.propose import propose
from pipeline.renew import renew, write_record
from pipeline.shipped import shipped
from pipeline.sources import confirmed, installed_code
from pipeline.stage import declared, snapshot
from pipeline.workspace import Workspace

VERSION = version("reprolora")


def pictures(folder: Path, sides: list[tuple[int, int]]) -> Path:
    folder.mkdir(parents=True)
    for i, size in enumerate(sides):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture {i}")
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The pipeline of a project without code, and settings."""
    root = tmp_path / "own"
    root.mkdir()
    shutil.copy(REPOSITORY / "params.yaml", root / "params.yaml")
    (root / "requirements.txt").write_text(f"--constraint constraints.txt\nreprolora[boards]=={VERSION}\nreprolora-more==0.1\n")
    write_record(root)
    return root


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code that counts as the installed one, to be edited."""
    for name in ("pipeline", "stages"):
        shutil.copytree(REPOSITORY / name, tmp_path / "installed" / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(pipeline.sources, "CODE", tmp_path / "installed")
    return tmp_path / "installed"


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "# edited\n")


def test_what_is_proposed_suits_the_pictures(tmp_path: Path) -> None:
    large = {p.key: p for p in propose(pictures(tmp_path / "a", [(900, 700)] * 20), 512, 4)}
    assert large["dataset.resolution"].value == 512 and large["train.steps"].value == 500
    assert "dataset.max_rejected" not in large and "100 times each" in large["train.steps"].reason
    small = {p.key: p.value for p in propose(pictures(tmp_path / "b", [(450, 400)] * 19 + [(90, 900)]), 512, 4)}
    assert small == {"dataset.resolution": 384, "train.steps": 500, "dataset.max_rejected": 1}
    few = {p.key: p for p in propose(pictures(tmp_path / "c", [(600, 600)] * 4), 512, 4)}
    assert few["train.steps"].value == 300 and "need no repeats" in few["train.steps"].reason
    (tmp_path / "none").mkdir()
    assert propose(tmp_path / "none", 512, 4) == []
    with pytest.raises(UserError, match="the largest of 3 pictures has 40 pixels on its shorter side: 64 are needed"):
        propose(pictures(tmp_path / "d", [(40, 50)] * 3), 512, 4)


def test_folders_of_different_sizes_are_to_count_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for name, count in (("dog", 12), ("cat", 3), ("owl", 5)):
        pictures(folder / name, [(64, 64)] * count)
    found = {p.key: p for p in propose(folder, 64, 4)}
    wanted = [{"path": "cat", "repeats": 4}, {"path": "dog", "repeats": 1}, {"path": "owl", "repeats": 2}]
    assert found["dataset.concepts"].value == wanted and "cat 3, dog 12, owl 5" in found["dataset.concepts"].reason
    (folder / "loose.png").write_bytes((folder / "cat/0.png").read_bytes())  # a concept is a folder: this one would be lost
    assert "dataset.concepts" not in {p.key for p in propose(folder, 64, 4)}
    (folder / "loose.png").unlink()
    (folder / "cat").rename(folder / "9_cat")  # Kohya's repeats
    assert "dataset.concepts" not in {p.key for p in propose(folder, 64, 4)}


def test_nothing_is_overwritten_and_mistakes_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(tmp_path / "images", [(64, 64)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for folder, preset, where, said in (
        ("full", "sd15", images, "is not empty"),
        ("new", "sd9", images, "there are sd15, sd21, sdxl, sd3, demo"),
        ("new", "sd15", tmp_path / "nowhere", "no such folder"),
        ("new", "sd15", "hf://nobody", "is no dataset of the Hub"),
        ("new", "demo", pictures(tmp_path / "tiny", [(4, 4)]), "8 are needed"),
        ("images/inside", "sd15", images, "lies inside the pictures"),
    ):
        with pytest.raises(UserError, match=said):
            init_project(tmp_path / folder, str(where), preset, "")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "new").exists() and not (images / "inside").exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_make_valid_projects(tmp_path: Path, preset: str) -> None:
    images = pictures(tmp_path / "images", [(600, 600)] * 3)
    root = tmp_path / "my style"
    init_project(root, str(images), preset, "zyx")
    params = load_params(root / "params.yaml")
    assert params.export.name == "my-style" and params.dataset.trigger == "zyx" and params.dataset.path == "data"
    assert params.dataset.resolution == {"sd15": 512, "sd21": 576, "sdxl": 576, "sd3": 576, "demo": 64}[preset]
    assert (root / "data.dvc").is_file() and (root / ".git").is_dir()
    assert "# inner dimension" in (root / "params.yaml").read_text()
    assert all("zyx" in prompt and "nightglow" not in prompt for prompt in params.validate_.prompts)
    assert not any((root / name).exists() for name in ("cli.py", "pipeline", "stages", "presets"))
    assert (root / params.model.base).is_dir() == (preset == "demo")
    for name in ("dvc.yaml", "README.md", ".github/workflows/retrain.yml", ".github/gitlab-ci.retrain.yml"):
        text = (root / name).read_text()
        assert not re.search(r"cli\.py|\bmake\b|\.venv/bin:|tests/", text.replace("source .venv/bin/activate", "")), name
        assert "reprolora run" in text
    for step in YAML(typ="safe").load((root / ".github/workflows/retrain.yml").read_text())["jobs"]["retrain"]["steps"]:
        subprocess.run(["bash", "-n", "-c", step.get("run", "")], check=True)


def test_pictures_of_the_hub(hub: stand_in.Hub, tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (520, 700), "red").save(content, "PNG")
    commit = hub.push(
        "someone/cats", {f"{i}{end}": c for i in range(12) for end, c in ((".png", content.getvalue()), (".txt", b"a cat"))}
    )
    root = tmp_path / "cats"
    found = {p.key: p.value for p in init_project(root, "hf://someone/cats", "sd15", "")}
    assert found == {"dataset.resolution": 512, "train.steps": 300}
    assert load_params(root / "params.yaml").dataset.path == "data/someone--cats"
    assert json.loads((root / "data/someone--cats.source.json").read_text())["commit"] == commit
    shown = subprocess.run(
        ["git", "status", "--porcelain", "-uall"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert "data/someone--cats.dvc" in shown and "data/someone--cats.source.json" in shown and ".png" not in shown


def test_other_code_is_stated_for_the_stages_that_use_it(own: Path, installed: Path) -> None:
    assert renew(own) == []
    before = json.loads((own / "code.json").read_text())["stages"]
    key = "stages.validate.sd"
    assert confirmed(own, key) == before["validate"]["sd"]
    edit(installed / "stages/validate.py")
    with pytest.raises(
        UserError, match=rf"code.json states {before['validate']['sd'][:12]} as {key}, .*`reprolora run` brings"
    ):
        confirmed(own, key)
    assert renew(own) == [f"code.json: reprolora {VERSION} is installed, with other code for validate"]
    assert renew(own) == [] and confirmed(own, key) != before["validate"]["sd"]
    edit(installed / "pipeline/families/sdxl.py")
    after = installed_code()
    changed = {(name, f) for name, code in after.items() if isinstance(code, dict) for f in code if code[f] != before[name][f]}
    assert changed == {("validate", f) for f in ("sd", "sdxl", "sd3")} | {(name, "sdxl") for name in list(after)[1:]}
    assert after["prepare-dataset"] == before["prepare-dataset"]


def test_a_stage_sees_the_installed_code_and_its_result_does_not(own: Path, installed: Path) -> None:
    workspace, params = Workspace(own, own), load_params(own / "params.yaml")
    for name in ("build/adapter/x", "build/encoded/x", "assets/tiny-sd/x", "assets/tiny-clip/x"):
        write_json(own / name, 1)
    declaration = declared(workspace, "validate")
    assert declaration.code == "stages.validate.sd" and declaration.params == ("model", "validate")
    before = snapshot(workspace, declaration, params)
    edit(installed / "pipeline/lora.py")
    with pytest.raises(UserError, match="states"):
        snapshot(workspace, declaration, params)
    renew(own)
    after = snapshot(workspace, declaration, params)
    assert before.fingerprint != after.fingerprint and before.identity == after.identity
    (own / "params.yaml").write_text((own / "params.yaml").read_text().replace("family: sd ", "family: sdxl "))
    assert declared(workspace, "validate").code == "stages.validate.sdxl"


def test_the_same_code_is_the_same_link_of_the_lineage(own: Path, project: Project) -> None:
    assert sources_hash(Workspace(own, own)) == sources_hash(Workspace(project.root, project.root))
    edit(project.path("pipeline/lora.py"))
    assert sources_hash(Workspace(own, own)) != sources_hash(Workspace(project.root, project.root))


def test_another_version_brings_its_pipeline_and_asks_for_itself(
    own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    newer = (
        (REPOSITORY / "dvc.yaml")
        .read_text()
        .replace("      - dataset\n    outs:", "      - dataset\n      - runtime\n    outs:")
    )
    (tmp_path / "dvc.yaml").write_text(newer)
    edited = (own / "dvc.yaml").read_text() + "  - reports/mine.png\n"
    real = pipeline.renew.shipped
    monkeypatch.setattr(pipeline.renew, "shipped", lambda name: tmp_path / name if name == "dvc.yaml" else real(name))
    monkeypatch.setattr(pipeline.renew, "version", lambda name: "99")
    told = renew(own)
    assert told == [
        "dvc.yaml: the stages as reprolora 99 declares them",
        f"code.json: reprolora {VERSION} → 99 is installed, with the same code for every stage",
        "requirements.txt: reprolora==99",
    ]
    assert "runtime" in (own / "dvc.yaml").read_text()
    assert "reprolora[boards]==99\nreprolora-more==0.1\n" in (own / "requirements.txt").read_text()
    (own / "dvc.yaml").write_text(edited)  # lacks what 99 declares, and is not as the other made it
    before = hash_tree(own)
    with pytest.raises(
        UserError, match=r"dvc\.yaml was edited here, and reprolora 99 declares prepare-dataset otherwise: remove"
    ):
        renew(own)
    assert hash_tree(own) == before
    (own / "dvc.yaml").unlink()
    assert renew(own) == ["dvc.yaml: the stages as reprolora 99 declares them"]
    with (own / "dvc.yaml").open("a") as file:  # what is the owner's own stays
        file.write("  - reports/mine.png\n")
    assert renew(own) == [] and "mine.png" in (own / "dvc.yaml").read_text()


def test_a_project_with_code_of_its_own_is_left_alone(project: Project) -> None:
    before = hash_tree(project.root)
    assert renew(project.root) == [] and hash_tree(project.root) == before


def test_the_transcript_shows_the_commands_of_its_script() -> None:
    sections = runpy.run_path(str(REPOSITORY / "docs/transcript.py"))["SECTIONS"]
    shown = re.findall(r"^\$ (.*)$", (REPOSITORY / "docs/transcript.md").read_text(encoding="utf-8"), re.M)
    assert shown == [command for _, commands in sections for command in commands], "record it again: docs/transcript.py"


@pytest.mark.parametrize("code", ["env/lib/python3.11/site-packages", "target", "usr/local/lib/python3/dist-packages"])
def test_what_is_shipped_lies_above_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    (tmp_path / code).mkdir(parents=True)
    share = tmp_path / code.split("/lib/")[0] / "share/reprolora"
    for folder in (share, tmp_path / "share/reprolora"):  # the farther one is another installation's
        (folder / "presets").mkdir(parents=True)
        (folder / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.setattr(pipeline.shipped, "CODE", tmp_path / code)
    assert shipped("presets") == share / "presets"
    with pytest.raises(UserError, match=r"share/reprolora/assets is missing beside .*: install reprolora again"):
        shipped("assets")
