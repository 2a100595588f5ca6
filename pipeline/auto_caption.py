"""Captions for pictures that have none, written by a BLIP-type model and kept by the picture's content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.dataset.images import decode
from pipeline.errors import UserError
from pipeline.files import hash_json, write_json
from pipeline.model_source import LocalModel
from pipeline.progress import progress
from pipeline.quiet import quiet_libraries

_MAX_TOKENS = 60
_BATCH = 8


def write_captions(
    pictures: list[tuple[Path, str]],
    model: LocalModel,
    kept: Path,
    device: torch.device,
    background: str,
    check_stop: Callable[[], None],
) -> list[str]:
    """One caption per picture, by greedy decoding: the same caption for the same picture and model.

    Args:
        pictures: file and pixel hash of each.
        model: an image-to-text model in the transformers layout (`Salesforce/blip-image-captioning-base`).
        kept: folder of the captions written so far, one file per model.
        background: colour under transparent pictures.

    Raises:
        UserError: the model is none that captions.
    """
    file = kept / f"{hash_json([model.fingerprint(), _MAX_TOKENS])[:16]}.json"
    known: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    todo = [(path, pixels) for path, pixels in pictures if pixels not in known]
    if todo:
        captioner = Captioner(model, device, background)
        with progress("writing captions", len(todo), "captions") as bar:
            for i in range(0, len(todo), _BATCH):
                check_stop()
                chunk = todo[i : i + _BATCH]
                captions = captioner([path for path, _ in chunk])
                known |= {pixels: caption for (_, pixels), caption in zip(chunk, captions, strict=True)}
                write_json(file, known)
                bar.advance(len(chunk))
    return [known[pixels] for _, pixels in pictures]


class Captioner:
    """A BLIP model with its tokenizer, frozen, float32."""

    def __init__(self, model: LocalModel, device: torch.device, background: str) -> None:
        config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") != "blip":
            raise UserError(
                f"dataset.auto_caption: {model.path} is a model of type {config.get('model_type')!r}, not blip: name one like "
                "Salesforce/blip-image-captioning-base"
            )
        quiet_libraries()
        from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

        self.device, self.background = device, background
        self.model: Any = BlipForConditionalGeneration.from_pretrained(
            model.path, use_safetensors=True, dtype=torch.float32, local_files_only=True
        )
        self.model.requires_grad_(False).eval().to(device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model.path, local_files_only=True)
        self.processor: Any = BlipImageProcessorPil.from_pretrained(model.path, local_files_only=True)

    @torch.inference_mode()
    def __call__(self, paths: list[Path]) -> list[str]:
        """A caption for each picture, never empty."""
        pictures = [decode(path, max_pixels=2**62, background=self.background).image for path in paths]
        pixels = self.processor(images=pictures, return_tensors="pt").pixel_values.to(self.device)
        tokens = self.model.generate(pixel_values=pixels, max_new_tokens=_MAX_TOKENS, do_sample=False)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) or "a picture" for text in texts]
