"""Pictures, captions and encodings where they are easily lost, swapped or taken for others."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from encoded import HOW, encode_manifest, prepare_folder
from PIL import Image
from test_prepare import noise, put, run, samples

from pipeline import encode_worker
from pipeline.auto_caption import write_captions
from pipeline.batches import Batches
from pipeline.cache import collect
from pipeline.config import load_params
from pipeline.dataset.captions import with_trigger
from pipeline.dataset.geometry import Geometry, cut
from pipeline.dataset.images import read_mask
from pipeline.dataset.manifest import write_manifest
from pipeline.dataset.report import summarise
from pipeline.encode import How, Todo, encode
from pipeline.encoders import encode_todo
from pipeline.encodings import ContentStore, Encodings, Reading, latent_key, text_key, write_encoded
from pipeline.errors import UserError
from pipeline.families import family
from pipeline.families.sd import StableDiffusion
from pipeline.model_source import LocalModel
from pipeline.randomness import Purpose, draw
from pipeline.workspace import Workspace

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_a_trigger_inside_another_word_is_not_the_trigger() -> None:
    assert with_trigger("two desks, sks.", "sks") == "two desks, sks."
    assert with_trigger("two desks", "sks") == "sks, two desks"
    assert with_trigger("a c++ book", "c++") == "a c++ book"


def test_kohya_folders_without_caption_files_are_no_class_folders(folder: Path) -> None:
    put(folder, "10_sks dog/a.png", noise(40, 40, 1), None)
    put(folder, "2_a cat/b.png", noise(40, 40, 2), None)
    found = samples(folder)
    assert {(s.captions, s.repeats) for s in found.values()} == {(("sks dog",), 10), (("a cat",), 2)}


def test_captions_of_another_extension_keep_folders_from_being_classes(folder: Path) -> None:
    for i, name in enumerate(("a/1.png", "b/2.png")):
        put(folder, name, noise(40, 40, i), None)
        (folder / name).with_suffix(".tags").write_text(f"tag {i}")
    found = samples(folder, caption_extension=".tags", instance_prompt="wrong")
    assert {s.captions for s in found.values()} == {("tag 0",), ("tag 1",)}


def test_upper_case_caption_files_are_captions(folder: Path) -> None:
    put(folder, "a.png", noise(40, 40), None)
    (folder / "a.TXT").write_text("loud")
    assert samples(folder)["a.png"].captions == ("loud",)


def test_a_table_of_pictures_alone_takes_the_instance_prompt(folder: Path) -> None:
    noise(40, 40).save(folder.parent / "x.png")
    row = {"bytes": (folder.parent / "x.png").read_bytes(), "path": "x.png"}
    pq.write_table(pa.table({"image": [row]}), folder / "train.parquet")
    found = samples(folder, instance_prompt="a photo of sks dog")
    assert [s.captions for s in found.values()] == [("a photo of sks dog",)]
    with pytest.raises(UserError, match="no column text"):
        run(folder)


def test_the_datasets_own_folder_names_what_lies_at_its_top(folder: Path) -> None:
    put(folder, "a.png", noise(40, 40), None)
    assert samples(folder, missing_caption="folder-name")["a.png"].captions == ("data",)


def test_formats_that_are_not_read_are_named(folder: Path) -> None:
    put(folder, "a.png", noise(40, 40))
    for name in ("b.heic", "c.AVIF"):
        (folder / name).write_bytes(b"x")
        (folder / name).with_suffix(".txt").write_text("a picture")
    rejects = {r.path: r.reason for r in run(folder, instance_prompt="x").rejects}
    assert set(rejects) == {"b.heic", "c.AVIF"} and all("convert it" in reason for reason in rejects.values())


def test_pictures_in_no_concept_are_named(folder: Path) -> None:
    for name in ("one/a.png", "two/b.png", "c.png", "masks/one/a.png"):
        put(folder, name, noise(40, 40, len(name)), "x" if not name.startswith("masks") else None)
    prepared = run(folder, concepts=[{"path": "one"}])
    assert [r.path for r in prepared.rejects] == ["c.png", "masks/one/a.png", "two/b.png"]
    assert [s.path for s in prepared.manifest.samples] == ["one/a.png"]


def test_masks_of_concepts_do_not_meet_each_others_pictures(folder: Path) -> None:
    for place, name in enumerate(("one/a.png", "two/a.png")):
        put(folder, name, noise(40, 40, place))
        (folder / "masks" / name).parent.mkdir(parents=True)
        Image.new("L", (40, 40), 50 + 100 * place).save(folder / "masks" / name)
    found = samples(folder, masks="masks", concepts=[{"path": "one"}, {"path": "two"}])
    assert {path: s.mask and s.mask.path for path, s in found.items()} == {
        "one/a.png": "masks/one/a.png",
        "two/a.png": "masks/two/a.png",
    }
    (folder / "own").mkdir()
    Image.new("L", (40, 40), 9).save(folder / "own" / "a.png")
    found = {s.path: s for s in run(folder, concepts=[{"path": "one", "masks": "own"}, {"path": "two"}]).manifest.samples}
    assert found["one/a.png"].mask.path == "own/a.png" and found["two/a.png"].mask is None


def test_masks_beside_their_pictures(folder: Path) -> None:
    for place, name in enumerate(("a.jpg", "b.png", "c.png")):
        put(folder, name, noise(40, 40, place))
    for name in ("a.mask.png", "b-masklabel.png"):
        Image.new("L", (40, 40), 50).save(folder / name)
    prepared = run(folder, masks="sidecar", max_rejected=1)
    assert {s.path: s.mask.path for s in prepared.manifest.samples} == {"a.jpg": "a.mask.png", "b.png": "b-masklabel.png"}
    assert [(r.path, r.reason) for r in prepared.rejects] == [("c.png", "has no mask beside it")]
    assert {r.path for r in run(folder, max_rejected=9).rejects} == {
        "a.mask.png",
        "b-masklabel.png",
    }  # pictures without a caption


def test_masks_outside_the_dataset_are_not_read(folder: Path, tmp_path: Path) -> None:
    put(folder, "a.png", noise(40, 40))
    (tmp_path / "outside").mkdir()
    Image.new("L", (40, 40), 9).save(tmp_path / "outside" / "a.png")
    with pytest.raises(UserError, match=r"dataset\.masks"):
        run(folder, masks="../outside")
    (folder / "masks").mkdir()
    (folder / "masks" / "a.png").symlink_to(tmp_path / "outside" / "a.png")
    assert [r.reason for r in run(folder, masks="masks").rejects] == [
        "has a mask that is a link out of the dataset's folder: masks"
    ]


def test_a_thread_of_a_picture_is_enlarged_without_its_ends() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1, 3), dtype=np.uint8))
    huge = Geometry((1, 900), (700, 630_000), (0, 300_000, 700, 300_700))
    assert cut(image, huge).size == (700, 700)


def test_another_kind_of_model_writes_no_captions(clip_folder: Path, tmp_path: Path, folder: Path) -> None:
    put(folder, "a.png", noise(40, 40))
    with pytest.raises(UserError, match="model of type 'clip', not blip"):
        write_captions(
            [(folder / "a.png", "0" * 64)], LocalModel(clip_folder, None, None), tmp_path, CPU, "#ffffff", lambda: None
        )


def test_only_what_overflows_is_done_again(pictures_folder: Path, sd_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Its neighbours keep the bytes that they have without it, whatever batch they are in."""
    honest, victim = StableDiffusion.encode_pixels, 3

    def overflowing(self, vae, pixels):
        posterior = honest(self, vae, pixels)
        if vae.dtype == torch.bfloat16:
            posterior.mean[victim % len(posterior.mean)] = float("inf")
        return posterior

    manifest, how = prepare_folder(pictures_folder), replace(HOW, compute_dtype="bfloat16")
    stores = [ContentStore(tmp_path / name) for name in ("half", "mended", "exact")]
    index, _ = encode_manifest(manifest, pictures_folder.parent, sd_folder, stores[0], how=how)
    monkeypatch.setattr(StableDiffusion, "encode_pixels", overflowing)
    encode_manifest(manifest, pictures_folder.parent, sd_folder, stores[1], how=how)
    monkeypatch.setattr(StableDiffusion, "encode_pixels", honest)
    exact, _ = encode_manifest(manifest, pictures_folder.parent, sd_folder, stores[2])
    same = 0
    for a, b in zip(index.samples, exact.samples, strict=True):
        half, mended, full = (
            store.read([key])[key]["mean"]
            for store, key in zip(stores, (a.latents[0], a.latents[0], b.latents[0]), strict=True)
        )
        assert torch.equal(mended, half) or torch.equal(mended, full)
        same += torch.equal(mended, half)
    assert len(index.samples) - 2 <= same < len(index.samples)  # ten pictures in batches of eight: one or two fell


