"""Metrics on cases with known answers, and samples that are resumed to the byte."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import encode_folder
from PIL import Image

from pipeline import lora
from pipeline.config import Threshold
from pipeline.diffusion import Ddpm
from pipeline.errors import UserError
from pipeline.evaluate.clip import Clip, clip_score, style_shift
from pipeline.evaluate.dino import Dino
from pipeline.evaluate.gate import compare, judge
from pipeline.evaluate.losses import Questions, mean_loss
from pipeline.evaluate.sampling import Sampler, Shot, draw_shots, use_scheduler
from pipeline.evaluate.scores import Gallery, clip_metrics, copies, dino_metrics
from pipeline.evaluate.similarity import cmmd, diversity, mean_similarity, nearest, paired_distance
from pipeline.families import family
from pipeline.files import hash_tree
from pipeline.metrics import NAMES
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_a_base_in_half_precision_draws_and_measures_nearly_the_same(
    name: str, dtype: torch.dtype, request: pytest.FixtureRequest, pictures_folder: Path, tmp_path: Path
) -> None:
    """The VAE stays in float32 whatever the rest is in; nothing of the types' meeting raises."""
    folder = request.getfixturevalue(f"{name}_folder")
    kind, model = family(name), LocalModel(folder, None, None)
    encodings, _ = encode_folder(pictures_folder, folder, tmp_path / "store", tmp_path / "out", name=name)
    drawn, losses = [], []
    for i, wanted in enumerate((torch.float32, dtype)):
        pipeline = kind.load_pipeline(model, CPU, wanted)
        use_scheduler(pipeline, "base" if name == "sd3" else "ddim")
        denoiser = getattr(pipeline, kind.denoiser_key)
        assert next(pipeline.vae.parameters()).dtype == torch.float32 and next(denoiser.parameters()).dtype == wanted
        lora.inject(denoiser, lora.LoraSpec(2, 2.0, 0.0, kind.lora_targets["attention"]), 0)
        with progress("", 0, "") as bar:
            sampler = Sampler("ddim", 3, 2.0, "", 32, 32)
            draw_shots(pipeline, [Shot("a red circle", 0, 1.0)], sampler, 1, tmp_path / str(i), lambda: None, bar)
            questions = Questions(encodings.index.samples[:3], 3)
            objective = kind.objective(model)
            losses.append(mean_loss(denoiser, kind, objective, encodings, questions, 4, CPU, lambda: None, bar))
        drawn.append(np.asarray(Image.open(next((tmp_path / str(i)).glob("*.png"))), np.float32))
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]
    assert 0 < np.abs(drawn[0] - drawn[1]).mean() < 6  # of 255


def test_a_base_that_overflows_is_named_and_an_adapter_that_does_is_told(
    sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = family("sd").load_pipeline(LocalModel(sd_folder, None, None), CPU, torch.float16)
    use_scheduler(pipeline, "ddim")
    pipeline.unet.conv_out.bias.data += math.inf
    sampler = Sampler("ddim", 1, 1.0, "", 32, 32)
    with progress("", 0, "") as bar:
        with pytest.raises(UserError, match=r"nothing finite in float16: set validate\.dtype to bfloat16 or float32"):
            draw_shots(pipeline, [Shot("a", 0, 0.0)], sampler, 1, tmp_path, lambda: None, bar)
        draw_shots(pipeline, [Shot("a", 0, 1.0)], sampler, 1, tmp_path, lambda: None, bar)
    assert "what the adapter draws is not finite" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [Shot("a", 0, 1.0).file_name]


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


def vectors(count: int, seed: int, towards: int | None = None) -> torch.Tensor:
    """Unit vectors in 16 dimensions; around one axis, if told."""
    rows = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    if towards is not None:
        rows[:, towards] += 4
    return torch.nn.functional.normalize(rows, dim=-1)


def test_cmmd_equals_the_formula_written_out() -> None:
    x, y = vectors(7, 0, 1), vectors(9, 1, 2)

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.exp(-float((a.double() - b.double()).square().sum()) / (2 * 10.0**2))

    within = [
        sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1)) for s in (x, y)
    ]
    across = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    assert cmmd(x, y).value == pytest.approx(1000 * (within[0] + within[1] - 2 * across), rel=1e-9)


def test_cmmd_tells_equal_distributions_from_others() -> None:
    same = [cmmd(vectors(40, 2 * s, 3), vectors(40, 2 * s + 1, 3)) for s in range(10)]
    assert abs(sum(d.value for d in same) / 10) < 0.05 and sum(d.low <= 0.05 for d in same) >= 8
    other = cmmd(vectors(40, 0, 3), vectors(40, 1, 4))
    assert other.low > 0.5 and other.low <= other.value <= other.high
    assert cmmd(vectors(40, 0, 3), vectors(40, 1, 4)) == other  # the interval is drawn from a fixed seed


def test_similarities_of_known_embeddings() -> None:
    x, y = unit([1.0, 0.0], [0.0, 1.0]), unit([1.0, 0.0], [-1.0, 0.0])
    assert mean_similarity(x, x) == pytest.approx(0.5) and mean_similarity(x, y) == pytest.approx(0.0)
    assert paired_distance(x, x) == pytest.approx(0) and paired_distance(x, -x) == pytest.approx(2)
    assert diversity([x, x[:1]]) == pytest.approx(1) and diversity([torch.cat([x[:1], x[:1]])]) == pytest.approx(0)
    assert diversity([y]) == pytest.approx(2)
    assert [(m.picture, round(m.cosine, 6)) for m in nearest(x, torch.cat([x.flip(0), y]))] == [(1, 1.0), (0, 1.0)]


