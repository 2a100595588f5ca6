"""PEFT's names and shapes of an adapter's factors <-> those of `pipeline.export.adapter`, and adapters in live modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.export.adapter import Adapter, Layer, layer_of

_TO_KOHYA = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
}
_SAME = tuple(
    [f"hada_{p}" for p in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")]
    + [f"lokr_{p}" for p in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
)
_FROM_KOHYA = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}


def peft_parts(layer: Layer, name: str) -> dict[str, Tensor]:
    """A layer's factors under PEFT's names.

    Raises:
        UserError: factors that PEFT does not know.
    """
    if "lora_mid.weight" in layer.parts:
        raise UserError(
            f"{name}: a convolution in three factors (LoCon's lora_mid), which diffusers cannot load: --rank N refactors it"
        )
    return {_FROM_KOHYA.get(part, part): _shaped(layer, part, name) for part, tensor in layer.parts.items()}


def adapter_of_peft(tensors: Mapping[str, Tensor], alphas: Mapping[str, float]) -> Adapter:
    """The adapter in `<component>.<module>.<PEFT's part>` tensors.

    Args:
        alphas: by layer; a layer that is not in it has α = rank.
    """
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, part = _split(key)
        if _TO_KOHYA.get(part) == "dora_scale":  # (out,) or (1, out, 1, 1) there, the output first here
            tensor = tensor.reshape(-1, 1) if tensor.dim() == 1 else tensor.transpose(0, 1)
        parts[name][_TO_KOHYA.get(part, part)] = tensor
    return Adapter({name: layer_of(found, alphas.get(name), name) for name, found in parts.items()})


def adapter_of_modules(components: Mapping[str, nn.Module], adapter: str = "default") -> Adapter:
    """What PEFT has injected into live modules, with the scale that it really applies."""
    from peft import get_peft_model_state_dict

    layers: dict[str, Layer] = {}
    for component, module in components.items():
        tuned = tuner_layers(module)
        if not tuned:
            continue
        state = {
            f"{component}.{k}": v.detach().cpu() for k, v in get_peft_model_state_dict(module, adapter_name=adapter).items()
        }
        for name, layer in adapter_of_peft(state, {}).layers.items():
            injected: Any = tuned[name.removeprefix(component + ".")]
            rank = int(injected.r[adapter])
            layers[_with_text_model(name)] = Layer(layer.parts, rank, float(injected.scaling[adapter]) * rank)
    return Adapter(layers)


def tuner_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that PEFT has wrapped, by their paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: child for name, child in module.named_modules() if isinstance(child, BaseTunerLayer)}


def attach(module: nn.Module, layers: Mapping[str, Layer], adapter: str, scale: float) -> None:
    """Put LoHa or LoKr layers, which diffusers' loader does not know, into a module by PEFT's own classes."""
    from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model

    for kind, config in (("loha", LoHaConfig), ("lokr", LoKrConfig)):
        chosen = {module_path(module, name): layer for name, layer in layers.items() if layer.kind == kind}
        if not chosen:
            continue
        inject_adapter_in_model(config(r=1, alpha=1, target_modules=sorted(chosen)), module, adapter_name=adapter)
        reached = tuner_layers(module)
        for path, layer in chosen.items():
            if path not in reached:
                raise UserError(f"the adapter has a layer {path}, which this base does not have")
            wrapped: Any = reached[path]
            like = next(wrapped.get_base_layer().parameters())
            for part in wrapped.adapter_layer_names:
                held = getattr(wrapped, part)
                if adapter in held:
                    del held[adapter]
                if part in layer.parts:
                    held[adapter] = nn.Parameter(layer.parts[part].float().to(like.device), requires_grad=False)
            wrapped.r[adapter], wrapped.scaling[adapter] = layer.rank, layer.scale * scale


def strip(module: Any) -> None:
    """Take every adapter out of a module again: it is the base it was, whoever put them in."""
    for path, wrapped in tuner_layers(module).items():
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, wrapped.get_base_layer())  # type: ignore[operator]
    if hasattr(module, "peft_config"):
        del module.peft_config
    module._hf_peft_config_loaded = False


def module_path(module: nn.Module, name: str) -> str:
    """A layer's path in this module. transformers 5 dropped `text_model.` from one of its CLIP classes; files keep it."""
    if name.startswith("text_model.") and "text_model" not in dict(module.named_children()):
        return name.removeprefix("text_model.")
    return name


def _with_text_model(name: str) -> str:
    component, _, path = name.partition(".")
    return f"{component}.text_model.{path}" if component.startswith("text_encoder") and path.startswith("encoder.") else name


def _split(key: str) -> tuple[str, str]:
    for part in (*_TO_KOHYA, *_SAME):
        if key.endswith("." + part):
            return key.removesuffix("." + part), part
    raise UserError(f"{key}: not a factor of a LoRA, DoRA, LoHa or LoKr under PEFT's names")


def _shaped(layer: Layer, part: str, name: str) -> Tensor:
    tensor = layer.parts[part]
    if part != "dora_scale":
        return tensor
    out = layer.parts["lora_up.weight"].shape[0]
    if tensor.shape[0] != out:
        raise UserError(
            f"{name}: a DoRA that normalises over inputs (dora_scale {tuple(tensor.shape)}); PEFT and diffusers know only the paper's, over outputs"
        )
    return tensor.transpose(0, 1) if tensor.dim() == 4 else tensor.reshape(-1)


def scaled_up(layer: Layer) -> Layer:
    """α / r multiplied into the factor that is linear in ΔW, and α = r stated."""
    part = next(p for p in ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a") if p in layer.parts)
    folded: Tensor = layer.parts[part].to(torch.float32) * layer.scale
    return Layer({**layer.parts, part: folded}, layer.rank, float(layer.rank))
