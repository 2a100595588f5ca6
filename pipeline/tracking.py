"""The MLflow mirror. Files are the truth: `sync` reads the tracked outs and logs whatever MLflow does not have yet.

One run per trained adapter, found by its fingerprint; validate and export are child runs, each by its own fingerprint. A
server that cannot be reached costs seconds and a line on the screen, never the work, unless `tracking.required` says so.
"""

from __future__ import annotations

import csv
import fcntl
import http.client
import json
import os
import queue
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.boards import mirror_pictures, mirrored_curves
from pipeline.config import Tracking, load_params
from pipeline.errors import UserError
from pipeline.files import hash_json, hash_tree
from pipeline.progress import say
from pipeline.stage import Stage
from pipeline.workspace import ADAPTER, DIST, PREVIEWS, TRAIN_REPORT, VALIDATE_REPORT, Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FINGERPRINT = "reprolora.fingerprint"
_STAGE = "reprolora.stage"
_ANSWER_SECONDS = 2.0
_FLUSH_SECONDS = 2.0
_BATCH = 200  # metrics per call: a call costs 30 ms or so, whatever it carries
_LATER = "`reprolora sync` fills the gap later"

Row = dict[str, float]


@dataclass(frozen=True)
class Run:
    """A run to be mirrored, as the files tell it."""

    stage: str
    fingerprint: str
    params: dict[str, Any]
    metrics: dict[str, float | None]
    artifacts: tuple[Path, ...]
    curve: tuple[Row, ...] = ()


def mirror(stage: Stage) -> None:
    """Mirror what this stage has just finished. Never fails the stage unless `tracking.required`."""
    settings = stage.params.tracking
    if settings.enabled:
        with _open_failing(settings):
            sync(stage.workspace, settings, only=stage.name)
            if stage.name == "validate" and (settings.tensorboard or settings.wandb_project):
                mirror_pictures(stage.workspace, settings, _run_name("validate", stage.identity))


def fill_gap(workspace: Workspace) -> list[str]:
    """`sync` for a person who asked for it.

    Raises:
        UserError: the store cannot be reached, or refuses something.
    """
    settings = load_params(workspace.params).tracking
    try:
        return sync(workspace, settings)
    except UserError:
        raise
    except Exception as error:  # MLflow's own, the database's, the network's
        raise UserError(f"MLflow: {_brief(error)}; the files are complete, {_LATER}") from error


def sync(workspace: Workspace, settings: Tracking, only: str | None = None) -> list[str]:
    """Log what is in the files and not in MLflow; does nothing the second time.

    Args:
        only: mirror just the run of this stage (its parent run is made where it is missing).

    Returns:
        One line per run that gained something.

    Raises:
        UserError: the store cannot be reached.
    """
    runs = _runs_of_files(workspace)
    if not runs or (only and only not in [r.stage for r in runs]):
        return []
    client, experiment = connect(workspace, settings)
    parent = _find_or_create(client, experiment, runs[0], parent=None)
    gained = []
    for run in runs:
        if only and run.stage != only:
            continue
        run_id = parent if run is runs[0] else _find_or_create(client, experiment, run, parent)
        if _fill(client, run_id, run):
            gained.append(f"{run.stage} {run.fingerprint}")
        if run.stage == "export-and-card" and settings.register_model:
            from pipeline.registry import register

            uri = os.environ.get("MLFLOW_TRACKING_URI") or settings.uri or default_uri(workspace)
            if register(client, uri, run_id, run.fingerprint, workspace):
                gained.append("a version of the registered model")
    return gained


@contextmanager
def live_curves(stage: Stage) -> Iterator[Callable[[list[Row]], None]]:
    """While the block runs, a thread sends the rows it is given to MLflow, with rate and memory; failures are told once."""
    settings = stage.params.tracking
    if not settings.enabled:
        yield lambda rows: None
        return
    rows: queue.Queue[list[Row] | None] = queue.Queue()
    # the stop marker ends the thread after what is queued before it
    thread = threading.Thread(target=_send_live, args=(stage, rows), daemon=True)
    if settings.required:
        connect(stage.workspace, settings)
    thread.start()
    sections = {name: stage.params.section(name) for name in ("model", "lora", "train")}
    boards = mirrored_curves(stage.workspace, settings, _run_name("train-lora", stage.identity), _flat(sections))

    def observe(new: list[Row]) -> None:
        rows.put(new)
        boards(new)

    try:
        yield observe
    finally:
        rows.put(None)
        thread.join(timeout=10)


