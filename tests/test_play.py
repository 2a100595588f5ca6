"""The playground: what draws, and the page in a browser, on the embedded base. The page needs the extra `ui`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from finished import export, finish
from PIL import Image
from project import REPOSITORY, Project, make_project
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from pipeline.studio import Studio, Wish, known_adapters, save
from pipeline.workspace import DIST, Workspace


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, sd_folder: Path, clip_folder: Path, pictures_folder: Path
) -> Iterator[Workspace]:
    project = make_project(tmp_path_factory.mktemp("play") / "p", sd_folder, clip_folder, pictures_folder)
    export(finish(project))
    with contextlib.chdir(project.root):
        yield Workspace(project.root, project.root)


@pytest.fixture(scope="module")
def studio(home: Workspace) -> Studio:
    return Studio(home)


@pytest.fixture(scope="module")
def file(home: Workspace) -> str:
    return known_adapters(home)["pytorch_lora_weights.safetensors"]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)


def test_base_and_adapters_beside_each_other_and_nothing_is_left_behind(studio: Studio, file: str) -> None:
    plain = Wish("a red circle", steps=2, guidance_scale=1.0)
    base, same = studio.draw(plain)
    assert (pixels(base) == pixels(same)).all()
    before, after = studio.draw(Wish("a red circle", steps=2, guidance_scale=1.0, adapters=((file, 1.0),)))
    assert (pixels(before) == pixels(base)).all() and (pixels(after) != pixels(base)).any()
    again, _ = studio.draw(plain)
    assert (pixels(again) == pixels(base)).all()


def test_two_halves_of_an_adapter_are_the_adapter(studio: Studio, file: str) -> None:
    _, whole = studio.draw(Wish("a", steps=2, guidance_scale=1.0, adapters=((file, 1.0),)))
    _, halves = studio.draw(Wish("a", steps=2, guidance_scale=1.0, adapters=((file, 0.5), (file, 0.5))))
    assert np.abs(pixels(whole) - pixels(halves)).max() <= 1
    _, none = studio.draw(Wish("a", steps=2, guidance_scale=1.0, adapters=((file, 1.0), (file, -1.0))))
    base, _ = studio.draw(Wish("a", steps=2, guidance_scale=1.0))
    assert np.abs(pixels(none) - pixels(base)).max() <= 1


def test_what_is_no_adapter_is_refused_and_the_base_stays(studio: Studio, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"odd.safetensors"):
        studio.draw(Wish("a", steps=2, adapters=((str(tmp_path / "odd.safetensors"), 1.0),)))
    base, _ = studio.draw(Wish("a", steps=2))
    assert base.size == (32, 32)


def test_a_download_holds_its_parameters(studio: Studio, tmp_path: Path) -> None:
    wish = Wish("a é", seed=4, steps=2, adapters=(("x.safetensors", 0.5),))
    image, _ = studio.draw(Wish("a", steps=2))
    stored = json.loads(Image.open(save(image, wish, tmp_path / "x.png")).info["parameters"])
    assert stored["prompt"] == "a é" and stored["adapters"] == [["x.safetensors", 0.5]] and stored["seed"] == 4


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium: apt-get install chromium")
def test_the_page_draws_in_a_browser(tmp_path: Path, clip_folder: Path, pictures_folder: Path) -> None:
    pytest.importorskip("gradio", reason="pip install '.[ui]'; .ci/run does, for this test")
    from browser import page

    project = make_project(tmp_path / "p", REPOSITORY / "assets" / "tiny-sd", clip_folder, pictures_folder)
    project.set("dataset", resolution=64)
    export(finish(project))
    assert load_file(project.root / DIST / "tiny.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = project.start(sys.executable, "cli.py", "play", "--port", str(port))
    try:
        wait_for_answer(port)
        with page(f"http://127.0.0.1:{port}", tmp_path / "profile") as browser:
            button = "[...document.querySelectorAll('button')].find(b => b.textContent.trim() === 'Draw')"
            browser.wait_for(f"!!({button})")
            browser.evaluate(f"({button}).click()")
            drawn = "[...document.querySelectorAll('img')].filter(i => i.naturalWidth === 64).map(i => i.src)"
            browser.wait_for(f"({drawn}).length === 2")
            assert browser.evaluate("!!document.querySelector('a[download]')")
            assert browser.evaluate("document.body.innerText").count("Adapter ") == 3
            ours = [error for error in browser.errors if "manifest" not in error and "favicon" not in error]
            assert not ours, ours
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate(timeout=30)


def wait_for_answer(port: int) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError("the playground did not start")


def test_without_gradio_it_says_what_to_install(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.playground import play

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"play needs gradio.*reprolora\[ui\]"):
        play(Workspace(project.root, project.root), "127.0.0.1", 7860)
