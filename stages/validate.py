"""validate: adapter -> samples, grids and metrics, of the base and of the adapter side by side."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import nn

from pipeline import lora
from pipeline.config import Validate
from pipeline.curve import curve_csv
from pipeline.device import pick_device
from pipeline.diffusion import overridden
from pipeline.encodings import EncodedSample, Encodings
from pipeline.evaluate.clip import Clip
from pipeline.evaluate.dino import Dino
from pipeline.evaluate.losses import Questions, mean_loss, spread
from pipeline.evaluate.sampling import Sampler, Shot, decode_latents, draw_shots, sampling_changes, use_scheduler
from pipeline.evaluate.scores import Gallery, clip_metrics, copies, dino_metrics
from pipeline.evaluate.similarity import Match
from pipeline.families import family
from pipeline.files import hash_file, write_json, write_text
from pipeline.live_text import LiveText
from pipeline.model_source import ModelSource, resolve
from pipeline.pictures import labelled_grid
from pipeline.progress import Bar, progress, say
from pipeline.safetensors_file import read_safetensors
from pipeline.stage import Stage
from pipeline.workspace import ADAPTER, ENCODED, VALIDATE_REPORT

_GRID_ROWS = 8
_PICTURES = 256  # of each side of the split, that samples are compared with
_NEAREST = 6  # pairs of sample and training picture that are shown


@dataclass
class _Judge:
    """The base with everything that draws and measures with it; the adapter comes in between."""

    stage: Stage
    settings: Validate
    encodings: Encodings
    sides: dict[str, list[EncodedSample]]
    pipeline: Any
    measured: Any  # (family, objective, denoiser, device)
    sampler: Sampler
    samples: Path
    live: LiveText | None = None

    def draw(self, shots: Sequence[Shot], folder: Path, bar: Bar) -> None:
        draw_shots(self.pipeline, shots, self.sampler, self.settings.batch_size, folder, self.stage.stop.check, bar)

    def losses(self, prefix: str, bar: Bar) -> dict[str, float]:
        """Of every side of the split that has pictures."""
        kind, objective, denoiser, device = self.measured
        found = {}
        for split, chosen in self.sides.items():
            if chosen:
                found[f"{prefix}{split.replace('-', '_')}_loss"] = mean_loss(
                    denoiser,
                    kind,
                    objective,
                    self.encodings,
                    Questions(chosen, self.settings.loss_timesteps),
                    self.settings.batch_size,
                    device,
                    self.stage.stop.check,
                    bar,
                    self.live.encode if self.live else None,
                )
        return found


def main(stage: Stage) -> None:
    """Run the stage."""
    params, settings, root = stage.params, stage.params.validate_, stage.workspace.root
    device = pick_device(params.runtime.device)
    kind = family(params.model.family)
    model = resolve(stage.source(), root)
    encodings = Encodings(root / ENCODED)
    training = json.loads((root / ADAPTER / "training.json").read_text(encoding="utf-8"))
    index = encodings.index
    ours = {split: [s for s in encodings.samples(split) if not s.regularisation] for split in ("held-out", "train")}
    width, height = Counter(s.size for s in ours["train"] or index.samples).most_common(1)[0][0]
    pipeline = kind.load_pipeline(model, device, getattr(torch, settings.dtype))
    use_scheduler(pipeline, settings.scheduler, sampling_changes(params.model.prediction, params.model.zero_terminal_snr))
    denoiser = getattr(pipeline, kind.denoiser_key).eval()
    objective = overridden(kind.objective(model), params.model.prediction, params.model.zero_terminal_snr)
    judge = _Judge(
        stage,
        settings,
        encodings,
        {split: spread(samples, settings.loss_samples) for split, samples in ours.items()},
        pipeline,
        (kind, objective, denoiser, device),
        Sampler(
            settings.scheduler,
            settings.inference_steps,
            settings.guidance_scale,
            settings.negative_prompt,
            width,
            height,
            index.clip_skip,
        ),
        stage.work / "samples",
    )
    scales, main_scale = (0.0, *settings.scales), min(settings.scales, key=lambda s: abs(s - 1))
    snapshots = _snapshots(root) if settings.checkpoints == "all" else []
    forwards = settings.loss_timesteps * sum(map(len, judge.sides.values()))
    plain = len(settings.untriggered_prompts) * len(settings.seeds)
    shots = len(settings.prompts) * len(settings.seeds)
    total = shots * len(scales) + 2 * plain + 2 * forwards + (forwards + shots + plain) * len(snapshots)
    text = {name: getattr(pipeline, name) for name in training["text_components"]}
    if text:  # both are asked through the same encoders
        judge.live = LiveText(kind, kind.text_encoders_of(pipeline), text, index.caption_chunks, index.clip_skip)
    with progress("sampling and measuring", total, "items") as bar:
        losses = judge.losses("base_", bar)
        judge.draw([*_shots(settings, 0.0), *_plain(settings, 0.0)], judge.samples, bar)  # the untouched base
        weights = read_safetensors(root / ADAPTER / "adapter.safetensors")
        networks = lora.inject_trained(denoiser, text, training, weights)
        losses |= judge.losses("", bar)
        for scale in settings.scales:
            _weigh(networks, scale)
            extra = _plain(settings, scale) if scale == main_scale else []
            judge.draw([*_shots(settings, scale), *extra], judge.samples, bar)
        rows = []
        for step, path in snapshots:
            lora.load_joint_state(denoiser, text, read_safetensors(path))
            _weigh(networks, 1.0)
            rows.append({"step": float(step), **judge.losses("", bar)})
            _weigh(networks, main_scale)
            judge.draw([*_shots(settings, main_scale), *_plain(settings, main_scale)], judge.samples / f"step-{step}", bar)

    def pictures(chosen: list[EncodedSample]) -> list[Image.Image]:
        """As the base sees them: both sides of a comparison went through the same VAE."""
        return [
            decode_latents(pipeline, encodings.read(s.latents[0])["mean"].float()[None])[0] for s in spread(chosen, _PICTURES)
        ]

    def drawn(chosen: Sequence[Shot], folder: Path = judge.samples) -> list[Image.Image]:
        return [Image.open(folder / shot.file_name).convert("RGB") for shot in chosen]

    gallery = Gallery(
        [shot.prompt for shot in _shots(settings, 0.0)],
        drawn(_shots(settings, 0.0)),
        drawn(_shots(settings, main_scale)),
        pictures(ours["train"]),
        pictures(ours["held-out"]),
        drawn(_plain(settings, 0.0)),
        drawn(_plain(settings, main_scale)),
    )
    metrics = {**losses, **_ratios(losses)}
    copied = copies(gallery.adapted, gallery.train)
    metrics["memorised_share"] = len(copied) / len(gallery.adapted)
    on_the_way = [
        replace(
            gallery,
            adapted=drawn(_shots(settings, main_scale), judge.samples / f"step-{step}"),
            plain_adapted=drawn(_plain(settings, main_scale), judge.samples / f"step-{step}"),
        )
        for step, _ in snapshots
    ]
    for row, then in zip(rows, on_the_way, strict=True):
        row["memorised_share"] = len(copies(then.adapted, then.train)) / len(then.adapted)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to("meta")  # gone: room for those that follow
    matches: list[Match] = []
    if settings.clip_model:
        clip = Clip(resolve(ModelSource(settings.clip_model, settings.clip_revision), root, "validate.clip_model"), device)
        scores, matches = clip_metrics(clip, gallery)
        metrics |= scores
        for row, then in zip(rows, on_the_way, strict=True):
            row |= {name: value for name, value in clip_metrics(clip, then)[0].items() if not name.startswith("base_")}
    if settings.dino_model:
        dino = Dino(resolve(ModelSource(settings.dino_model, settings.dino_revision), root, "validate.dino_model"), device)
        metrics |= dino_metrics(dino, gallery)
        for row, then in zip(rows, on_the_way, strict=True):
            row |= {name: value for name, value in dino_metrics(dino, then).items() if not name.startswith("base_")}

    out = stage.out(VALIDATE_REPORT)
    (out / "samples").mkdir()
    shown = [shot for scale in scales for shot in _shots(settings, scale)]
    for shot in [*shown, *_plain(settings, 0.0), *_plain(settings, main_scale)]:
        (out / "samples" / shot.file_name).write_bytes((judge.samples / shot.file_name).read_bytes())
    _grid(settings, judge.samples, (0.0, main_scale)).save(out / "before-after.png")
    _grid(settings, judge.samples, scales).save(out / "scales.png")
    if settings.untriggered_prompts:
        _grid(settings, judge.samples, (0.0, main_scale), settings.untriggered_prompts).save(out / "untriggered.png")
    _write_nearest(out, gallery, matches, copied, [s.id for s in spread(ours["train"], _PICTURES)])
    if rows:
        rows = [{**row, **_ratios({**losses, **row})} for row in rows]
        write_text(out / "checkpoints.csv", curve_csv(rows, ["step", *(name for name in rows[0] if name != "step")]))
    # JSON has no NaN: null is what the gate takes for failed
    write_json(out / "metrics.json", {name: value if math.isfinite(value) else None for name, value in metrics.items()})
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
    if not judge.sides["held-out"]:
        say("  no picture is held out: there is no held-out loss, and nothing tells of overfitting")


def _ratios(losses: dict[str, float]) -> dict[str, float]:
    """Losses as shares of the base's, and how far the two sides of the split are apart."""
    found = {}
    for side in ("held_out", "train"):
        if f"{side}_loss" in losses:
            found[f"{side}_loss_ratio"] = losses[f"{side}_loss"] / losses[f"base_{side}_loss"]
    if len(found) == 2:
        found["overfitting_gap"] = found["held_out_loss_ratio"] - found["train_loss_ratio"]
    return found


