"""Each family against the diffusers pipeline it stands for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import encode_folder

from pipeline import lora
from pipeline.diffusion import Flow
from pipeline.errors import UserError
from pipeline.families import family
from pipeline.model_source import LocalModel

CPU = torch.device("cpu")
CAPTIONS = ["a red circle", "", "a small blue square and very many more words than it takes"]


@pytest.fixture(params=["sd", "sdxl", "sd3"])
def case(request: pytest.FixtureRequest):
    folder = request.getfixturevalue(f"{request.param}_folder")
    return family(request.param), LocalModel(folder, None, None)


def test_captions_encode_as_the_pipeline_encodes_prompts(case) -> None:
    kind, model = case
    pipeline = kind.load_pipeline(model, CPU, torch.float32)
    mine = kind.encode_captions(kind.load_text_encoders(model, CPU), CAPTIONS, chunks=1, clip_skip=0)
    options = {"prompt_2": None, "prompt_3": None} if kind.name == "sd3" else {}
    encoded = pipeline.encode_prompt(
        CAPTIONS, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False, **options
    )
    torch.testing.assert_close(mine["hidden"], encoded[0])
    if kind.name != "sd":
        torch.testing.assert_close(mine["pooled"], encoded[2])


def test_prediction_and_sampling_agree(case) -> None:
    """Two of the scheduler's steps by hand, from `predict` alone, give the pipeline's own latents."""
    kind, model = case
    pipeline = kind.load_pipeline(model, CPU, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline("a red circle", num_inference_steps=2, guidance_scale=1.0, latents=start.clone(), height=32, width=32,
                      output_type="latent").images  # fmt: skip
    text = kind.encode_captions(kind.load_text_encoders(model, CPU), ["a red circle"], chunks=1, clip_skip=0)
    geometry = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]])
    denoiser = kind.load_denoiser(model, torch.float32).eval()
    pipeline.scheduler.set_timesteps(2)
    x = start
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(kind.predict(denoiser, x, t[None], text, geometry), t, x).prev_sample
    torch.testing.assert_close(x, theirs, rtol=1e-4, atol=1e-4)


def test_the_objective_is_the_bases_own(case, tmp_path: Path) -> None:
    kind, model = case
    pipeline = kind.load_pipeline(model, CPU, torch.float32)
    objective = kind.objective(model)
    if kind.name == "sd3":
        assert objective == Flow(shift=3.0, steps=1000)
        return
    torch.testing.assert_close(objective.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    assert objective.prediction == pipeline.scheduler.config.prediction_type == "epsilon"


def test_v_prediction_is_read_from_the_scheduler(tmp_path: Path) -> None:
    import tiny

    folder = tiny.make_sd(tmp_path / "v", prediction_type="v_prediction")
    assert family("sd").objective(LocalModel(folder, None, None)).prediction == "v_prediction"


def test_normalised_latents_decode_to_the_picture_the_vae_makes_of_it(case) -> None:
    from pipeline.evaluate.sampling import decode_latents

    kind, model = case
    pipeline = kind.load_pipeline(model, CPU, torch.float32)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = kind.encode_pixels(kind.load_vae(model, CPU, torch.float32), pixels)
        expected = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    pictures = decode_latents(pipeline, posterior.mean)
    for mine, theirs in zip(pictures, pipeline.image_processor.postprocess(expected, output_type="pil"), strict=True):
        levels = np.asarray(mine, np.int16) - np.asarray(theirs, np.int16)
        assert abs(levels).max() <= 1  # a last bit can tip a value over a rounding edge


def test_a_vae_that_shifts_its_channels_is_refused(sd_folder: Path, tmp_path: Path) -> None:
    """Its latents would be normalised wrongly, and trained on."""
    shutil.copytree(sd_folder, tmp_path / "base")
    config = json.loads((tmp_path / "base/vae/config.json").read_text())
    (tmp_path / "base/vae/config.json").write_text(json.dumps({**config, "latents_mean": [0.1, 0.2, 0.3, 0.4]}))
    with pytest.raises(UserError, match=r"latents_mean.*another VAE with model\.vae"):
        family("sd").load_vae(LocalModel(tmp_path / "base", None, None), CPU, torch.float32)


def test_encodings_hold_all_that_predict_needs(case, pictures_folder: Path, tmp_path: Path) -> None:
    kind, model = case
    encodings, _ = encode_folder(pictures_folder, model.path, tmp_path / "store", tmp_path / "out", name=kind.name)
    sample = encodings.index.samples[0]
    latents, text = encodings.read(sample.latents[0]), encodings.text(sample.texts[0])
    denoiser = kind.load_denoiser(model, torch.float32)
    named = {part: values[None] for part, values in text.items()}
    out = kind.predict(denoiser, latents["mean"][None], torch.tensor([5]), named, latents["geometry"][None])
    assert out.shape == latents["mean"][None].shape and latents["geometry"].dtype == torch.float32


def test_sdxl_geometry_reaches_the_network_unrounded(sdxl_folder: Path) -> None:
    """1333 becomes 1336 in bf16."""
    kind, model = family("sdxl"), LocalModel(sdxl_folder, None, None)
    seen = []
    denoiser = kind.load_denoiser(model, torch.bfloat16)
    denoiser.add_time_proj.register_forward_hook(lambda m, args, out: seen.append(args[0].clone()))
    text = {"hidden": torch.zeros(1, 16, 32, dtype=torch.bfloat16), "pooled": torch.zeros(1, 16, dtype=torch.bfloat16)}
    geometry = torch.tensor([[1333.0, 1000.0, 3.0, 5.0, 1024.0, 1024.0]])
    kind.predict(denoiser, torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), torch.tensor([5]), text, geometry)
    assert seen[0].flatten().tolist() == geometry.flatten().tolist()


def test_every_family_takes_the_default_targets(case) -> None:
    kind, model = case
    denoiser = kind.load_denoiser(model, torch.float32)
    assert len(lora.inject(denoiser, lora.LoraSpec(2, 2.0, 0.0, ("to_q", "to_k", "to_v", "to_out.0")), 0)) > 8


@pytest.mark.parametrize("targets", [("attention",), ("attention", "feed-forward"), ("all-linear",)])
def test_every_family_writes_out_the_presets(case, targets: tuple[str, ...]) -> None:
    kind, model = case
    denoiser = kind.load_denoiser(model, torch.float32)
    written = lora.expand_targets(denoiser, targets, kind.lora_targets)
    lora.inject(denoiser, lora.LoraSpec(2, 2.0, 0.0, written), 0)
    adapted = {name.split(".lora_A")[0] for name, _ in denoiser.named_parameters() if ".lora_A." in name}
    linear = {
        n.removesuffix(".base_layer")
        for n, m in denoiser.named_modules()
        if isinstance(m, torch.nn.Linear) and ".lora_" not in n
    }
    if targets == ("all-linear",):
        assert adapted == linear
    else:
        blocks = {n for n in linear if re.search(r"\.attn\d*\." + (r"|\.ff(_context)?\.net" if len(targets) > 1 else ""), n)}
        assert adapted == blocks


def test_convolutions_are_a_preset_of_the_unets_alone(case) -> None:
    kind, model = case
    denoiser = kind.load_denoiser(model, torch.float32)
    if kind.name == "sd3":
        with pytest.raises(UserError, match="'conv': this base has no such layers"):
            lora.expand_targets(denoiser, ("conv",), kind.lora_targets)
        return
    lora.inject(denoiser, lora.LoraSpec(2, 2.0, 0.0, lora.expand_targets(denoiser, ("conv",), kind.lora_targets)), 0)
    adapted = {name.split(".lora_A")[0] for name, _ in denoiser.named_parameters() if ".lora_A." in name}
    convs = {
        n.removesuffix(".base_layer")
        for n, m in denoiser.named_modules()
        if isinstance(m, torch.nn.Conv2d) and ".lora_" not in n
    }
    assert adapted == {name for name in convs if ".resnets." in name or "samplers." in name}
