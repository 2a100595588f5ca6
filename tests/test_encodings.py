"""Content keys, the store, the shards: what is encoded again, and what never is."""

from __future__ import annotations

import shutil
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import FLIPPED, HOW, encode_folder, encode_manifest, prepare_folder
from PIL import Image

from pipeline.batches import Batches
from pipeline.dataset.geometry import Geometry, cut
from pipeline.dataset.manifest import Manifest, Sample, read_manifest, write_manifest
from pipeline.encode import token_report
from pipeline.encodings import ContentStore, EncodedSample, Index, Reading, latent_key, mask_key, text_key, write_encoded
from pipeline.encodings import Encodings as Reader
from pipeline.errors import AlreadyRunning, UserError
from pipeline.families import family
from pipeline.files import files_under, hash_tree
from pipeline.lock import held
from pipeline.model_source import LocalModel

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
        text_key("p", Reading("vae", 1, 0, "float32")),
        text_key("q", Reading("vae", 1, 0, "float32")),
        text_key("p", Reading("other", 1, 0, "float32")),
        text_key("p", Reading("vae", 2, 0, "float32")),
        text_key("p", Reading("vae", 1, 1, "float32")),
        text_key("p", Reading("vae", 1, 0, "float16")),
        mask_key("p", GEOMETRY, False, 8),
        mask_key("q", GEOMETRY, False, 8),
        mask_key("p", replace(GEOMETRY, crop=(4, 0, 36, 32)), False, 8),
        mask_key("p", GEOMETRY, True, 8),
        mask_key("p", GEOMETRY, False, 16),
    ]
    assert len({key, *others}) == 19


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
    assert again(how=FLIPPED) == (10, 0)
    Image.open(pictures / "000.png").resize((61, 40)).save(pictures / "000.png")
    encodings, _ = encode_folder(pictures, sd_folder, tmp_path / "store", tmp_path / "flipped", how=FLIPPED)
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
    assert again(how=replace(HOW, dtype="float16")) == (10, 11)
    encodings = Reader(tmp_path / "out")
    assert {t.dtype for t in encodings.text(encodings.index.empty_text).values()} == {torch.float16}


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
    by_caption = {s.captions[0]: s for s in encodings.index.samples}
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
        torch.testing.assert_close(encodings.text(sample.texts[0])["hidden"], hidden, rtol=1e-4, atol=1e-5)


