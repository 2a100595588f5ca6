"""Content keys, the store, the shards: what is encoded again, and what never is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import encode_folder
from PIL import Image

from pipeline.dataset.images import Geometry
from pipeline.encodings import ContentStore, EncodedSample, Index, latent_key, text_key, write_encoded
from pipeline.encodings import Encodings as Reader
from pipeline.errors import UserError
from pipeline.files import files_under, hash_tree

GEOMETRY = Geometry((64, 48), (43, 32), (5, 0, 37, 32))


@pytest.fixture
def pictures(tmp_path: Path, pictures_folder: Path) -> Path:
    return Path(shutil.copytree(pictures_folder, tmp_path / "data"))


@pytest.fixture
def again(tmp_path: Path, pictures: Path, sd_folder: Path):
    """Encodes the folder as it is now; returns (pictures, captions) really encoded."""

    def encode(**options: object) -> tuple[int, int]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        base = options.pop("base", sd_folder)
        _, counts = encode_folder(pictures, base, tmp_path / "store", tmp_path / "out", **options)
        return counts.pictures, counts.captions

    return encode


def test_every_ingredient_is_in_the_keys() -> None:
    key = latent_key("p", GEOMETRY, False, "vae", "float32")
    others = [
        latent_key("q", GEOMETRY, False, "vae", "float32"),
        latent_key("p", replace(GEOMETRY, crop=(4, 0, 36, 32)), False, "vae", "float32"),
        latent_key("p", replace(GEOMETRY, resized=(44, 32)), False, "vae", "float32"),
        latent_key("p", replace(GEOMETRY, original=(65, 48)), False, "vae", "float32"),
        latent_key("p", GEOMETRY, True, "vae", "float32"),
        latent_key("p", GEOMETRY, False, "other", "float32"),
        latent_key("p", GEOMETRY, False, "vae", "float16"),
        text_key("p", "vae", "float32"),
        text_key("q", "vae", "float32"),
        text_key("p", "other", "float32"),
        text_key("p", "vae", "float16"),
    ]
    assert len({key, *others}) == 12


def test_nothing_is_encoded_twice(again) -> None:
    assert again() == (10, 11)
    assert again() == (0, 0)


def test_an_edited_caption_costs_one_text_and_no_picture(again, pictures: Path) -> None:
    again()
    (pictures / "004.txt").write_text("something else entirely")
    assert again() == (0, 1)


def test_new_pixels_under_an_old_name_cost_one_picture(again, pictures: Path) -> None:
    again()
    shutil.copy(pictures / "005.png", pictures / "keep.png")
    Image.new("RGB", (32, 32), (9, 99, 199)).save(pictures / "005.png")
    (pictures / "keep.png").unlink()
    assert again() == (1, 0)


def test_a_renamed_picture_costs_nothing_and_changes_no_byte(again, pictures: Path, tmp_path: Path) -> None:
    again()
    before = hash_tree(tmp_path / "out")
    shutil.move(pictures / "000.png", pictures / "zzz.png")
    shutil.move(pictures / "000.txt", pictures / "zzz.txt")
    assert again() == (0, 0)
    assert hash_tree(tmp_path / "out") == before


def test_another_resolution_and_back(again) -> None:
    again()
    assert again(resolution=24) == (10, 0)
    assert again() == (0, 0)


def test_flips_are_a_second_latent_and_mirror_the_geometry(again, tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    again()
    assert again(flip=True) == (10, 0)
    Image.open(pictures / "000.png").resize((61, 40)).save(pictures / "000.png")
    encodings, _ = encode_folder(pictures, sd_folder, tmp_path / "store", tmp_path / "flipped", flip=True)
    for sample in encodings.index.samples:
        plain, mirrored = encodings.read_many(sample.latents)
        assert not torch.equal(plain["mean"], mirrored["mean"])
    wide = next(s for s in encodings.index.samples if encodings.read(s.latents[0])["geometry"][1] == 61)
    assert encodings.read(wide.latents[0])["geometry"].tolist() == [40, 61, 0, 8, 32, 32]
    assert encodings.read(wide.latents[1])["geometry"].tolist() == [40, 61, 0, 9, 32, 32]


def test_another_vae_costs_all_pictures_and_another_text_encoder_all_captions(again, sd_folder: Path, tmp_path: Path) -> None:
    again()
    other = Path(shutil.copytree(sd_folder, tmp_path / "other"))
    config = (other / "vae" / "config.json").read_text()
    (other / "vae" / "config.json").write_text(config.replace('"scaling_factor": 0.5', '"scaling_factor": 0.25'))
    assert again(base=other) == (10, 0)
    config = (other / "tokenizer" / "tokenizer_config.json").read_text()
    (other / "tokenizer" / "tokenizer_config.json").write_text(config + " ")
    assert again(base=other) == (0, 11)


def test_dtype_is_a_key_and_is_what_is_stored(again, tmp_path: Path) -> None:
    again()
    assert again(dtype="float16") == (10, 11)
    encodings = Reader(tmp_path / "out")
    assert {t.dtype for t in encodings.read(encodings.index.empty_text).values()} == {torch.float16}


def test_values_are_the_normalised_posterior_and_the_captions_own_embedding(
    pictures: Path, sd_folder: Path, tmp_path: Path
) -> None:
    """Against diffusers and transformers themselves, and never swapped between pictures."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    encodings, _ = encode_folder(pictures, sd_folder, tmp_path / "store", tmp_path / "out")
    vae = AutoencoderKL.from_pretrained(sd_folder / "vae")
    text, words = (
        CLIPTextModel.from_pretrained(sd_folder / "text_encoder"),
        CLIPTokenizer.from_pretrained(sd_folder / "tokenizer"),
    )
    by_caption = {s.caption: s for s in encodings.index.samples}
    assert len(by_caption) == 10
    for i in range(10):
        caption = (pictures / f"{i:03d}.txt").read_text()
        sample = by_caption[caption]
        pixels = (
            torch.from_numpy(np.asarray(Image.open(pictures / f"{i:03d}.png"), np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        )
        ids = words([caption], padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
            hidden = text(ids).last_hidden_state[0]
        entry = encodings.read(sample.latents[0])
        torch.testing.assert_close(entry["mean"], posterior.mean[0] * 0.5, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entry["std"], posterior.std[0] * 0.5, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encodings.read(sample.text)["hidden"], hidden, rtol=1e-4, atol=1e-5)


def test_a_picture_that_changed_after_the_manifest_is_refused(pictures: Path, sd_folder: Path, tmp_path: Path) -> None:
    from pipeline.config import Dataset
    from pipeline.dataset.prepare import prepare
    from pipeline.encode import encode
    from pipeline.families import family
    from pipeline.model_source import LocalModel

    manifest, _ = prepare(tmp_path, Dataset(path="data", resolution=32), lambda: None)

    def late() -> None:
        encode(
            manifest, tmp_path, family("sd"), LocalModel(sd_folder, None, None), ContentStore(tmp_path / "s"), "float32", False,
            torch.device("cpu"), lambda: None,
        )  # fmt: skip

    Image.new("RGB", (40, 40)).save(pictures / "003.png")
    with pytest.raises(UserError, match=r"003\.png changed since"):
        late()
    (pictures / "003.png").write_bytes(b"gone bad")
    with pytest.raises(UserError, match=r"003\.png is not a picture"):
        late()


def test_a_damaged_segment_is_encoded_again_and_nothing_else_breaks(again, tmp_path: Path) -> None:
    again()
    segments = files_under(tmp_path / "store")
    victim = max(segments, key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:100])
    pictures, captions = again()
    assert (pictures, captions) in [(10, 0), (0, 11)]
    assert again() == (0, 0)


def test_stopping_midway_keeps_what_is_done(pictures: Path, sd_folder: Path, tmp_path: Path, monkeypatch) -> None:
    from pipeline import encode as module
    from pipeline.errors import Interrupted

    monkeypatch.setattr(module, "_PICTURES", 2)
    monkeypatch.setattr(module, "_KEEP_EVERY", 2)
    calls = []

    def stop_at_fourth() -> None:
        calls.append(None)
        if len(calls) == 4:  # one batch of captions, then pictures
            raise Interrupted("stop")

    from pipeline.config import Dataset
    from pipeline.dataset.prepare import prepare
    from pipeline.families import family
    from pipeline.model_source import LocalModel

    manifest, _ = prepare(tmp_path, Dataset(path="data", resolution=32), lambda: None)
    arguments = (manifest, tmp_path, family("sd"), LocalModel(sd_folder, None, None))
    with pytest.raises(Interrupted):
        module.encode(*arguments, ContentStore(tmp_path / "s"), "float32", False, torch.device("cpu"), stop_at_fourth)
    _, counts = module.encode(*arguments, ContentStore(tmp_path / "s"), "float32", False, torch.device("cpu"), lambda: None)
    assert (counts.pictures, counts.captions) == (6, 0)


def test_shards_are_settled_by_key_and_one_new_sample_rewrites_one(tmp_path: Path, monkeypatch) -> None:
    from pipeline import encodings as module
    from pipeline.files import hash_json

    monkeypatch.setattr(module, "SHARD_BYTES", 4096)
    store = ContentStore(tmp_path / "store")

    def sample(i: int) -> EncodedSample:
        key = hash_json(["latents", i])[:32]
        if key not in store:
            store.add({key: {"mean": torch.full((4, 8, 8), float(i))}})
        return EncodedSample(f"{i:016x}", f"caption {i}", "train", (32, 32), (key,), empty)

    empty = hash_json("")[:32]
    store.add({empty: {"hidden": torch.zeros(2, 4)}})
    samples = tuple(sample(i) for i in range(40))
    index = Index("sd", "float32", empty, samples[:39])
    write_encoded(tmp_path / "a", index, store)
    write_encoded(tmp_path / "b", replace(index, samples=samples), store)
    a, b = hash_tree(tmp_path / "a"), hash_tree(tmp_path / "b")
    assert a.keys() == b.keys() and len(a) > 8
    assert len([name for name in a if a[name] != b[name]]) == 2  # its shard, and the index
    reader = Reader(tmp_path / "b")
    for i, s in enumerate(samples):
        assert reader.read(s.latents[0])["mean"].unique().tolist() == [float(i)]