def _send_live(stage: Stage, incoming: queue.Queue[list[Row] | None]) -> None:
    start, steps, open_ = time.monotonic(), 0, True
    shown: set[str] = set()
    try:
        client, experiment = connect(stage.workspace, stage.params.tracking)
        fresh = os.environ.get("REPROLORA_FORCE") == "1"
        sections = {name: stage.params.section(name) for name in ("model", "lora", "train")}
        run = Run("train-lora", stage.identity, _flat(sections), {}, ())
        run_id = _find_or_create(client, experiment, run, parent=None, fresh=fresh)
        client.update_run(run_id, status="RUNNING")
        while open_:
            batch: list[Row] = []
            try:
                while True:
                    item = incoming.get(timeout=_FLUSH_SECONDS)
                    if item is None:
                        open_ = False
                        break
                    batch += item
                    if len(batch) >= _BATCH // 3:
                        break
            except queue.Empty:
                pass
            for grid in sorted((stage.work / PREVIEWS).glob("step-*.png")):
                if grid.name not in shown:
                    client.log_artifact(run_id, str(grid), PREVIEWS)
                    shown.add(grid.name)
            if batch:
                steps += len(batch)
                rate = steps / (time.monotonic() - start)
                extra = {"steps_per_second": rate, "peak_memory_mib": _peak_mib()}
                _log_rows(client, run_id, [*batch[:-1], {**batch[-1], **extra}])
    except Exception as error:  # the mirror must not hurt the training: told on the screen, mended by sync
        say(f"  MLflow: {_brief(error)}; training goes on, {_LATER}")
        while open_ and incoming.get() is not None:
            pass


def connect(workspace: Workspace, settings: Tracking) -> tuple[MlflowClient, str]:
    """A client and the experiment's id; makes the default store at its first use.

    Raises:
        UserError: the server does not answer within seconds.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or settings.uri
    _refuse_unreachable(uri)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import logging

    for chatty in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    with _creation_lock(workspace):
        client = MlflowClient(tracking_uri=uri or default_uri(workspace))
        found = client.get_experiment_by_name(settings.experiment)
        if found:
            return client, str(found.experiment_id)
        location = None if uri else (workspace.mlruns / "artifacts").as_uri()
        return client, str(client.create_experiment(settings.experiment, artifact_location=location))


def default_uri(workspace: Workspace) -> str:
    """The sqlite store in the repository."""
    return f"sqlite:///{workspace.mlruns / 'mlflow.db'}"


@contextmanager
def _creation_lock(workspace: Workspace) -> Iterator[None]:
    """Two processes that create the sqlite store at once corrupt it: one at a time."""
    workspace.mlruns.mkdir(parents=True, exist_ok=True)
    with (workspace.mlruns / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _refuse_unreachable(uri: str | None) -> None:
    """Find out in two seconds what MLflow's own client takes minutes for."""
    parts = urllib.parse.urlsplit(uri or "")
    if parts.scheme not in ("http", "https"):
        return
    server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # without credentials: it is shown
    try:
        with urllib.request.urlopen(f"{server}{parts.path.rstrip('/')}/health", timeout=_ANSWER_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # an answer: something that speaks HTTP is there
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"the MLflow server {server} does not answer ({error}): start it, or change tracking.uri") from None


@contextmanager
def _open_failing(settings: Tracking) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if settings.required:
            raise UserError(f"MLflow: {_brief(error)}; tracking.required is set, so the stage fails") from error
        say(f"  MLflow: {_brief(error)}; the files are complete, {_LATER}")


def _brief(error: Exception) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def _find_or_create(client: MlflowClient, experiment: str, run: Run, parent: str | None, fresh: bool = False) -> str:
    """The newest run of this fingerprint. `fresh`: make another one beside it, for a forced retraining."""
    same = f"tags.`{_FINGERPRINT}` = '{run.fingerprint}' and tags.`{_STAGE}` = '{run.stage}'"
    if parent:
        same += f" and tags.`mlflow.parentRunId` = '{parent}'"
    if not fresh:
        for found in client.search_runs([experiment], same, order_by=["attributes.start_time DESC"], max_results=1):
            return str(found.info.run_id)
    tags = {_FINGERPRINT: run.fingerprint, _STAGE: run.stage, "mlflow.runName": _run_name(run.stage, run.fingerprint)}
    if parent:
        tags["mlflow.parentRunId"] = parent
    if group := os.environ.get("REPROLORA_SWEEP"):
        tags["reprolora.sweep"] = group
    if commit := _commit():
        tags["mlflow.source.git.commit"] = commit
    return str(client.create_run(experiment, tags=tags).info.run_id)


