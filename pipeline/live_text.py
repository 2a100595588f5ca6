"""Text encoders that carry an adapter: their embeddings change with every step, so captions are encoded in the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.families.base import Family


@dataclass(frozen=True)
class LiveText:
    """A family's text encoders with adapters in them."""

    family: Family
    encoders: Any  # what the family's `encode_captions` takes
    modules: Mapping[str, nn.Module]  # component of diffusers' pipeline -> the encoder that carries an adapter
    chunks: int
    clip_skip: int

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Named embeddings, each (B, …), with gradients to the adapters."""
        return self.family.encode_captions(self.encoders, captions, self.chunks, self.clip_skip)
