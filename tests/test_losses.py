"""Each formula of the loss, the noise and the timesteps against an evaluation of its own, in double precision."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.diffusion import (
    Ddpm,
    Flow,
    logit_normal,
    overridden,
    power,
    rescale_zero_terminal_snr,
    within,
)
from pipeline.errors import UserError
from pipeline.losses import (
    Huber,
    Loss,
    debiased,
    huber_c,
    mean_per_sample,
    min_snr,
    mse_per_sample,
    pseudo_huber,
    sample_losses,
)
from pipeline.noise import NoiseShape
from pipeline.randomness import Purpose, draw

SCHEDULER = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
T = torch.tensor([0, 1, 17, 250, 500, 731, 998, 999])


def ddpm(prediction: str = "epsilon") -> Ddpm:
    return Ddpm(SCHEDULER.alphas_cumprod.double(), prediction)


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predicted, target = torch.randn(2, len(T), 4, 6, 5, dtype=torch.float64, generator=generator).unbind()
    return predicted, target


def test_snr_equals_the_librarys() -> None:
    torch.testing.assert_close(ddpm().snr(T), compute_snr(SCHEDULER, T).double(), rtol=1e-4, atol=0)


def test_min_snr_by_hand() -> None:
    for i, t in enumerate(T.tolist()):
        a = SCHEDULER.alphas_cumprod[t].item()
        snr = a / (1 - a)
        for gamma in (1.0, 5.0, 20.0):
            assert min_snr(ddpm().snr(T), gamma, "epsilon")[i].item() == pytest.approx(min(snr, gamma) / snr, rel=1e-12)
            assert min_snr(ddpm().snr(T), gamma, "v_prediction")[i].item() == pytest.approx(
                min(snr, gamma) / (snr + 1), rel=1e-12
            )


@pytest.mark.parametrize("weight", [lambda snr, p: min_snr(snr, 5.0, p), debiased])
def test_a_weight_means_the_same_whatever_is_predicted(weight) -> None:
    """One error of x_0, told as an error of ε, of v or of a flow's velocity, costs the same."""
    a = SCHEDULER.alphas_cumprod[T].double()
    error = torch.randn(len(T), dtype=torch.float64)  # of x_0, with x_t fixed
    as_epsilon = error * (a / (1 - a)).sqrt()  # ε = (x_t − √a x_0) / √(1−a)
    as_v = error / (1 - a).sqrt()  # v = (√a x_t − x_0) / √(1−a)
    snr = ddpm().snr(T)
    costs = [weight(snr, "epsilon") * as_epsilon**2, weight(snr, "v_prediction") * as_v**2]
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-9, atol=0)
    sigma = 1 / (1 + snr.sqrt())  # the flow's σ of the same SNR
    torch.testing.assert_close(weight(snr, "flow") * (error / sigma) ** 2, costs[0], rtol=1e-9, atol=0)


def test_debiased_is_one_over_the_root_of_snr_for_epsilon() -> None:
    torch.testing.assert_close(
        debiased(ddpm().snr(T), "epsilon"), compute_snr(SCHEDULER, T).double() ** -0.5, rtol=1e-4, atol=0
    )


def sd_scripts_huber(predicted: np.ndarray, target: np.ndarray, c: float, kind: str) -> np.ndarray:
    """As sd-scripts' `conditional_loss` writes it."""
    root = np.sqrt((predicted - target) ** 2 + c**2) - c
    return 2 * c * root if kind == "huber" else 2 * root


