"""Colours, buckets, crops, masks, captions, concepts and duplicates: what prepare-dataset decides about a picture."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw, ImageFilter
from pydantic import ValidationError

from pipeline.config import Dataset
from pipeline.dataset.captions import dress, variants
from pipeline.dataset.duplicates import Alike, Likeness, are_near, likeness
from pipeline.dataset.geometry import bucket, buckets, fit
from pipeline.dataset.images import BadImage, decode
from pipeline.dataset.manifest import Sample
from pipeline.dataset.prepare import Prepared, prepare
from pipeline.dataset.report import write_report
from pipeline.errors import UserError


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise: it survives saving and scaling as a photograph does."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def put(folder: Path, name: str, image: Image.Image, caption: str | None = "a thing", **options: object) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def run(folder: Path, **changes: object) -> Prepared:
    settings = {"path": folder.name, "resolution": 32, "held_out_fraction": 0.0, **changes}
    parsed = Dataset.model_validate_json(json.dumps(settings))
    return prepare(folder.parent, parsed, lambda: None, folder.parent / "unpacked")


def samples(folder: Path, **changes: object) -> dict[str, Sample]:
    prepared = run(folder, **changes)
    assert not prepared.rejects, prepared.rejects
    return {s.path: s for s in prepared.manifest.samples}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# --- decoding


def test_sixteen_bits_keep_their_brightness(folder: Path) -> None:
    grey = np.full((40, 40), 0x8000, np.uint16)
    grey[0, 0] = 0x00FF  # Pillow's own conversion would make white of it
    Image.fromarray(grey).save(folder / "deep.png")
    picture = decode(folder / "deep.png", 10**6)
    assert picture.image.getpixel((20, 20)) == (128, 128, 128) and picture.image.getpixel((0, 0)) == (0, 0, 0)
    assert "16-bit" in picture.notes[0]


def test_a_colour_profile_is_turned_into_srgb(folder: Path) -> None:
    """Against littleCMS called by hand: Display-P3-like primaries are not at hand, Lab and XYZ profiles are; a gamma-less
    grey profile would hide an error, so the profile swaps nothing but the white point."""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB", 5000))
    srgb = ImageCms.createProfile("sRGB")
    original = Image.new("RGB", (40, 40), (200, 30, 60))
    as_lab = ImageCms.profileToProfile(original, srgb, lab, outputMode="LAB")
    as_lab.save(folder / "lab.tif", icc_profile=lab.tobytes())
    there = decode(folder / "lab.tif", 10**6).image.getpixel((5, 5))
    assert max(abs(a - b) for a, b in zip(there, (200, 30, 60), strict=True)) <= 3


def swapped_primaries() -> bytes:
    """sRGB with the places of red and green exchanged in its table of tags: what is written red means green."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"temp", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"temp", b"gXYZ", 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("ending", ["png", "webp", "tif", "jpg"])
def test_primaries_of_a_profile_are_heeded_in_every_mode(folder: Path, mode: str, ending: str) -> None:
    if (mode, ending) in {("RGBA", "jpg"), ("P", "jpg"), ("P", "webp")}:
        pytest.skip("the format has no such mode")
    plain = Image.new("RGB", (40, 40), (200, 30, 60))
    image = plain.quantize(4) if mode == "P" else plain.convert(mode)
    options = {"lossless": True} if ending == "webp" else {"quality": 100} if ending == "jpg" else {}
    image.save(folder / f"a.{ending}", icc_profile=swapped_primaries(), **options)
    there = decode(folder / f"a.{ending}", 10**6).image.getpixel((5, 5))
    assert max(abs(a - b) for a, b in zip(there, (30, 200, 60), strict=True)) <= 4, there


def test_an_unusable_profile_is_noted_and_not_fatal(folder: Path) -> None:
    Image.new("RGB", (40, 40), (9, 8, 7)).save(folder / "odd.png", icc_profile=b"no profile at all")
    picture = decode(folder / "odd.png", 10**6)
    assert picture.image.getpixel((0, 0)) == (9, 8, 7) and "colour profile" in picture.notes[0]