def test_a_picture_that_changed_after_the_manifest_is_refused(pictures: Path, sd_folder: Path, tmp_path: Path) -> None:
    manifest = prepare_folder(pictures)

    def late() -> None:
        encode_manifest(manifest, tmp_path, sd_folder, ContentStore(tmp_path / "s"))

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
    from pipeline import encoders as module
    from pipeline.errors import Interrupted

    monkeypatch.setattr(module, "_PICTURES", 2)
    monkeypatch.setattr(module, "_KEEP_EVERY", 2)
    calls = []

    def stop_at_fourth() -> None:
        calls.append(None)
        if len(calls) == 4:  # one batch of captions, then pictures
            raise Interrupted("stop")

    manifest = prepare_folder(pictures)
    with pytest.raises(Interrupted):
        encode_manifest(manifest, tmp_path, sd_folder, ContentStore(tmp_path / "s"), check_stop=stop_at_fourth)
    _, counts = encode_manifest(manifest, tmp_path, sd_folder, ContentStore(tmp_path / "s"))
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
        return EncodedSample(f"{i:016x}", (f"caption {i}",), "train", (32, 32), (key,), (empty,))

    empty = hash_json("")[:32]
    store.add({empty: {"hidden": torch.zeros(2, 4)}})
    samples = tuple(sample(i) for i in range(40))
    index = Index("sd", "float32", 0, 1, empty, samples[:39])
    write_encoded(tmp_path / "a", index, store)
    write_encoded(tmp_path / "b", replace(index, samples=samples), store)
    a, b = hash_tree(tmp_path / "a"), hash_tree(tmp_path / "b")
    assert a.keys() == b.keys() and len(a) > 8
    assert len([name for name in a if a[name] != b[name]]) == 2  # its shard, and the index
    reader = Reader(tmp_path / "b")
    for i, s in enumerate(samples):
        assert reader.read(s.latents[0])["mean"].unique().tolist() == [float(i)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_read_of_the_store_keeps_none_of_its_files_mapped(tmp_path: Path) -> None:
    """A shard has entries from all of the store: mapped, that is all of it in memory."""
    store = ContentStore(tmp_path / "store")
    store.add({f"{i:032x}": {"mean": torch.full((4, 8, 8), float(i))} for i in range(8)})
    entries = store.read(store.keys())
    assert entries[f"{3:032x}"]["mean"].unique().tolist() == [3.0]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_picture_more_in_the_manifest_takes_half_a_kilobyte_to_read(tmp_path: Path) -> None:
    """Lines come one by one, and equal geometries are one object: it was two and a half."""

    def peak(count: int) -> int:
        geometry = Geometry((640, 480), (85, 64), (10, 0, 74, 64))
        samples = tuple(
            Sample(f"{i:06d}.jpg", f"{i:064x}", geometry, (f"noise number {i % 50}",), "train") for i in range(count)
        )
        write_manifest(tmp_path / str(count), Manifest("data", "", "#ffffff", samples), ())
        tracemalloc.start()
        manifest = read_manifest(tmp_path / str(count))
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert manifest.samples == samples
        return taken

    peak(10)  # whatever is loaded on first use
    assert (peak(1100) - peak(100)) / 1000 < 1000


# --- fall-backs, long captions, masks, several processes, the store's upkeep


def test_worker_processes_and_smaller_batches_change_no_byte(pictures: Path, sd_folder: Path, tmp_path: Path) -> None:
    for i in range(10, 70):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (34, 40, 3), dtype=np.uint8)).save(pictures / f"{i:03d}.png")
        (pictures / f"{i:03d}.txt").write_text(f"noise {i}")
    encode_folder(pictures, sd_folder, tmp_path / "s1", tmp_path / "one")
    encode_folder(pictures, sd_folder, tmp_path / "s2", tmp_path / "two", workers=2)
    assert hash_tree(tmp_path / "one") == hash_tree(tmp_path / "two")


