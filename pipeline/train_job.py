"""A whole training, from settings and encodings to an adapter: what each of the processes of the stage does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import lora
from pipeline.base_model import base_source
from pipeline.batches import Batches
from pipeline.config import Params, Train
from pipeline.device import full_memory_is_the_users, pick_device
from pipeline.diffusion import Flow, Objective, overridden
from pipeline.encodings import Encodings
from pipeline.errors import UserError
from pipeline.families import family
from pipeline.families.base import Family
from pipeline.files import write_json
from pipeline.live_text import LiveText
from pipeline.model_source import LocalModel, resolve
from pipeline.preview import Previews
from pipeline.progress import say
from pipeline.quantise import quantise
from pipeline.randomness import torch_seed
from pipeline.safetensors_file import read_safetensors, write_safetensors
from pipeline.team import ALONE, Team
from pipeline.train import SNAPSHOTS, Hardware, Observer, train
from pipeline.workspace import ENCODED

PUBLISHED_SNAPSHOTS = "published-snapshots"  # folder in the work directory
_BASE_TYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # CLIP's attention, as diffusers' and Kohya's scripts take it


@dataclass(frozen=True)
class Trained:
    """An adapter for the base as it was published, and what is to be known of it."""

    weights: dict[str, Tensor]  # as `lora.joint_state` names them
    facts: dict[str, Any]  # JSON: how many parameters, steps and samples; the adapter's spec and scales

    def write(self, folder: Path) -> None:
        write_safetensors(folder / "trained.safetensors", self.weights)
        write_json(folder / "trained.json", self.facts)

    @classmethod
    def read(cls, folder: Path) -> Trained:
        facts = json.loads((folder / "trained.json").read_text(encoding="utf-8"))
        return cls(read_safetensors(folder / "trained.safetensors"), facts)


def perform(
    params: Params,
    root: Path,
    work: Path,
    stop: Callable[[], bool],
    check_stop: Callable[[str], None],
    observe: Observer,
    team: Team = ALONE,
    fingerprint: str = "",
) -> Trained:
    """Train as `params` say, going on from what lies in `work`.

    Args:
        root: the project's folder, with its encodings.
        stop, check_stop, observe: as `train` takes them.
        fingerprint: of all that settles the result; every machine's must be the same.

    Raises:
        UserError: as `train`, and whatever the settings ask for that this base does not have.
    """
    settings, runtime, kind = params.train, params.runtime, family(params.model.family)
    model = resolve(base_source(params.model), root)
    encodings = Encodings(root / ENCODED)
    batches = Batches(encodings, settings.batch_size, settings.seed, settings.caption_dropout, settings.prior_weight)
    if not batches.samples:
        raise UserError("no picture is on the training side of the split: add pictures or lower dataset.held_out_fraction")
    if fingerprint != team.from_first(fingerprint):
        raise UserError(
            "this machine's settings, encodings, base or code are not those of the main one (runtime.machine_rank 0): "
            "bring the same commit and data to both"
        )
    if team.size > 1 and params.lora.dropout:
        raise UserError(
            "lora.dropout: several processes would draw other masks than one: set it to 0, or runtime.processes to 1"
        )
    device = pick_device(_own_device(runtime.device), runtime.tf32)
    denoiser = kind.load_denoiser(model, _BASE_TYPES[settings.mixed_precision])
    if settings.quantise_base:
        with full_memory_is_the_users(denoiser, 0, runtime.micro_batch or settings.batch_size):
            quantise(denoiser, settings.quantise_base, device)
    spec = lora.LoraSpec(**params.lora.model_dump(exclude={"init_from", "text_encoder"}))
    spec = replace(spec, targets=lora.expand_targets(denoiser, spec.targets, kind.lora_targets))
    parameters = lora.inject(denoiser, spec, torch_seed(settings.seed))
    live, text_spec = None, None
    if params.lora.text_encoder:
        live, text_spec, more = _live_text(kind, model, encodings, spec, device, settings.seed)
        parameters += more
    text = live.modules if live else {}
    if params.lora.init_from:
        lora.start_from(denoiser, root / params.lora.init_from, kind.denoiser_key)
    start = {}
    if spec.init == "pissa":
        start = {name: tensor.detach().clone() for name, tensor in lora.joint_state(denoiser, text).items()}
    trainable, each = sum(p.numel() for p in parameters), batches.steps_per_epoch
    if team.rank == 0:
        many = f", shared by {team.size} processes" if team.size > 1 else ""
        say(f"  {trainable:,} parameters to train on {len(batches.samples)} pictures, {each} steps an epoch{many}")
    previews = Previews(params, kind, model, encodings, work, device)
    weights = train(
        denoiser,
        kind,
        _objective(kind.objective(model), params),
        batches,
        settings,
        Hardware(
            device,
            runtime.micro_batch,
            runtime.checkpoint_every,
            runtime.keep_checkpoints,
            runtime.gradient_checkpointing,
            runtime.compile,
            runtime.channels_last,
            runtime.attention,
            runtime.deterministic,
            runtime.sample_every,
        ),
        work,
        stop,
        check_stop,
        observe,
        live,
        team,
        lambda step: previews.draw(step, denoiser, text),
        overridden(kind.objective(model), params.model.prediction, params.model.zero_terminal_snr),
    )
    weights, published = lora.portable(weights, start, spec)
    if team.leads:
        _publish_snapshots(work, start, spec)
    if text_spec:
        text_spec = replace(published, targets=text_spec.targets, rank_pattern={}, alpha_pattern={})
    facts = {
        "trainable_parameters": trainable,
        "train_samples": len(batches.samples),
        "steps_per_epoch": each,
        "sizes": sorted({s.size for s in batches.samples}),
        "steps": settings.length(each),
        "lora": asdict(published),  # of the file beside: presets written out, PiSSA's rank doubled
        "text_lora": asdict(text_spec) if text_spec else None,
        "text_components": sorted(text),
        "scales": lora.scales(denoiser),  # layer -> what its B A is multiplied by
    }
    return Trained(weights, facts)


def _publish_snapshots(work: Path, start: dict[str, Tensor], spec: lora.LoraSpec) -> None:
    """Make the adapters that were kept on the way ones for the base as it was published."""
    published = work / PUBLISHED_SNAPSHOTS
    shutil.rmtree(published, ignore_errors=True)
    for path in sorted((work / SNAPSHOTS).glob("step-*.safetensors")):
        write_safetensors(published / path.name, lora.portable(read_safetensors(path), start, spec)[0])


def steps_of(settings: Train, encodings: Encodings) -> int:
    """The training's length in optimiser steps."""
    return settings.length(Batches(encodings, settings.batch_size, settings.seed).steps_per_epoch)


