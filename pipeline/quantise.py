"""A frozen base in 8 or 4 bits: less memory for the network; the adapter and the arithmetic stay in floats.

QLoRA: Dettmers et al. 2023 (arXiv 2305.14314), section 3, for nf4; LLM.int8(): Dettmers et al. 2022 (arXiv 2208.07339).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError


def quantise(denoiser: nn.Module, kind: str, device: torch.device) -> None:
    """Replace every `nn.Linear` by bitsandbytes' layer of `kind`, int8 or nf4, in place, and move the network to `device`, where
    the weights are rounded. Convolutions, norms and embeddings stay as they are.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes import nn as bnb
    except ImportError as error:
        raise UserError(
            f"train.quantise_base: {kind} needs bitsandbytes, which cannot be imported ({error}): "
            "pip install 'reprolora[8bit]', or set it to null"
        ) from None
    for path, layer in [(p, m) for p, m in denoiser.named_modules() if type(m) is nn.Linear]:
        parent, _, name = path.rpartition(".")
        setattr(denoiser.get_submodule(parent), name, _rounded(layer, kind, bnb))
    denoiser.to(device)


def _rounded(layer: nn.Linear, kind: str, bnb: Any) -> nn.Module:
    shape = (layer.in_features, layer.out_features, layer.bias is not None)
    dtype = layer.weight.dtype
    if kind == "nf4":
        new: Any = bnb.Linear4bit(*shape, compute_dtype=dtype, quant_type="nf4")
        new.weight = bnb.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    else:
        new = bnb.Linear8bitLt(*shape, has_fp16_weights=False)
        new.weight = bnb.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    rounded: nn.Module = new
    return rounded
