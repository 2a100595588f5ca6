"""The base that the section `model` names."""

from __future__ import annotations

from pipeline.config import Model
from pipeline.model_source import ModelSource


def base_source(model: Model) -> ModelSource:
    """Where it comes from, its pin, and the VAE that stands in for its own, if any."""
    vae = ModelSource(model.vae, model.vae_revision) if model.vae else None
    return ModelSource(model.base, model.revision, model.variant, model.family, model.config, vae)
