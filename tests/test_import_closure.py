"""dvc.yaml lists, for every stage, exactly the code that the stage really imports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from project import Project
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "cache",
    "check",
    "data",
    "dvc",
    "dvc_process",
    "dvc_waiting",
    "edit",
    "estimate",
    "export/convert",
    "export/hub",
    "export/show",
    "export/verify",
    "fetch",
    "gating",
    "generate",
    "import_config",
    "init_project",
    "live",
    "page/diff",
    "parameters",
    "playground",
    "propose",
    "quiet_torchrun",
    "registered_model",
    "renew",
    "schema",
    "search",
    "share",
    "studio",
    "summary",
    "sweep",
)
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


# Imported only where captions are missing and a model is to write them, or where the base is a single file; they change the
# result all the same.
ON_REQUEST = {
    "prepare-dataset": {f"pipeline/{name}.py" for name in ("auto_caption", "device", "quiet")},
    **{stage: {"pipeline/single_file.py"} for stage in list(STAGES)[1:]},
}


def imported(project: Project, stage: str) -> set[str]:
    """Files of ours that a run of the stage imports, as the interpreter itself tells (`-X importtime`)."""
    done = project.cli("stage", stage, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    names = re.findall(r"^import time:.*\|\s+((?:pipeline|stages)[\w.]*)$", done.stderr, re.M)
    # the two imports by name, which the interpreter does not time: the stage's module and the family's
    names.append(f"stages.{stage.replace('-', '_')}")
    names += ["pipeline.families.sd"] if "pipeline.families.parts" in names else []
    files = set()
    for name in names:
        path = Path(*name.split("."))
        files.add((path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")).as_posix())
    return files


@pytest.mark.slow
def test_each_stages_code_is_its_deps(project: Project) -> None:
    """With tracking on, and the store of encodings empty: nothing that is imported late is missed."""
    project.set("tracking", enabled=True)
    for stage, entry in STAGES.items():
        listed = {dep for dep in entry["deps"] if dep.startswith(("pipeline/", "stages/")) and dep.endswith(".py")}
        listed = {dep.replace("${model.family}", "sd") for dep in listed}
        found = imported(project, stage)
        assert found - listed == set(), f"{stage} imports what dvc.yaml does not list"
        assert listed - found == ON_REQUEST.get(stage, set()), f"{stage} lists in dvc.yaml what it does not import"


def test_the_command_line_imports_nothing_heavy(project: Project) -> None:
    heavy = ("torch", "diffusers", "transformers", "peft", "mlflow", "dvc", "PIL", "numpy")
    for arguments in (["--help"], ["run", "--help"], ["status", "--help"]):
        done = project.cli(*arguments, PYTHONPROFILEIMPORTTIME="1")
        modules = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
        assert done.returncode == 0 and "typer" in modules
        assert not modules & set(heavy)


@pytest.mark.parametrize("module", ["pipeline.config", "pipeline.stage", "pipeline.dvc", "pipeline.check", "pipeline.tracking"])
def test_what_runs_before_the_work_starts_is_light(module: str) -> None:
    import subprocess
    import sys

    script = f"import sys, {module}; print([m for m in ('torch', 'diffusers', 'mlflow', 'dvc') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_file_of_the_library_is_used() -> None:
    """A file that no stage lists is the command line's own, and is named here."""
    listed = {dep.replace("${model.family}", f) for e in STAGES.values() for dep in e["deps"] for f in ("sd", "sdxl", "sd3")}
    files = {p.relative_to(ROOT).as_posix() for top in ("pipeline", "stages") for p in (ROOT / top).rglob("*.py")}
    assert files - listed == {f"pipeline/{name}.py" for name in COMMANDS}