def _weigh(networks: Sequence[nn.Module], scale: float) -> None:
    for network in networks:
        lora.set_scale(network, scale)


def _snapshots(root: Path) -> list[tuple[int, Path]]:
    """The adapters that the training left on its way, by their steps."""
    return [
        (int(path.stem.removeprefix("step-")), path)
        for path in sorted((root / ADAPTER / "snapshots").glob("step-*.safetensors"))
    ]


def _shots(settings: Validate, scale: float) -> list[Shot]:
    return [Shot(prompt, seed, scale) for seed in settings.seeds for prompt in settings.prompts]


def _plain(settings: Validate, scale: float) -> list[Shot]:
    """Of the prompts without the trigger."""
    return [Shot(prompt, seed, scale) for seed in settings.seeds for prompt in settings.untriggered_prompts]


def _grid(settings: Validate, samples: Path, scales: tuple[float, ...], prompts: Sequence[str] = ()) -> Image.Image:
    rows, seed = (prompts or settings.prompts)[:_GRID_ROWS], settings.seeds[0]
    return labelled_grid(
        [[Image.open(samples / Shot(p, seed, s).file_name).convert("RGB") for s in scales] for p in rows],
        columns=["base" if s == 0 else f"with adapter, weight {s:g}" for s in scales],
        row_captions=[f"{p}  (seed {seed})" for p in rows],
    )


