"""The adapter: injected by PEFT, always in float32.

W' = W + (α / r) · B A with A (r, in), B (out, r); Hu et al. 2021 (LoRA, arXiv 2106.09685), section 4.1. B starts at zero,
so a fresh adapter changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pipeline.errors import UserError

_ADAPTER = "default"


@dataclass(frozen=True)
class LoraSpec:
    """Shape of an adapter. `targets`: names of the linear layers, by the ends of their module paths."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


def inject(denoiser: nn.Module, spec: LoraSpec, seed: int) -> list[nn.Parameter]:
    """Put fresh LoRA layers into the denoiser, in place.

    Args:
        denoiser: the frozen base.
        spec: shape of the adapter.
        seed: settles A's first values.

    Returns:
        The trainable parameters, float32, in module order.

    Raises:
        UserError: a target names no layer of this denoiser.
    """
    names = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in spec.targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            ends = sorted({".".join(n.split(".")[-2:]) if n.split(".")[-1].isdigit() else n.split(".")[-1] for n in names})
            raise UserError(f"lora.targets: {target!r} names no layer of this base; layer names end in: {', '.join(ends)}")
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(spec.targets),
        init_lora_weights=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, denoiser, adapter_name=_ADAPTER)
    for name, parameter in denoiser.named_parameters():
        trainable = ".lora_" in name
        parameter.requires_grad_(trainable)
        if trainable:
            parameter.data = parameter.data.float()  # in bf16 most small updates round away
    return trainable_parameters(denoiser)


def trainable_parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters in module order; a list, which can be gone through more than once."""
    return [p for p in denoiser.parameters() if p.requires_grad]


def state(denoiser: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights under PEFT's names, `<module>.lora_A.weight` and `<module>.lora_B.weight`."""
    found: dict[str, Tensor] = get_peft_model_state_dict(denoiser, adapter_name=_ADAPTER)
    return found


def load_state(denoiser: nn.Module, weights: dict[str, Tensor]) -> None:
    """Overwrite an injected adapter's weights; every weight must fit."""
    result = set_peft_model_state_dict(denoiser, weights, adapter_name=_ADAPTER)
    missing = [key for key in result.missing_keys if ".lora_" in key]
    assert not result.unexpected_keys and not missing, f"adapter does not fit: {result.unexpected_keys} {missing}"


def set_scale(denoiser: nn.Module, scale: float) -> None:
    """Weigh the adapter: 0 is the base alone, 1 the adapter as trained."""
    for module in denoiser.modules():
        if isinstance(module, LoraLayer):
            module.set_scale(_ADAPTER, scale)
