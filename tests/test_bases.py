"""Bases in other forms: a single file in the original layout, a VAE of one's own."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from project import Project
from safetensors.torch import load_file, save_file

from pipeline.base_model import base_source
from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.families import family
from pipeline.model_source import LocalModel, ModelSource, pin_of, resolve
from pipeline.quantise import quantise

CPU = torch.device("cpu")


def original_layout(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a base in the diffusers layout, as CompVis' checkpoints name them."""
    tensors = {}
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in unet.items():
        tensors["model.diffusion_model." + _unet_name(name, layers=1)] = value
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    for name, value in vae.items():
        renamed = _vae_name(name, levels=3)
        square = ".attn_1." in renamed and value.dim() == 2
        tensors["first_stage_model." + renamed] = value[:, :, None, None].clone() if square else value
    for name, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        tensors["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = value
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    tensors["alphas_cumprod"] = torch.cumprod(1 - betas, 0).float()
    return tensors


def _swap(name: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        name = name.replace(old, new)
    return name


def _unet_name(name: str, layers: int) -> str:
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    inner |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    outer = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    outer |= {"conv_norm_out": "out.0", "conv_out": "out.2", "conv_in": "input_blocks.0.0"}
    head, *rest = name.split(".")
    if head == "mid_block":
        place = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}[".".join(rest[:2])]
        tail = ".".join(rest[2:])
        return f"middle_block.{place}." + (_swap(tail, inner) if rest[0] == "resnets" else tail)
    if head not in ("down_blocks", "up_blocks"):
        return _swap(name, outer)
    block, kind, at = int(rest[0]), rest[1], int(rest[2])
    tail = ".".join(rest[3:])
    if kind in ("downsamplers", "upsamplers"):
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (block + 1)}.0.op." + tail.removeprefix("conv.")
        return f"output_blocks.{(layers + 1) * block + layers}.{1 if block == 0 else 2}.{tail}"  # no attention in the first
    number = (layers + 1) * block + at + (head == "down_blocks")
    side = "input_blocks" if head == "down_blocks" else "output_blocks"
    return f"{side}.{number}." + (f"0.{_swap(tail, inner)}" if kind == "resnets" else f"1.{tail}")


def _vae_name(name: str, levels: int) -> str:
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    name = _swap(name, {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"})
    if "mid_block.attentions.0" in name:
        return _swap(name.replace("mid_block.attentions.0", "mid.attn_1"), attention)
    parts = name.split(".")
    if len(parts) > 2 and parts[1] in ("down_blocks", "up_blocks"):
        level = int(parts[2]) if parts[1] == "down_blocks" else levels - 1 - int(parts[2])
        parts[1:3] = [parts[1].removesuffix("_blocks"), str(level)]
    name = ".".join(parts).replace(".resnets.", ".block.").replace("conv_shortcut", "nin_shortcut")
    return _swap(name, {"downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_norm_out": "norm_out"})


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("single") / "base.safetensors"
    save_file(original_layout(sd_folder), path)
    return path


def test_a_single_file_is_the_base_it_was_made_from(single: Path, sd_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = single.parent
    source = ModelSource(single.name, pin_of(single), family="sd", config=str(sd_folder))
    model = resolve(source, root)
    assert "converting base.safetensors" in capsys.readouterr().out
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        ours, theirs = (load_file(folder / f"{part}.safetensors") for folder in (model.path, sd_folder))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    kind = family("sd")
    texts = [kind.load_text_encoders(m, CPU) for m in (model, LocalModel(sd_folder, None, None))]
    embedded = [kind.encode_captions(text, ["a red circle"], 1, 0)["hidden"] for text in texts]
    torch.testing.assert_close(embedded[0], embedded[1])
    again = resolve(source, root)
    assert again.path == model.path and "converting" not in capsys.readouterr().out


def test_files_that_are_no_base_are_refused_in_words(single: Path, sd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the pinned ones"):
        resolve(ModelSource(single.name, "sha256:" + "0" * 64, family="sd"), single.parent)
    save_file({"x": torch.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"odd.safetensors cannot be read as a base of family sd: .*model.config"):
        resolve(ModelSource("odd.safetensors", family="sd", config=str(sd_folder)), tmp_path)
    (tmp_path / "base.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="a pickle, which can run code"):
        resolve(ModelSource("base.ckpt", family="sd"), tmp_path)


@pytest.mark.slow
def test_the_pipeline_runs_on_a_single_file(project: Project, single: Path, sd_folder: Path) -> None:
    project.path("base.safetensors").write_bytes(single.read_bytes())
    project.set("model", base="base.safetensors", config="base")
    assert project.cli("pin").returncode == 0
    assert project.params()["model"]["revision"] == pin_of(single)
    done = project.cli("run", REPROLORA_STRICT="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("converting base.safetensors") == 1


def test_a_vae_of_ones_own_changes_the_latents_and_nothing_else(sd_folder: Path, tmp_path: Path, project: Project) -> None:
    tiny.vae(seed=5).save_pretrained(tmp_path / "vae")
    plain = LocalModel(sd_folder, None, None)
    mine = replace(plain, vae=LocalModel(tmp_path / "vae", None, None))
    kind = family("sd")
    assert mine.fingerprint(*kind.vae_folders) != plain.fingerprint(*kind.vae_folders)
    assert mine.fingerprint(*kind.text_folders) == plain.fingerprint(*kind.text_folders)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    given = tiny.vae(seed=5).eval()
    with torch.no_grad():
        posterior = kind.encode_pixels(kind.load_vae(mine, CPU, torch.float32), pixels)
        torch.testing.assert_close(posterior.mean, given.encode(pixels).latent_dist.mean * given.config.scaling_factor)
    drawn = kind.load_pipeline(mine, CPU, torch.float32).vae
    assert all(torch.equal(a, b) for a, b in zip(drawn.state_dict().values(), given.state_dict().values(), strict=True))
    project.set("model", vae=str(tmp_path / "vae"), vae_revision="sha256:" + "1" * 64)
    source = base_source(load_params(project.path("params.yaml")).model)
    with pytest.raises(UserError, match=r"model.vae: the files of .* are not the pinned ones"):
        resolve(source, project.root)


def test_a_missing_bitsandbytes_is_named(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    denoiser = family("sd").load_denoiser(LocalModel(sd_folder, None, None), torch.float32)
    with pytest.raises(UserError, match=r"train.quantise_base: nf4 needs bitsandbytes.*reprolora\[8bit\]"):
        quantise(denoiser, "nf4", CPU)
