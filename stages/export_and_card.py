"""export-and-card: adapter and reports -> files that load elsewhere, each loaded again and compared, and a model card."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline import lora
from pipeline.device import pick_device
from pipeline.errors import UserError
from pipeline.evaluate.gate import judge
from pipeline.evaluate.sampling import Shot, sampling_changes, use_scheduler
from pipeline.export.adapter import Adapter
from pipeline.export.card import loss_by_fifths, model_index, render_card
from pipeline.export.diffusers_format import FILE_NAME, diffusers_tensors, write_diffusers
from pipeline.export.kohya_format import kohya_tensors, write_kohya
from pipeline.export.lineage import lineage_of, revision_of
from pipeline.export.merged import write_merged
from pipeline.export.metadata import Facts, Picture, header
from pipeline.export.reload import Probe, Reloaded, Trained, observe, reload_all
from pipeline.families import family
from pipeline.families.base import BaseVersion, Family
from pipeline.files import hash_file, write_json, write_text
from pipeline.model_source import resolve
from pipeline.progress import say
from pipeline.safetensors_file import read_safetensors
from pipeline.stage import Stage
from pipeline.workspace import ADAPTER, DATASET, DATASET_REPORT, DIST, ENCODED, TRAIN_REPORT, VALIDATE_REPORT

_KINDS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}
_WIDGETS = 8  # sample pictures that the card's header shows


def main(stage: Stage) -> None:
    """Run the stage."""
    params, root, out = stage.params, stage.workspace.root, stage.out(DIST)
    training, validation = _read(root / ADAPTER / "training.json"), _read(root / VALIDATE_REPORT / "validation.json")
    metrics = _read(root / VALIDATE_REPORT / "metrics.json")
    if validation["adapter_sha256"] != hash_file(root / ADAPTER / "adapter.safetensors"):
        raise UserError(f"{VALIDATE_REPORT} judges another adapter than {ADAPTER} holds: run validate first")
    findings = judge(metrics, {str(name): threshold for name, threshold in params.gate.items()})
    passed = all(f.passed for f in findings)
    lineage = lineage_of(stage.workspace, training["params"], revision_of(stage.source(), root))
    kind = family(params.model.family)
    model = resolve(stage.source(), root)
    version = _as_trained(kind.base_version(model), params.model.prediction)

    base_dtype = getattr(torch, validation["settings"]["dtype"])
    pipeline = kind.load_pipeline(model, pick_device(params.runtime.device), base_dtype)
    published = pipeline.scheduler
    use_scheduler(pipeline, "base" if kind.objective(model).prediction == "flow" else "ddim")
    components = [kind.denoiser_key, *training["text_components"]]
    probe = Probe(validation["settings"]["prompts"][0], validation["width"], validation["height"])
    _inject(pipeline, kind, training, root)
    trained = observe(pipeline, components, probe)
    files = _write(stage, out, trained.adapter, kind, version, training, lineage)
    dtype = getattr(torch, params.export.dtype)
    stage.stop.check()
    reloaded = reload_all(pipeline, components, trained, files, dtype, base_dtype, version.layers_per_block, probe)
    for file in reloaded:
        say(f"  {file.file}: loaded by {file.loader}, ΔW within {file.delta_error:.1e}, picture within {file.drawn_error:.1e}")
    if params.export.merge:
        stage.stop.check()
        if base_dtype != torch.float32:  # what is added to rounded weights is mostly rounded away
            pipeline = kind.load_pipeline(model, torch.device("cpu"), torch.float32)
        _inject(pipeline, kind, training, root)
        pipeline.scheduler = published
        use_scheduler(pipeline, "base", sampling_changes(params.model.prediction, params.model.zero_terminal_snr))
        write_merged(out / "merged", pipeline, components)

    # how the adapter was judged is no part of the files: other prompts must not change their bytes
    lineage = {**lineage, "training": training["identity"], "validation": validation["identity"]}
    lineage |= {f"file {path.name}": hash_file(path) for path in files}
    for picture in ("before-after.png", "scales.png"):
        shutil.copyfile(root / VALIDATE_REPORT / picture, out / picture)
    write_json(out / "lineage.json", lineage)
    verdict = {"passed": passed, "findings": [f.sentence() for f in findings]}
    write_json(out / "gate.json", verdict)
    write_text(out / "README.md", _card(stage, out, training, validation, metrics, lineage, verdict, trained, kind, reloaded))
    for finding in findings:
        say(f"  gate: {finding.sentence()}")
    if not passed:
        say("  the gate FAILED: the files are written, but this adapter should not be published")


def _as_trained(version: BaseVersion, prediction: str) -> BaseVersion:
    """What other programs are told of the base, where `model.prediction` overrides what its own config says."""
    if prediction == "auto":
        return version
    word = "v" if prediction == "v_prediction" else "epsilon"
    kohya = version.kohya.removesuffix("_v") + ("_v" if word == "v" and version.kohya.startswith("sd_") else "")
    return replace(version, prediction=word, kohya=kohya)


def _inject(pipeline: Any, kind: Family, training: dict[str, Any], root: Path) -> None:
    """Put the trained adapter into the pipeline, as validate does."""
    text = {name: getattr(pipeline, name) for name in training["text_components"]}
    weights = read_safetensors(root / ADAPTER / "adapter.safetensors")
    lora.inject_trained(getattr(pipeline, kind.denoiser_key), text, training, weights)


def _write(
    stage: Stage,
    out: Path,
    adapter: Adapter,
    kind: Family,
    version: BaseVersion,
    training: dict[str, Any],
    lineage: dict[str, str],
) -> list[Path]:
    """The adapter's files, in the formats that are asked for and can hold it."""
    settings, root = stage.params.export, stage.workspace.root
    dtype = getattr(torch, settings.dtype)
    largest = max(adapter.layers.values(), key=lambda layer: layer.rank)
    index = _read(root / ENCODED / "index.json")
    facts = Facts(
        name=settings.name,
        title=settings.title,
        author=settings.author,
        description=settings.description,
        license=settings.license,
        tags=settings.tags,
        trigger=_read(root / DATASET / "dataset.json")["trigger"],
        base=training["params"]["model"]["base"],
        version=version,
        rank=largest.rank,
        alpha=largest.alpha,
        pictures=[
            Picture(s["captions"][0], tuple(s["size"]), s["repeats"])
            for s in index["samples"]
            if s["split"] == "train" and not s["regularisation"]
        ],
        regularisation=sum(s["split"] == "train" and s["regularisation"] for s in index["samples"]),
        clip_skip=index["clip_skip"],
        train={**training["params"]["train"], "steps": training["steps"]},
        lineage=lineage,
    )
    files = []
    if "diffusers" in settings.formats:
        if set(adapter.kinds) <= {"lora", "dora"}:
            tensors = diffusers_tensors(adapter, dtype)
            write_diffusers(out / FILE_NAME, adapter, dtype, header(facts, adapter, tensors))
            files.append(out / FILE_NAME)
        elif "kohya" in settings.formats:
            say(
                f"  diffusers' loader does not know {', '.join(_KINDS[k] for k in adapter.kinds)}: only the Kohya file is written"
            )
        else:
            raise UserError(
                f"export.formats: diffusers' loader does not know {', '.join(_KINDS[k] for k in adapter.kinds)}: ask for kohya"
            )
    if "kohya" in settings.formats:
        assert kind.kohya  # the settings' check
        tensors = kohya_tensors(adapter, kind.kohya, version.layers_per_block, dtype)
        path = out / f"{settings.name}.safetensors"
        write_kohya(path, adapter, kind.kohya, version.layers_per_block, dtype, header(facts, adapter, tensors))
        files.append(path)
    return files


