"""One step of each family, in double precision, against a reference written straight from diffusers' formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, SD3Transformer2DModel, UNet2DConditionModel
from encoded import encode_folder
from test_train import Bench, same

from pipeline import lora
from pipeline.batches import Batch, Batches
from pipeline.config import Train
from pipeline.encodings import Encodings
from pipeline.errors import Interrupted
from pipeline.families import family
from pipeline.model_source import LocalModel
from pipeline.train import _loss_sum

ALPHA, RANK = 6.0, 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pictures_folder: Path):
    folder = request.getfixturevalue(f"{request.param}_folder")
    out = tmp_path_factory.mktemp("encoded")
    encodings, _ = encode_folder(pictures_folder, folder, out / "store", out / "out", name=request.param, held_out_fraction=0.0)
    return request.param, folder, encodings


class Double(Batches):
    """The batches in double precision."""

    def batch(self, step: int, start: int, stop: int) -> Batch:
        b = super().batch(step, start, stop)
        text = {part: values.double() for part, values in b.text.items()}
        return replace(b, x_0=b.x_0.double(), noise=b.noise.double(), text=text)


def reference(
    name: str, folder: Path, batch: Batch, adapter: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients with W + (α/r)·BA merged into the library's own network."""
    if name == "sd3":
        network: Any = SD3Transformer2DModel.from_pretrained(folder / "transformer").double()
        sigma = 3 * batch.u / (1 + 2 * batch.u)  # the scheduler's shift is 3
        t = (1000 * sigma).float()
        sigma = (t.double() / 1000).view(-1, 1, 1, 1)
        noisy, target = (1 - sigma) * batch.x_0 + sigma * batch.noise, batch.noise - batch.x_0
        arguments: dict[str, Any] = {
            "hidden_states": noisy,
            "timestep": t,
            "encoder_hidden_states": batch.text["hidden"],
            "pooled_projections": batch.text["pooled"],
        }
    else:
        network = UNet2DConditionModel.from_pretrained(folder / "unet").double()
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        t = (batch.u * 1000).long()
        noisy, target = scheduler.add_noise(batch.x_0, batch.noise, t), batch.noise
        arguments = {"sample": noisy, "timestep": t, "encoder_hidden_states": batch.text["hidden"]}
        if name == "sdxl":
            arguments["added_cond_kwargs"] = {"text_embeds": batch.text["pooled"], "time_ids": batch.geometry}
    merged = {k: v.detach() for k, v in network.named_parameters()}
    trained = {k: v.detach().clone().requires_grad_(True) for k, v in adapter.items()}
    for layer in {k.split(".lora_")[0] for k in trained}:
        delta = trained[f"{layer}.lora_B.weight"] @ trained[f"{layer}.lora_A.weight"]
        merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + ALPHA / RANK * delta
    out = torch.func.functional_call(network, merged, kwargs=arguments).sample
    loss = ((out - target) ** 2).mean()
    return loss, list(torch.autograd.grad(loss, list(trained.values())))


def test_loss_and_gradients_equal_the_formulas(case: tuple[str, Path, Encodings]) -> None:
    name, folder, encodings = case
    kind, model = family(name), LocalModel(folder, None, None)
    denoiser = kind.load_denoiser(model, torch.float64).train()
    targets = lora.expand_targets(denoiser, ("attention", "feed-forward"), kind.lora_targets)
    parameters = lora.inject(denoiser, lora.LoraSpec(RANK, ALPHA, 0.0, targets), 0)
    generator = torch.Generator().manual_seed(0)
    for p in parameters:  # B too, or A would have no gradient
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.1
    batches = Double(encodings, 4, seed=3)
    settings = Train(steps=1, batch_size=4, learning_rate=1e-3)
    loss = _loss_sum(denoiser, kind, kind.objective(model), batches, settings, 0, 0, 4, CPU, None) / 4
    loss.backward()
    mine = {k: p.grad for (k, v), p in zip(lora.state(denoiser).items(), parameters, strict=True) if torch.equal(v, p)}
    expected, gradients = reference(name, folder, batches.batch(0, 0, 4), lora.state(denoiser))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(mine) == len(gradients) > 8
    largest = max(g.abs().max() for g in gradients)
    for mine_, theirs in zip(mine.values(), gradients, strict=True):
        torch.testing.assert_close(mine_, theirs, rtol=1e-5, atol=1e-6 * largest.item())


def test_fifty_steps_follow_the_reference(case: tuple[str, Path, Encodings], tmp_path: Path) -> None:
    """The loop in float32 against AdamW on the reference's gradients in float64: torch's own, without its fused kernel."""
    name, folder, encodings = case
    bench = Bench(encodings, folder, tmp_path, family=name)
    (tmp_path / "run").mkdir()
    kind, model = family(name), LocalModel(folder, None, None)
    denoiser = kind.load_denoiser(model, torch.float32)
    spec = lora.LoraSpec(RANK, ALPHA, 0.0, ("to_q", "to_v"))
    trained = bench.train(steps=50, spec=spec, learning_rate=1e-3, max_grad_norm=1e9, denoiser=denoiser)
    fresh = kind.load_denoiser(model, torch.float32)
    lora.inject(fresh, spec, 3)
    weights = {k: torch.nn.Parameter(v.detach().clone().double()) for k, v in lora.state(fresh).items()}
    optimiser = torch.optim.AdamW(weights.values(), lr=1e-3, weight_decay=0.01, foreach=False)
    batches = Double(encodings, 4, seed=3)
    for step in range(50):
        batch = batches.batch(step, 0, 4)
        _, gradients = reference(name, folder, batch, {k: v.detach() for k, v in weights.items()})
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient
        optimiser.step()
    for key, expected in weights.items():
        assert float((trained[key].double() - expected).norm() / expected.norm()) < 2e-2, key
    moved = max(float((v - trained[k].double()).norm() / v.norm()) for k, v in lora.state(fresh).items() if ".lora_A." in k)
    assert moved > 3e-2  # far more than what the two differ by


def test_sd3_trains_end_to_end_and_resumes(sd3_folder: Path, pictures_folder: Path, tmp_path: Path) -> None:
    encodings, _ = encode_folder(
        pictures_folder, sd3_folder, tmp_path / "store", tmp_path / "out", name="sd3", held_out_fraction=0.3
    )
    bench = Bench(encodings, sd3_folder, tmp_path, family="sd3")
    options = {"timestep_logit_normal": (0.0, 1.0), "held_out_every": 40, "steps": 40, "learning_rate": 0.02}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = bench.train("whole", **options)
    with pytest.raises(Interrupted):
        bench.train("parts", stop_at=17, **options)
    assert same(whole, bench.train("parts", **options))
    from pipeline.curve import read_held_out

    rows = read_held_out(tmp_path / "whole")
    assert rows == read_held_out(tmp_path / "parts")
    assert [r["step"] for r in rows] == [0, 40] and rows[1]["held_out_loss"] < 0.98 * rows[0]["held_out_loss"]
