"""A sweep over DVC's experiments: encodings once, cut off and gone on with, the best first, and taken over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mlflow import MlflowClient
from project import Project, commit

from pipeline.errors import UserError
from pipeline.sweep import combinations


def test_combinations_are_a_grid() -> None:
    assert combinations(["lora.rank=4,8", "train.learning_rate=1e-4"]) == [
        ("lora.rank=4", "train.learning_rate=0.0001"),
        ("lora.rank=8", "train.learning_rate=0.0001"),
    ]
    assert combinations(["lora.targets=[to_q],[to_q, to_v]"]) == [
        ('lora.targets=["to_q"]',),
        ('lora.targets=["to_q", "to_v"]',),
    ]
    for wrong in ("rank=4", "lora.rank", "lora.rank="):
        with pytest.raises(UserError, match=r"expected section.key=value,value"):
            combinations([wrong])


@pytest.mark.slow
def test_a_sweep_shares_goes_on_and_is_applied(new_project: Callable[[], Project]) -> None:
    project = new_project()
    project.set("tracking", enabled=True)

    refused = project.cli("sweep", "--set", "lora.rank=1,2")
    assert refused.returncode == 2 and "needs a commit" in refused.stderr
    commit(project.root)
    refused = project.cli("sweep", "--set", "lora.rank=1,0")
    assert refused.returncode == 2 and "lora.rank" in refused.stderr
    done = project.cli("sweep", "--set", "train.learning_rate=0.00001,0.02")
    assert done.returncode == 0, done.stdout + done.stderr
    ran = project.executed()
    assert ran.count("precompute-latents-and-embeddings") == 1 and ran.count("train-lora") == 2, ran
    lines = [line for line in done.stdout.splitlines() if "sweep-" in line and "train.learning_rate" in line]
    assert "0.02" in lines[0] and "1e-05" in lines[1]
    best = lines[0].split()[-1]
    page = project.path("reports/sweep.html").read_text()
    assert page.count("<h2>") == 2 and page.index("0.02") < page.index("1e-05")
    done = project.cli("sweep", "--set", "train.learning_rate=0.00001,0.02,0.01")  # as after being cut off: two are there
    assert done.returncode == 0 and "3 combinations, 2 of them are there already" in done.stdout, done.stdout + done.stderr
    assert project.executed().count("train-lora") == 1
    assert project.cli("apply", best).returncode == 0
    assert project.params()["train"]["learning_rate"] == 0.02
    assert project.path("dist/adapter/tiny.safetensors").is_file()
    store = MlflowClient(tracking_uri=f"sqlite:///{project.path('mlruns/mlflow.db')}")
    [experiment] = [e for e in store.search_experiments() if e.name == "reprolora"]
    grouped = [r for r in store.search_runs([experiment.experiment_id]) if "reprolora.sweep" in r.data.tags]
    assert len({r.data.tags["reprolora.sweep"] for r in grouped}) == 2 and len(grouped) >= 3
