"""The Kohya file: every name is one that public loaders know, and what they compute from it is what was trained."""

from __future__ import annotations

from pathlib import Path

import loaders
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pipeline import lora
from pipeline.errors import UserError
from pipeline.export.adapter import Adapter, Layer, combined, delta, layer_of, resized
from pipeline.export.diffusers_format import adapter_of_diffusers, diffusers_tensors
from pipeline.export.kohya_format import adapter_of_kohya, kohya_tensors
from pipeline.export.kohya_names import diffusers_path, kohya_name, layer_name, original_path
from pipeline.export.peft_format import adapter_of_modules, attach, strip
from pipeline.families import family
from pipeline.model_source import LocalModel
from pipeline.safetensors_file import write_safetensors

FAMILY_OF = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl"}
CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=7.5, target_modules=["to_q", "to_out.0", "conv1", "proj_in"], init_lora_weights=False),
    "dora": LoraConfig(r=3, lora_alpha=7.5, target_modules=["to_q", "conv1"], use_dora=True, init_lora_weights=False),
    "loha": LoHaConfig(r=3, alpha=7.5, target_modules=["to_q", "conv1"], init_weights=False),
    "lokr, one whole": LoKrConfig(r=1, alpha=7.5, target_modules=["to_q"], decompose_factor=2, init_weights=False),
    "lokr, both whole": LoKrConfig(r=8, alpha=7.5, target_modules=["to_q", "conv1"], init_weights=False),
    "lokr, products": LoKrConfig(
        r=1, alpha=7.5, target_modules=["to_q"], decompose_both=True, decompose_factor=4, init_weights=False
    ),
}


def trained(config: str, seed: int = 1) -> nn.Module:
    unet = tiny.unet()
    torch.manual_seed(seed)
    inject_adapter_in_model(CONFIGS[config], unet)
    for name, parameter in unet.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    return unet


@pytest.fixture(scope="module", params=list(loaders.MODELS))
def full_size(request: pytest.FixtureRequest) -> tuple[str, list[str]]:
    """Every layer of a real model: the UNet from its published config, without memory, and the text encoders."""
    from diffusers import UNet2DConditionModel

    model = loaders.MODELS[request.param]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**model.unet)
    names = [f"unet.{n}" for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for component, count in zip(("text_encoder", "text_encoder_2"), model.text_layers.values(), strict=False):
        names += [f"{component}.text_model.encoder.layers.{i}.{layer}" for i in range(count) for layer in loaders.TEXT]
    return request.param, names


def test_every_name_of_every_layer_is_known_to_comfyui_and_a1111(full_size: tuple[str, list[str]]) -> None:
    name, layers = full_size
    model, kohya = loaders.MODELS[name], family(FAMILY_OF[name]).kohya
    ours = {kohya_name(layer, kohya) for layer in layers}
    assert len(ours) == len(layers) > 300
    assert ours - loaders.comfyui_knows(model) == set()
    assert ours - loaders.a1111_knows(model) == set()


def test_every_name_finds_its_way_back(full_size: tuple[str, list[str]]) -> None:
    name, layers = full_size
    kohya = family(FAMILY_OF[name]).kohya
    assert [layer_name(kohya_name(layer, kohya)) for layer in layers] == layers


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 4), st.sampled_from(["down_blocks", "up_blocks"]))
def test_block_numbers_go_there_and_back_for_any_depth(per_block: int, level: int, j: int, side: str) -> None:
    j %= per_block + (side == "up_blocks")
    for path in (f"{side}.{level}.attentions.{j}.proj_in", f"{side}.{level}.resnets.{j}.conv1"):
        assert diffusers_path(original_path(path, per_block), per_block) == path


@pytest.mark.parametrize("config", list(CONFIGS))
def test_loaders_compute_what_peft_computes(config: str) -> None:
    unet = trained(config)
    adapter = adapter_of_modules({"unet": unet})
    tensors = kohya_tensors(adapter, family("sd").kohya)
    wrapped = {n: m for n, m in unet.named_modules() if isinstance(m, BaseTunerLayer)}
    assert len(wrapped) == len(adapter.layers) > 3
    for name, module in wrapped.items():
        expected = module.get_delta_weight("default").detach()
        torch.testing.assert_close(delta(adapter.layers[f"unet.{name}"]).reshape(expected.shape), expected)
        theirs = loaders.their_delta(tensors, kohya_name(f"unet.{name}", family("sd").kohya))
        torch.testing.assert_close(theirs.reshape(expected.shape), expected)


