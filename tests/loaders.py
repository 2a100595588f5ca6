"""Which names public loaders know, generated from their documented rules and the published shapes of the models.

ComfyUI (and Forge, which carries its code): `comfy/lora.py`, `model_lora_keys_unet` and `model_lora_keys_clip`, with `unet_to_diffusers`
of `comfy/utils.py`: a UNet's layer is known by its original name and by diffusers' name, dots turned to underscores.
A1111: `extensions-builtin/Lora/networks.py`, `convert_diffusers_name_to_compvis` and `load_network`: for SD 1.x and 2.x diffusers' block
names are turned into the original ones (three blocks a level), for SDXL the original names are expected.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ATTENTION = [f"{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0")] + [
    "ff.net.0.proj",
    "ff.net.2",
]
TEXT = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


@dataclass(frozen=True)
class Model:
    """The published shape: transformer blocks in the attentions of each level, downwards (upwards is the mirror image)."""

    depths: tuple[int, ...]
    middle: int
    text_layers: dict[str, int]  # prefix -> layers
    has_label_embedding: bool
    unet: dict  # config of diffusers


_SD = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
MODELS = {
    "sd1": Model((1, 1, 1, 0), 1, {"lora_te": 12}, False, {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "sd2": Model(
        (1, 1, 1, 0),
        1,
        {"lora_te": 23},
        False,
        {**_SD, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    ),
    "sdxl": Model(
        (0, 2, 10),
        10,
        {"lora_te1": 12, "lora_te2": 32},
        True,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
}


def unet_layers(model: Model) -> Iterator[tuple[str, str]]:
    """(diffusers' name, original name) of every layer with weights of two or more dimensions."""

    def attention(theirs: str, ours: str, depth: int) -> Iterator[tuple[str, str]]:
        for end in ("proj_in", "proj_out", *(f"transformer_blocks.{d}.{layer}" for d in range(depth) for layer in ATTENTION)):
            yield f"{ours}.{end}", f"{theirs}.{end}"

    def resnet(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
        for name, original in RESNET.items():
            yield f"{ours}.{name}", f"{theirs}.{original}"

    yield from (("conv_in", "input_blocks.0.0"), ("conv_out", "out.2"))
    yield from (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"))
    if model.has_label_embedding:
        yield from (("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"))
    number = 1
    for level, depth in enumerate(model.depths):
        for j in range(2):
            yield from resnet(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{j}")
            if depth:
                yield from attention(f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{j}", depth)
            number += 1
        if level < len(model.depths) - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    yield from resnet("middle_block.0", "mid_block.resnets.0")
    yield from attention("middle_block.1", "mid_block.attentions.0", model.middle)
    yield from resnet("middle_block.2", "mid_block.resnets.1")
    number = 0
    for level, depth in enumerate(reversed(model.depths)):
        for j in range(3):
            yield from resnet(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{j}")
            if depth:
                yield from attention(f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{j}", depth)
            if j == 2 and level < len(model.depths) - 1:
                yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{number}.{2 if depth else 1}.conv"
            number += 1


def text_names(model: Model) -> set[str]:
    return {
        f"{prefix}_text_model_encoder_layers_{i}_{layer.replace('.', '_')}"
        for prefix, count in model.text_layers.items()
        for i in range(count)
        for layer in TEXT
    }


def comfyui_knows(model: Model) -> set[str]:
    names = {f"lora_unet_{name.replace('.', '_')}" for pair in unet_layers(model) for name in pair}
    return names | text_names(model)


def a1111_knows(model: Model) -> set[str]:
    """For SD 1.x and 2.x, what its rules turn into a layer of the original checkpoint; for SDXL, the original names."""
    original = {theirs.replace(".", "_") for _, theirs in unet_layers(model)}
    if model.has_label_embedding:
        return {f"lora_unet_{name}" for name in original} | a1111_text(model)
    known = set()
    for ours, _ in unet_layers(model):
        parts = ours.split(".")
        end = "_".join(parts[4:])
        if parts[0] in ("conv_in", "conv_out"):
            turned = {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}[parts[0]]
        elif parts[0] == "time_embedding":
            turned = f"time_embed_{int(parts[1][-1]) * 2 - 2}"
        elif parts[0] == "mid_block":
            end = "_".join(parts[3:])
            block = 1 if parts[1] == "attentions" else int(parts[2]) * 2
            turned = f"middle_block_{block}_{RESNET.get(end, end).replace('.', '_')}"
        else:
            i, j = int(parts[1]), int(parts[3])
            what = "1" if parts[2] == "attentions" else "0"
            end = RESNET.get(end, end).replace(".", "_")
            if parts[2] == "downsamplers":
                turned = f"input_blocks_{3 + i * 3}_0_op"
            elif parts[2] == "upsamplers":
                turned = f"output_blocks_{2 + i * 3}_{2 if i > 0 else 1}_conv"
            elif parts[0] == "down_blocks":
                turned = f"input_blocks_{1 + i * 3 + j}_{what}_{end}"
            else:
                turned = f"output_blocks_{i * 3 + j}_{what}_{end}"
        if turned in original:
            known.add(f"lora_unet_{ours.replace('.', '_')}")
    return known | a1111_text(model)


def a1111_text(model: Model) -> set[str]:
    """The text layers that its rules find. SD 1.x and SDXL's first encoder are CLIP as transformers has it; SD 2.x and SDXL's second
    one are OpenCLIP, whose q, k and v are one `attn` (found by dropping `_q_proj`), and whose MLP is `c_fc` and `c_proj`."""
    known = set()
    for prefix, count in model.text_layers.items():
        open_clip = prefix == "lora_te2" or count == 23
        modules = ("attn", "attn_out_proj", "mlp_c_fc", "mlp_c_proj") if open_clip else [t.replace(".", "_") for t in TEXT]
        for i in range(count):
            for layer in TEXT:
                end = layer.replace(".", "_")
                turned = end
                if open_clip:
                    turned = end.replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")
                    turned = turned if turned in modules else turned.removesuffix("_proj")[:-2]
                if turned in modules:
                    known.add(f"{prefix}_text_model_encoder_layers_{i}_{end}")
    return known


def their_delta(tensors: dict, name: str):
    """ΔW as ComfyUI and A1111 compute it: the dimension is read off the factors, and α without a dimension is ignored."""
    import torch

    p = {key.removeprefix(name + "."): t.float() for key, t in tensors.items() if key.startswith(name + ".")}
    alpha = p.pop("alpha", None)
    if "lora_up.weight" in p:
        up, down = p["lora_up.weight"], p["lora_down.weight"]
        change, dim = up.flatten(1) @ down.flatten(1), down.shape[0]
    elif "hada_w1_a" in p:
        change, dim = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]), p["hada_w1_b"].shape[0]
    else:
        dim = next((p[k].shape[0] for k in ("lokr_w1_b", "lokr_w2_b") if k in p), None)
        w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
        w2 = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
        change = torch.kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - 2)), w2)
    return change * (alpha / dim if alpha is not None and dim is not None else 1.0)