def _fill(client: MlflowClient, run_id: str, run: Run) -> bool:
    """Log what the run lacks; returns whether it lacked anything."""
    from mlflow.entities import Metric, Param

    have = client.get_run(run_id)
    now = int(time.time() * 1000)
    params = [Param(k, str(v)[:6000]) for k, v in run.params.items() if k not in have.data.params]
    finite = {k: float(v) for k, v in run.metrics.items() if v is not None}
    metrics = [Metric(k, v, now, 0) for k, v in finite.items() if have.data.metrics.get(k) != v]
    for i in range(0, max(len(params), 1), 100):
        if params[i : i + 100] or (i == 0 and metrics):
            client.log_batch(run_id, metrics if i == 0 else [], params[i : i + 100])
    missing_rows = []
    if run.curve:
        logged = {m.step for m in client.get_metric_history(run_id, "loss")}
        missing_rows = [row for row in run.curve if int(row["step"]) not in logged]
        _log_rows(client, run_id, missing_rows)
    uploaded = False
    folders = {"samples" if path.parent.name == "samples" else None for path in run.artifacts}
    listed = {a.path for folder in folders for a in client.list_artifacts(run_id, folder)}
    for path in run.artifacts:
        folder = "samples" if path.parent.name == "samples" else None
        if (f"{folder}/{path.name}" if folder else path.name) not in listed:
            client.log_artifact(run_id, str(path), folder)
            uploaded = True
    if have.info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED")
    return bool(params or metrics or missing_rows or uploaded or have.info.status != "FINISHED")


def _log_rows(client: MlflowClient, run_id: str, rows: list[Row]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(k, v, now, int(row["step"])) for row in rows for k, v in row.items() if k != "step"]
    for i in range(0, len(metrics), _BATCH):
        client.log_batch(run_id, metrics=metrics[i : i + _BATCH])


def _runs_of_files(workspace: Workspace) -> list[Run]:
    """Training, validation and export as the tracked outs tell them, as far as they belong together."""
    root = workspace.root
    if not (root / ADAPTER / "training.json").is_file() or not (root / TRAIN_REPORT / "curve.csv").is_file():
        return []
    training = _json(root / ADAPTER / "training.json")
    with (root / TRAIN_REPORT / "curve.csv").open(encoding="utf-8", newline="") as file:
        curve = tuple({k: float(v) for k, v in row.items()} for row in csv.DictReader(file))
    runs = [
        Run(
            "train-lora",
            training["identity"],
            _flat({**_earlier_sections(workspace), **training["params"], "lineage": {"encodings": training["encodings"]}}),
            {"final_loss": _json(root / TRAIN_REPORT / "metrics.json")["final_loss"]},
            (root / ADAPTER / "adapter.safetensors", root / ADAPTER / "training.json"),
            curve,
        )
    ]
    report = root / VALIDATE_REPORT
    if not (report / "validation.json").is_file():
        return runs
    validation = _json(report / "validation.json")
    if validation["adapter_identity"] != training["identity"]:
        return runs
    runs.append(
        Run(
            "validate",
            validation["identity"],
            _flat({"validate": validation["settings"]}),
            _json(report / "metrics.json"),
            (*sorted(p for p in report.iterdir() if p.suffix in (".png", ".csv")), *sorted((report / "samples").glob("*.png"))),
        )
    )
    dist = root / DIST
    if not (dist / "lineage.json").is_file():
        return runs
    lineage = _json(dist / "lineage.json")
    if lineage["validation"] == validation["identity"] and lineage["training"] == training["identity"]:
        gate = _json(dist / "gate.json")
        runs.append(
            Run(
                "export-and-card",
                hash_json(hash_tree(dist))[:16],  # another card or verdict is another run
                {f"lineage.{k}": v for k, v in lineage.items()},
                {"gate_passed": float(gate["passed"])},
                (
                    *(p for p in sorted(dist.iterdir()) if p.is_file()),
                    *(p for p in [root / "reports" / "index.html"] if p.is_file()),
                ),
            )
        )
    return runs


def _earlier_sections(workspace: Workspace) -> dict[str, Any]:
    """`dataset` and `encode` as DVC has recorded them of the stages that use them; nothing where no DVC ran them."""
    readers = {"dataset": "prepare-dataset", "encode": "precompute-latents-and-embeddings"}
    recorded = workspace.recorded()
    return {s: recorded.get(name, {}).get("params", {}).get("params.yaml", {}).get(s, {}) for s, name in readers.items()}


def _run_name(stage: str, fingerprint: str) -> str:
    return f"{stage} {fingerprint[:6]}"


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _peak_mib() -> float:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