def test_a_vae_of_ones_own_reaches_every_process(pictures_folder: Path, sd_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The worker's own code, told its place by nobody: one process of one."""
    tiny.vae(seed=5).save_pretrained(tmp_path / "vae")
    model = LocalModel(sd_folder, None, None, LocalModel(tmp_path / "vae", None, None))
    manifest, kind, root = prepare_folder(pictures_folder), family("sd"), pictures_folder.parent
    write_manifest(tmp_path / "dataset", manifest, [])
    stores = [ContentStore(tmp_path / name) for name in ("here", "there")]

    def here(todo: Todo) -> None:
        encode_todo(todo, manifest, root, kind, model, stores[0], HOW, CPU, 0, lambda: None)

    def there(todo: Todo) -> None:
        encode_worker.write_job(
            tmp_path / "job.json", todo, tmp_path / "dataset", tmp_path / "root", stores[1].folder, model, "sd", HOW
        )
        encode_worker.main(tmp_path / "job.json")
        stores[1].look_again()

    (tmp_path / "root").mkdir()
    shutil.copytree(pictures_folder, tmp_path / "root" / pictures_folder.name)
    shutil.copy(Path(__file__).parent.parent / "params.yaml", tmp_path / "root" / "params.yaml")
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    for store, work in zip(stores, (here, there), strict=True):
        index, _ = encode(manifest, kind, model, store, HOW, work)
    for sample in index.samples:
        a, b = (store.read(sample.latents)[sample.latents[0]]["mean"] for store in stores)
        assert torch.equal(a, b)


def test_shards_are_counted_by_what_the_entries_really_take(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    entries = {f"{i:032x}": {"mean": torch.zeros(4, 2 + i, 3), "std": torch.zeros(4, dtype=torch.float16)} for i in range(5)}
    store.add(entries)
    keys = list(entries)[1:4]
    assert store.size(keys) == sum(t.numel() * t.element_size() for k in keys for t in entries[k].values())


def test_the_store_is_not_emptied_where_nothing_says_what_is_used(tmp_path: Path) -> None:
    here = Workspace(tmp_path, tmp_path)
    ContentStore(here.store).add({"0" * 32: {"mean": torch.zeros(2)}})
    with pytest.raises(UserError, match="build/encoded is missing"):
        collect(here, 0.0, False)
    assert ContentStore(here.store).keys()


@pytest.mark.parametrize("seed", range(6))
def test_pictures_and_captions_never_swap(seed: int, sd_folder: Path, tmp_path: Path, folder: Path) -> None:
    """Random sizes, buckets, variants, flips, dropout, two processes' shares: every row of every batch is traced back, by content
    keys computed here, to the picture and the caption that the manifest has together."""
    rng = np.random.default_rng(seed)
    for i in range(int(rng.integers(5, 12))):
        width, height = (int(v) for v in rng.integers(24, 90, 2))
        put(folder, f"{i:02d}.png", noise(width, height, 100 * seed + i), f"tag {i}, a{i}, b{i}, c{i}")
    dataset = {"held_out_fraction": 0.2, "buckets": {"step": 8, "min_side": 16, "max_side": 64}, "shuffle_tags": True}
    prepared = run(folder, variants=3, crop="random", seed=seed, **dataset)
    assert not prepared.rejects
    manifest, kind, model = prepared.manifest, family("sd"), LocalModel(sd_folder, None, None)
    how, store = replace(HOW, flip=True), ContentStore(tmp_path / "store")

    def shared_out(todo: Todo) -> None:
        for share in (0, 1):
            cuts, captions = ({k: d[k] for k in sorted(d)[share::2]} for d in (todo.cuts, todo.captions))
            encode_todo(Todo(cuts, captions, {}), manifest, tmp_path, kind, model, store, how, CPU, 0, lambda: None)

    index, _ = encode(manifest, kind, model, store, how, shared_out)
    write_encoded(tmp_path / "out", index, store)
    encodings = Encodings(tmp_path / "out")
    batches = Batches(encodings, 4, seed, caption_dropout=0.2)
    by_id = {s.id: s for s in manifest.samples}
    vae = "/".join([model.fingerprint(*kind.vae_folders), how.compute_dtype])
    reading = Reading(model.fingerprint(*kind.text_folders), 1, 0, how.dtype)
    seen = set()
    for step in range(2 * batches.steps_per_epoch):
        count = len(batches.members(step))
        batch = batches.batch(step, 0, count)
        for row, (identity, caption) in enumerate(zip(batch.ids, batch.captions, strict=True)):
            sample = by_id[identity]
            number = int(sample.path[:2])
            assert caption == "" or (caption in sample.captions and f"a{number}" in caption.split(", "))
            flipped = bool(draw(seed, Purpose.FLIP, step, row).integers(2))
            entry = store.read([k := latent_key(sample.pixels, sample.geometry, flipped, vae, how.dtype)])[k]
            posterior = draw(seed, Purpose.POSTERIOR, step, row).standard_normal(tuple(entry["mean"].shape), dtype=np.float32)
            assert torch.equal(batch.x_0[row], entry["mean"] + entry["std"] * torch.from_numpy(posterior))
            assert torch.equal(batch.text["hidden"][row], store.read([t := text_key(caption, reading)])[t]["hidden"])
            seen.add(identity)
    assert seen == {s.id for s in manifest.samples if s.split == "train"}


def test_the_settings_of_the_worker_are_the_stages_own() -> None:
    """`How` travels whole: a field that is added must be in the settings too."""
    assert set(How.__dataclass_fields__) == set(load_params(Path(__file__).parent.parent / "params.yaml").encode.model_dump())
    assert json.loads(json.dumps(HOW.__dict__)) == HOW.__dict__


def test_what_is_missing_behind_a_link_is_told(folder: Path, tmp_path: Path) -> None:
    """As of git-annex, before its files are fetched."""
    put(folder, "a.png", noise(40, 40, 1))
    (folder / "b.png").symlink_to(folder / "not-fetched")
    (folder / "b.txt").write_text("a thing")
    put(tmp_path / "elsewhere", "c.png", noise(40, 40, 2))
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    said = {r.path: r.reason for r in run(folder).rejects}
    assert said.keys() == {"b.png", "linked"}
    assert "No such file" in said["b.png"] and said["linked"].startswith("is a link to a folder")


@pytest.mark.parametrize("layout", ["imagefolder", "kohya-json", "two-folders", "webdataset"])
def test_pictures_in_a_format_that_is_not_read_are_told_once(folder: Path, layout: str) -> None:
    images = folder / "images" if layout == "two-folders" else folder
    put(images, "cat/a.png", noise(40, 40, 1), None)
    put(images, "dog/b.png", noise(40, 40, 2), None)
    (images / "dog/c.heic").write_bytes(b"x")
    if layout == "kohya-json":
        (folder / "meta_cap.json").write_text('{"cat/a": {"caption": "x"}, "dog/c": {"caption": "y"}}')
    if layout == "two-folders":
        (folder / "texts/dog").mkdir(parents=True)
        (folder / "texts/dog/c.txt").write_text("a dog")
    if layout == "webdataset":
        with tarfile.open(folder / "0.tar", "w") as tar:
            for name in ("cat/a.png", "dog/c.heic"):
                tar.add(folder / name, name)
        shutil.rmtree(folder / "cat")
        shutil.rmtree(folder / "dog")
    said = run(folder, missing_caption="folder-name").rejects
    assert len(said) == 1 and ("format" in said[0].reason or layout == "kohya-json"), said


def test_folders_of_a_layout_name_no_class(folder: Path) -> None:
    put(folder, "images/a.png", noise(40, 40, 1), None)
    put(folder, "images/cat/b.png", noise(40, 40, 2), None)
    (folder / "texts").mkdir()
    told = {path: s.captions for path, s in samples(folder, format="two-folders", missing_caption="folder-name").items()}
    assert told == {"images/a.png": ("data",), "images/cat/b.png": ("cat",)}
    shutil.rmtree(folder)
    put(folder, "train/a.png", noise(40, 40, 1), None)
    put(folder, "train/b.png", noise(40, 40, 2), None)
    (folder / "train/metadata.csv").write_text("file_name,text\na.png,a cat\n")
    told = {path: s.captions for path, s in samples(folder, missing_caption="folder-name").items()}
    assert told == {"train/a.png": ("a cat",), "train/b.png": ("data",)}


def test_a_year_is_no_number_of_repeats_unless_the_format_says_so(folder: Path) -> None:
    put(folder, "2023_summer/a.png", noise(40, 40, 1))
    put(folder, "b.png", noise(40, 40, 2))
    assert {s.repeats for s in samples(folder).values()} == {1}
    assert [s.repeats for s in run(folder, format="kohya").manifest.samples] == [2023]


def test_two_captions_of_one_name_are_not_settled_in_silence(folder: Path) -> None:
    put(folder, "images/a.png", noise(40, 40, 1), None)
    for name in ("texts", "captions"):
        (folder / name).mkdir()
        (folder / name / "a.txt").write_text(f"from {name}")
    prepared = run(folder)
    assert [(r.path, r.reason) for r in prepared.rejects] == [
        ("captions/a.txt", "is a second caption beside texts/a.txt: leave one")
    ]
    assert prepared.manifest.samples[0].captions == ("from texts",)


@pytest.mark.parametrize("text", [",", ", ,", " ,, "])
def test_commas_alone_are_no_caption(folder: Path, text: str) -> None:
    put(folder, "a.png", noise(40, 40, 1), text)
    assert [r.reason for r in run(folder, shuffle_tags=True).rejects] == ["the caption is empty (a.txt)"]


def test_masks_are_found_in_capitals_and_their_transparency_is_left_out(folder: Path) -> None:
    put(folder, "a.png", noise(40, 40, 1))
    mask = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 20, 40))
    put(folder, "masks/a.PNG", mask, None)
    assert samples(folder, masks="masks")["a.png"].mask.path == "masks/a.PNG"
    read = read_mask(folder / "masks/a.PNG", (40, 40), 10**6)
    assert read.getpixel((5, 5)) == 255 and read.getpixel((30, 5)) == 0


def test_reasons_are_counted_without_the_names_in_them(folder: Path) -> None:
    put(folder, "good.png", noise(40, 40, 1))
    for name in ("cat", "dog", "img_001"):
        put(folder, f"{name}.png", noise(40, 40, len(name)), " ")
    counted = summarise(run(folder))
    assert counted["rejected_by_reason"] == {"the caption is empty": 3} and counted["left_out_by_reason"] == {}
    rows = "file_name,text\ngood.png,a cat\nmissing.png,x\nother one.png,y\n"
    shutil.rmtree(folder)
    put(folder, "good.png", noise(40, 40, 1), None)
    (folder / "metadata.csv").write_text(rows)
    assert summarise(run(folder))["rejected_by_reason"] == {"names …, which is not there": 2}


def test_the_longest_come_last(folder: Path) -> None:
    put(folder, "a.png", noise(40, 40, 1), "a cat")
    put(folder, "b.png", noise(40, 40, 2), "a cat " * 50)
    assert summarise(run(folder))["caption_words"] == {"up to 05": 1, "over 75": 1}
    assert list(summarise(run(folder))["caption_words"]) == ["up to 05", "over 75"]
