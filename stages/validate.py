"""validate: adapter -> samples, grids and metrics, of the base and of the adapter side by side."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline import lora
from pipeline.config import Validate
from pipeline.device import pick_device
from pipeline.diffusion import overridden
from pipeline.encodings import Encodings
from pipeline.evaluate.clip import Clip, clip_score, style_shift
from pipeline.evaluate.losses import Questions, mean_loss, spread
from pipeline.evaluate.sampling import Sampler, Shot, decode_latents, draw_shots, sampling_changes, use_scheduler
from pipeline.families import family
from pipeline.files import hash_file, write_json
from pipeline.live_text import LiveText
from pipeline.model_source import ModelSource, resolve
from pipeline.pictures import labelled_grid
from pipeline.progress import progress, say
from pipeline.safetensors_file import read_safetensors
from pipeline.stage import Stage
from pipeline.workspace import ADAPTER, ENCODED, VALIDATE_REPORT

_GRID_ROWS = 8
_CLIP_PICTURES = 128  # training pictures that the style shift is measured against


def main(stage: Stage) -> None:
    """Run the stage."""
    params, settings, root = stage.params, stage.params.validate_, stage.workspace.root
    device = pick_device(params.runtime.device)
    kind = family(params.model.family)
    model = resolve(stage.source(), root)
    encodings = Encodings(root / ENCODED)
    training = json.loads((root / ADAPTER / "training.json").read_text(encoding="utf-8"))
    weights = read_safetensors(root / ADAPTER / "adapter.safetensors")
    width, height = Counter(s.size for s in encodings.index.samples).most_common(1)[0][0]
    sampler = Sampler(
        settings.scheduler,
        settings.inference_steps,
        settings.guidance_scale,
        settings.negative_prompt,
        width,
        height,
        encodings.index.clip_skip,
    )
    ours = {split: [s for s in encodings.samples(split) if not s.regularisation] for split in ("held-out", "train")}
    sides = {split: spread(samples, settings.loss_samples) for split, samples in ours.items()}
    pipeline = kind.load_pipeline(model, device, torch.float32)
    use_scheduler(pipeline, settings.scheduler, sampling_changes(params.model.prediction, params.model.zero_terminal_snr))
    denoiser = getattr(pipeline, kind.denoiser_key).eval()
    objective = overridden(kind.objective(model), params.model.prediction, params.model.zero_terminal_snr)
    samples = stage.work / "samples"
    losses: dict[str, float] = {}

    def draw(scale: float) -> None:
        draw_shots(pipeline, _shots(settings, scale), sampler, settings.batch_size, samples, stage.stop.check, bar)

    def measure(prefix: str, live: LiveText | None = None) -> None:
        for split, chosen in sides.items():
            if chosen:
                losses[f"{prefix}{split.replace('-', '_')}_loss"] = mean_loss(
                    denoiser,
                    kind,
                    objective,
                    encodings,
                    Questions(chosen, settings.loss_timesteps),
                    settings.batch_size,
                    device,
                    stage.stop.check,
                    bar,
                    live.encode if live else None,
                )

    pictures = len(settings.prompts) * len(settings.seeds) * (1 + len(settings.scales))
    forwards = 2 * settings.loss_timesteps * sum(map(len, sides.values()))
    with progress("sampling and measuring", pictures + forwards, "items") as bar:
        measure("base_")
        draw(0.0)  # before the adapter is injected: the untouched base
        text = {name: getattr(pipeline, name) for name in training["text_components"]}
        networks = lora.inject_trained(denoiser, text, training, weights)
        encoders, index = kind.text_encoders_of(pipeline), encodings.index
        live = LiveText(kind, encoders, text, index.caption_chunks, index.clip_skip) if text else None
        measure("", live)
        for scale in settings.scales:
            for network in networks:
                lora.set_scale(network, scale)
            draw(scale)

    metrics = dict(losses)
    if "held_out_loss" in losses:
        metrics["held_out_loss_ratio"] = losses["held_out_loss"] / losses["base_held_out_loss"]
    main_scale = min(settings.scales, key=lambda s: abs(s - 1))
    if settings.clip_model:
        clip = Clip(resolve(ModelSource(settings.clip_model, settings.clip_revision), root, "validate.clip_model"), device)
        seen = spread(ours["train"], _CLIP_PICTURES)
        means = torch.stack([encodings.read(s.latents[0])["mean"].float() for s in seen if s.size == (width, height)])
        metrics |= _clip_metrics(clip, settings, samples, main_scale, decode_latents(pipeline, means))

    out = stage.out(VALIDATE_REPORT)
    (out / "samples").mkdir()
    for scale in (0.0, *settings.scales):
        for shot in _shots(settings, scale):
            (out / "samples" / shot.file_name).write_bytes((samples / shot.file_name).read_bytes())
    _grid(settings, samples, (0.0, main_scale)).save(out / "before-after.png")
    _grid(settings, samples, (0.0, *settings.scales)).save(out / "scales.png")
    write_json(out / "metrics.json", metrics)
    write_json(
        out / "validation.json",
        {
            "identity": stage.identity,
            "adapter_identity": training["identity"],
            "adapter_sha256": hash_file(root / ADAPTER / "adapter.safetensors"),
            "held_out_samples": len(ours["held-out"]),
            "train_samples": len(ours["train"]),
            "width": width,
            "height": height,
            "main_scale": main_scale,
            "settings": params.section("validate"),
        },
    )
    if not sides["held-out"]:
        say("  no picture is held out: there is no held-out loss, and nothing tells of overfitting")


def _shots(settings: Validate, scale: float) -> list[Shot]:
    return [Shot(prompt, seed, scale) for seed in settings.seeds for prompt in settings.prompts]


def _clip_metrics(
    clip: Clip, settings: Validate, samples: Path, main_scale: float, training: list[Image.Image]
) -> dict[str, float]:
    texts = clip.texts([shot.prompt for shot in _shots(settings, 0.0)])
    embedded: dict[float, Any] = {
        scale: clip.images([Image.open(samples / shot.file_name).convert("RGB") for shot in _shots(settings, scale)])
        for scale in (0.0, main_scale)
    }
    return {
        "base_clip_score": clip_score(embedded[0.0], texts),
        "clip_score": clip_score(embedded[main_scale], texts),
        "style_shift": style_shift(embedded[0.0], embedded[main_scale], clip.images(training)),
    }


def _grid(settings: Validate, samples: Path, scales: tuple[float, ...]) -> Image.Image:
    prompts, seed = settings.prompts[:_GRID_ROWS], settings.seeds[0]
    return labelled_grid(
        [[Image.open(samples / Shot(p, seed, s).file_name).convert("RGB") for s in scales] for p in prompts],
        columns=["base" if s == 0 else f"with adapter, weight {s:g}" for s in scales],
        row_captions=[f"{p}  (seed {seed})" for p in prompts],
    )
