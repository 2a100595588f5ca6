"""A base that stays loaded, with any adapters in it: what the playground draws with."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.base_model import base_source
from pipeline.config import load_params
from pipeline.device import pick_device
from pipeline.errors import UserError
from pipeline.evaluate.sampling import clip_skip_can_be, decode_latents, sampling_changes, use_scheduler
from pipeline.export.adapter_file import load_into, read_adapter
from pipeline.export.peft_format import strip
from pipeline.families import family
from pipeline.model_source import resolve
from pipeline.workspace import DIST, Workspace


@dataclass(frozen=True)
class Wish:
    """One picture."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance_scale: float = 7.5
    adapters: tuple[tuple[str, float], ...] = ()  # (file, weight)


class Studio:
    """Draws one wish at a time."""

    def __init__(self, workspace: Workspace) -> None:
        self.params = load_params(workspace.params)
        model, self.side = self.params.model, self.params.dataset.resolution
        self.kind, base = family(model.family), resolve(base_source(model), workspace.root)
        device = pick_device(self.params.runtime.device)
        self.pipeline: Any = self.kind.load_pipeline(base, device, getattr(torch, self.params.validate_.dtype))
        changes = sampling_changes(model.prediction, model.zero_terminal_snr)
        use_scheduler(self.pipeline, self.params.validate_.scheduler, changes)
        self.pipeline.set_progress_bar_config(disable=True)
        self.layers = self.kind.base_version(base).layers_per_block
        self._busy = threading.Lock()

    def draw(self, wish: Wish) -> tuple[Image.Image, Image.Image]:
        """The picture without and with the adapters.

        Raises:
            UserError: a file is no adapter, or two of them cannot be together.
        """
        with self._busy:
            self._empty()
            base = self._picture(wish)
            if not wish.adapters:
                return base, base
            try:
                self._load(wish.adapters)
                return base, self._picture(wish)
            finally:
                self._empty()

    def _load(self, adapters: Sequence[tuple[str, float]]) -> None:
        names, plain = [], True
        for place, (file, weight) in enumerate(adapters):
            path = Path(file)
            plain &= not set(read_adapter(path, self.layers).adapter.kinds) & {"loha", "lokr"}
            names.append(f"adapter{place}")
            load_into(self.pipeline, path, weight, self.layers, names[-1])
        if len(names) > 1:
            if not plain:
                raise UserError("a LoHa or LoKr cannot be loaded beside other adapters: `combine` makes one file of them")
            self.pipeline.set_adapters(names, [weight for _, weight in adapters])

    def _empty(self) -> None:
        for component in (self.kind.denoiser_key, *self.kind.text_components):
            strip(getattr(self.pipeline, component))

    def _picture(self, wish: Wish) -> Image.Image:
        with clip_skip_can_be(self.pipeline.text_encoder):
            latents: torch.Tensor = self.pipeline(
                prompt=wish.prompt,
                negative_prompt=wish.negative_prompt or None,
                num_inference_steps=wish.steps,
                guidance_scale=wish.guidance_scale,
                width=self.side,
                height=self.side,
                clip_skip=self.params.encode.clip_skip or None,
                generator=torch.Generator("cpu").manual_seed(wish.seed),
                output_type="latent",
            ).images
        return decode_latents(self.pipeline, latents)[0]


def save(image: Image.Image, wish: Wish, path: Path) -> Path:
    """Write the picture with its parameters in the PNG's metadata."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(asdict(wish), ensure_ascii=False, sort_keys=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", pnginfo=info)
    return path


def known_adapters(workspace: Workspace) -> dict[str, str]:
    """Adapters to choose from, by a name for people: the exported files, and the versions that MLflow's store here has."""
    found = {path.name: str(path) for path in sorted((workspace.root / DIST).glob("*.safetensors"))}
    if not workspace.mlruns.is_dir():
        return found
    from pipeline.tracking import connect

    client, experiment = connect(workspace, load_params(workspace.params).tracking)
    runs = client.search_runs([experiment], "tags.`reprolora.stage` = 'train-lora'", order_by=["attributes.start_time DESC"])
    for run in runs[:20]:
        artifact = Path(str(run.info.artifact_uri).removeprefix("file://")) / "adapter.safetensors"
        if artifact.is_file():
            found[f"MLflow: {run.info.run_name}"] = str(artifact)
    return found