def test_copies_of_training_pictures_are_found_and_others_are_not(pictures_folder: Path) -> None:
    pictures = [Image.open(p).convert("RGB") for p in sorted(pictures_folder.glob("*.png"))]
    again = pictures[3].resize((64, 64)).resize((32, 32))
    assert copies([again, Image.new("RGB", (32, 32), "red")], pictures) == [(0, 3)]


def test_shuffled_prompts_score_lower_and_copies_of_the_data_are_at_no_distance(clip_folder: Path) -> None:
    """CLIP's own numbers, on a gallery whose answers are known: samples that are the data, a base that is another colour."""
    clip = Clip(LocalModel(clip_folder, None, None), CPU)
    rng = np.random.default_rng(0)
    data = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(12)]
    other = [Image.new("RGB", (32, 32), (i * 20, 0, 0)) for i in range(6)]
    prompts = ["a red circle", "a blue square", "a", "green", "small", "large"]
    gallery = Gallery(prompts, other, data[:6], data[:9], data[9:], other[:2], other[:2])
    metrics, matches = clip_metrics(clip, gallery)
    texts, images = clip.texts(prompts), clip.images(data[:6])
    assert metrics["clip_score"] == pytest.approx(100 * float((texts * images).sum(-1).mean()), rel=1e-5)
    shuffled, _ = clip_metrics(clip, replace(gallery, prompts=[*prompts[1:], prompts[0]]))
    assert shuffled["clip_score"] != pytest.approx(metrics["clip_score"], rel=1e-4)
    assert metrics["cmmd"] < metrics["base_cmmd"] and metrics["cmmd_low"] <= metrics["cmmd"] <= metrics["cmmd_high"]
    assert metrics["nearest_similarity"] == pytest.approx(1.0) and [m.picture for m in matches] == list(range(6))
    assert metrics["drift"] == pytest.approx(0, abs=1e-6) and metrics["leak"] == pytest.approx(0, abs=1e-6)
    assert "diversity" not in metrics
    assert "diversity" in clip_metrics(clip, replace(gallery, prompts=["a"] * 6))[0]
    assert set(metrics) <= set(NAMES)


def test_dino_reads_the_transformers_layout(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    size = {"height": 28, "width": 28}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "BitImageProcessor",
                "size": {"shortest_edge": 28},
                "crop_size": size,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            }
        )
    )
    pictures = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue", "white")]
    dino = Dino(LocalModel(tmp_path, None, None), CPU)
    pixels = torch.stack([torch.from_numpy(np.asarray(p, np.float32) / 127.5 - 1).permute(2, 0, 1) for p in pictures])
    with torch.no_grad():
        wanted = Dinov2Model.from_pretrained(tmp_path).eval()(pixel_values=pixels).pooler_output
    torch.testing.assert_close(dino.images(pictures), torch.nn.functional.normalize(wanted, dim=-1), rtol=1e-4, atol=1e-5)
    metrics = dino_metrics(dino, Gallery([""] * 3, pictures, pictures, pictures, pictures[:1]))
    assert metrics["dino_similarity"] == pytest.approx(metrics["base_dino_similarity"])
    assert dino_metrics(dino, Gallery([""], pictures[:1], pictures[:1], pictures, [])) == {}


def test_shares_of_the_bases_value_and_comparison_with_an_earlier_adapter() -> None:
    metrics = {"clip_score": 20.0, "base_clip_score": 25.0, "cmmd": 1.0}
    assert not judge(metrics, {"clip_score": Threshold(min_of_base=0.9)})[0].passed
    assert judge(metrics, {"clip_score": Threshold(min=10.0, min_of_base=0.7)})[0].minimum == pytest.approx(17.5)
    with pytest.raises(UserError, match="base_cmmd"):
        judge(metrics, {"cmmd": Threshold(max_of_base=0.5)})
    findings = compare(metrics, {"clip_score": 21.0, "cmmd": 0.8}, ["clip_score", "cmmd", "leak"], 0.1, "main")
    assert [(f.metric, f.passed) for f in findings] == [("clip_score", True), ("cmmd", False)]
    assert findings[1].sentence() == "cmmd 1: fails (at most 0.88, from 0.8 at main)"
    assert not judge({"cmmd": float("nan")}, {"cmmd": Threshold(max=1.0)})[0].passed


def test_the_embedded_clip_tells_right_prompts_from_shuffled_ones() -> None:
    """Real weights and pictures that it was trained on: each caption with its own picture, and with the next one's."""
    import sys

    assets = Path(__file__).parent.parent / "assets"
    sys.path.insert(0, str(assets))
    from world import draw, random_scene

    rng = np.random.default_rng(3)
    scenes = [random_scene(rng) for _ in range(24)]
    pictures = [draw(scene, rng) for scene in scenes]
    prompts = [scene.caption() for scene in scenes]
    clip = Clip(LocalModel(assets / "tiny-clip", None, None), CPU)
    gallery = Gallery(prompts, pictures, pictures, pictures, pictures)
    right, _ = clip_metrics(clip, gallery)
    shuffled, _ = clip_metrics(clip, replace(gallery, prompts=[*prompts[1:], prompts[0]]))
    assert right["clip_score"] > shuffled["clip_score"] + 20
    assert right["base_clip_score"] == right["clip_score"] and right["nearest_similarity"] == pytest.approx(1)
    assert right["cmmd"] <= 0  # samples that are the data: the unbiased estimator counts each picture as its own neighbour
