"""Metrics on cases with known answers, and samples that are resumed to the byte."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encoded import encode_folder
from PIL import Image

from pipeline.config import Threshold
from pipeline.diffusion import Ddpm
from pipeline.errors import UserError
from pipeline.evaluate.clip import Clip, clip_score, style_shift
from pipeline.evaluate.gate import judge
from pipeline.evaluate.losses import Questions, mean_loss
from pipeline.evaluate.sampling import Sampler, Shot, draw_shots, use_scheduler
from pipeline.families import family
from pipeline.files import hash_tree
from pipeline.model_source import LocalModel
from pipeline.pictures import labelled_grid
from pipeline.progress import progress

CPU = torch.device("cpu")


def unit(*rows: list[float]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


def test_clip_score_of_known_embeddings() -> None:
    a = unit([1.0, 0.0], [0.0, 1.0])
    assert clip_score(a, a) == pytest.approx(100)
    assert clip_score(a, a.flip(0)) == pytest.approx(0)
    assert clip_score(a, -a) == pytest.approx(-100)


def test_style_shift_of_known_embeddings() -> None:
    base, training = unit([1.0, 0.0, 0.0]), unit([0.0, 1.0, 0.0])
    assert style_shift(base, base, training) == pytest.approx(0)
    assert style_shift(base, training, training) == pytest.approx(1)
    assert style_shift(base, (base + training) / 2, training) == pytest.approx(0.5)
    assert style_shift(base, base + torch.tensor([[0.0, 0.0, 9.0]]), training) == pytest.approx(0)


def test_clip_embeddings_equal_the_librarys(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    clip = Clip(LocalModel(clip_folder, None, None), CPU)
    theirs = CLIPModel.from_pretrained(clip_folder).eval()
    pictures = [Image.new("RGB", (32, 32), c) for c in ("red", "blue", "white")]
    pixels = torch.stack(
        [torch.tensor(list(p.tobytes()), dtype=torch.float32).view(32, 32, 3).permute(2, 0, 1) for p in pictures]
    )
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(["a red circle", "a"], padding=True, return_tensors="pt")
    with torch.no_grad():
        vision = theirs(pixel_values=(pixels / 255 - 0.5) / 0.5, **tokens)
    torch.testing.assert_close(clip.images(pictures), vision.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip.texts(["a red circle", "a"]), vision.text_embeds, rtol=1e-4, atol=1e-5)


def test_gate_holds_thresholds_against_metrics() -> None:
    findings = judge({"a": 1.0, "b": 2.0}, {"a": Threshold(max=1.0), "b": Threshold(min=1.0, max=1.5)})
    assert [f.passed for f in findings] == [True, False]
    assert findings[1].sentence() == "b 2: fails (at least 1 and at most 1.5)"
    assert findings[0].sentence() == "a 1: passes (at most 1)"
    assert judge({"a": 1.0}, {}) == []
    with pytest.raises(UserError, match=r"gate.c: no such metric was measured; there are: a, b"):
        judge({"a": 1.0, "b": 2.0}, {"c": Threshold(max=1)})
    assert not judge({"a": float("nan")}, {"a": Threshold(max=1.0)})[0].passed


class Perfect(torch.nn.Module):
    """A denoiser that answers with a constant."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x_t, t, encoder_hidden_states):
        from types import SimpleNamespace

        return SimpleNamespace(sample=torch.full_like(x_t, self.value.item()))


def test_mean_loss_of_known_predictions_and_the_same_questions_for_all(
    pictures_folder: Path, sd_folder: Path, tmp_path: Path
) -> None:
    encodings, _ = encode_folder(pictures_folder, sd_folder, tmp_path / "store", tmp_path / "out")
    objective = Ddpm(torch.linspace(0.99, 0.01, 100), "epsilon")

    def loss(value: float, samples=encodings.index.samples, batch: int = 7) -> float:
        with progress("", 0, "") as bar:
            return mean_loss(
                Perfect(value), family("sd"), objective, encodings, Questions(samples, 4), batch, CPU, lambda: None, bar
            )

    # E(ε − c)² = 1 + c² for every sample and timestep
    assert loss(0.0) == pytest.approx(1, abs=0.03)
    assert loss(2.0) - loss(0.0) == pytest.approx(4, abs=0.2)
    assert loss(0.0) == loss(0.0) == pytest.approx(loss(0.0, batch=1), rel=1e-6)
    parts = [loss(0.0, [s]) for s in encodings.index.samples]
    assert sum(parts) / len(parts) == pytest.approx(loss(0.0), rel=1e-6)  # a sample's noise is its own


def test_samples_carry_their_parameters_and_resume_to_the_byte(sd_folder: Path, tmp_path: Path) -> None:
    pipeline = family("sd").load_pipeline(LocalModel(sd_folder, None, None), CPU, torch.float32)
    use_scheduler(pipeline, "ddim")
    sampler = Sampler("ddim", 2, 3.0, "", 32, 32)
    shots = [Shot(prompt, seed, 0.5) for seed in (0, 1) for prompt in ("a red <circle>/../x", "a blue square", "ü " * 90)]

    def draw(folder: Path) -> dict[str, str]:
        with progress("", 0, "") as bar:
            draw_shots(pipeline, shots, sampler, 2, folder, lambda: None, bar)
        return hash_tree(folder)

    whole = draw(tmp_path / "a")
    assert len(whole) == 6 and draw(tmp_path / "b") == whole
    for i, name in enumerate(sorted(whole)):
        if i % 2:
            (tmp_path / "b" / name).unlink()
    assert draw(tmp_path / "b") == whole
    for shot in shots:
        with Image.open(tmp_path / "a" / shot.file_name) as image:
            told = json.loads(image.info["parameters"])
        assert told["prompt"] == shot.prompt and told["seed"] == shot.seed and told["steps"] == 2
    assert {p.parent for p in (tmp_path / "a").rglob("*.png")} == {tmp_path / "a"}


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++"])
def test_every_scheduler_draws(scheduler: str, sd_folder: Path, tmp_path: Path) -> None:
    pipeline = family("sd").load_pipeline(LocalModel(sd_folder, None, None), CPU, torch.float32)
    use_scheduler(pipeline, scheduler)
    with progress("", 0, "") as bar:
        draw_shots(pipeline, [Shot("a", 0, 0.0)], Sampler(scheduler, 3, 1.0, "", 32, 32), 1, tmp_path, lambda: None, bar)
    assert Image.open(next(tmp_path.glob("*.png"))).size == (32, 32)


def test_names_tell_shots_apart() -> None:
    shot = Shot("a red circle", 0, 1.0)
    others = [
        replace(shot, prompt="a red  circle"),
        replace(shot, prompt="a red circle!"),
        replace(shot, seed=1),
        replace(shot, scale=0.5),
    ]
    assert len({s.file_name for s in [shot, *others]}) == 5
    shutil.os.fsencode(Shot("字" * 500, 0, 1.0).file_name)
    assert len(Shot("字" * 500, 0, 1.0).file_name.encode()) < 255


def test_grids_are_the_same_every_time_and_hold_their_pictures() -> None:
    picture = Image.new("RGB", (64, 64), "red")
    grid = labelled_grid([[picture, picture]], columns=["base", "adapter"], row_captions=["a prompt " * 30])
    assert (
        grid.tobytes()
        == labelled_grid([[picture, picture]], columns=["base", "adapter"], row_captions=["a prompt " * 30]).tobytes()
    )
    assert sum(n for n, colour in grid.getcolors(2**24) if colour == (255, 0, 0)) == 2 * 192 * 192
