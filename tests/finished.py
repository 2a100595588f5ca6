"""A project whose adapter is trained and judged, laid out by hand in a second: what export-and-card finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from project import Project

from pipeline import lora
from pipeline.config import load_params
from pipeline.evaluate.sampling import Shot
from pipeline.families import family
from pipeline.files import hash_file, write_json, write_text
from pipeline.model_source import LocalModel
from pipeline.safetensors_file import write_safetensors
from pipeline.stage import Snapshot, Stage, StopRequest
from pipeline.workspace import DIST, Workspace

TRIGGER = "zyx, *bold*"


def finish(project: Project, **export: Any) -> Project:
    """Write every out that comes before the export."""
    project.set("export", **export)
    root, params = project.root, load_params(project.path("params.yaml"))
    kind = family(params.model.family)
    denoiser = kind.load_denoiser(LocalModel(root / "base", None, None), torch.float32)
    lora.inject(denoiser, lora.LoraSpec(**params.lora.model_dump(exclude={"init_from", "text_encoder"})), 0)
    modules = kind.text_modules(kind.load_text_encoders(LocalModel(root / "base", None, None), torch.device("cpu")))
    text = modules if params.lora.text_encoder else {}
    spec = params.lora.model_dump(mode="json", exclude={"init_from", "text_encoder"})
    text_spec = {**spec, "targets": ["q_proj", "k_proj", "v_proj", "out_proj"], "rank_pattern": {}, "alpha_pattern": {}}
    for module in text.values():
        lora.inject(module, lora.LoraSpec(**text_spec), 0)
    torch.manual_seed(3)
    weights = {name: torch.randn_like(t) * 0.3 for name, t in lora.joint_state(denoiser, text).items()}
    write_safetensors(root / "build/adapter/adapter.safetensors", weights)
    write_json(
        root / "build/adapter/training.json",
        {
            "identity": "0123456789abcdef",
            "family": kind.name,
            "denoiser_key": kind.denoiser_key,
            "trainable_parameters": sum(t.numel() for t in weights.values()),
            "steps": params.train.steps,
            "lora": spec,
            "text_lora": text_spec if text else None,
            "text_components": sorted(text),
            "encodings": "e" * 64,
            "params": {section: params.section(section) for section in ("model", "lora", "train")},
        },
    )
    samples = [
        {
            "id": f"{i:016x}",
            "captions": [f"{TRIGGER}, a red circle"],
            "split": "train" if i else "held-out",
            "size": [32, 32],
            "repeats": 1,
            "regularisation": False,
        }
        for i in range(4)
    ]
    write_json(root / "build/encoded/index.json", {"family": kind.name, "clip_skip": 0, "samples": samples})
    write_json(root / "build/dataset/dataset.json", {"folder": "data", "trigger": TRIGGER})
    write_text(root / "build/dataset/manifest.jsonl", "".join(json.dumps(s) + "\n" for s in samples))
    counts = {"samples": 4, "train": 3, "held_out": 1, "rejected": 0, "distinct_captions": 1, "distinct_pictures": 4}
    write_json(root / "reports/dataset/summary.json", {**counts, "sizes": {"32×32": 4}})
    rows = "".join(f"{step},{1 / (step + 1)},0.01,1\n" for step in range(6))
    write_text(root / "reports/train/curve.csv", "step,loss,learning_rate,grad_norm\n" + rows)
    report = root / "reports/validate"
    write_json(report / "metrics.json", {"held_out_loss": 0.5, "base_held_out_loss": 1.0, "held_out_loss_ratio": 0.5})
    settings = params.section("validate")
    write_json(
        report / "validation.json",
        {
            "identity": "fedcba9876543210",
            "adapter_sha256": hash_file(root / "build/adapter/adapter.safetensors"),
            "width": 32,
            "height": 32,
            "main_scale": 1.0,
            "settings": settings,
        },
    )
    (report / "samples").mkdir()
    for name in ("before-after.png", "scales.png"):
        Image.new("RGB", (8, 8)).save(report / name)
    for prompt in settings["prompts"]:
        for scale in (0.0, *settings["scales"]):
            Image.new("RGB", (32, 32)).save(report / "samples" / Shot(prompt, settings["seeds"][0], scale).file_name)
    Image.new("RGB", (8, 8)).save(root / "reports/dataset/contact-sheet.png")
    return project


def export(project: Project, work: str = "work") -> Path:
    """Run the stage's body and put its out in place."""
    from stages.export_and_card import main

    workspace = Workspace(project.root, project.root)
    params, snapshot = load_params(workspace.params), Snapshot({}, {}, {})
    stage = Stage("export-and-card", params, workspace, project.root / work, "abc", StopRequest(), snapshot)
    main(stage)
    shutil.rmtree(project.root / DIST, ignore_errors=True)
    shutil.copytree(stage.out(DIST), project.root / DIST)
    return project.root / DIST
