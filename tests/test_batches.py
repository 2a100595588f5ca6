"""Batches: order and draws as functions of (seed, step, position); nothing dropped, nothing swapped."""

from __future__ import annotations

from collections import Counter
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encoded import FLIPPED, encode_folder
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches import Batches, plan_epoch
from pipeline.encodings import Encodings


@pytest.fixture(scope="module")
def encodings(tmp_path_factory: pytest.TempPathFactory, pictures_folder: Path, sd_folder: Path) -> Encodings:
    out = tmp_path_factory.mktemp("encoded")
    return encode_folder(pictures_folder, sd_folder, out / "store", out / "out", how=FLIPPED, held_out_fraction=0.0)[0]


groups = st.lists(st.integers(1, 23), min_size=1, max_size=5).map(
    lambda sizes: [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))]
)


@given(groups, st.integers(1, 9), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_an_epoch_shows_everything_once_and_mixes_no_sizes(members: list[list[int]], size: int, seed: int, epoch: int) -> None:
    plan = plan_epoch(members, size, seed, epoch)
    assert Counter(i for batch in plan for i in batch) == Counter(i for group in members for i in group)
    assert all(1 <= len(batch) <= size for batch in plan)
    assert all(any(set(batch) <= set(group) for group in members) for batch in plan)
    assert plan == plan_epoch(members, size, seed, epoch)


def test_epochs_differ_and_seeds_differ(encodings: Encodings) -> None:
    batches = Batches(encodings, 3, seed=1)
    assert batches.steps_per_epoch == 4

    def order(b: Batches, steps: range) -> list[str]:
        return [s.id for step in steps for s in b.members(step)]

    assert sorted(order(batches, range(4))) == sorted(order(batches, range(4, 8)))
    assert order(batches, range(4)) != order(batches, range(4, 8))
    assert order(batches, range(4)) != order(Batches(encodings, 3, seed=2), range(4))


def test_a_batch_is_the_same_however_it_is_reached_or_split(encodings: Encodings) -> None:
    straight, jumping = Batches(encodings, 4, 7, 0.5), Batches(encodings, 4, 7, 0.5)
    for step in (9, 2, 5):
        for earlier in range(step):
            straight.members(earlier)
        whole = straight.batch(step, 0, 4)
        parts = [jumping.batch(step, i, i + 1) for i in range(len(whole.ids))]
        assert whole.ids == tuple(p.ids[0] for p in parts)
        for field in ("x_0", "noise", "u", "geometry"):
            assert torch.equal(getattr(whole, field), torch.cat([getattr(p, field) for p in parts])), field
        assert torch.equal(whole.text["hidden"], torch.cat([p.text["hidden"] for p in parts]))


def test_latents_and_captions_stay_together(encodings: Encodings) -> None:
    batches = Batches(encodings, 3, seed=3)
    by_id = {s.id: s for s in encodings.index.samples}
    for step in range(40):
        batch = batches.batch(step, 0, 3)
        for i, sample_id in enumerate(batch.ids):
            sample = by_id[sample_id]
            assert torch.equal(batch.text["hidden"][i], encodings.text(sample.texts[0])["hidden"])
            sides = [encodings.read(key) for key in sample.latents]
            assert any(((batch.x_0[i] - e["mean"]).abs() <= 7 * e["std"]).all() for e in sides)


def test_every_step_draws_the_posterior_and_the_flip_anew(encodings: Encodings) -> None:
    batches = Batches(encodings, 10, seed=4)
    draws = {}
    flips = Counter()
    for step in range(200):
        batch = batches.batch(step, 0, 10)
        for i, sample_id in enumerate(batch.ids):
            draws.setdefault(sample_id, []).append(batch.x_0[i])
        positions = [batches._side(s, step, p) == 1 for p, s in enumerate(batches.members(step))]
        flips.update(positions)
    assert 0.45 < flips[True] / 2000 < 0.55
    sample = encodings.index.samples[0]
    plain, mirrored = (encodings.read(key) for key in sample.latents)
    stack = torch.stack(draws[sample.id])
    assert len(torch.unique(stack.flatten(1), dim=0)) == 200
    middle = (plain["mean"] + mirrored["mean"]) / 2
    spread = ((plain["std"] ** 2 + mirrored["std"] ** 2) / 2 + ((plain["mean"] - mirrored["mean"]) / 2) ** 2).sqrt()
    assert ((stack.mean(0) - middle).abs() < 5 * spread / 200**0.5).float().mean() > 0.99
    assert (stack.std(0) / spread).mean().item() == pytest.approx(1, abs=0.05)


def test_caption_dropout_uses_the_empty_caption_at_its_rate(encodings: Encodings) -> None:
    batches = Batches(encodings, 10, seed=5, caption_dropout=0.3)
    empty = encodings.read(encodings.index.empty_text)["hidden"]
    dropped = sum(torch.equal(row, empty) for step in range(150) for row in batches.batch(step, 0, 10).text["hidden"])
    assert dropped / 1500 == pytest.approx(0.3, abs=0.04)


def test_timesteps_and_noise_are_fresh_and_spread(encodings: Encodings) -> None:
    batches = Batches(encodings, 10, seed=6)
    u = torch.cat([batches.batch(step, 0, 10).u for step in range(100)])
    assert len(u.unique()) == 1000 and (torch.histc(u, 10, 0, 1) - 100).abs().max() < 45
    noise = batches.batch(0, 0, 10).noise
    assert len(torch.unique(noise.flatten(1), dim=0)) == 10 and noise.std().item() == pytest.approx(1, abs=0.05)


def test_repeats_variants_and_regularisation(encodings: Encodings) -> None:
    """An epoch shows repeats as often as asked, as many regularisation pictures as others, and every variant in time."""
    samples = list(encodings.index.samples)
    own = [replace(s, repeats=1 + i % 3) for i, s in enumerate(samples[:6])]
    prior = [replace(s, regularisation=True) for s in samples[6:]]
    other = samples[0].texts[0]
    own[1] = replace(own[1], captions=("a", "b"), texts=(own[1].texts[0], other))
    changed = copy(encodings)
    changed.index = replace(encodings.index, samples=(*own, *prior))
    batches = Batches(changed, 5, seed=3, prior_weight=0.25)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        epochs.append(Counter(s.id for step in steps for s in batches.members(step)))
    for seen in epochs:
        assert all(seen[s.id] == s.repeats for s in own)
        assert sum(seen[s.id] for s in prior) == sum(s.repeats for s in own) == 12
    assert all(sum(seen[s.id] for seen in epochs) == 9 for s in prior)  # each its turn: 36 over 4
    texts, weights = Counter(), {}
    for step in range(120):
        batch = batches.batch(step, 0, 5)
        for i, sample_id in enumerate(batch.ids):
            weights[sample_id] = batch.weight[i].item()
            if sample_id == own[1].id:
                texts[next(k for k in own[1].texts if torch.equal(batch.text["hidden"][i], encodings.text(k)["hidden"]))] += 1
    assert all(weights[s.id] == 1.0 for s in own) and all(weights[s.id] == 0.25 for s in prior)
    assert min(texts.values()) > 0.3 * sum(texts.values()) and len(texts) == 2
