"""How long a turn takes: when nothing changed, against DVC alone; after a change in each section; a stage's start.

    python bench/turnaround.py             # some ten minutes on two cores
    python bench/turnaround.py --sections "" --repeats 7      # no-op runs and starts alone

On a project with the demo's settings in a temporary folder. No-op commands take turns, so that a busy machine slows both alike; medians.
Written to `bench/results/turnaround.json`; compare ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "turnaround.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from project import Project, make_project  # noqa: E402

CHANGES = {
    "dataset": "dataset.suffix=at night",
    "model": "model.prediction=v_prediction",
    "encode": "encode.flip=true",
    "lora": "lora.rank=16",
    "train": "train.learning_rate=2e-3",
    "validate": "validate.inference_steps=20",
    "gate": "gate.held_out_loss_ratio.max=0.8",
    "export": "export.author=me",
    "runtime": "runtime.workers=2",
    "tracking": "tracking.experiment=another",
}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of each no-op command")
    parser.add_argument("--sections", default=",".join(CHANGES), help="what is changed and run again")
    args = parser.parse_args()
    results: dict[str, object] = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    with tempfile.TemporaryDirectory() as temporary:
        project = demo(Path(temporary) / "p")
        full = seconds(project, "cli.py", "run")
        results |= {"full run, seconds": full} | no_ops(project, args.repeats) | {"start of a stage, seconds": starts()}
        results["after a change, as a share of a full run"] = {
            section: changed(project, CHANGES[section]) / full for section in args.sections.split(",") if section
        }
    print(json.dumps(results, indent=1))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def demo(root: Path) -> Project:
    """The demo as it is shipped, but for where its parts lie and for MLflow."""
    assets = ROOT / "assets"
    project = make_project(root, assets / "tiny-sd", assets / "tiny-clip", assets / "demo-dataset")
    shipped = re.sub(r"assets/tiny-(sd|clip)|assets/demo-dataset", lambda m: {"sd": "base", "clip": "clip"}.get(m[1], "data"),
                     (ROOT / "params.yaml").read_text(encoding="utf-8"))  # fmt: skip
    project.path("params.yaml").write_text(shipped, encoding="utf-8")
    return project


def no_ops(project: Project, repeats: int) -> dict[str, object]:
    """Ours and DVC's own command in turn."""
    pairs = {"run": ("repro", ("cli.py", "run")), "status": ("status", ("cli.py", "status"))}
    found: dict[str, object] = {}
    for name, (theirs, ours) in pairs.items():
        times = [(seconds(project, *ours), seconds(project, "-m", "dvc", theirs)) for _ in range(repeats)]
        mine, plain = (statistics.median(column) for column in zip(*times, strict=True))
        found[f"{name} when nothing changed"] = {"seconds": mine, "dvc alone": plain, "ratio": mine / plain}
    return found


def starts() -> dict[str, float]:
    """Importing what a stage needs, in a new process: the median of three."""
    found = {}
    for path in sorted((ROOT / "stages").glob("[a-z]*.py")):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import stages.{path.stem}"], cwd=ROOT, check=True)
            times.append(time.perf_counter() - start)
        found[path.stem] = statistics.median(times)
    return found


def changed(project: Project, assignment: str) -> float:
    """Seconds of a run with another value, which must be another one."""
    before = project.params()
    took = seconds(project, "cli.py", "run", "--set", assignment)
    assert project.params() != before, f"{assignment} is what stands there already"
    return took


def seconds(project: Project, *command: str) -> float:
    """Of a Python command in the project."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=project.root,
        env=project.environment({"OMP_NUM_THREADS": str(os.cpu_count())}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