@pytest.mark.parametrize("config", list(CONFIGS))
def test_keys_and_values_survive_the_round_trip(config: str) -> None:
    before = adapter_of_modules({"unet": trained(config)})
    tensors = kohya_tensors(before, family("sd").kohya)
    again = kohya_tensors(adapter_of_kohya(tensors), family("sd").kohya)
    assert tensors.keys() == again.keys() and len(tensors) > 6
    for key in tensors:
        assert torch.equal(tensors[key], again[key]), key
    ends = {key.split(".", 1)[1] for key in tensors}
    if config == "dora":
        assert ends == {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"}
        scales = {tuple(t.shape[1:]) for k, t in tensors.items() if k.endswith("dora_scale")}
        assert scales == {(1,), (1, 1, 1)}  # the outputs come first, in linear layers and convolutions
    if config == "loha":
        assert ends == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"}
    if config == "lokr, both whole":
        assert ends == {"lokr_w1", "lokr_w2", "alpha"}
    if config == "lora":
        assert {float(t) for k, t in tensors.items() if k.endswith(".alpha")} == {7.5}


def test_a_layer_put_back_by_peft_computes_the_same() -> None:
    """What diffusers' loader does not know goes in through PEFT, with any shape of factors."""
    for config in ("loha", "lokr, one whole", "lokr, both whole", "lokr, products"):
        adapter = adapter_of_modules({"unet": trained(config)})
        read = adapter_of_kohya(kohya_tensors(adapter, family("sd").kohya))
        fresh = tiny.unet()
        attach(fresh, read.of("unet"), "x", 0.5)
        for name, module in fresh.named_modules():
            if isinstance(module, BaseTunerLayer):
                expected = delta(adapter.layers[f"unet.{name}"])
                got = module.get_delta_weight("x").detach().reshape(expected.shape)
                torch.testing.assert_close(got, 0.5 * expected)
        strip(fresh)
        assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in tiny.unet().named_parameters()}


@given(rank=st.integers(1, 8), alpha=st.floats(0.25, 256, width=32), seed=st.integers(0, 99))
def test_alpha_survives_every_round_trip(rank: int, alpha: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "lora_down.weight": torch.randn(rank, 8, generator=generator),
        "lora_up.weight": torch.randn(8, rank, generator=generator),
    }
    names = ("unet.down_blocks.1.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1")
    adapter = Adapter({name: Layer(parts, rank, alpha) for name in names})
    change = delta(adapter.layers[names[0]])
    for name in ("sd", "sdxl"):
        through = adapter_of_kohya(kohya_tensors(adapter, family(name).kohya, dtype=torch.bfloat16))
        assert {layer.alpha for layer in through.layers.values()} == {alpha}
        assert {layer.rank for layer in through.layers.values()} == {rank}
    diffusers = adapter_of_diffusers(diffusers_tensors(adapter), {})  # with no header at all the effect is the same
    torch.testing.assert_close(delta(diffusers.layers[names[0]]), change, rtol=1e-4, atol=1e-5)


def test_a_resize_keeps_the_largest_directions_and_the_scale() -> None:
    adapter = adapter_of_modules({"unet": trained("lora")})
    smaller = resized(adapter, 2)
    for name, layer in adapter.layers.items():
        change, cut = delta(layer).flatten(1), delta(smaller.layers[name]).flatten(1)
        s = torch.linalg.svdvals(change)
        torch.testing.assert_close((change - cut).norm(), s[2:].norm(), rtol=1e-3, atol=1e-4)  # Eckart and Young
        assert smaller.layers[name].rank == 2
        assert smaller.layers[name].scale == pytest.approx(layer.scale)
    with pytest.raises(UserError, match="rank 9 is more than the adapter has"):
        resized(adapter, 9)
    loha = adapter_of_modules({"unet": trained("loha")})
    whole = resized(loha, 64)  # of rank r² at most: nothing is lost
    assert whole.kinds == ("lora",)
    for name, layer in loha.layers.items():
        torch.testing.assert_close(delta(whole.layers[name]).flatten(1), delta(layer).flatten(1), rtol=1e-3, atol=1e-4)