def test_cmyk_animation_and_background(folder: Path) -> None:
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(folder / "ink.jpg", quality=95)
    red, green, blue = decode(folder / "ink.jpg", 10**6).image.getpixel((20, 20))
    assert red > 200 and green < 60 and blue < 60
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    first = decode(folder / "moving.gif", 10**6)
    assert first.image.getpixel((0, 0)) == (255, 0, 0) and "first of 2 frames" in first.notes[0]
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    clear.paste((10, 20, 30, 255), (0, 0, 20, 40))
    clear.save(folder / "clear.png")
    picture = decode(folder / "clear.png", 10**6, "#00ff00")
    assert picture.image.getpixel((30, 5)) == (0, 255, 0) and picture.image.getpixel((5, 5)) == (10, 20, 30)
    assert picture.alpha.getpixel((5, 5)) == 255 and picture.alpha.getpixel((30, 5)) == 0


def test_a_file_whose_name_lies_is_rejected(folder: Path) -> None:
    Image.new("RGB", (40, 40)).save(folder / "a.jpg", "PNG")
    with pytest.raises(BadImage, match=r"named \.jpg but holds PNG"):
        decode(folder / "a.jpg", 10**6)


def test_a_header_of_fifty_thousand_squared_is_refused_unread(folder: Path) -> None:
    put(folder, "bomb.png", Image.new("L", (40, 40)))
    data = bytearray((folder / "bomb.png").read_bytes())
    data[16:24] = (50_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(bytes(data))
    assert "50000×50000" in run(folder).rejects[0].reason or "too large" in run(folder).rejects[0].reason


# --- buckets and crops

sizes = st.integers(64, 4000)


@given(sizes, sizes, st.sampled_from([256, 512, 768]), st.booleans())
def test_every_picture_lands_in_a_bucket_or_says_why(width: int, height: int, resolution: int, upscale: bool) -> None:
    try:
        w, h = bucket((width, height), resolution, 64, 128, 1024, upscale)
    except BadImage as bad:
        assert not upscale and min(width, height) < 128 and "min_side" in str(bad)
        return
    assert w % 64 == h % 64 == 0 and min(w, h) >= 128 and max(w, h) <= 1024 and w * h <= resolution**2
    if not upscale:
        assert w <= width and h <= height
    geometry = fit((width, height), (w, h))
    assert geometry.size == (w, h) and geometry.resized[0] >= w and geometry.resized[1] >= h
    assert geometry.resized[0] == w or geometry.resized[1] == h  # no more is cut away than must be


def test_the_nearest_aspect_ratio_wins() -> None:
    assert bucket((2000, 1000), 512, 64, 256, 1024, False) == (704, 320)  # 2.2, nearer to 2 than 640×384 = 1.67
    assert bucket((1000, 1000), 512, 64, 256, 1024, False) == (512, 512)
    assert bucket((300, 500), 512, 64, 256, 1024, False) == (256, 448)  # its own: no upscaling
    assert bucket((300, 500), 512, 64, 256, 1024, True) == (384, 640)
    assert (512, 512) in buckets(512, 64, 256, 1024)


def test_buckets_through_prepare(folder: Path) -> None:
    put(folder, "wide.png", noise(300, 150, 1))
    put(folder, "tall.png", noise(100, 240, 2))
    found = samples(folder, resolution=128, buckets={"step": 32, "min_side": 64, "max_side": 256})
    assert found["wide.png"].geometry.size[0] > found["wide.png"].geometry.size[1]
    assert found["tall.png"].geometry.size[0] < found["tall.png"].geometry.size[1]


def test_random_crops_are_seeded_by_content(folder: Path) -> None:
    for i in range(6):
        put(folder, f"{i}.png", noise(200, 64, i))
    first = samples(folder, crop="random")
    assert first == samples(folder, crop="random")
    assert first != samples(folder, crop="random", seed=1)
    assert len({s.geometry.crop for s in first.values()}) > 3
    shutil.move(folder / "0.png", folder / "z.png")
    shutil.move(folder / "0.txt", folder / "z.txt")
    assert samples(folder, crop="random")["z.png"].geometry == first["0.png"].geometry


def test_smaller_pictures_need_leave_to_be_enlarged(folder: Path) -> None:
    put(folder, "small.png", noise(20, 40))
    assert "allow_upscaling" in run(folder).rejects[0].reason
    assert samples(folder, allow_upscaling=True)["small.png"].geometry.resized == (32, 64)


# --- masks


def test_masks_from_a_folder_are_no_pictures_and_steer_the_crop(folder: Path) -> None:
    mask = Image.new("L", (200, 64))
    ImageDraw.Draw(mask).rectangle((150, 0, 199, 63), fill=255)
    put(folder, "sub/a.png", noise(200, 64))
    (folder / "masks" / "sub").mkdir(parents=True)
    mask.save(folder / "masks" / "sub" / "a.png")
    centred = samples(folder, masks="masks")["sub/a.png"]
    steered = samples(folder, masks="masks", crop="mask")["sub/a.png"]
    assert centred.mask.path == "masks/sub/a.png"
    assert centred.geometry.crop[0] == 34 and steered.geometry.crop[0] == 68  # as far right as there is picture
    mask.point(lambda v: 255 - v).save(folder / "masks" / "sub" / "a.png")
    other = samples(folder, masks="masks")["sub/a.png"]
    assert other.id != centred.id and other.pixels == centred.pixels


def test_masks_that_are_missing_or_do_not_fit_are_reasons(folder: Path) -> None:
    put(folder, "a.png", noise(64, 64, 1))
    put(folder, "b.png", noise(64, 64, 2))
    (folder / "masks").mkdir()
    Image.new("L", (64, 60)).save(folder / "masks" / "b.png")
    said = {r.path: r.reason for r in run(folder, masks="masks").rejects}
    assert said["a.png"] == "has no mask in masks" and "64×60" in said["b.png"]
    assert "no transparency" in run(folder, masks="alpha").rejects[0].reason
    with pytest.raises(UserError, match=r"masks: .*elsewhere is no folder"):
        run(folder, masks="elsewhere")


# --- captions


def test_variants_are_orders_of_tags_with_the_first_ones_kept(folder: Path) -> None:
    put(folder, "a.png", noise(40, 40, 1), "1girl, solo, red hair, smile, outdoors")
    found = samples(folder, shuffle_tags=True, keep_tags=2, variants=5)["a.png"].captions
    assert 2 <= len(found) <= 5
    for caption in found:
        tags = caption.split(", ")
        assert tags[:2] == ["1girl", "solo"] and sorted(tags) == sorted(["1girl", "solo", "red hair", "smile", "outdoors"])
    assert found == samples(folder, shuffle_tags=True, keep_tags=2, variants=5)["a.png"].captions
    assert found != samples(folder, shuffle_tags=True, keep_tags=2, variants=5, seed=9)["a.png"].captions


@given(st.text(max_size=60), st.integers(0, 4), st.integers(1, 4), st.integers(0, 2**63 - 1))
def test_variants_never_lose_a_tag(caption: str, keep: int, count: int, seed: int) -> None:
    tags = sorted(tag.strip() for tag in caption.split(",") if tag.strip())
    for variant in variants([caption], keep, count, seed, "ab" * 32):
        assert sorted(tag.strip() for tag in variant.split(",") if tag.strip()) == tags


def test_prefix_suffix_template_and_trigger(folder: Path) -> None:
    put(folder, "a.png", noise(40, 40, 1), "a cat")
    caption = samples(folder, prefix="photo of", suffix="at night", template="{caption}, film", trigger="zyx")["a.png"].captions
    assert caption == ("zyx, photo of a cat at night, film",)
    assert dress("{caption}", "", "", "{caption}!") == "{caption}!"


def test_lines_are_variants(folder: Path) -> None:
    put(folder, "a.png", noise(40, 40, 1), "a cat\n\n  a   feline\n")
    assert samples(folder, caption_lines=True)["a.png"].captions == ("a cat", "a feline")
    assert samples(folder)["a.png"].captions == ("a cat a feline",)


def test_pictures_without_caption(folder: Path) -> None:
    put(folder, "red shoes/a.png", noise(40, 40, 1), None)
    assert "has no caption" in run(folder).rejects[0].reason
    assert samples(folder, missing_caption="folder-name")["red shoes/a.png"].captions == ("red shoes",)
    assert samples(folder, instance_prompt="a photo of sks shoes")["red shoes/a.png"].captions == ("a photo of sks shoes",)


def test_concepts_have_settings_of_their_own(folder: Path) -> None:
    put(folder, "me/a.png", noise(40, 40, 1), None)
    put(folder, "people/b.png", noise(40, 40, 2), None)
    concepts = [
        {"path": "me", "repeats": 3, "instance_prompt": "a photo of zyx person"},
        {"path": "people", "regularisation": True, "instance_prompt": "a photo of a person", "prefix": "plain"},
    ]
    found = samples(folder, concepts=concepts, trigger="zyx", held_out_fraction=0.5)
    assert found["me/a.png"].repeats == 3 and found["me/a.png"].captions == ("a photo of zyx person",)
    other = found["people/b.png"]
    assert other.regularisation and other.split == "train" and other.captions == ("plain a photo of a person",)  # no trigger


def test_concepts_must_exist_stay_inside_and_not_overlap(folder: Path) -> None:
    put(folder, "a/b/x.png", noise(40, 40, 1))
    for path in ("nowhere", "../data/..", "/"):
        with pytest.raises(UserError, match="is no folder in"):
            run(folder, concepts=[{"path": path}])
    with pytest.raises(UserError, match="overlap"):
        run(folder, concepts=[{"path": "a"}, {"path": "a/b"}])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"missing_caption": "auto"}, "auto_caption names no"),
        ({"variants": 3}, "shuffle_tags"),
        ({"crop": "mask"}, "masks names no"),
        ({"buckets": {}}, "min_side"),
        ({"buckets": {"min_side": 104}}, "not a multiple"),
        ({"template": "x"}, "pattern"),
    ],
)
def test_settings_that_contradict_each_other(folder: Path, changes: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        run(folder, **changes)


# --- duplicates and the split


def test_copies_are_near_and_others_are_not() -> None:
    picture = noise(300, 200, 5)
    copies = [
        picture.resize((150, 100), Image.Resampling.LANCZOS),
        picture.filter(ImageFilter.GaussianBlur(1)),
        picture.point(lambda v: min(255, v + 3)),
    ]
    assert all(are_near(likeness(picture), likeness(copy)) for copy in copies)
    others = [noise(300, 200, 6), picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), picture.convert("L").convert("RGB")]
    assert not any(are_near(likeness(picture), likeness(other)) for other in others)