def _write_nearest(out: Path, gallery: Gallery, matches: list[Match], copied: list[tuple[int, int]], ids: list[str]) -> None:
    """The samples that are most like a training picture, copies first: a list, and a picture to judge by eye.

    Args:
        ids: of the training pictures, as build/encoded/index.json has them.
    """
    far = {match.sample: match.cosine for match in matches}
    pairs = [(i, j, True) for i, j in copied]
    known = {i for i, _, _ in pairs}
    pairs += [(m.sample, m.picture, False) for m in sorted(matches, key=lambda m: -m.cosine) if m.sample not in known]
    pairs = pairs[:_NEAREST]
    listed = [
        {"prompt": gallery.prompts[i], "training_picture": ids[j], "copy": copy, "cosine": far.get(i)} for i, j, copy in pairs
    ]
    write_json(out / "nearest.json", listed)
    if pairs:
        labelled_grid(
            [[gallery.adapted[i], ImageOps.pad(gallery.train[j], gallery.adapted[i].size, color="white")] for i, j, _ in pairs],
            columns=["sample", "nearest training picture"],
            row_captions=[("a copy" if copy else f"cosine {far[i]:.3f}") + f": {gallery.prompts[i]}" for i, _, copy in pairs],
        ).save(out / "nearest.png")
