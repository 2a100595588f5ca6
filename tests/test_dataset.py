"""From a folder to a manifest: what is let in, what is rejected with which reason, what moves what."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipeline.config import Dataset
from pipeline.dataset.captions import with_trigger
from pipeline.dataset.geometry import cut, fit
from pipeline.dataset.images import BadImage, decode, hash_pixels
from pipeline.dataset.manifest import read_manifest, split_of, write_manifest
from pipeline.dataset.prepare import prepare, refuse_nothing_to_train_on, refuse_too_many_rejects
from pipeline.errors import UserError


def settings(folder: Path, **changes: object) -> Dataset:
    return Dataset(**{"path": folder.name, "resolution": 32, "held_out_fraction": 0.3, **changes})


def run(folder: Path, **changes: object):
    prepared = prepare(folder.parent, settings(folder, **changes), lambda: None, folder.parent / "unpacked")
    return prepared.manifest, prepared.rejects


@pytest.fixture
def folder(tmp_path: Path, pictures_folder: Path) -> Path:
    return Path(shutil.copytree(pictures_folder, tmp_path / "data"))


def reasons(folder: Path, **changes: object) -> dict[str, str]:
    return {r.path: r.reason for r in run(folder, **changes)[1]}


def test_every_picture_meets_its_own_caption_and_round_trips(folder: Path, tmp_path: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    shutil.move(folder / "003.png", folder / "deep" / "er" / "x.png")
    shutil.move(folder / "003.txt", folder / "deep" / "er" / "x.txt")
    manifest, rejects = run(folder)
    assert not rejects and len(manifest.samples) == 10
    for sample in manifest.samples:
        assert sample.captions == ((folder / sample.path).with_suffix(".txt").read_text(),)
    write_manifest(tmp_path / "out", manifest, rejects)
    assert read_manifest(tmp_path / "out") == manifest


def test_a_caption_without_picture_and_a_picture_without_caption(folder: Path) -> None:
    (folder / "003.txt").unlink()
    (folder / "004.png").unlink()
    said = reasons(folder)
    assert said.keys() == {"003.png", "004.txt"}
    assert said["003.png"].startswith("has no caption") and "instance_prompt" in said["003.png"]
    assert said["004.txt"] == "is a caption without a picture of the same name"


@pytest.mark.parametrize("keep", [0, 1, 8, 40, 100, 150])
def test_truncated_pictures_are_rejected(folder: Path, keep: int) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(folder / "photo.jpg")
    (folder / "photo.txt").write_text("a photo")
    assert not reasons(folder)
    data = (folder / "photo.jpg").read_bytes()
    (folder / "photo.jpg").write_bytes(data[: len(data) * keep // 200])
    assert "photo.jpg" in reasons(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b" \n\t ", "empty"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"a" * 20_000, "20000 characters"),
        (b"bell \x07", "control characters"),
    ],
)
def test_bad_captions_are_rejected_with_a_reason(folder: Path, content: bytes, said: str) -> None:
    (folder / "002.txt").write_bytes(content)
    assert said in reasons(folder)["002.png"]


def test_pictures_that_cannot_be_used_say_why(folder: Path) -> None:
    (folder / "000.png").write_text("not a picture")
    Image.new("RGB", (31, 90)).save(folder / "001.png")
    Image.new("F", (40, 40)).save(folder / "002.tiff")
    shutil.copy(folder / "002.txt", folder / "002f.txt")
    shutil.move(folder / "002.tiff", folder / "002f.tiff")
    Image.new("1", (20_000, 6_000)).save(folder / "003.png")
    said = reasons(folder)
    assert said["000.png"] == "is not a picture that can be read"
    assert "31×90" in said["001.png"] and "resolution 32" in said["001.png"]
    assert "floating-point" in said["002f.tiff"]
    assert "20000×6000" in said["003.png"] and "max_pixels" in said["003.png"]


def test_two_pictures_with_one_caption_file(folder: Path) -> None:
    Image.new("RGB", (40, 40)).save(folder / "000.jpg")
    said = reasons(folder)
    assert list(said.values()) == ["shares its caption file with 000.jpg: give one of them another name"]


def test_links_out_of_the_folder_are_not_followed(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "000.png", tmp_path / "secret.png")
    (folder / "000.png").symlink_to(tmp_path / "secret.png")
    assert reasons(folder) == {"000.png": "is a link out of the dataset's folder"}


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no picture in"):
        run(tmp_path / "empty")


def test_too_many_rejects_fail_and_name_the_first(folder: Path, tmp_path: Path) -> None:
    for i in range(3):
        (folder / f"00{i}.txt").unlink()
    _, rejects = run(folder)
    with pytest.raises(UserError, match=r"3 rejected, dataset.max_rejected allows 2(.|\n)*000.png: has no caption"):
        refuse_too_many_rejects(rejects, settings(folder, max_rejected=2), tmp_path / "rejects.jsonl", None)
    refuse_too_many_rejects(rejects, settings(folder, max_rejected=3), tmp_path / "rejects.jsonl", None)


def test_nothing_left_to_train_on(folder: Path) -> None:
    manifest, _ = run(folder)
    held = [s for s in manifest.samples if s.split == "held-out"]
    only_held = replace(manifest, samples=tuple(held))
    with pytest.raises(UserError, match="no picture is left to train on"):
        refuse_nothing_to_train_on(only_held, 0, settings(folder))


def test_the_split_is_by_content_and_new_pictures_move_none(folder: Path, tmp_path: Path) -> None:
    before = {s.pixels: s.split for s in run(folder)[0].samples}
    rng = np.random.default_rng(9)
    for i in range(30):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"0new{i}.png")
        (folder / f"0new{i}.txt").write_text("noise")
    shutil.move(folder / "000.png", folder / "zz.png")
    shutil.move(folder / "000.txt", folder / "zz.txt")
    after = {s.pixels: s.split for s in run(folder)[0].samples}
    assert before.items() <= after.items()
    assert 3 <= sum(side == "held-out" for side in after.values()) <= 22


def test_where_chance_holds_nothing_out_one_picture_is(folder: Path) -> None:
    few = run(folder, held_out_fraction=1e-9)[0].samples
    assert [s.split for s in few].count("held-out") == 1
    assert all(s.split == "train" for s in run(folder, held_out_fraction=0.0)[0].samples)


@given(st.binary(min_size=32, max_size=32), st.floats(0, 0.5), st.floats(0, 0.5))
def test_raising_the_fraction_only_moves_pictures_out_of_training(digest: bytes, a: float, b: float) -> None:
    low, high = sorted((a, b))
    if split_of(digest.hex(), low) == "held-out":
        assert split_of(digest.hex(), high) == "held-out"
    assert split_of(digest.hex(), 0.0) == "train"


@given(st.integers(32, 900), st.integers(32, 900))
def test_the_crop_is_square_central_and_inside(width: int, height: int) -> None:
    g = fit((width, height), (32, 32))
    left, top, right, bottom = g.crop
    assert g.size == (32, 32) and min(g.resized) == 32
    assert left >= 0 and top >= 0 and right <= g.resized[0] and bottom <= g.resized[1]
    assert abs(left - (g.resized[0] - right)) <= 1 and abs(top - (g.resized[1] - bottom)) <= 1
    assert abs(g.resized[0] / g.resized[1] - width / height) / (width / height) < 0.05


def test_colour_modes_arrive_as_the_rgb_a_person_sees(tmp_path: Path) -> None:
    red = Image.new("RGB", (40, 40), (200, 0, 0))
    half = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    saved = {
        "rgb.png": (red, (200, 0, 0)),
        "palette.png": (red.convert("P"), (200, 0, 0)),
        "grey.png": (Image.new("L", (40, 40), 77), (77, 77, 77)),
        "clear.png": (half, (255, 255, 255)),
    }
    for name, (image, expected) in saved.items():
        image.save(tmp_path / name)
        pixel = decode(tmp_path / name, 10**6).image.getpixel((20, 20))
        assert max(abs(a - b) for a, b in zip(pixel, expected, strict=True)) <= 6, name


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), "black")
    image.paste("white", (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to show
    image.save(tmp_path / "turned.png", exif=exif)
    upright = decode(tmp_path / "turned.png", 10**6).image
    assert upright.size == (40, 60)
    assert upright.getpixel((20, 5)) == (255, 255, 255) and upright.getpixel((20, 55)) == (0, 0, 0)


def test_pixels_settle_the_hash_and_the_file_does_not(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png", compress_level=1)
    image.save(tmp_path / "b.bmp")
    hashes = {hash_pixels(decode(tmp_path / name, 10**6).image) for name in ("a.png", "b.bmp")}
    image.putpixel((0, 0), (1, 2, 3))
    assert len(hashes) == 1 and hash_pixels(image) not in hashes
    assert hash_pixels(image.transpose(Image.Transpose.ROTATE_90)) not in hashes


def test_cut_gives_the_size_and_the_middle() -> None:
    image = Image.new("RGB", (96, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    assert cut(image, fit(image.size, (32, 32))).getcolors() == [(32 * 32, (0, 0, 255))]


def test_decode_gives_up_on_bombs_before_reading_them(tmp_path: Path) -> None:
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    with pytest.raises(BadImage, match="900000000 pixels"):
        decode(tmp_path / "bomb.png", 10**6)


def test_trigger_is_put_in_front_once() -> None:
    assert with_trigger("a cat", "zyx") == "zyx, a cat"
    assert with_trigger("a cat, zyx style", "zyx") == "a cat, zyx style"
    assert with_trigger("a cat", "") == "a cat"


def test_mutated_files_are_accepted_or_rejected_and_nothing_else(folder: Path) -> None:
    """More than 1,000 damaged pictures and as many captions: whatever the bytes, a reason or a sample."""
    rng = np.random.default_rng(1)

    def noise() -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {"a.webp": noise(), "b.tif": noise().convert("CMYK"), "c.bmp": noise().convert("P"), "d.jpg": noise()}
    kinds |= {"e.png": Image.fromarray(rng.integers(0, 65535, (40, 40), dtype=np.uint16)), "f.png": noise().convert("RGBA")}
    for name, image in kinds.items():
        image.save(folder / name, **({"exif": exif, "icc_profile": profile} if name == "d.jpg" else {}))
        (folder / name).with_suffix(".txt").write_text(f"picture {name}")
    Image.open(folder / "001.png").convert("RGB").resize((40, 40)).save(folder / "001.jpg", quality=60)
    (folder / "001.png").unlink()
    Image.open(folder / "002.png").save(folder / "002.gif")
    (folder / "002.png").unlink()
    originals = {p: p.read_bytes() for p in sorted(folder.iterdir())}
    for _ in range(80):
        for path, data in originals.items():
            broken = bytearray(data)
            for _ in range(int(rng.integers(1, 6))):
                broken[int(rng.integers(len(broken)))] = int(rng.integers(256))
            path.write_bytes(bytes(broken[: int(rng.integers(1, len(broken) + 1))] if rng.random() < 0.3 else broken))
        manifest, rejects = run(folder)
        named = {s.path for s in manifest.samples} | {r.path for r in rejects}
        assert {p.name for p in originals if p.suffix != ".txt"} <= named
        assert all(r.reason for r in rejects)
    assert 80 * sum(p.suffix != ".txt" for p in originals) >= 1000
