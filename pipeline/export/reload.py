"""Is what was written what was trained? Each file is loaded into the untouched base, and both are asked the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.export.adapter import Adapter, delta
from pipeline.export.adapter_file import load_into
from pipeline.export.peft_format import adapter_of_modules, module_path, strip, tuner_layers

# relative error of ΔW in the Frobenius norm, per layer, and of drawn latents as a share of what the adapter changes in them: a
# product of two rounded factors errs by about 2 ε, and two denoising steps multiply that by a few
_DELTA = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_DRAWN = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}
_NOISE = 1e-4  # of latents of deviation 1: float32's own


@dataclass(frozen=True)
class Probe:
    """What every copy draws: latents, which need no VAE."""

    prompt: str
    width: int
    height: int
    steps: int = 2


@dataclass(frozen=True)
class Reloaded:
    """How a file did."""

    file: str
    loader: str
    delta_error: float  # the worst layer's
    drawn_error: float  # mean difference of the latents


@dataclass(frozen=True)
class Trained:
    """The adapter as it was in the pipeline that it was trained for."""

    adapter: Adapter
    latents: Tensor  # (C, h, w), float32 on the CPU


def observe(pipeline: Any, components: Sequence[str], probe: Probe) -> Trained:
    """Read the adapter that PEFT has put into the pipeline, and draw with it.

    Raises:
        UserError: PEFT computes another ΔW from it than we do.
    """
    modules = {name: getattr(pipeline, name) for name in components}
    adapter = adapter_of_modules(modules)
    _compare(modules, adapter, "default", _DELTA[torch.float32], "the trained adapter")
    return Trained(adapter, _draw(pipeline, probe))


def reload_all(
    pipeline: Any,
    components: Sequence[str],
    trained: Trained,
    files: Sequence[Path],
    dtype: torch.dtype,
    base_dtype: torch.dtype,
    layers_per_block: int,
    probe: Probe,
) -> list[Reloaded]:
    """Load every file into the base and compare; leaves the pipeline without adapters.

    Args:
        pipeline: the base, with or without adapters in it.
        components: of the pipeline, that can carry adapters.
        dtype, base_dtype: of the files and of the base; they settle what difference is rounding. What is drawn with a base that is
            not in float32 is told and not judged: rounding on the way is as large as what a weak adapter changes.

    Raises:
        UserError: a file gives another ΔW or draws another picture.
    """
    modules = {name: getattr(pipeline, name) for name in components}
    for module in modules.values():
        strip(module)
    base = _draw(pipeline, probe)
    effect = float((trained.latents - base).abs().mean())
    found = []
    for path in files:
        try:
            loader = load_into(pipeline, path, 1.0, layers_per_block)
        except Exception as error:  # whatever a loader makes of a file that it does not understand
            raise UserError(f"{path.name} was written, but cannot be loaded: {error}") from error
        worst = _compare(modules, trained.adapter, "reprolora", max(_DELTA[dtype], _DELTA[base_dtype]), path.name)
        off = float((_draw(pipeline, probe) - trained.latents).abs().mean())
        if base_dtype == torch.float32 and not off <= max(_NOISE, _DRAWN[dtype] * effect):  # a NaN is no match
            raise UserError(
                f"{path.name} was written, but draws another picture than the trained adapter: mean difference {off:.2g}, "
                f"where the adapter itself changes {effect:.2g}"
            )
        found.append(Reloaded(path.name, loader, worst, off))
        for module in modules.values():
            strip(module)
    return found


def _compare(modules: Mapping[str, nn.Module], adapter: Adapter, name: str, tolerance: float, what: str) -> float:
    """The worst layer's relative error between the adapter and what lies in the modules under `name`."""
    worst = 0.0
    reached = 0
    for component, module in modules.items():
        tuned = tuner_layers(module)
        reached += len(tuned)
        for path, layer in adapter.of(component).items():
            wrapped: Any = tuned.get(module_path(module, path))
            if wrapped is None:
                raise UserError(f"{what} was loaded without its layer {component}.{path}")
            expected = delta(layer)
            got = wrapped.get_delta_weight(name).detach().float().cpu().reshape(expected.shape)
            worst = max(worst, _error(got, expected, tolerance, f"{what}: ΔW of {component}.{path}"))
            if "dora_scale" in layer.parts:
                magnitudes = getattr(wrapped, "lora_magnitude_vector", {})
                if name not in magnitudes:
                    raise UserError(f"{what} was loaded without the DoRA scale of {component}.{path}")
                scale = layer.parts["dora_scale"].float().flatten()
                got = magnitudes[name].weight.detach().float().cpu().flatten()
                worst = max(worst, _error(got, scale, tolerance, f"{what}: DoRA scale of {component}.{path}"))
    if reached != len(adapter.layers):
        raise UserError(f"{what} was loaded with {reached} layers, where {len(adapter.layers)} were trained")
    return worst


def _error(got: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    error = float((got - expected).norm() / expected.norm().clamp_min(1e-12))
    if not error <= tolerance:  # a NaN is no match
        raise UserError(
            f"{what} is not what was trained: it differs by {error:.2g} of its size, where rounding explains {tolerance:.2g}. "
            "Values too small for export.dtype or validate.dtype do this: try float32"
        )
    return error


@torch.inference_mode()
def _draw(pipeline: Any, probe: Probe) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    latents: Tensor = pipeline(
        prompt=probe.prompt,
        num_inference_steps=probe.steps,
        guidance_scale=1.0,
        width=probe.width,
        height=probe.height,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="latent",
    ).images[0]
    return latents.float().cpu()