def test_several_adapters_add_up() -> None:
    a, b = (adapter_of_modules({"unet": trained("lora", seed)}) for seed in (1, 2))
    lokr = adapter_of_modules({"unet": trained("lokr, both whole")})
    both = combined([(a, 0.5), (b, -1.0), (lokr, 2.0)])
    for name, layer in both.layers.items():
        expected = 0.5 * delta(a.layers[name]) - delta(b.layers[name])
        if name in lokr.layers:
            expected = expected + 2.0 * delta(lokr.layers[name]).reshape(expected.shape)
        torch.testing.assert_close(delta(layer), expected, rtol=1e-3, atol=1e-4)
    assert {layer.rank for layer in combined([(a, 1), (b, 1)], rank=4).layers.values()} == {4}
    with pytest.raises(UserError, match="a DoRA adapter cannot be combined"):
        combined([(a, 1.0), (adapter_of_modules({"unet": trained("dora")}), 1.0)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_half_precision_tells_the_adapter_from_another(sd_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    from pipeline.export.kohya_format import write_kohya
    from pipeline.export.reload import Probe, observe, reload_all

    kind = family("sd")
    pipeline = kind.load_pipeline(LocalModel(sd_folder, None, None), torch.device("cpu"), dtype)
    for parameter in lora.inject(pipeline.unet, lora.LoraSpec(2, 4.0, 0.0, ("to_q", "to_out.0")), 0):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    seen, path = observe(pipeline, ["unet"], Probe("a red circle", 32, 32)), tmp_path / "k.safetensors"
    write_kohya(path, seen.adapter, kind.kohya, 2, torch.float32, {})
    (found,) = reload_all(pipeline, ["unet"], seen, [path], torch.float32, dtype, 2, Probe("a red circle", 32, 32))
    assert found.delta_error < {torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    tensors = kohya_tensors(seen.adapter, kind.kohya)
    name = next(key for key in tensors if "lora_up" in key)
    tensors[name] = tensors[name] * 1.1
    write_safetensors(path, tensors)
    with pytest.raises(UserError, match="is not what was trained"):
        reload_all(pipeline, ["unet"], seen, [path], torch.float32, dtype, 2, Probe("a red circle", 32, 32))


def test_half_a_layer_and_foreign_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"no lora_up\.weight"):
        layer_of({"lora_down.weight": torch.ones(2, 4)}, None, "x")
    with pytest.raises(UserError, match="hada_w2_b"):
        layer_of({"hada_w1_a": torch.ones(4, 2), "hada_w1_b": torch.ones(2, 4), "hada_w2_a": torch.ones(4, 2)}, 1.0, "x")
    with pytest.raises(UserError, match="lora_transformer_blocks_0: names of this kind are unknown"):
        layer_name("lora_transformer_blocks_0")
    with pytest.raises(UserError, match="a layer of transformer"):
        kohya_name("transformer.blocks.0", family("sd").kohya)


def test_the_file_of_an_sdxl_with_text_encoders_loads_in_diffusers(sdxl_folder: Path, tmp_path: Path) -> None:
    """Block numbers of the original layout, two text encoders, α ≠ rank, ranks that differ: through diffusers' own loader."""
    from diffusers import StableDiffusionXLPipeline

    from pipeline.export.diffusers_format import write_diffusers
    from pipeline.export.kohya_format import write_kohya
    from pipeline.export.reload import Probe, observe, reload_all

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    components = ["unet", "text_encoder", "text_encoder_2"]
    for i, component in enumerate(components):
        targets = ["to_q", "to_out.0", "ff.net.0.proj", "conv1", "conv_shortcut"] if i == 0 else ["q_proj", "out_proj", "fc1"]
        config = LoraConfig(
            r=2, lora_alpha=7.5, rank_pattern={"to_q": 3, "q_proj": 4}, target_modules=targets, init_lora_weights=False
        )
        inject_adapter_in_model(config, getattr(pipeline, component))
    seen = observe(pipeline, components, Probe("a red circle", 32, 32))
    assert seen.adapter.components == ("text_encoder", "text_encoder_2", "unet")
    write_kohya(tmp_path / "k.safetensors", seen.adapter, family("sdxl").kohya, 1, torch.float32, {})
    write_diffusers(tmp_path / "d.safetensors", seen.adapter, torch.float32, {})
    paths = [tmp_path / "k.safetensors", tmp_path / "d.safetensors"]
    found = reload_all(pipeline, components, seen, paths, torch.float32, torch.float32, 1, Probe("a red circle", 32, 32))
    assert [f.loader for f in found] == ["diffusers", "diffusers"]
    assert max(f.delta_error for f in found) < 1e-6


@pytest.mark.parametrize(
    ("config", "loaders_of"),
    [
        ("lora", ["diffusers", "diffusers"]),
        ("dora", ["diffusers, the DoRA scales renamed", "diffusers"]),
        ("loha", ["PEFT"]),
        ("lokr, both whole", ["PEFT"]),
    ],
)
def test_every_kind_is_loaded_again_and_draws_the_same(
    config: str, loaders_of: list[str], sd_folder: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    from pipeline.export.diffusers_format import write_diffusers
    from pipeline.export.kohya_format import write_kohya
    from pipeline.export.reload import Probe, observe, reload_all

    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    inject_adapter_in_model(CONFIGS[config], pipeline.unet)
    for name, parameter in pipeline.unet.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.2
    probe = Probe("a red circle", 32, 32)
    seen = observe(pipeline, ["unet", "text_encoder"], probe)
    paths = [tmp_path / "k.safetensors", tmp_path / "d.safetensors"][: len(loaders_of)]
    write_kohya(paths[0], seen.adapter, family("sd").kohya, 1, torch.float32, {})
    if len(paths) == 2:
        write_diffusers(paths[1], seen.adapter, torch.float32, {})
    else:
        with pytest.raises(UserError, match="diffusers' loader knows no lo"):
            write_diffusers(tmp_path / "d.safetensors", seen.adapter, torch.float32, {})
    found = reload_all(pipeline, ["unet", "text_encoder"], seen, paths, torch.float32, torch.float32, 1, probe)
    assert [f.loader for f in found] == loaders_of
    assert all(f.drawn_error < 1e-4 for f in found)
    if config == "dora":  # a file that lost its scales is told, not drawn
        bare = {k: t for k, t in kohya_tensors(seen.adapter, family("sd").kohya).items() if not k.endswith("dora_scale")}
        write_safetensors(paths[0], bare)
        with pytest.raises(UserError, match="without the DoRA scale"):
            reload_all(pipeline, ["unet", "text_encoder"], seen, paths[:1], torch.float32, torch.float32, 1, probe)
