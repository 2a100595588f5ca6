"""train-lora: encodings -> adapter and training curve."""

from __future__ import annotations

import torch

from pipeline import lora
from pipeline.batches import Batches
from pipeline.device import pick_device
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
from pipeline.train import Hardware, curve_csv, read_curve, train
from pipeline.workspace import ADAPTER, ENCODED, TRAIN_REPORT


def main(stage: Stage) -> None:
    """Run the stage."""
    params, settings, runtime = stage.params, stage.params.train, stage.params.runtime
    kind = family(params.model.family)
    model = resolve(stage.source(), stage.workspace.root)
    batches = Batches(Encodings(stage.workspace.root / ENCODED), settings.batch_size, settings.seed, settings.caption_dropout)
    if not batches.samples:
        raise UserError("no picture is on the training side of the split: add pictures or lower dataset.held_out_fraction")
    denoiser = kind.load_denoiser(model, torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32)
    spec = lora.LoraSpec(**params.lora.model_dump())
    trainable = sum(p.numel() for p in lora.inject(denoiser, spec, torch_seed(settings.seed)))
    say(f"  {trainable:,} parameters to train on {len(batches.samples)} pictures, {batches.steps_per_epoch} steps an epoch")
    with live_curves(stage) as observe:
        adapter = train(
            denoiser,
            kind,
            kind.objective(model),
            batches,
            settings,
            Hardware(pick_device(runtime.device), runtime.micro_batch, runtime.checkpoint_every, runtime.keep_checkpoints),
            stage.work,
            stage.stop,
            stage.stop.check,
            observe,
        )
    rows = read_curve(stage.work)
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
            "model": params.section("model"),
            "lora": params.section("lora"),
            "train": params.section("train"),
        },
    )
    write_text(stage.out(TRAIN_REPORT) / "curve.csv", curve_csv(rows))
    last = rows[-50:]
    write_json(
        stage.out(TRAIN_REPORT) / "metrics.json",
        {"steps": len(rows), "final_loss": sum(r["loss"] for r in last) / len(last), "final_loss_steps": len(last)},
    )