@pytest.mark.parametrize("kind", ["huber", "smooth-l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_scheduled_huber_equals_sd_scripts(kind: str, schedule: str) -> None:
    predicted, target = pair()
    losses = sample_losses(Loss(Huber(0.1, schedule, kind)), ddpm(), predicted, target, T)
    for i, t in enumerate(T.tolist()):
        a = SCHEDULER.alphas_cumprod[t].item()
        c = {
            "constant": 0.1,
            "exponential": math.exp(math.log(0.1) / 1000 * t),
            "snr": (1 - 0.1) / (1 + math.sqrt((1 - a) / a)) ** 2 + 0.1,
        }[schedule]
        expected = sd_scripts_huber(predicted[i].numpy(), target[i].numpy(), c, kind).mean()
        assert losses[i].item() == pytest.approx(expected, rel=1e-5)


def test_huber_is_exact_where_the_difference_vanishes_and_linear_far_out() -> None:
    tiny, far = torch.full((1, 1, 1, 1), 1e-6), torch.full((1, 1, 1, 1), 1e4)
    zero, c = torch.zeros(1, 1, 1, 1), torch.tensor([1.0])
    assert pseudo_huber(tiny, zero, c, "smooth-l1").item() == pytest.approx(1e-12, rel=1e-4)  # √(d²+c²) − c would give 0
    assert pseudo_huber(far, zero, c, "smooth-l1").item() == pytest.approx(2e4, rel=1e-3)
    assert huber_c(Huber(0.1, "exponential", "huber"), Flow(), torch.tensor([0.0, 500.0, 1000.0])).tolist() == pytest.approx(
        [1, 0.1**0.5, 0.1]
    )


def test_the_plain_loss_is_the_mean_square_and_weights_multiply_it() -> None:
    predicted, target = pair()
    plain = mse_per_sample(predicted, target)
    assert torch.equal(sample_losses(Loss(), ddpm(), predicted, target, T), plain)
    weighted = sample_losses(Loss(min_snr_gamma=5.0), ddpm(), predicted, target, T)
    torch.testing.assert_close(weighted, plain * min_snr(ddpm().snr(T), 5.0, "epsilon"))
    torch.testing.assert_close(
        sample_losses(Loss(debiased=True), ddpm("v_prediction"), predicted, target, T),
        plain * debiased(ddpm().snr(T), "v_prediction"),
    )


@pytest.mark.parametrize("loss", [Loss(), Loss(Huber(0.2, "constant", "huber"))])
def test_a_mask_weighs_places(loss: Loss) -> None:
    predicted, target = pair()
    mask = torch.rand(len(T), 1, 6, 5)
    one = sample_losses(loss, ddpm(), predicted, target, T)
    assert torch.equal(sample_losses(loss, ddpm(), predicted, target, T, torch.ones_like(mask)), one)
    inside = predicted.clone()
    inside[:, :, :3] = 1e3  # what the mask leaves out may be anything
    half = torch.ones_like(mask)
    half[:, :, :3] = 0
    torch.testing.assert_close(
        sample_losses(loss, ddpm(), inside, target, T, half), sample_losses(loss, ddpm(), predicted, target, T, half)
    )
    errors = (predicted - target) ** 2
    by_hand = torch.stack([sum((e * m[0]).sum() for e in es) / es.numel() for es, m in zip(errors, mask.double(), strict=True)])
    torch.testing.assert_close(mean_per_sample(errors, mask), by_hand)


def test_zero_terminal_snr_equals_the_librarys() -> None:
    theirs = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True)
    mine = rescale_zero_terminal_snr(SCHEDULER.alphas_cumprod)
    torch.testing.assert_close(mine, theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert mine[-1] == 0 and mine[0] == pytest.approx(SCHEDULER.alphas_cumprod[0].item())


def test_overrides_of_the_objective() -> None:
    base = ddpm()
    assert overridden(base, "auto", False) is base
    changed = overridden(base, "v_prediction", True)
    assert changed.prediction == "v_prediction" and changed.snr(torch.tensor([999])) == 0
    with pytest.raises(UserError, match=r"zero_terminal_snr: true with ε-prediction"):
        overridden(base, "auto", True)
    with pytest.raises(UserError, match="flow matching"):
        overridden(Flow(), "epsilon", False)
    for weight in (min_snr(changed.snr(torch.tensor([999])), 5.0, "v_prediction"), debiased(changed.snr(T), "v_prediction")):
        assert weight.isfinite().all()


# --- timesteps


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-1.0, 2.0)])
def test_logit_normal_has_its_distribution(mean: float, std: float) -> None:
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    mine = logit_normal(u, mean, std)
    x = np.linspace(0.01, 0.99, 99)
    expected = stats.norm.cdf((np.log(x / (1 - x)) - mean) / std)
    np.testing.assert_allclose([(mine.numpy() < v).mean() for v in x], expected, atol=1e-3)
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 50_000, mean, std, generator=torch.Generator().manual_seed(0)
    )
    assert stats.ks_2samp(mine.numpy(), theirs.numpy()).statistic < 0.02


