"""CLIP embeddings and what is measured with them.

*CLIP score*: 100 · cos(picture, prompt), the mean over samples; Hessel et al. 2021 (arXiv 2104.08718), eq. 1 with w = 100 and
without the cut at zero, as torchmetrics reports it.

*Style shift*: how far the adapter moved samples from the base's towards the training pictures,
⟨mean(adapted) − mean(base), d⟩ / ⟨d, d⟩ with d = mean(training) − mean(base), in CLIP's picture embedding: 0 is the base, 1 is
all the way. Prompts should name what the pictures show, or the shift of subject is counted too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.model_source import LocalModel
from pipeline.quiet import quiet_libraries

_BATCH = 32


class Clip:
    """A CLIP model in the transformers layout, frozen, float32."""

    def __init__(self, model: LocalModel, device: torch.device) -> None:
        quiet_libraries()
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.device = device
        self.model: Any = CLIPModel.from_pretrained(
            model.path, use_safetensors=True, dtype=torch.float32, local_files_only=True
        )
        self.model.requires_grad_(False).eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(model.path, local_files_only=True)
        self.processor: Any = CLIPImageProcessorPil.from_pretrained(model.path, local_files_only=True)

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit picture embeddings, (N, D)."""
        parts = []
        for i in range(0, len(pictures), _BATCH):
            pixels = self.processor(images=list(pictures[i : i + _BATCH]), return_tensors="pt").pixel_values.to(self.device)
            vision = self.model.vision_model(pixel_values=pixels)
            parts.append(self.model.visual_projection(vision.pooler_output))
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1).cpu()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit text embeddings, (N, D)."""
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        text = self.model.text_model(**tokens)
        return torch.nn.functional.normalize(self.model.text_projection(text.pooler_output), dim=-1).cpu()


def clip_score(images: Tensor, texts: Tensor) -> float:
    """100 × the mean cosine of matching rows of unit embeddings, (N, D) each."""
    return float(100 * (images * texts).sum(dim=-1).double().mean())


def style_shift(base: Tensor, adapted: Tensor, training: Tensor) -> float:
    """See the module's text. Embeddings (N, D), (N, D), (M, D)."""
    start = base.double().mean(dim=0)
    direction = training.double().mean(dim=0) - start
    return float((adapted.double().mean(dim=0) - start) @ direction / (direction @ direction))
