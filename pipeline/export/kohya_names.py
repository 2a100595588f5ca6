"""Names of layers: diffusers' module paths <-> `lora_unet_…`, `lora_te…` of Kohya's scripts, ComfyUI and A1111.

sd-scripts trains SD 1.x and 2.x on diffusers' UNet and SDXL on the original one, and names layers after what it trains. A1111
reads diffusers' block names for SD 1.x and 2.x and the original ones for SDXL (`extensions-builtin/Lora/networks.py`); ComfyUI and
Forge read both (`comfy/lora.py`). Hence a family says which it uses (`KohyaNames.original_blocks`).
"""

from __future__ import annotations

import re

from pipeline.errors import UserError
from pipeline.families.base import KohyaNames

# names with underscores of their own: without the list, the way back from `a_b_c` to `a.b_c` could not be told
_WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks", "middle_block", "transformer_blocks"),
    *("to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out", "conv_in", "conv_out", "conv_shortcut", "skip_connection"),
    *("time_emb_proj", "time_embedding", "time_embed", "add_embedding", "label_emb", "linear_1", "linear_2"),
    *("in_layers", "out_layers", "emb_layers", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    "text_projection",
)
_TOKEN = re.compile("|".join(f"{word}(?=_|$)" for word in sorted(_WORDS, key=len, reverse=True)) + "|[^_]+")

_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
_RESNET_BACK = {original: name for name, original in _RESNET.items()}
_FIXED = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_FIXED_BACK = {original: name for name, original in _FIXED.items()}
_COMPONENTS = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}


def kohya_name(layer: str, names: KohyaNames, layers_per_block: int = 2) -> str:
    """`unet.down_blocks.0.….to_q` -> `lora_unet_down_blocks_0_…_to_q`.

    Args:
        layer: component and module path.
        names: the family's.
        layers_per_block: of the UNet, 2 in all Stable Diffusions; the original layout's numbers count them.
    """
    component, _, path = layer.partition(".")
    if component not in names.prefixes:
        raise UserError(f"{layer}: a layer of {component}; this family's files name layers of {', '.join(names.prefixes)}")
    if component == "unet" and names.original_blocks:
        path = original_path(path, layers_per_block)
    return f"{names.prefixes[component]}_{path.replace('.', '_')}"


def layer_name(kohya: str, layers_per_block: int = 2) -> str:
    """The way back, for both layouts.

    Raises:
        UserError: a prefix of another family of models.
    """
    prefix = next((p for p in sorted(_COMPONENTS, key=len, reverse=True) if kohya.startswith(p + "_")), None)
    if prefix is None:
        raise UserError(f"{kohya}: names of this kind are unknown here; known are {', '.join(p + '_…' for p in _COMPONENTS)}")
    path = ".".join(_TOKEN.findall(kohya.removeprefix(prefix + "_")))
    if prefix == "lora_unet":
        path = diffusers_path(path, layers_per_block)
    return f"{_COMPONENTS[prefix]}.{path}"


def original_path(path: str, layers_per_block: int = 2) -> str:
    """A UNet's module path under diffusers' names -> under the original checkpoint's. A level is `layers_per_block` blocks and one
    that halves the size; on the way up, one block more, the last of which doubles it."""
    if path in _FIXED:
        return _FIXED[path]
    level = layers_per_block + 1
    parts = path.split(".")
    if parts[0] == "mid_block":
        number = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        return ".".join(["middle_block", str(number), *_inner(parts[1], parts[3:])])
    i, what, j, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
    if what == "downsamplers":
        return f"input_blocks.{(i + 1) * level}.0.op"
    if what == "upsamplers":
        return f"output_blocks.{i * level + layers_per_block}.2.conv"
    side, number = ("input_blocks", 1 + i * level + j) if parts[0] == "down_blocks" else ("output_blocks", i * level + j)
    return ".".join([side, str(number), "1" if what == "attentions" else "0", *_inner(what, rest)])


def diffusers_path(path: str, layers_per_block: int = 2) -> str:
    """The way back; a path that is diffusers' already stays."""
    if path in _FIXED_BACK:
        return _FIXED_BACK[path]
    level = layers_per_block + 1
    parts = path.split(".")
    if parts[0] == "middle_block":
        what, j = ("attentions", 0) if parts[1] == "1" else ("resnets", int(parts[1]) // 2)
        return ".".join(["mid_block", what, str(j), *_outer(what, parts[2:])])
    if parts[0] == "input_blocks":
        i, j = divmod(int(parts[1]) - 1, level)
        if parts[3:] == ["op"]:
            return f"down_blocks.{i}.downsamplers.0.conv"
        side = "down_blocks"
    elif parts[0] == "output_blocks":
        i, j = divmod(int(parts[1]), level)
        if parts[3:] == ["conv"]:
            return f"up_blocks.{i}.upsamplers.0.conv"
        side = "up_blocks"
    else:
        return path
    what = "attentions" if parts[2] == "1" else "resnets"
    return ".".join([side, str(i), what, str(j), *_outer(what, parts[3:])])


def _inner(what: str, rest: list[str]) -> list[str]:
    return [_RESNET.get(part, part) for part in rest] if what == "resnets" else rest


def _outer(what: str, rest: list[str]) -> list[str]:
    joined = ".".join(rest)
    return [_RESNET_BACK.get(joined, joined)] if what == "resnets" else rest
