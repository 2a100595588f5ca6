"""Text encoders that learn too: gradients equal a reference, resumed to the bit, and the files of other programs hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from encoded import HOW, encode_folder
from finished import export, finish
from project import Project, make_project
from safetensors.torch import load_file
from test_train import SPEC, same, stopping

from pipeline import lora
from pipeline.batches import Batches
from pipeline.config import Train
from pipeline.encodings import Encodings
from pipeline.errors import Interrupted
from pipeline.families import family
from pipeline.live_text import LiveText
from pipeline.model_source import LocalModel
from pipeline.train import Hardware, _loss_sum, read_curve, train
from pipeline.train_job import _live_text

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "seed": 3, "caption_dropout": 0.2}


@pytest.fixture(scope="module")
def encodings(tmp_path_factory: pytest.TempPathFactory, pictures_folder: Path, sd_folder: Path) -> Encodings:
    out = tmp_path_factory.mktemp("encoded")
    return encode_folder(pictures_folder, sd_folder, out / "store", out / "out", how=HOW, held_out_fraction=0.3)[0]


def learn(encodings: Encodings, base: Path, work: Path, stop_at: int | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = Train(**{**SETTINGS, **changes})
    kind, model = family("sd"), LocalModel(base, None, None)
    denoiser = kind.load_denoiser(model, torch.float32)
    lora.inject(denoiser, SPEC, settings.seed)
    live, _, _ = _live_text(kind, model, encodings, SPEC, CPU, settings.seed)
    stop, check_stop = stopping(stop_at)
    work.mkdir(exist_ok=True)
    return train(
        denoiser,
        kind,
        kind.objective(model),
        Batches(encodings, settings.batch_size, settings.seed, settings.caption_dropout),
        settings,
        Hardware(CPU, None, 2, 2),
        work,
        stop,
        check_stop,
        lambda rows: None,
        live,
    )


def test_gradients_equal_those_of_explicit_weights(encodings: Encodings, sd_folder: Path) -> None:
    """W + (α/r) B A written out for every projection of the text encoder, in double precision."""
    kind, model = family("sd"), LocalModel(sd_folder, None, None)
    live, spec, parameters = _live_text(kind, model, encodings, SPEC, CPU, 0)
    encoder, denoiser = live.modules["text_encoder"].double(), kind.load_denoiser(model, torch.float64).eval()
    torch.manual_seed(1)
    for p in parameters:
        p.data = torch.randn_like(p) * 0.1
    batches = Batches(encodings, 4, 3)
    live = LiveText(kind, live.encoders, {"text_encoder": encoder}, 1, 0)
    settings = Train(**SETTINGS)
    loss = _loss_sum(denoiser, kind, kind.objective(model), batches, settings, 0, 0, 4, CPU, live) / 4
    loss.backward()
    mine = {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}

    from transformers import CLIPTextModel

    plain = CLIPTextModel.from_pretrained(sd_folder / "text_encoder").double().eval().requires_grad_(False)
    factors = {n: p.detach().clone().requires_grad_(True) for n, p in encoder.named_parameters() if p.requires_grad}
    merged = dict(plain.named_parameters())
    layers = {n.split(".lora_")[0] for n in factors}
    assert len(layers) == 2 * 4  # two layers of four projections
    for layer in layers:
        a, b = factors[f"{layer}.lora_A.default.weight"], factors[f"{layer}.lora_B.default.weight"]
        merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + spec.alpha / spec.rank * b @ a
    batch = batches.batch(0, 0, 4)
    words = live.encoders.tokenizer(list(batch.captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
    hidden = torch.func.functional_call(plain, merged, (words,)).last_hidden_state
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    t = (batch.u * 1000).long()
    a = torch.cumprod(1 - betas, 0)[t].float().double().view(-1, 1, 1, 1)
    x_t = a.sqrt() * batch.x_0.double() + (1 - a).sqrt() * batch.noise.double()
    expected = ((denoiser(x_t, t, encoder_hidden_states=hidden).sample - batch.noise.double()) ** 2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, _), gradient in zip(factors.items(), torch.autograd.grad(expected, list(factors.values())), strict=True):
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-9)


def test_it_begins_as_the_stored_embeddings_do_and_both_networks_learn(
    encodings: Encodings, sd_folder: Path, tmp_path: Path
) -> None:
    weights = learn(encodings, sd_folder, tmp_path / "live")
    text = {k: v for k, v in weights.items() if k.startswith("text_encoder.")}
    assert len(text) == 2 * 2 * 4 and all(v.any() for k, v in text.items() if ".lora_B." in k)
    assert any(v.any() for k, v in weights.items() if k not in text and ".lora_B." in k)
    still = learn(encodings, sd_folder, tmp_path / "still", text_encoder_learning_rate=1e-6)
    size = sum(float(v.norm()) for k, v in text.items() if ".lora_B." in k)
    assert sum(float(v.norm()) for k, v in still.items() if k in text and ".lora_B." in k) < 1e-3 * size
    kind, model, batches = family("sd"), LocalModel(sd_folder, None, None), Batches(encodings, 4, 3, 0.2)
    denoiser, objective = kind.load_denoiser(model, torch.float32), kind.objective(model)
    stored = _loss_sum(denoiser, kind, objective, batches, Train(**SETTINGS), 0, 0, 4, CPU, None).item() / 4
    assert read_curve(tmp_path / "live")[0]["loss"] == pytest.approx(stored, rel=1e-5)


def test_resumed_to_the_bit_with_average_and_held_out_loss(encodings: Encodings, sd_folder: Path, tmp_path: Path) -> None:
    options = {"ema_decay": 0.9, "held_out_every": 2, "keep": "best"}
    whole = learn(encodings, sd_folder, tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        learn(encodings, sd_folder, tmp_path / "cut", stop_at=3, **options)
    assert same(learn(encodings, sd_folder, tmp_path / "cut", **options), whole)
    losses = [(tmp_path / name / "held_out.jsonl").read_text() for name in ("whole", "cut")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_both_files_hold_the_text_encoders(
    name: str, tmp_path: Path, sd_folder: Path, sdxl_folder: Path, clip_folder: Path, pictures_folder: Path
) -> None:
    """The stage itself loads them again and compares ΔW of every layer, so that the files are there says that they are right."""
    project = make_project(tmp_path / "p", {"sd": sd_folder, "sdxl": sdxl_folder}[name], clip_folder, pictures_folder)
    project.set("model", family=name)
    project.set("lora", text_encoder=True)
    dist = export(finish(project))
    prefixes = {key.split("_text_model")[0] for key in load_file(dist / "tiny.safetensors") if "_text_model" in key}
    assert prefixes == {"sd": {"lora_te"}, "sdxl": {"lora_te1", "lora_te2"}}[name]
    diffusers = load_file(dist / "pytorch_lora_weights.safetensors")
    assert any(key.startswith("text_encoder.text_model.encoder.layers.1.self_attn.out_proj.lora_B") for key in diffusers)


@pytest.mark.slow
def test_the_whole_run(new_project: Callable[[], Project]) -> None:
    project = new_project()
    project.set("lora", text_encoder=True, rank_pattern={"to_k": 3}, alpha_pattern={"to_k": 5.0})
    project.set("runtime", sample_every=4)
    project.set("tracking", enabled=True)
    done = project.cli("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(key.startswith("lora_te_") for key in load_file(project.path("dist/adapter/tiny.safetensors")))
    assert "text encoder" in project.path("dist/adapter/README.md").read_text()
    grids = list(project.root.glob(".work/train-lora/*/previews/step-*.png"))
    assert [grid.name for grid in grids] == ["step-00000004.png"]
    assert list(project.path("mlruns/artifacts").rglob("previews/step-00000004.png"))
    before = project.path("build/adapter/adapter.safetensors").read_bytes()
    project.set("runtime", sample_every=None)
    assert project.cli("stage", "train-lora", REPROLORA_FORCE="1").returncode == 0
    assert project.path("build/adapter/adapter.safetensors").read_bytes() == before  # looking changes nothing
