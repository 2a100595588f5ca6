"""The adapter: injected by PEFT, always in float32.

LoRA: W' = W + (α / r) · B A with A (r, in), B (out, r); Hu et al. 2021 (arXiv 2106.09685), section 4.1. rsLoRA: α / √r instead
(Kalajdzievski 2023, arXiv 2312.03732). DoRA: its direction and its length learned apart (Liu et al. 2024, arXiv 2402.09353).
LoHa: ΔW a Hadamard product of two low-rank ones (Hyeon-Woo et al. 2022, arXiv 2108.06098). LoKr: a Kronecker product (Yeh et
al. 2024, LyCORIS, arXiv 2309.14859). All but PiSSA start at ΔW = 0: a fresh adapter changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from safetensors import safe_open
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.safetensors_file import read_safetensors

_ADAPTER = "default"
_MARKS = (".lora_", ".hada_", ".lokr_")  # what the names of adapters' parameters hold


@dataclass(frozen=True)
class LoraSpec:
    """Shape of an adapter. `targets`: names of the layers, by the ends of their module paths."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    method: Literal["lora", "loha", "lokr"] = "lora"
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "gaussian", "pissa"] = "default"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # end of a layer's name -> its own rank
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # ... and its own α

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # a list, where it was read from JSON


def expand_targets(denoiser: nn.Module, targets: tuple[str, ...], presets: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Presets among `targets` written out: those of the family, and `all-linear`, every `nn.Linear`.

    Raises:
        UserError: a preset names no layer of this denoiser.
    """
    names = _layers(denoiser)
    found: list[str] = []
    for target in targets:
        if target == "all-linear":
            found += [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
        elif target in presets:
            there = [end for end in presets[target] if any(_ends_with(name, end) for name in names)]
            if not there:
                raise UserError(f"lora.targets: {target!r}: this base has no such layers")
            found += there
        else:
            found.append(target)
    return tuple(dict.fromkeys(found))


def inject(denoiser: nn.Module, spec: LoraSpec, seed: int) -> list[nn.Parameter]:
    """Put fresh LoRA layers into the denoiser, in place.

    Args:
        denoiser: the frozen base. Under `init="pissa"` its weights become what the adapter leaves of them.
        spec: shape of the adapter, with its targets written out.
        seed: settles A's first values.

    Returns:
        The trainable parameters, float32, in module order.

    Raises:
        UserError: a target or a pattern names no layer of this denoiser, or PiSSA meets a convolution.
    """
    layers = _layers(denoiser)
    for target in spec.targets:
        if not any(_ends_with(name, target) for name in layers):
            ends = sorted({".".join(n.split(".")[-2:]) if n.split(".")[-1].isdigit() else n.split(".")[-1] for n in layers})
            raise UserError(f"lora.targets: {target!r} names no layer of this base; layer names end in: {', '.join(ends)}")
    adapted = {n: m for n, m in layers.items() if any(_ends_with(n, target) for target in spec.targets)}
    for key, pattern in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        for end in pattern:
            if not any(_ends_with(name, end) for name in adapted):
                raise UserError(f"lora.{key}: {end!r} names no layer that lora.targets names")
    convolutions = [name for name, module in adapted.items() if isinstance(module, nn.Conv2d)]
    if spec.init == "pissa" and convolutions:
        raise UserError(f"lora.init: pissa is for linear layers, but lora.targets names the convolution {convolutions[0]}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_config(spec), denoiser, adapter_name=_ADAPTER)
    for name, parameter in denoiser.named_parameters():
        trainable = any(mark in name for mark in _MARKS)
        parameter.requires_grad_(trainable)
        if trainable:
            parameter.data = parameter.data.float()  # in bf16 most small updates round away
    return trainable_parameters(denoiser)


def trainable_parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters in module order; a list, which can be gone through more than once."""
    return [p for p in denoiser.parameters() if p.requires_grad]


def state(denoiser: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights under PEFT's names, `<module>.lora_A.weight`, `<module>.hada_w1_a`, …"""
    found: dict[str, Tensor] = get_peft_model_state_dict(denoiser, adapter_name=_ADAPTER)
    return found


def load_state(denoiser: nn.Module, weights: dict[str, Tensor]) -> None:
    """Overwrite an injected adapter's weights; every weight must fit."""
    result = set_peft_model_state_dict(denoiser, weights, adapter_name=_ADAPTER)
    missing = [key for key in result.missing_keys if any(mark in key for mark in _MARKS)]
    assert not result.unexpected_keys and not missing, f"adapter does not fit: {result.unexpected_keys} {missing}"


def joint_state(denoiser: nn.Module, text: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The denoiser's adapter under its layers' names, and those of text encoders behind `<component>.`."""
    joint = state(denoiser)
    for component, module in text.items():
        joint |= {f"{component}.{name}": tensor for name, tensor in state(module).items()}
    return joint


def load_joint_state(denoiser: nn.Module, text: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Overwrite injected adapters with what `joint_state` gave."""
    rest = dict(weights)
    for component, module in text.items():
        start = f"{component}."
        load_state(module, {n.removeprefix(start): rest.pop(n) for n in list(rest) if n.startswith(start)})
    load_state(denoiser, rest)


def inject_trained(
    denoiser: nn.Module,
    text: Mapping[str, nn.Module],
    facts: Mapping[str, Any],
    weights: Mapping[str, Tensor],
) -> list[nn.Module]:
    """Put a trained adapter into the networks that it was trained for, each on its own device and in evaluation mode.

    Args:
        text: the text encoders by component, as far as the adapter has a part for them.
        facts: `lora` and `text_lora`, the specs as `training.json` states them.
        weights: as `joint_state` names them.

    Returns:
        Denoiser and text encoders.
    """
    networks = [denoiser, *text.values()]
    for network in networks:
        device = next(network.parameters()).device
        inject(network, LoraSpec(**facts["lora" if network is denoiser else "text_lora"]), seed=0)
        network.to(device).eval()
    load_joint_state(denoiser, text, weights)
    return networks


def set_scale(denoiser: nn.Module, scale: float) -> None:
    """Weigh the adapter: 0 is the base alone (but for DoRA, whose lengths stay), 1 the adapter as trained."""
    for module in denoiser.modules():
        if isinstance(module, LoraLayer | LycorisLayer):
            module.set_scale(_ADAPTER, scale)


def scales(denoiser: nn.Module) -> dict[str, float]:
    """What each adapted layer's product of factors is multiplied by: α / r, or α / √r, with the layer's own α and r."""
    return {
        name: float(module.scaling[_ADAPTER])
        for name, module in denoiser.named_modules()
        if isinstance(module, LoraLayer | LycorisLayer)
    }


def start_from(denoiser: nn.Module, path: Path, denoiser_key: str) -> None:
    """Overwrite a fresh adapter with the one in a file, as this project or diffusers writes it.

    The file's own weight α / r is carried over, so that the adapter does here what it does there.

    Raises:
        UserError: there is no such file, or its layers, ranks or method are not those of `lora`.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(f"lora.init_from: {path} is no .safetensors file: give an adapter's file, or null to start afresh")
    prefix = f"{denoiser_key}."
    weights = {name.removeprefix(prefix): tensor.float() for name, tensor in read_safetensors(path).items()}
    own = state(denoiser)
    for name in sorted(own.keys() | weights.keys()):
        ours, theirs = (str(list(w[name].shape)) if name in w else "nothing" for w in (own, weights))
        if ours != theirs:
            raise UserError(
                f"lora.init_from: {path.name} does not fit lora.rank, targets and method: {name} is {theirs} there and {ours} here"
            )
    theirs_at, ours_at = _stated_scales(path, prefix), scales(denoiser)
    for name, tensor in weights.items():
        layer, is_b, _ = name.partition(".lora_B.")
        if is_b:
            weights[name] = tensor * (theirs_at(layer) / ours_at[layer])
    load_state(denoiser, weights)


def portable(weights: dict[str, Tensor], start: dict[str, Tensor], spec: LoraSpec) -> tuple[dict[str, Tensor], LoraSpec]:
    """The trained adapter as one for the base as it was published.

    PiSSA (Meng et al. 2024, arXiv 2404.02948) trains W_res + s B A with W_res = W − s B₀ A₀. Relative to W that is
    ΔW = s (B A − B₀ A₀): an adapter of twice the rank, A over A₀ and B beside −B₀, at the same s. Others are returned as
    they are.

    Args:
        start: the adapter's weights as `inject` made them.
    """
    if spec.init != "pissa":
        return weights, spec
    joined = {
        name: torch.cat([tensor, start[name]], 0) if ".lora_A." in name else torch.cat([tensor, -start[name]], 1)
        for name, tensor in weights.items()
    }
    growth = 2**0.5 if spec.rslora else 2.0  # what keeps α / √r or α / r when r doubles
    return joined, replace(
        spec,
        init="default",
        rank=2 * spec.rank,
        alpha=growth * spec.alpha,
        rank_pattern={end: 2 * r for end, r in spec.rank_pattern.items()},
        alpha_pattern={end: growth * a for end, a in spec.alpha_pattern.items()},
    )


def _config(spec: LoraSpec) -> Any:
    # PEFT reads patterns as regular expressions at the end of a layer's name
    ranks = {re.escape(end): r for end, r in spec.rank_pattern.items()}
    alphas = {re.escape(end): a for end, a in spec.alpha_pattern.items()}
    if spec.method == "lora":
        return LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            lora_dropout=spec.dropout,
            target_modules=list(spec.targets),
            init_lora_weights=True if spec.init == "default" else spec.init,
            use_rslora=spec.rslora,
            use_dora=spec.dora,
            rank_pattern=ranks,
            alpha_pattern=alphas,
        )
    kind = {"loha": LoHaConfig, "lokr": LoKrConfig}[spec.method]
    return kind(r=spec.rank, alpha=spec.alpha, target_modules=list(spec.targets), rank_pattern=ranks, alpha_pattern=alphas)


def _stated_scales(path: Path, prefix: str) -> Callable[[str], float]:
    """Each layer's α / r in an adapter's file: from its header, from `training.json` beside it, or 1 where neither says."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    stated = json.loads(header.get("lora_adapter_metadata", "{}"))
    if f"{prefix}r" in stated:
        scale = float(stated[f"{prefix}lora_alpha"] / stated[f"{prefix}r"])
        return lambda layer: scale
    beside = path.with_name("training.json")
    noted = json.loads(beside.read_text(encoding="utf-8"))["scales"] if beside.is_file() else {}
    return lambda layer: float(noted.get(layer, 1.0))


def _layers(denoiser: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)
