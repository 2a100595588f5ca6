"""The demo, as a newcomer gets it: a clean copy of what is committed, run and judged apart from the pipeline."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
from project import Project, copy_of_what_is_tracked

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("demo") / "reprolora"
    copy_of_what_is_tracked(root)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    project = Project(root)
    done = project.cli("run", OMP_NUM_THREADS="2", REPROLORA_STRICT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ran ") == 5 and "reports/validate/before-after.png" in done.stdout
    return project


def run_script(demo: Project, name: str) -> subprocess.CompletedProcess[str]:
    """One of the asset scripts, in the demo's folder, on both cores."""
    environment = demo.environment({"OMP_NUM_THREADS": "2"})
    return subprocess.run([sys.executable, name], cwd=demo.root, env=environment, capture_output=True, text=True, check=False)


def test_the_adapter_learned_the_style_and_kept_shape_and_colour(demo: Project) -> None:
    done = run_script(demo, "assets/check_demo.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_metrics_and_gate_say_so_too(demo: Project) -> None:
    metrics = json.loads(demo.path("reports/validate/metrics.json").read_text())
    assert metrics["held_out_loss"] < 0.8 * metrics["base_held_out_loss"]
    assert json.loads(demo.path("dist/adapter/gate.json").read_text())["passed"] is True


def test_a_second_run_changes_nothing(demo: Project) -> None:
    demo.executed()
    done = demo.cli("run")
    assert done.returncode == 0 and demo.executed() == []


def test_peak_memory_stays_within_3_gib(demo: Project) -> None:
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak_kib < 3 * 2**20


def test_the_base_draws_what_it_is_asked(demo: Project) -> None:
    done = run_script(demo, "assets/check_tiny_sd.py")
    assert done.returncode == 0, done.stdout + done.stderr