def _card(
    stage: Stage,
    out: Path,
    training: dict[str, Any],
    validation: dict[str, Any],
    metrics: dict[str, float | None],
    lineage: dict[str, str],
    verdict: dict[str, Any],
    trained: Trained,
    kind: Family,
    reloaded: Sequence[Reloaded],
) -> str:
    settings, root = stage.params.export, stage.workspace.root
    with (root / TRAIN_REPORT / "curve.csv").open(encoding="utf-8", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    summary, trigger = _read(root / DATASET_REPORT / "summary.json"), _read(root / DATASET / "dataset.json")["trigger"]
    model, asked, adapter = training["params"]["model"], validation["settings"], trained.adapter
    title = settings.title or settings.name
    on_hub = not stage.source().is_local(root)
    card_header = {
        "license": settings.license,
        "base_model": model["base"] if on_hub else None,  # a folder's name would be taken for somebody's repository
        "base_model_relation": "adapter" if on_hub else None,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": trigger or None,
        "tags": ["lora", "text-to-image", "diffusers", "template:sd-lora", *settings.tags],
        "datasets": list(settings.datasets) or None,
        "widget": _widgets(out, root / VALIDATE_REPORT / "samples", asked, validation["main_scale"]),
        "model-index": model_index(title, dict(sorted(metrics.items())), "pictures held out of training"),
    }
    last = min(50, len(losses))
    names = {file.file for file in reloaded}
    largest = max(adapter.layers.values(), key=lambda layer: layer.rank)
    facts = {
        "title": title,
        "name": settings.name,
        "description": settings.description,
        "license": settings.license,
        "author": settings.author,
        "datasets": settings.datasets,
        "merged": settings.merge,
        "dtype": settings.dtype,
        "kind": " and ".join(_KINDS[k] for k in adapter.kinds),
        "rank": largest.rank,
        "alpha": f"{largest.alpha:g}",
        "base": model["base"],
        "base_literal": json.dumps(model["base"], ensure_ascii=False),
        "family": training["family"],
        "pipeline_class": kind.pipeline_class,
        "diffusers_file": FILE_NAME if FILE_NAME in names else None,
        "kohya_file": next((name for name in sorted(names) if name != FILE_NAME), None),
        "reloaded": reloaded,
        "trigger": trigger,
        "prompt_literal": json.dumps(asked["prompts"][0], ensure_ascii=False),
        "prompts": asked["prompts"],
        "seeds": asked["seeds"],
        "inference_steps": asked["inference_steps"],
        "guidance_scale": asked["guidance_scale"],
        "loss_timesteps": asked["loss_timesteps"],
        "trainable_parameters": f"{training['trainable_parameters']:,}",
        "text_components": training["text_components"],
        "clip_skip": _read(root / ENCODED / "index.json")["clip_skip"],
        "settings": {**training["params"]["train"], "steps": training["steps"]},
        "all_settings": {
            f"{section}.{key}": value for section, keys in training["params"].items() for key, value in keys.items()
        },
        "data": summary,
        "train": summary["train"],
        "held_out": summary["held_out"],
        "width": validation["width"],
        "height": validation["height"],
        "losses": loss_by_fifths(losses),
        "final_loss": sum(losses[-last:]) / last,
        "last_steps": last,
        "metrics": dict(sorted(metrics.items())),
        "passed": verdict["passed"],
        "findings": verdict["findings"],
        "lineage": lineage,
    }
    return render_card(card_header, facts)


def _widgets(out: Path, samples: Path, asked: dict[str, Any], scale: float) -> list[dict[str, Any]]:
    """Copy one sample a prompt to `samples/` and list them as the Hub wants them."""
    widgets = []
    for prompt in asked["prompts"][:_WIDGETS]:
        name = Shot(prompt, asked["seeds"][0], scale).file_name
        (out / "samples").mkdir(exist_ok=True)
        shutil.copyfile(samples / name, out / "samples" / name)
        widgets.append({"text": prompt, "output": {"url": f"samples/{name}"}})
    return widgets


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
