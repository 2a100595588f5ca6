"""Each family against the diffusers pipeline it stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoded import encode_folder

from pipeline import lora
from pipeline.families import family
from pipeline.model_source import LocalModel

CPU = torch.device("cpu")
CAPTIONS = ["a red circle", "", "a small blue square and very many more words than it takes"]


@pytest.fixture(params=["sd", "sdxl"])
def case(request: pytest.FixtureRequest, sd_folder: Path, sdxl_folder: Path):
    folder = {"sd": sd_folder, "sdxl": sdxl_folder}[request.param]
    return family(request.param), LocalModel(folder, None, None)


def test_captions_encode_as_the_pipeline_encodes_prompts(case) -> None:
    kind, model = case
    pipeline = kind.load_pipeline(model, CPU, torch.float32)
    mine = kind.encode_captions(kind.load_text_encoders(model, CPU), CAPTIONS)
    encoded = pipeline.encode_prompt(CAPTIONS, device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(mine["hidden"], encoded[0])
    if kind.name == "sdxl":
        torch.testing.assert_close(mine["pooled"], encoded[2])


def test_prediction_and_sampling_agree(case) -> None:
    """Two DDIM steps by hand, from `predict` alone, give the pipeline's own latents."""
    kind, model = case
    pipeline = kind.load_pipeline(model, CPU, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipeline("a red circle", num_inference_steps=2, guidance_scale=1.0, latents=start.clone(), height=32, width=32,
                      output_type="latent").images  # fmt: skip
    text = kind.encode_captions(kind.load_text_encoders(model, CPU), ["a red circle"])
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
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = kind.encode_pixels(kind.load_vae(model, CPU), pixels)
        expected = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    pictures = decode_latents(pipeline, posterior.mean)
    for mine, theirs in zip(pictures, pipeline.image_processor.postprocess(expected, output_type="pil"), strict=True):
        assert mine.tobytes() == theirs.tobytes()


def test_encodings_hold_all_that_predict_needs(case, pictures_folder: Path, tmp_path: Path) -> None:
    kind, model = case
    encodings, _ = encode_folder(pictures_folder, model.path, tmp_path / "store", tmp_path / "out", name=kind.name)
    sample = encodings.index.samples[0]
    latents, text = encodings.read(sample.latents[0]), encodings.read(sample.text)
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
