"""Bases: what is taken, what is refused, how a pin holds."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.files import hash_file
from pipeline.model_source import LocalModel, ModelSource, pin_of, resolve
from pipeline.remembered import hash_weights


@pytest.fixture
def base(tmp_path: Path, sd_folder: Path) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path / "base"))


def refusal(root: Path, *source: str | None) -> str:
    with pytest.raises(UserError) as caught:
        resolve(ModelSource(*source), root)
    assert str(caught.value).startswith("model.base: ")
    return str(caught.value)


def test_an_unpinned_base_is_noted_and_refused_when_strict(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(ModelSource("base"), base.parent).path == base
    assert "base is not pinned" in capsys.readouterr().out
    monkeypatch.setenv("REPROLORA_STRICT", "1")
    assert "is not pinned" in refusal(base.parent, "base")


def test_a_pin_holds_and_sees_every_file_that_matters(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pin = pin_of(base)
    resolve(ModelSource("base", pin), base.parent)
    assert capsys.readouterr().out == ""
    (base / "README.md").write_text("the card may change")
    resolve(ModelSource("base", pin), base.parent)
    for name in ("vae/config.json", "tokenizer/tokenizer.json", "unet/diffusion_pytorch_model.safetensors"):
        path = base / name
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        assert "are not the pinned ones" in refusal(base.parent, "base", pin), name
        path.write_bytes(content)


def test_what_is_no_model_is_refused_in_words(base: Path) -> None:
    root = base.parent
    (root / "empty").mkdir()
    (root / "file.safetensors").write_text("x")
    assert "empty is no model: neither model_index.json" in refusal(root, "empty")
    assert "is a file" in refusal(root, "file.safetensors")
    assert "is no folder here and no Hub id" in refusal(root, "no/such/folder")
    assert "is no folder here and no Hub id" in refusal(root, "nothing")
    assert "is a Hub commit, but base lies here" in refusal(root, "base", "a" * 40)
    assert "a sha256 pin belongs to a local folder" in refusal(root, "owner/name", "sha256:" + "a" * 64)


def test_pickles_are_refused(base: Path) -> None:
    for path in base.rglob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    assert "a pickle, which can run code when loaded" in refusal(base.parent, "base")


def test_a_hub_base_without_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal(tmp_path, "owner/name", "a" * 40)
    assert "neither a folder here nor in the local Hub cache, and the Hub cannot be reached" in message


def test_fingerprints_tell_components_apart(base: Path) -> None:
    model = LocalModel(base, None, None)
    vae, text = model.fingerprint("vae"), model.fingerprint("text_encoder", "tokenizer")
    config = base / "vae" / "config.json"
    config.write_text(config.read_text() + " ")
    assert model.fingerprint("vae") != vae and model.fingerprint("text_encoder", "tokenizer") == text
    hub = LocalModel(base, None, "a" * 40)
    assert hub.fingerprint("vae") != LocalModel(base, "fp16", "a" * 40).fingerprint("vae") != hub.fingerprint("unet")


def test_the_hash_of_a_large_file_is_remembered_until_it_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr("pipeline.remembered._LARGE", 8)
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return hash_file(path)

    def asked(path: Path) -> tuple[str, int]:
        read.clear()
        return hash_weights(path), len(read)

    monkeypatch.setattr("pipeline.remembered.hash_file", counted)
    weights, one, other = tmp_path / "w.safetensors", b"0123456789", b"9876543210"
    weights.write_bytes(one)
    first = hashlib.sha256(one).hexdigest()
    # written a moment ago: it may be written again within a tick of the clock
    assert asked(weights) == asked(weights) == (first, 1)
    monkeypatch.setattr("pipeline.remembered._SETTLED", -1.0)
    assert asked(weights) == (first, 1)
    assert asked(weights) == (first, 0)
    before = weights.stat()
    time.sleep(0.05)  # a coarse clock's tick: without it only _SETTLED keeps two writes apart
    weights.write_bytes(other)  # as many bytes, and the old time of change put back, as unpacking an archive does
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = hashlib.sha256(other).hexdigest()
    assert asked(weights) == (second, 1)
    assert asked(weights) == (second, 0)
    (tmp_path / "new").write_bytes(one)
    (tmp_path / "new").replace(weights)
    assert asked(weights) == (first, 1)
    next((tmp_path / ".work" / "hashes").iterdir()).write_text("{")
    assert asked(weights) == (first, 1)
    small = tmp_path / "small"
    small.write_bytes(b"1")
    assert asked(small)[1] == asked(small)[1] == 1
