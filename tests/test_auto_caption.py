"""Captions written by a BLIP-type model: a tiny random one, through the code that loads a real one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from project import Project

from pipeline.auto_caption import Captioner, write_captions
from pipeline.config import Dataset
from pipeline.dataset.manifest import read_manifest
from pipeline.dataset.prepare import prepare
from pipeline.model_source import LocalModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil

    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", *(f"word{i}" for i in range(25))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={
            **shape, "encoder_hidden_size": 16, "vocab_size": len(words), "bos_token_id": 5, "eos_token_id": 3,
            "sep_token_id": 3, "pad_token_id": 0, "max_position_embeddings": 80, "projection_dim": 16,
        },
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        image_text_hidden_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return LocalModel(folder, None, None)


def test_captions_are_written_once_per_picture_and_model(
    blip: LocalModel, pictures_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [(path, path.stem) for path in sorted(pictures_folder.glob("*.png"))]
    first = write_captions(pictures, blip, tmp_path, CPU, "#ffffff", lambda: None)
    assert len(first) == len(pictures) and all(isinstance(c, str) and c for c in first)
    monkeypatch.setattr(Captioner, "__call__", lambda self, paths: pytest.fail("a caption is written twice"))
    assert write_captions(pictures, blip, tmp_path, CPU, "#ffffff", lambda: None) == first


def test_the_captions_are_the_librarys_own(blip: LocalModel, pictures_folder: Path) -> None:
    from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

    path = sorted(pictures_folder.glob("*.png"))[0]
    model = BlipForConditionalGeneration.from_pretrained(blip.path).eval()
    pixels = BlipImageProcessorPil.from_pretrained(blip.path)(Image.open(path).convert("RGB"), return_tensors="pt").pixel_values
    tokens = model.generate(pixel_values=pixels, max_new_tokens=60, do_sample=False)
    wanted = AutoTokenizer.from_pretrained(blip.path).decode(tokens[0], skip_special_tokens=True)
    assert Captioner(blip, CPU, "#ffffff")([path]) == [wanted.strip() or "a picture"]


def test_only_pictures_without_a_caption_get_one(blip: LocalModel, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 9, 9)).save(tmp_path / "data" / f"{i}.png")
    (tmp_path / "data" / "1.txt").write_text("mine")
    asked: list[str] = []

    def auto(pictures: list[tuple[Path, str]]) -> list[str]:
        asked.extend(path.name for path, _ in pictures)
        return write_captions(pictures, blip, tmp_path / "kept", CPU, "#ffffff", lambda: None)

    settings = Dataset(
        path="data", resolution=32, missing_caption="auto", auto_caption="x", held_out_fraction=0.0, trigger="zyx"
    )
    samples = prepare(tmp_path, settings, lambda: None, tmp_path / "unpacked", auto).manifest.samples
    assert asked == ["0.png", "2.png"] and samples[1].captions == ("zyx, mine",)
    assert all(s.captions[0].startswith("zyx, ") for s in samples)


def test_the_stage_writes_them_once(blip: LocalModel, project: Project) -> None:
    """Through DVC; other settings of the dataset make the stage run again, and no caption be written again."""
    shutil.copytree(blip.path, project.path("blip"))
    uncaptioned = sorted(project.path("data").glob("*.txt"))[:2]
    for path in uncaptioned:
        path.unlink()
    project.set("dataset", missing_caption="auto", auto_caption="blip", trigger="zyx")
    done = project.cli("run", "prepare-dataset")
    assert done.returncode == 0, done.stderr
    samples = {s.path: s for s in read_manifest(project.path("build/dataset")).samples}
    written = [samples[path.with_suffix(".png").name].captions[0] for path in uncaptioned]
    assert all(caption.startswith("zyx, ") and len(caption) > len("zyx, ") for caption in written)
    kept = {path: path.stat().st_mtime_ns for path in project.path(".work/captions").rglob("*") if path.is_file()}
    assert kept
    project.set("dataset", trigger="abc")
    assert project.cli("run", "prepare-dataset").returncode == 0
    samples = {s.path: s for s in read_manifest(project.path("build/dataset")).samples}
    again = [samples[path.with_suffix(".png").name].captions[0] for path in uncaptioned]
    assert again == [caption.replace("zyx", "abc") for caption in written]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