def test_near_pictures_are_those_of_the_plain_comparison() -> None:
    likes = [likeness(noise(64, 64, i % 20).point(lambda v, i=i: min(255, v + i // 20))) for i in range(60)]
    members = [i for i in range(60) if i % 7]
    alike = Alike(likes, members)
    found = [list(alike.near(j)) for j in range(60)]
    assert found == [[i for i in members if are_near(likes[i], likes[j])] for j in range(60)]
    assert sum(len(near) > 1 for near in found) >= 20


def test_hashes_that_differ_in_four_bits_anywhere_are_found() -> None:
    """One band of five is always the same; a fifth bit, in the last of them, is too much."""
    thumbnail, bands = bytes(8 * 8 * 3), [1 << 5, 1 << 20, 1 << 30, 1 << 45, 1 << 63]
    likes = [
        Likeness(0, thumbnail),
        *(Likeness(sum(bands) - left_out, thumbnail) for left_out in bands),
        Likeness(sum(bands), thumbnail),
    ]
    assert list(Alike(likes, range(len(likes))).near(0)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("drift", [0, 1])
def test_many_pictures_that_look_alike_are_no_square_of_work(drift: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Frames of one film: their pairs would be the square. Where the light changes, the last are near to those that are dropped for
    the first's sake, and not to that."""
    compared, count = 0, 60
    for i in range(count):
        brighter = drift * 5 * (bool(i) + (i >= count // 2))
        put(folder, f"{i:03d}.png", noise(64, 64, 1).point(lambda v, more=brighter: v // 2 + more))

    def counted(a: Likeness, b: Likeness) -> bool:
        nonlocal compared
        compared += 1
        return are_near(a, b)

    monkeypatch.setattr("pipeline.dataset.duplicates.are_near", counted)
    for duplicates in ("keep", "drop"):
        compared = 0
        prepared = run(folder, duplicates=duplicates)
        assert len(prepared.duplicates) == count - 1
        assert compared < 4 * count
        assert len(prepared.manifest.samples) == (count if duplicates == "keep" else 1 + drift)


def test_the_demo_dataset_holds_no_near_duplicates() -> None:
    folder = Path(__file__).resolve().parent.parent / "assets" / "demo-dataset"
    likes = [likeness(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]
    assert len(likes) > 20 and not any(are_near(a, b) for i, a in enumerate(likes) for b in likes[:i])


def test_duplicates_are_reported_and_dropped_on_request(folder: Path) -> None:
    put(folder, "a.png", noise(64, 64, 1))
    put(folder, "b.jpg", noise(64, 64, 1), quality=95)
    put(folder, "c.png", noise(64, 64, 2))
    kept = run(folder)
    assert kept.duplicates == [("a.png", "b.jpg")] and len(kept.manifest.samples) == 3 and not kept.left_out
    dropped = run(folder, duplicates="drop")
    assert [s.path for s in dropped.manifest.samples] == ["a.png", "c.png"]
    assert dropped.left_out[0].path == "b.jpg" and "a.png" in dropped.left_out[0].reason and not dropped.rejects


def test_near_duplicates_stay_on_one_side_and_new_pictures_move_none(folder: Path) -> None:
    """Twenty pictures, then a nearly equal copy of each: some copies' content falls on the other side."""
    for i in range(20):
        put(folder, f"{i:02d}.png", noise(64, 64, i))
    before = {s.path: s.split for s in run(folder, held_out_fraction=0.5).manifest.samples}
    for i in range(20):
        put(folder, f"copy{i:02d}.png", noise(64, 64, i).point(lambda v: min(255, v + 2)))
    prepared = run(folder, held_out_fraction=0.5)
    after = {s.path: s.split for s in prepared.manifest.samples}
    assert prepared.left_out and all("held out" in r.reason for r in prepared.left_out)
    assert all(after.get(path, side) == side for path, side in before.items())
    likes = {path: likeness(Image.open(folder / path)) for path in after}
    assert not [(a, b) for a in after for b in after if after[a] != after[b] and are_near(likes[a], likes[b])]
    assert all(side == "train" for path, side in before.items() if path not in after)  # held-out pictures never vanish


# --- what a person sees


def test_the_report_escapes_what_pictures_are_called(folder: Path, tmp_path: Path) -> None:
    put(folder, "<script>alert(1)<.png", noise(40, 40, 1), "<b>bold</b> \U0001f600, <i>tag</i>")
    put(folder, "bad<img>.png", noise(8, 8, 1))
    prepared = run(folder)
    out = tmp_path / "report"
    out.mkdir()
    write_report(out, tmp_path, prepared, Dataset(path=folder.name, resolution=32), tmp_path / "unpacked")
    page = (out / "index.html").read_text()
    assert "<script>alert" not in page and "<b>bold" not in page and "<i>tag" not in page and "<img>" not in page
    assert "bad&lt;img&gt;.png" in page and "&lt;i&gt;tag" in page
    summary = json.loads((out / "summary.json").read_text())
    assert summary["samples"] == 1 and summary["rejected"] == 1 and sum(summary["sizes"].values()) == 1
    assert Image.open(out / "contact-sheet.png").size[0] > 100


def test_adding_pictures_changes_nobody_elses_sample(folder: Path) -> None:
    for i in range(8):
        put(folder, f"{i}.png", noise(90, 64, i), "one, two, three, four")
    options = {"crop": "random", "shuffle_tags": True, "variants": 3, "held_out_fraction": 0.4}
    before = samples(folder, **options)
    for i in range(8, 12):
        put(folder, f"0{i}.png", noise(90, 64, i), "one, two, three, four")
    after = samples(folder, **options)
    assert all(after[path] == sample for path, sample in before.items())


def test_background_is_part_of_what_the_model_sees(folder: Path) -> None:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 20, 40))
    put(folder, "a.png", image)
    white, black = (samples(folder, background=colour)["a.png"] for colour in ("#ffffff", "#000000"))
    assert white.pixels != black.pixels
    assert samples(folder, masks="alpha")["a.png"].mask.path is None


@pytest.mark.parametrize("count", [1, 2, 70])
def test_pictures_keep_their_own_captions_whatever_thread_reads_them(folder: Path, count: int) -> None:
    for i in range(count):
        put(folder, f"{i:03d}.png", Image.new("RGB", (40, 40), (i * 3, 0, 0)), f"red {i * 3}")
    for path, sample in samples(folder, duplicates="keep").items():
        assert sample.captions == (f"red {decode(folder / path, 10**6).image.getpixel((0, 0))[0]}",)


def test_a_picture_more_takes_a_kilobyte_or_two(tmp_path: Path) -> None:
    """Names, hashes, captions and a thumbnail; with a `Path` for each, a geometry and large thumbnails it was three and a half."""

    def peak(count: int) -> int:
        folder = tmp_path / str(count)
        for i in range(count):
            put(folder, f"{i:04d}.png", noise(32, 32, i))
        tracemalloc.start()
        run(folder)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return taken

    peak(20)  # whatever is loaded on first use
    assert (peak(420) - peak(120)) / 300 < 1500
