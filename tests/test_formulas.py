"""Formulas against the libraries' own: the diffusion objective, the schedules, the randomness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)
from hypothesis import given
from hypothesis import strategies as st

from pipeline.diffusion import Ddpm, stratified
from pipeline.losses import mse_per_sample
from pipeline.optim import learning_rate_at, scaled_learning_rate
from pipeline.randomness import Purpose, draw, torch_seed


@pytest.fixture(params=["scaled_linear", "linear", "squaredcos_cap_v2"])
def scheduler(request: pytest.FixtureRequest) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule=request.param, beta_start=0.00085, beta_end=0.012)


def test_noising_and_targets_equal_the_librarys(scheduler: DDPMScheduler) -> None:
    x_0, noise = torch.randn(2, 16, 4, 8, 8, dtype=torch.float64).unbind()
    t = torch.randint(0, 1000, (16,))
    for prediction in ("epsilon", "v_prediction"):
        objective = Ddpm(scheduler.alphas_cumprod, prediction)
        torch.testing.assert_close(objective.noised(x_0, noise, t), scheduler.add_noise(x_0, noise, t), rtol=1e-6, atol=1e-7)
        expected = noise if prediction == "epsilon" else scheduler.get_velocity(x_0, noise, t)
        torch.testing.assert_close(objective.target(x_0, noise, t), expected, rtol=1e-6, atol=1e-7)


def test_timesteps_are_uniform_and_within_the_schedule() -> None:
    objective = Ddpm(torch.linspace(0.99, 0.01, 10), "epsilon")
    t = objective.timesteps(torch.tensor([0.0, 0.0999, 0.1, 0.55, 0.999999999], dtype=torch.float64))
    assert t.tolist() == [0, 0, 1, 5, 9] and t.dtype == torch.int64
    counts = torch.bincount(objective.timesteps(torch.rand(20_000, dtype=torch.float64)), minlength=10)
    assert (counts - 2000).abs().max() < 250


def test_loss_is_the_mean_square_of_each_sample() -> None:
    a, b = torch.randn(2, 3, 4, 5, 6).unbind()
    expected = torch.stack([((x - y) ** 2).mean() for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(mse_per_sample(a, b), expected)
    assert mse_per_sample(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_stratified_points_are_midpoints() -> None:
    assert stratified(4).tolist() == [0.125, 0.375, 0.625, 0.875]


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_schedules_equal_the_librarys_after_the_warmup(warmup: int) -> None:
    steps, peak = 40, 3e-4
    cases = {
        "linear": (get_linear_schedule_with_warmup, {}),
        "cosine": (get_cosine_schedule_with_warmup, {}),
        "cosine-with-restarts": (get_cosine_with_hard_restarts_schedule_with_warmup, {"num_cycles": 3}),
        "polynomial": (get_polynomial_decay_schedule_with_warmup, {"power": 1.7, "lr_end": 0.0}),
    }
    for name, (make, options) in cases.items():
        optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
        theirs = make(optimiser, num_warmup_steps=warmup, num_training_steps=steps, **options)
        for step in range(steps):
            if step >= warmup:
                mine = learning_rate_at(step, peak, name, steps, warmup, cycles=3, power=1.7)
                assert mine == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), (name, step)
            optimiser.step()
            theirs.step()


def test_the_rate_grows_with_the_batch_as_asked() -> None:
    assert [scaled_learning_rate(1e-4, 16, rule) for rule in ("none", "linear", "sqrt")] == pytest.approx([1e-4, 16e-4, 4e-4])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "cosine-with-restarts", "polynomial"])
def test_warmup_rises_under_every_schedule_and_never_wastes_a_step(schedule: str) -> None:
    rates = [learning_rate_at(step, 1.0, schedule, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[0] > 0 and rates[10] == pytest.approx(1.0)


@given(
    seed=st.integers(0, 2**63 - 1),
    a=st.tuples(st.sampled_from(Purpose), st.integers(0, 10**9), st.integers(0, 2**64 - 1)),
    b=st.tuples(st.sampled_from(Purpose), st.integers(0, 10**9), st.integers(0, 2**64 - 1)),
)
def test_draws_are_functions_of_their_place_and_differ_between_places(seed: int, a: tuple, b: tuple) -> None:
    first = draw(seed, *a).standard_normal(8)
    assert np.array_equal(first, draw(seed, *a).standard_normal(8))
    if a != b:
        assert not np.array_equal(first, draw(seed, *b).standard_normal(8))


def test_draws_are_normal_and_uncorrelated() -> None:
    rows = np.stack([draw(1, Purpose.NOISE, step, p).standard_normal(64) for step in range(50) for p in range(8)])
    assert abs(rows.mean()) < 0.02 and abs(rows.std() - 1) < 0.02
    correlation = np.corrcoef(rows)
    assert np.abs(correlation - np.eye(len(rows))).max() < 0.65


def test_torch_seeds_differ_between_steps_and_seeds() -> None:
    assert len({torch_seed(seed, step) for seed in range(30) for step in range(30)}) == 900