def test_out_of_memory_halves_the_batch_and_goes_on(
    pictures: Path, sd_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from pipeline.families.sd import StableDiffusion

    encode_folder(pictures, sd_folder, tmp_path / "s1", tmp_path / "one")
    honest, sizes = StableDiffusion.encode_pixels, []

    def small(self, vae, pixels):
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError
        return honest(self, vae, pixels)

    monkeypatch.setattr(StableDiffusion, "encode_pixels", small)
    encodings, counts = encode_folder(pictures, sd_folder, tmp_path / "s2", tmp_path / "two")
    assert counts.pictures == 10 and sizes[:3] == [8, 4, 2] and set(sizes[3:]) == {2}
    assert "out of memory with 8 pictures at once: going on with 4" in capsys.readouterr().out
    for sample in encodings.index.samples:
        before = Reader(tmp_path / "one").read(sample.latents[0])["mean"]
        torch.testing.assert_close(encodings.read(sample.latents[0])["mean"], before, rtol=1e-4, atol=1e-5)

    def never(self, vae, pixels):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(StableDiffusion, "encode_pixels", never)
    with pytest.raises(UserError, match=r"\.png: encoding it alone takes more memory(.|\n)*encode\.tiling"):
        encode_folder(pictures, sd_folder, tmp_path / "s3", tmp_path / "three")


def test_out_of_memory_halves_the_captions_too(pictures: Path, sd_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from pipeline.families.sd import StableDiffusion

    encode_folder(pictures, sd_folder, tmp_path / "s1", tmp_path / "one")
    honest, sizes, most = StableDiffusion.encode_captions, [], 4

    def small(self, encoders, captions, chunks, clip_skip):
        sizes.append(len(captions))
        if len(captions) > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return honest(self, encoders, captions, chunks, clip_skip)

    monkeypatch.setattr(StableDiffusion, "encode_captions", small)
    encodings, counts = encode_folder(pictures, sd_folder, tmp_path / "s2", tmp_path / "two")
    assert counts.captions == 11 and sizes == [16, 8, 4, 4, 4]
    assert "out of memory with 16 captions at once: going on with 8" in capsys.readouterr().out
    for sample in encodings.index.samples:
        before = Reader(tmp_path / "one").text(sample.texts[0])["hidden"]
        torch.testing.assert_close(encodings.text(sample.texts[0])["hidden"], before, rtol=1e-4, atol=1e-5)
    most = 0
    with pytest.raises(UserError, match=r"encoding one caption takes more memory than cpu has"):
        encode_folder(pictures, sd_folder, tmp_path / "s3", tmp_path / "three")


def test_half_precision_that_overflows_is_done_again_in_float32(
    pictures: Path, sd_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from pipeline.families.base import Posterior
    from pipeline.families.sd import StableDiffusion

    honest = StableDiffusion.encode_pixels

    def overflowing(self, vae, pixels):
        posterior = honest(self, vae, pixels)
        half = vae.dtype == torch.bfloat16
        return Posterior(posterior.mean * float("inf"), posterior.std) if half else posterior

    monkeypatch.setattr(StableDiffusion, "encode_pixels", overflowing)
    encodings, _ = encode_folder(
        pictures, sd_folder, tmp_path / "s", tmp_path / "out", how=replace(HOW, compute_dtype="bfloat16")
    )
    assert "encoded in float32" in capsys.readouterr().out
    plain, _ = encode_folder(pictures, sd_folder, tmp_path / "s2", tmp_path / "plain")
    for a, b in zip(encodings.index.samples, plain.index.samples, strict=True):
        assert torch.equal(encodings.read(a.latents[0])["mean"], plain.read(b.latents[0])["mean"])

    def hopeless(self, vae, pixels):
        posterior = honest(self, vae, pixels)
        return Posterior(posterior.mean * float("nan"), posterior.std)

    monkeypatch.setattr(StableDiffusion, "encode_pixels", hopeless)
    with pytest.raises(UserError, match=r"\.png: its latents are not finite"):
        encode_folder(pictures, sd_folder, tmp_path / "s3", tmp_path / "nan")


def test_long_captions_in_chunks_and_left_out_layers_match_the_library(pictures: Path, sd_folder: Path, tmp_path: Path) -> None:
    """Chunks against encoding each stretch by itself; clip-skip against diffusers' own prompt encoding."""
    from pipeline.evaluate.sampling import clip_skip_can_be
    from pipeline.families import family
    from pipeline.model_source import LocalModel

    long = " ".join(["red circle"] * 20)
    (pictures / "000.txt").write_text(long)
    pipeline = family("sd").load_pipeline(LocalModel(sd_folder, None, None), torch.device("cpu"), torch.float32)
    words, limit = pipeline.tokenizer, pipeline.tokenizer.model_max_length
    how = replace(HOW, caption_chunks=3)
    encodings, _ = encode_folder(pictures, sd_folder, tmp_path / "s", tmp_path / "out", how=how)
    sample = next(s for s in encodings.index.samples if s.captions[0] == long)
    ids = words(long, add_special_tokens=False).input_ids
    assert len(ids) > limit
    states = []
    for i in range(3):
        piece = [words.bos_token_id, *ids[i * (limit - 2) : (i + 1) * (limit - 2)], words.eos_token_id]
        piece += [words.pad_token_id] * (limit - len(piece))
        with torch.no_grad():
            states.append(pipeline.text_encoder(torch.tensor([piece])).last_hidden_state[0])
    torch.testing.assert_close(encodings.text(sample.texts[0])["hidden"], torch.cat(states), rtol=1e-4, atol=1e-5)

    skipped, _ = encode_folder(pictures, sd_folder, tmp_path / "s", tmp_path / "skip", how=replace(HOW, clip_skip=1))
    sample = skipped.index.samples[0]
    with torch.no_grad(), clip_skip_can_be(pipeline.text_encoder):
        wanted, _ = pipeline.encode_prompt(sample.captions[0], "cpu", 1, False, clip_skip=1)
    torch.testing.assert_close(skipped.text(sample.texts[0])["hidden"], wanted[0], rtol=1e-4, atol=1e-5)


def test_captions_that_are_cut_off_are_listed_by_sample(pictures: Path, sd_folder: Path, tmp_path: Path, capsys) -> None:
    long = " ".join(["word"] * 90)
    (pictures / "004.txt").write_text(long)
    store = ContentStore(tmp_path / "s")
    for _ in range(2):  # the second time everything is in the store, and the list is the same
        index, _ = encode_manifest(prepare_folder(pictures), tmp_path, sd_folder, store)
        report = token_report(index, store)
        assert [row["caption"] for row in report["cut_off"]] == [long] and report["cut_off"][0]["tokens"] > report["limit"]
        assert sum(report["lengths"].values()) == 10
        assert "1 captions are longer than" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_masks_come_resized_and_mirrored_with_their_latents(
    name: str, pictures: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Of their latents' own size, whatever the VAE's factor: the tiny one's is 4, real ones' are 8."""
    (pictures / "masks").mkdir()
    for path in sorted(pictures.glob("*.png")):
        mask = Image.new("L", Image.open(path).size)
        mask.paste(255, (0, 0, mask.width // 4, mask.height))
        mask.save(pictures / "masks" / path.name)
    base = request.getfixturevalue(f"{name}_folder")
    encodings, counts = encode_folder(
        pictures, base, tmp_path / "s", tmp_path / "out", name, how=FLIPPED, masks="masks", held_out_fraction=0.0
    )
    assert counts.pictures == 20
    for sample in encodings.index.samples:
        plain, mirrored = (encodings.read(key)["mask"] for key in sample.masks)
        assert plain.shape == (1, *encodings.read(sample.latents[0])["mean"].shape[1:]) and torch.equal(
            mirrored, plain.flip(-1)
        )
        assert plain[0, :, :2].min() == 1 and plain[0, :, 2:].max() == 0
    batches = Batches(encodings, 5, seed=0)
    for step in range(4):
        batch = batches.batch(step, 0, 5)
        for i, member in enumerate(batches.members(step)):
            side = batches._side(member, step, i)
            assert torch.equal(batch.mask[i], encodings.read(member.masks[side])["mask"])


def test_alpha_is_a_mask_beside_pictures_without_one(pictures: Path, sd_folder: Path, tmp_path: Path) -> None:
    """Of two concepts one is masked by its transparency; in a batch the other's loss counts everywhere."""
    (pictures / "cut-out").mkdir()
    for path in sorted(pictures.glob("00[0-4].*")):
        shutil.move(path, pictures / "cut-out" / path.name)
    for path in (pictures / "cut-out").glob("*.png"):
        image = Image.open(path).convert("RGB")
        alpha = Image.new("L", image.size)
        alpha.paste(255, (0, 0, image.width, image.height // 2))
        image.putalpha(alpha)
        image.save(path)
    (pictures / "whole").mkdir()
    for path in sorted(pictures.glob("00*.*")):
        shutil.move(path, pictures / "whole" / path.name)
    concepts = ({"path": "cut-out", "masks": "alpha"}, {"path": "whole"})
    encodings, _ = encode_folder(
        pictures, sd_folder, tmp_path / "s", tmp_path / "out", concepts=concepts, held_out_fraction=0.0
    )
    masked = [s for s in encodings.index.samples if s.masks]
    assert len(masked) == 5 and len(encodings.index.samples) == 10
    for sample in masked:
        mask = encodings.read(sample.masks[0])["mask"]
        assert mask[0, :4].min() == 1 and mask[0, 4:].max() == 0
    batches = Batches(encodings, 10, seed=0)
    batch = batches.batch(0, 0, 10)
    assert batch.mask.shape[2:] == batch.x_0.shape[2:]
    for i, member in enumerate(batches.members(0)):
        assert batch.mask[i].mean() == (0.5 if member.masks else 1.0)


def test_the_store_is_counted_cleaned_and_verified(pictures: Path, sd_folder: Path, tmp_path: Path) -> None:
    from pipeline.cache import collect, stats, verify
    from pipeline.workspace import Workspace

    workspace = Workspace(tmp_path, tmp_path)
    out = tmp_path / "build" / "encoded"
    encode_folder(pictures, sd_folder, workspace.store, out, how=FLIPPED)
    shutil.rmtree(out)
    encode_folder(pictures, sd_folder, workspace.store, out)
    assert "31 encodings" in stats(workspace) and "21 of them are in use" in stats(workspace)
    assert collect(workspace, 1.0, dry_run=False).startswith("0 encodings")
    assert collect(workspace, 0.0, dry_run=True).startswith("10 encodings would be")
    assert collect(workspace, 0.0, dry_run=False).startswith("10 encodings were")
    assert "21 encodings" in stats(workspace) and verify(workspace)[0] == 0
    _, counts = encode_folder(pictures, sd_folder, workspace.store, tmp_path / "again")
    assert (counts.pictures, counts.captions) == (0, 0)
    victim = ContentStore(workspace.store).segments()[0]
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(bytes(data))
    with held(workspace.work / "precompute-latents-and-embeddings" / "x" / "lock", "x"), pytest.raises(AlreadyRunning):
        collect(workspace, 0.0, dry_run=True)
    assert verify(workspace)[0] == 1 and not victim.exists()
    assert verify(workspace)[0] == 0


def test_another_commit_of_the_base_is_another_base() -> None:
    one, two = (LocalModel(Path("/nowhere"), None, commit * 40) for commit in "ab")
    for folders in (("vae",), ("text_encoder", "tokenizer")):
        assert one.fingerprint(*folders) != two.fingerprint(*folders)
    assert one.fingerprint("vae") != one.fingerprint("text_encoder")


def test_tiles_are_the_librarys_own(pictures: Path, sd_folder: Path, tmp_path: Path) -> None:
    """A picture larger than the VAE's tile goes through in tiles, and comes out as diffusers' tiled VAE gives it."""
    kind, model = family("sd"), LocalModel(sd_folder, None, None)
    put = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    for path in pictures.iterdir():
        path.unlink()
    put.save(pictures / "large.png")
    (pictures / "large.txt").write_text("large")
    dataset = {"resolution": 64, "buckets": {"step": 8, "min_side": 32, "max_side": 96}, "held_out_fraction": 0.0}
    tiled, _ = encode_folder(pictures, sd_folder, tmp_path / "s", tmp_path / "t", how=replace(HOW, tiling=True), **dataset)
    whole, _ = encode_folder(pictures, sd_folder, tmp_path / "s", tmp_path / "w", **dataset)
    a, b = (e.read(e.index.samples[0].latents[0])["mean"] for e in (tiled, whole))
    assert tiled.index.samples[0].latents != whole.index.samples[0].latents and not torch.equal(a, b)
    vae = kind.load_vae(model, torch.device("cpu"), torch.float32)
    vae.enable_tiling()
    [sample] = prepare_folder(pictures, **dataset).samples
    pixels = torch.from_numpy(np.asarray(cut(put, sample.geometry), np.float32) / 127.5 - 1)
    with torch.no_grad():
        wanted = kind.encode_pixels(vae, pixels.permute(2, 0, 1)[None].expand(8, -1, -1, -1)).mean[0]
    torch.testing.assert_close(a, wanted, rtol=1e-4, atol=1e-5)