@given(st.floats(0, 1, exclude_max=True), st.floats(-3, 3), st.floats(0.05, 5), st.floats(0.1, 10))
@settings(deadline=None)
def test_every_bias_stays_on_the_schedule(u: float, mean: float, std: float, k: float) -> None:
    drawn = torch.tensor([u], dtype=torch.float64)
    for placed in (logit_normal(drawn, mean, std), power(drawn, k), within(drawn, 0.2, 0.7)):
        assert 0 <= placed.item() <= 1
        assert 0 <= ddpm().timesteps(placed).item() <= 999
    assert 0.2 <= within(drawn, 0.2, 0.7).item() <= 0.7  # rounded, where u is the last number below 1


def test_power_prefers_noise_below_one() -> None:
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert power(u, 0.5).mean().item() == pytest.approx(1 / 1.5, abs=1e-3)  # E u^k = 1 / (k + 1)
    assert power(u, 2.0).mean().item() == pytest.approx(1 / 3, abs=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_flow_equals_the_librarys(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    objective = Flow(shift)
    u = (1000 - torch.arange(1000, dtype=torch.float64)) / 1000  # the library's own grid, noise first
    t = objective.timesteps(u)
    torch.testing.assert_close(t, scheduler.timesteps, rtol=1e-5, atol=1e-3)
    x_0, noise = torch.randn(2, 1000, 2, 2, 2, dtype=torch.float64).unbind()
    theirs = scheduler.scale_noise(x_0.float(), scheduler.timesteps, noise.float()).double()
    torch.testing.assert_close(objective.noised(x_0, noise, t), theirs, rtol=1e-4, atol=1e-5)
    # following the velocity from pure noise back to σ = 0 lands on x_0
    one = torch.tensor([1000.0])
    torch.testing.assert_close(objective.noised(x_0[:1], noise[:1], one) - objective.target(x_0[:1], noise[:1], one), x_0[:1])
    assert torch.equal(compute_loss_weighting_for_sd3("logit_normal", t / 1000), torch.ones_like(t))  # as with us: no weight


# --- noise


def test_noise_is_left_alone_by_default() -> None:
    white = torch.randn(3, 4, 8, 8)
    assert NoiseShape().noise(white, 0, 0, 0) is white and NoiseShape().input_noise(white, 0, 0, 0) is white


def test_noise_offset_moves_whole_channels() -> None:
    white = torch.randn(3, 4, 8, 8)
    moved = NoiseShape(offset=0.1).noise(white, 5, 7, 2) - white
    expected = torch.stack(
        [torch.from_numpy(draw(5, Purpose.NOISE_OFFSET, 7, 2 + i).standard_normal((4, 1, 1), np.float32)) for i in range(3)]
    )
    torch.testing.assert_close(moved, (0.1 * expected).expand(3, 4, 8, 8), rtol=1e-4, atol=1e-6)


def test_input_perturbation_adds_white_noise() -> None:
    noise = torch.zeros(2, 4, 32, 32)
    xi = NoiseShape(perturbation=0.1).input_noise(noise, 1, 2, 0)
    assert xi.std().item() == pytest.approx(0.1, rel=0.05) and abs(xi.mean().item()) < 0.01


def test_pyramid_noise_is_rough_on_every_scale_and_of_unit_size() -> None:
    white = torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    rough = NoiseShape(pyramid=0.8).noise(white, 0, 0, 0)
    torch.testing.assert_close(rough.std(dim=(1, 2, 3)), torch.ones(4))
    coarse = [torch.nn.functional.avg_pool2d(n, 8).var().item() for n in (white, rough)]
    assert coarse[1] > 5 * coarse[0]


@pytest.mark.parametrize("shape", [NoiseShape(offset=0.1), NoiseShape(pyramid=0.7), NoiseShape(0.1, 0.7, 0.2)])
def test_noise_is_a_function_of_place_alone(shape: NoiseShape) -> None:
    """However a batch is split, a position is given the same noise."""
    white = torch.randn(6, 4, 8, 12)

    def both(rows: torch.Tensor, start: int) -> torch.Tensor:
        noise = shape.noise(rows, 3, 11, start)
        return torch.cat([noise, shape.input_noise(noise, 3, 11, start)], 1)

    parts = torch.cat([both(white[:2], 0), both(white[2:], 2)])
    assert torch.equal(both(white, 0), parts)
    other = replace(shape).noise(white, 3, 12, 0)
    assert not torch.equal(other, shape.noise(white, 3, 11, 0))
