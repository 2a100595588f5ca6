"""DVC as a process: one that loads itself first and is told afterwards, or never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from project import Project, ended

from pipeline.dvc_process import Waiting


def test_what_it_is_told_it_does_with_the_environment_that_comes_with_it(project: Project) -> None:
    """In a folder with packages of such names, which must not be taken for ours or DVC's."""
    for name in ("pipeline", "dvc"):
        (project.root / "sub" / name).mkdir(parents=True)
        (project.root / "sub" / name / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    with Waiting(project.root / "sub", caught=True) as dvc:
        assert dvc.process.stdout
        dvc.tell("root", DVC_NO_ANALYTICS="1")
        assert dvc.process.stdout.read().strip() == ".."
    assert dvc.process.returncode == 0


def test_one_that_is_never_told_ends_without_a_word(project: Project) -> None:
    start = time.monotonic()
    with Waiting(project.root, caught=True) as dvc:
        pass
    assert dvc.process.returncode is not None and time.monotonic() - start < 5
    assert dvc.process.stdout and dvc.process.stdout.read() == ""


def test_one_that_cannot_load_says_why_and_fails(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken" / "dvc").mkdir(parents=True)
    (tmp_path / "broken" / "dvc" / "__init__.py").write_text("raise ImportError('half of it is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    with Waiting(project.root, caught=True) as dvc:
        dvc.process.wait(30)
        dvc.tell("root")
        assert dvc.process.stdout and "half of it is missing" in dvc.process.stdout.read()
    assert dvc.process.returncode == 1
    done = project.cli("run", PYTHONPATH=str(tmp_path / "broken"))
    assert done.returncode == 1 and "half of it is missing" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_whoever_started_it(project: Project, number: signal.Signals) -> None:
    # what is started in a shell's background inherits that SIGINT is ignored
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom pathlib import Path\nfrom pipeline.dvc_process import Waiting\n"
    code += "with Waiting(Path('.'), caught=False) as dvc:\n    print(dvc.process.pid, flush=True)\n    time.sleep(60)"
    starter = subprocess.Popen(
        [sys.executable, "-c", code], cwd=project.root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert starter.stdout
    waiting = psutil.Process(int(starter.stdout.readline()))
    os.kill(starter.pid, number)
    starter.wait(10)
    psutil.wait_procs([waiting], timeout=10)
    assert ended(waiting)
