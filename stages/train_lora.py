"""train-lora: encodings -> adapter and training curve."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from pipeline.continuation import adopt
from pipeline.curve import HELD_OUT_COLUMNS, curve_csv, read_curve, read_held_out
from pipeline.encodings import Encodings
from pipeline.families import family
from pipeline.files import hash_file, write_bytes, write_json, write_text
from pipeline.follow import follow
from pipeline.launch import Processes, launch, processes_of
from pipeline.model_source import resolve
from pipeline.safetensors_file import write_safetensors
from pipeline.stage import Stage
from pipeline.tracking import live_curves
from pipeline.train import Observer
from pipeline.train_job import PUBLISHED_SNAPSHOTS, Trained, perform, steps_of
from pipeline.train_worker import write_job
from pipeline.workspace import ADAPTER, ENCODED, TRAIN_REPORT


def main(stage: Stage) -> None:
    """Run the stage."""
    params, settings, root = stage.params, stage.params.train, stage.workspace.root
    if settings.schedule == "constant" and os.environ.get("REPROLORA_FORCE") != "1":
        kind = stage.snapshot.fingerprint_without("train", "steps", "epochs")
        adopt(stage.work, kind, steps_of(settings, Encodings(root / ENCODED)), settings.keep == "best")
    done, start = len(read_curve(stage.work)), time.monotonic()
    with live_curves(stage) as observe:
        stop = _limited(stage, params.runtime.max_minutes)
        processes = processes_of(params.runtime)
        if processes:
            trained = _together(stage, processes, stop, observe)
        else:
            trained = perform(params, root, stage.work, stop, stage.stop.check, observe)
    facts = trained.facts
    rows, held_out = read_curve(stage.work), read_held_out(stage.work)
    if len(rows) > done:
        pace = (time.monotonic() - start) / (len(rows) - done) / settings.batch_size
        write_json(stage.workspace.pace, {"seconds_per_picture": pace, "resolution": params.dataset.resolution})
    write_safetensors(stage.out(ADAPTER) / "adapter.safetensors", trained.weights)
    write_json(
        stage.out(ADAPTER) / "training.json",
        {
            "identity": stage.identity,
            "family": params.model.family,
            "denoiser_key": family(params.model.family).denoiser_key,
            **facts,
            "encodings": hash_file(root / ENCODED / "index.json"),
            "params": {name: params.section(name) for name in ("model", "lora", "train")},  # as they were set
        },
    )
    if settings.snapshot_every:
        wanted = range(settings.snapshot_every, facts["steps"] + 1, settings.snapshot_every)
        for step in wanted:  # those of a longer training that this one was taken from are not asked for
            name = f"step-{step:08d}.safetensors"
            write_bytes(stage.out(ADAPTER) / "snapshots" / name, (stage.work / PUBLISHED_SNAPSHOTS / name).read_bytes())
    write_text(stage.out(TRAIN_REPORT) / "curve.csv", curve_csv(rows))
    last = rows[-50:]
    metrics = {"steps": len(rows), "final_loss": sum(r["loss"] for r in last) / len(last), "final_loss_steps": len(last)}
    if held_out:
        write_text(stage.out(TRAIN_REPORT) / "held-out.csv", curve_csv(held_out, HELD_OUT_COLUMNS))
        best = min(held_out[1:], key=lambda row: row["held_out_loss"])
        metrics |= {"best_held_out_loss": best["held_out_loss"], "best_held_out_step": int(best["step"])}
        metrics |= {"last_held_out_loss": held_out[-1]["held_out_loss"]}
    write_json(stage.out(TRAIN_REPORT) / "metrics.json", metrics)


def _together(stage: Stage, processes: Processes, stop: Callable[[], bool], observe: Observer) -> Trained:
    """In processes of their own; this one waits, tells MLflow of the curve, and hands a request to stop on."""
    job = stage.work / "job.json"
    told = follow([stage.work / "curve.jsonl", stage.work / "held_out.jsonl"], observe)
    resolve(stage.source(), stage.workspace.root)  # a single file is converted here, before all of them would
    write_job(job, stage.params, stage.workspace.root, stage.work, stage.snapshot.fingerprint)

    def waiting() -> None:
        told()
        if stop():
            stage.stop.check("the processes were told to save")

    launch("pipeline.train_worker", [str(job)], processes, waiting)
    told()
    return Trained.read(stage.work)


def _limited(stage: Stage, minutes: float | None) -> Callable[[], bool]:
    """The stage's request to stop, which is made too when `runtime.max_minutes` of training are over."""
    end = None if minutes is None else time.monotonic() + 60 * minutes

    def stop() -> bool:
        if end is not None and time.monotonic() > end:
            stage.stop.set(f"runtime.max_minutes: {minutes:g} minutes are over")
        return stage.stop()

    return stop
