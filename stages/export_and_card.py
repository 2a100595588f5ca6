"""export-and-card: adapter and reports -> files that load elsewhere, and a model card."""

from __future__ import annotations

import csv
import json
import shutil
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.evaluate.gate import judge
from pipeline.export.card import render_card
from pipeline.export.diffusers_format import FILE_NAME, write_diffusers
from pipeline.files import hash_file, hash_json, hash_tree, write_json, write_text
from pipeline.progress import say
from pipeline.safetensors_file import read_safetensors
from pipeline.stage import Stage
from pipeline.workspace import ADAPTER, DATASET, DATASET_REPORT, DIST, TRAIN_REPORT, VALIDATE_REPORT

_PIPELINES = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def main(stage: Stage) -> None:
    """Run the stage."""
    params, root, out = stage.params, stage.workspace.root, stage.out(DIST)
    settings = params.export

    def read(path: Any) -> Any:
        return json.loads((root / path).read_text(encoding="utf-8"))

    training, validation = read(ADAPTER / "training.json"), read(VALIDATE_REPORT / "validation.json")
    metrics, dataset = read(VALIDATE_REPORT / "metrics.json"), read(DATASET / "dataset.json")
    if validation["adapter_sha256"] != hash_file(root / ADAPTER / "adapter.safetensors"):
        raise UserError(f"{VALIDATE_REPORT} judges another adapter than {ADAPTER} holds: run validate first")
    findings = judge(metrics, {str(name): threshold for name, threshold in params.gate.items()})
    passed = all(f.passed for f in findings)
    lineage = {
        "dataset": hash_json(hash_tree(root / DATASET)),
        "base": training["model"]["revision"] or "unpinned",
        "training": training["identity"],
        "adapter": validation["adapter_sha256"],
    }
    path = write_diffusers(
        out,
        read_safetensors(root / ADAPTER / "adapter.safetensors"),
        training["denoiser_key"],
        training["lora"]["rank"],
        training["lora"]["alpha"],
        tuple(training["lora"]["targets"]),
        getattr(torch, settings.dtype),
        {"reprolora": json.dumps({"name": settings.name, "trigger": dataset["trigger"], "lineage": lineage}, sort_keys=True)},
    )
    # how the adapter was judged is no part of the file: other prompts must not change its bytes
    lineage |= {"validation": validation["identity"], "file": hash_file(path)}
    for picture in ("before-after.png", "scales.png"):
        shutil.copyfile(root / VALIDATE_REPORT / picture, out / picture)
    write_json(out / "lineage.json", lineage)
    verdict = {"passed": passed, "findings": [f.sentence() for f in findings]}
    write_json(out / "gate.json", verdict)
    write_text(out / "README.md", _card(stage, training, validation, metrics, dataset, lineage, verdict))
    for finding in findings:
        say(f"  gate: {finding.sentence()}")
    if not passed:
        say("  the gate FAILED: the files are written, but this adapter should not be published")


def _card(
    stage: Stage,
    training: dict[str, Any],
    validation: dict[str, Any],
    metrics: dict[str, float],
    dataset: dict[str, Any],
    lineage: dict[str, str],
    verdict: dict[str, Any],
) -> str:
    settings, root = stage.params.export, stage.workspace.root
    with (root / TRAIN_REPORT / "curve.csv").open(encoding="utf-8", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    summary = json.loads((root / DATASET_REPORT / "summary.json").read_text(encoding="utf-8"))
    model, asked = training["model"], validation["settings"]
    header = {
        "license": settings.license,
        "base_model": model["base"],
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": dataset["trigger"] or None,
        "tags": ["lora", "text-to-image", "diffusers", "template:sd-lora"],
    }
    last = min(50, len(losses))
    facts = {
        "title": settings.title or settings.name,
        "description": settings.description,
        "license": settings.license,
        "base": model["base"],
        "base_literal": json.dumps(model["base"], ensure_ascii=False),
        "base_revision": model["revision"],
        "family": training["family"],
        "pipeline_class": _PIPELINES[training["family"]],
        "file_name": FILE_NAME,
        "trigger": dataset["trigger"],
        "prompt_literal": json.dumps(asked["prompts"][0], ensure_ascii=False),
        "prompts": asked["prompts"],
        "seeds": asked["seeds"],
        "inference_steps": asked["inference_steps"],
        "guidance_scale": asked["guidance_scale"],
        "loss_timesteps": asked["loss_timesteps"],
        "lora": training["lora"],
        "trainable_parameters": f"{training['trainable_parameters']:,}",
        "settings": training["train"],
        "all_settings": {f"{s}.{k}": v for s in ("model", "lora", "train") for k, v in training[s].items()},
        "train": summary["train"],
        "held_out": summary["held_out"],
        "width": validation["width"],
        "height": validation["height"],
        "final_loss": sum(losses[-last:]) / last,
        "last_steps": last,
        "metrics": dict(sorted(metrics.items())),
        "passed": verdict["passed"],
        "findings": verdict["findings"],
        "lineage": lineage,
        "author": settings.author,
    }
    return render_card(header, facts)