def _live_text(
    kind: Family, model: LocalModel, encodings: Encodings, spec: lora.LoraSpec, device: torch.device, seed: int
) -> tuple[LiveText, lora.LoraSpec, list[nn.Parameter]]:
    """The family's text encoders with adapters of the denoiser's kind in them."""
    encoders = kind.load_text_encoders(model, device)
    modules = kind.text_modules(encoders)
    spec = replace(spec, targets=_TEXT_TARGETS, rank_pattern={}, alpha_pattern={})
    parameters = []
    for place, module in enumerate(modules.values()):
        parameters += lora.inject(module, spec, torch_seed(seed, place + 1))
        module.to(device)
    index = encodings.index
    return LiveText(kind, encoders, modules, index.caption_chunks, index.clip_skip), spec, parameters


def _objective(base: Objective, params: Params) -> Objective:
    """The base's objective, as `model` and `train.flow_shift` change it."""
    objective = overridden(base, params.model.prediction, params.model.zero_terminal_snr)
    if params.train.flow_shift is not None and isinstance(objective, Flow):
        return replace(objective, shift=params.train.flow_shift)
    return objective


def _own_device(wanted: str) -> str:
    """The GPU that is this process's, where several share a machine."""
    place = os.environ.get("LOCAL_RANK")
    if place is None or wanted not in ("auto", "cuda") or not torch.cuda.is_available():
        return wanted
    return f"cuda:{place}"
