"""The model that MLflow loads and serves: prompts in, PNG pictures out. It needs diffusers and nothing of this project.

Input: a table with the column `prompt` and, if wanted, `seed` (0) and `scale` (1, the adapter's weight). Output: a list of
base64-encoded PNGs.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import mlflow


class Drawing(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A base with the adapter in it."""

    def load_context(self, context: Any) -> None:
        """Load base and adapter."""
        import diffusers
        import torch

        settings = json.loads(Path(context.artifacts["settings"]).read_text(encoding="utf-8"))
        self.settings, device = settings, "cuda" if torch.cuda.is_available() else "cpu"
        kind = getattr(diffusers, settings["pipeline_class"])
        self.pipeline = kind.from_pretrained(
            context.artifacts.get("base", settings["base"]),
            revision=settings["revision"],
            variant=settings["variant"],
            dtype=torch.float32,
            use_safetensors=True,
        ).to(device)
        scheduler = self.pipeline.scheduler
        wanted = getattr(diffusers, settings["scheduler"]) if settings["scheduler"] else type(scheduler)
        self.pipeline.scheduler = wanted.from_config(scheduler.config, **settings["scheduler_changes"])
        adapter = Path(context.artifacts["adapter"])
        self.pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name, adapter_name="reprolora")
        self.pipeline.set_progress_bar_config(disable=True)
        encoder = getattr(self.pipeline, "text_encoder", None)
        if settings["clip_skip"] and not hasattr(encoder, "text_model"):
            # diffusers 0.42 looks for the name under clip_skip, and transformers 5 dropped it; past torch's registration, or
            # the module would contain itself
            object.__setattr__(encoder, "text_model", encoder)

    # without hints: MLflow would make a schema of them, and the one that it is given says more
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Draw one picture a row."""
        import torch

        pictures = []
        skip = {"clip_skip": self.settings["clip_skip"]} if self.settings["clip_skip"] else {}
        for row in model_input.to_dict("records"):
            self.pipeline.set_adapters("reprolora", float(row.get("scale", 1.0)))
            image = self.pipeline(
                row["prompt"],
                negative_prompt=self.settings["negative_prompt"] or None,
                num_inference_steps=self.settings["steps"],
                guidance_scale=self.settings["guidance_scale"],
                width=self.settings["width"],
                height=self.settings["height"],
                generator=torch.Generator("cpu").manual_seed(int(row.get("seed", 0))),
                **skip,
            ).images[0]
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            pictures.append(base64.b64encode(buffer.getvalue()).decode())
        return pictures


mlflow.models.set_model(Drawing())
