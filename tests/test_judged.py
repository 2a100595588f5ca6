"""A whole run with every measurement on: the metrics, the page in a real browser, and the comparison with a commit."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from PIL import Image
from project import Project, commit, make_project

from pipeline.metrics import DEFINITIONS, NAMES

pytestmark = pytest.mark.slow
HOSTILE = '<script>alert(1)</script> & "co"'


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path, clip_folder: Path, pictures_folder: Path) -> Project:
    project = make_project(tmp_path_factory.mktemp("judged") / "p", sd_folder, clip_folder, pictures_folder)
    project.set("dataset", trigger="zyx")
    project.set("train", snapshot_every=2, held_out_every=3)
    project.set(
        "validate",
        prompts=["zyx, a red circle", HOSTILE],
        seeds=[0, 1],
        scales=[0.5, 1.0],
        untriggered_prompts=["a blue square"],
        checkpoints="all",
    )
    project.set("encode", clip_skip=1)
    project.set("export", title=HOSTILE)
    params = project.params()
    project.write({**params, "gate": {"held_out_loss_ratio": {"max": 10.0}, "clip_score": {"min": -100.0}}})
    done = project.cli("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reports/index.html" in done.stdout
    commit(project.root)
    return project


def test_everything_is_measured_and_defined(judged: Project) -> None:
    metrics = json.loads(judged.path("reports/validate/metrics.json").read_text())
    assert set(metrics) == set(NAMES) - {"dino_similarity", "base_dino_similarity"}
    assert metrics["overfitting_gap"] == pytest.approx(metrics["held_out_loss_ratio"] - metrics["train_loss_ratio"])
    assert 0 <= metrics["memorised_share"] <= 1 and metrics["diversity"] > 0


def test_every_snapshot_is_judged_and_the_last_is_the_adapter(judged: Project) -> None:
    with judged.path("reports/validate/checkpoints.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    metrics = json.loads(judged.path("reports/validate/metrics.json").read_text())
    for name in set(rows[-1]) - {"step"}:
        assert float(rows[-1][name]) == pytest.approx(metrics[name], rel=1e-5, abs=1e-7), name
    assert rows[0]["held_out_loss"] != rows[-1]["held_out_loss"]
    assert set(rows[0]) - {"step"} == {name for name in metrics if not name.startswith("base_")}


def test_nearest_pictures_are_listed_and_shown(judged: Project) -> None:
    nearest = json.loads(judged.path("reports/validate/nearest.json").read_text())
    assert len(nearest) == 4 and all(-1 <= pair["cosine"] <= 1 for pair in nearest)
    assert judged.path("reports/validate/nearest.png").is_file() and judged.path("reports/validate/untriggered.png").is_file()


def test_the_page_holds_everything_and_nothing_from_elsewhere(judged: Project) -> None:
    page = judged.path("reports/index.html").read_text()
    metrics = json.loads(judged.path("reports/validate/metrics.json").read_text())
    assert all(f"<code>{name}</code>" in page for name in DEFINITIONS if name in metrics)
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    lineage = json.loads(judged.path("dist/adapter/lineage.json").read_text())
    assert all(value in page for value in lineage.values())
    assert "train.learning_rate" in page and "On the way" in page
    assert page.count("(seed 0)") == page.count("(seed 1)") == 2
    tokens = json.loads(judged.path("build/encoded/tokens.json").read_text())
    _, _, table = page.partition(f"<h3>Tokens a caption ({tokens['limit']} are read)</h3>")
    shown = re.findall(r'<tr><td>(.+?)</td><td class="number">(\d+)</td>', table.partition("</table>")[0])
    assert {name: int(count) for name, count in shown} == tokens["lengths"]
    assert sum(tokens["lengths"].values()) == tokens["captions"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium: apt-get install chromium")
def test_the_page_in_a_browser(judged: Project, tmp_path: Path) -> None:
    """Pictures load, the slider changes them, and the console stays silent."""
    probe = """<script>
      const failed = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
      const images = [...document.querySelectorAll("img.adapted")], before = images.map(i => i.src);
      slider.value = 0; slider.dispatchEvent(new Event("input"));
      const same = images.filter((i, k) => i.src === i.parentElement.firstElementChild.src).length;
      document.title = JSON.stringify({failed, moved: images.filter((i, k) => i.src !== before[k]).length, same,
        shown: shown.value, count: images.length, wide: document.documentElement.scrollWidth > innerWidth});
    </script></body>"""
    copy = tmp_path / "page.html"
    copy.write_text(judged.path("reports/index.html").read_text().replace("</body>", probe))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ]
    options += [
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/profile",
    ]
    done = subprocess.run(
        ["chromium", *options, "--window-size=400,900", "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stderr
    found = json.loads(title[1].replace("&quot;", '"'))
    assert found == {"failed": 0, "moved": 4, "same": 4, "shown": "0", "count": 4, "wide": False}, found
    assert "CONSOLE" not in done.stderr, done.stderr


def test_the_gate_against_a_commit_and_what_changed_since(judged: Project) -> None:
    done = judged.cli("gate", "--against", "HEAD")
    assert done.returncode == 0 and "from" in done.stdout and "at HEAD" in done.stdout, done.stdout + done.stderr
    judged.set("train", learning_rate=1e-5)
    done = judged.cli("run")
    assert done.returncode == 0, done.stdout + done.stderr
    done = judged.cli("gate", "--against", "HEAD", "--tolerance", "0")
    assert done.returncode == 1 and "fails" in done.stdout, done.stdout + done.stderr
    page = judged.path("reports/index.html").read_text()
    assert (
        "Since the last commit" in page and "<td>0.01</td><td>1e-05</td>" in page and "<td><code>train_loss</code></td>" in page
    )
    done = judged.cli("diff", "HEAD")
    assert done.returncode == 0 and "train.learning_rate" in done.stdout and "worse" in done.stdout, done.stdout + done.stderr
    page = judged.path("reports/diff.html").read_text()
    assert page.count("<figure") == 2 and "<script" not in page and "train.learning_rate" in page
    done = judged.cli("gate", "--against", "no-such-commit")
    assert done.returncode == 2 and "no-such-commit" in done.stderr


def test_what_passed_is_registered_once_loads_and_is_served(judged: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own loader and its own server; the picture is the one that the adapter draws."""
    judged.set("tracking", enabled=True)
    done = judged.cli("sync")
    assert "a version of the registered model" in done.stdout, done.stdout + done.stderr
    assert "registered" not in judged.cli("sync").stdout
    store = f"sqlite:///{judged.path('mlruns/mlflow.db')}"
    client = MlflowClient(tracking_uri=store)
    assert client.get_model_version_by_alias("tiny", "champion").version in (1, "1")
    assert list(judged.path("mlruns/artifacts").rglob("index.html"))  # the page
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    model = mlflow.pyfunc.load_model("models:/tiny@champion")
    rows = pd.DataFrame({"prompt": ["zyx, a red circle"], "seed": [0]})
    drawn = Image.open(io.BytesIO(base64.b64decode(model.predict(rows)[0])))
    assert drawn.size == (32, 32)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["mlflow", "models", "serve", "-m", "models:/tiny@champion", "--env-manager", "local", "-p", str(port)]
    server = judged.start(sys.executable, "-m", *command, MLFLOW_TRACKING_URI=store, HF_HUB_OFFLINE="1")
    try:
        answer = None
        end = time.monotonic() + 90
        body = json.dumps({"dataframe_split": {"columns": ["prompt", "seed"], "data": [["zyx, a red circle", 0]]}}).encode()
        while answer is None and time.monotonic() < end:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    answer = json.loads(response.read())
            except OSError:
                time.sleep(0.5)
        assert answer is not None
        served = Image.open(io.BytesIO(base64.b64decode(answer["predictions"][0])))
        assert served.tobytes() == drawn.tobytes()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate(timeout=30)


def test_what_failed_is_not_registered(judged: Project) -> None:
    judged.set("tracking", enabled=True, experiment="failing")
    params = judged.params()
    judged.write(
        {**params, "gate": {"held_out_loss_ratio": {"max": 0.0001}}, "export": {**params["export"], "name": "failing"}}
    )
    done = judged.cli("run")
    assert done.returncode == 0 and "the gate FAILED" in done.stdout
    client = MlflowClient(tracking_uri=f"sqlite:///{judged.path('mlruns/mlflow.db')}")
    assert not client.search_model_versions("name = 'failing'")
    assert judged.path("dist/adapter/failing.safetensors").is_file()
