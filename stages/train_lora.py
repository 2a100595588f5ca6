"""train-lora: encodings -> adapter and training curve."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from pipeline import lora
from pipeline.batches import Batches
from pipeline.config import Params
from pipeline.continuation import adopt
from pipeline.curve import HELD_OUT_COLUMNS, curve_csv, read_curve, read_held_out
from pipeline.device import pick_device
from pipeline.diffusion import Flow, Objective, overridden
from pipeline.encodings import Encodings
from pipeline.errors import UserError
from pipeline.families import family
from pipeline.files import write_json, write_text
from pipeline.model_source import resolve
from pipeline.progress import say
from pipeline.randomness import torch_seed
from pipeline.safetensors_file import write_safetensors
from pipeline.stage import Stage
from pipeline.tracking import live_curves
from pipeline.train import Hardware, train
from pipeline.workspace import ADAPTER, ENCODED, TRAIN_REPORT

_BASE_TYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(stage: Stage) -> None:
    """Run the stage."""
    params, settings, runtime = stage.params, stage.params.train, stage.params.runtime
    kind = family(params.model.family)
    model = resolve(stage.source(), stage.workspace.root)
    batches = Batches(
        Encodings(stage.workspace.root / ENCODED),
        settings.batch_size,
        settings.seed,
        settings.caption_dropout,
        settings.prior_weight,
    )
    if not batches.samples:
        raise UserError("no picture is on the training side of the split: add pictures or lower dataset.held_out_fraction")
    steps = settings.length(batches.steps_per_epoch)
    denoiser = kind.load_denoiser(model, _BASE_TYPES[settings.mixed_precision])
    spec = lora.LoraSpec(**params.lora.model_dump(exclude={"init_from"}))
    spec = replace(spec, targets=lora.expand_targets(denoiser, spec.targets, kind.lora_targets))
    trainable = sum(p.numel() for p in lora.inject(denoiser, spec, torch_seed(settings.seed)))
    if params.lora.init_from:
        lora.start_from(denoiser, stage.workspace.root / params.lora.init_from, kind.denoiser_key)
    start = {name: tensor.detach().clone() for name, tensor in lora.state(denoiser).items()} if spec.init == "pissa" else {}
    say(f"  {trainable:,} parameters to train on {len(batches.samples)} pictures, {batches.steps_per_epoch} steps an epoch")
    if settings.schedule == "constant":
        adopt(stage.work, stage.snapshot.fingerprint_without("train", "steps", "epochs"), steps, settings.keep == "best")
    with live_curves(stage) as observe:
        trained = train(
            denoiser,
            kind,
            _objective(kind.objective(model), params),
            batches,
            settings,
            Hardware(
                pick_device(runtime.device, runtime.tf32),
                runtime.micro_batch,
                runtime.checkpoint_every,
                runtime.keep_checkpoints,
                runtime.gradient_checkpointing,
                runtime.compile,
                runtime.channels_last,
                runtime.attention,
            ),
            stage.work,
            _limited(stage, runtime.max_minutes),
            stage.stop.check,
            observe,
        )
    adapter, spec = lora.portable(trained, start, spec)
    scales = lora.scales(denoiser)
    rows, held_out = read_curve(stage.work), read_held_out(stage.work)
    write_safetensors(stage.out(ADAPTER) / "adapter.safetensors", adapter)
    write_json(
        stage.out(ADAPTER) / "training.json",
        {
            "identity": stage.identity,
            "family": kind.name,
            "denoiser_key": kind.denoiser_key,
            "trainable_parameters": trainable,
            "train_samples": len(batches.samples),
            "steps_per_epoch": batches.steps_per_epoch,
            "sizes": sorted({s.size for s in batches.samples}),
            "steps": steps,
            "lora": asdict(spec),  # of the file beside: presets written out, PiSSA's rank doubled
            "scales": scales,  # layer -> what its B A is multiplied by
            "params": {name: params.section(name) for name in ("model", "lora", "train")},  # as they were set
        },
    )
    write_text(stage.out(TRAIN_REPORT) / "curve.csv", curve_csv(rows))
    last = rows[-50:]
    metrics = {"steps": len(rows), "final_loss": sum(r["loss"] for r in last) / len(last), "final_loss_steps": len(last)}
    if held_out:
        write_text(stage.out(TRAIN_REPORT) / "held-out.csv", curve_csv(held_out, HELD_OUT_COLUMNS))
        best = min(held_out[1:], key=lambda row: row["held_out_loss"])
        metrics |= {"best_held_out_loss": best["held_out_loss"], "best_held_out_step": int(best["step"])}
        metrics |= {"last_held_out_loss": held_out[-1]["held_out_loss"]}
    write_json(stage.out(TRAIN_REPORT) / "metrics.json", metrics)


def _objective(base: Objective, params: Params) -> Objective:
    """The base's objective, as `model` and `train.flow_shift` change it."""
    objective = overridden(base, params.model.prediction, params.model.zero_terminal_snr)
    if params.train.flow_shift is not None and isinstance(objective, Flow):
        return replace(objective, shift=params.train.flow_shift)
    return objective


def _limited(stage: Stage, minutes: float | None) -> Callable[[], bool]:
    """The stage's request to stop, which is made too when `runtime.max_minutes` of training are over."""
    end = None if minutes is None else time.monotonic() + 60 * minutes

    def stop() -> bool:
        if end is not None and time.monotonic() > end:
            stage.stop.set(f"runtime.max_minutes: {minutes:g} minutes are over")
        return stage.stop()

    return stop
