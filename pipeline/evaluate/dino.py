"""DINO's picture embeddings: trained without words, they hold on to what a particular subject looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.model_source import LocalModel
from pipeline.quiet import quiet_libraries

_BATCH = 32


class Dino:
    """A DINO (Caron et al. 2021, arXiv 2104.14294) or DINOv2 in the transformers layout, frozen, float32."""

    def __init__(self, model: LocalModel, device: torch.device) -> None:
        quiet_libraries()
        from transformers import AutoImageProcessor, AutoModel

        self.device = device
        network = AutoModel.from_pretrained(model.path, use_safetensors=True, dtype=torch.float32, local_files_only=True)
        self.model: Any = network.requires_grad_(False).eval().to(device)
        self.processor: Any = AutoImageProcessor.from_pretrained(model.path, use_fast=False, local_files_only=True)

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings of the class token, (N, D)."""
        parts = []
        for i in range(0, len(pictures), _BATCH):
            pixels = self.processor(images=list(pictures[i : i + _BATCH]), return_tensors="pt").pixel_values.to(self.device)
            parts.append(self.model(pixel_values=pixels).last_hidden_state[:, 0])
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1).cpu()
