"""What leaves the project: the file loads in plain diffusers and draws what the model in training drew."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline import lora
from pipeline.config import Threshold
from pipeline.export.adapter import Adapter, Layer
from pipeline.export.adapter_file import load_into
from pipeline.export.card import escape_markdown, render_card
from pipeline.export.diffusers_format import FILE_NAME, write_diffusers
from pipeline.export.peft_format import adapter_of_modules
from pipeline.families import family
from pipeline.safetensors_file import write_safetensors

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def draw(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        ["a red circle", "a blue square"],
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
        height=32,
        width=32,
        output_type="np",
    ).images
    return np.asarray(images)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (2, 7.5)])
def test_the_exported_file_draws_what_the_trained_model_drew(
    name: str, rank: int, alpha: float, sd_folder: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    folder, kind = {"sd": (sd_folder, StableDiffusionPipeline), "sdxl": (sdxl_folder, StableDiffusionXLPipeline)}[name]
    trained = kind.from_pretrained(folder)
    base = draw(trained)
    lora.inject(trained.unet, lora.LoraSpec(rank, alpha, 0.0, TARGETS), 0)
    torch.manual_seed(1)
    weights = {k: torch.randn_like(v) * 0.3 for k, v in lora.state(trained.unet).items()}
    lora.load_state(trained.unet, weights)
    expected = draw(trained)
    path = tmp_path / FILE_NAME
    write_diffusers(path, adapter_of_modules({"unet": trained.unet}), torch.float32, {"reprolora": "{}"})
    plain = kind.from_pretrained(folder)
    plain.load_lora_weights(tmp_path)  # as a user does it: α is read from the file
    np.testing.assert_allclose(draw(plain), expected, atol=1e-5)
    assert np.abs(expected - base).max() > 0.02
    ours = family(name).load_pipeline(_model(folder), torch.device("cpu"), torch.float32)
    load_into(ours, path, scale=1.0)
    np.testing.assert_allclose(draw(ours), expected, atol=1e-5)
    load_into_again = kind.from_pretrained(folder)
    load_into(load_into_again, path, scale=0.0)
    np.testing.assert_allclose(draw(load_into_again), base, atol=1e-5)


def _model(folder: Path):
    from pipeline.model_source import LocalModel

    return LocalModel(folder, None, None)


def one_layer(a: torch.Tensor, b: torch.Tensor, alpha: float) -> Adapter:
    parts = {"lora_down.weight": a, "lora_up.weight": b}
    return Adapter({"unet.down.to_q": Layer(parts, a.shape[0], alpha)})


def test_dtype_is_as_asked_and_metadata_is_kept(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    write_diffusers(path, one_layer(torch.randn(2, 8), torch.randn(8, 2), 3.0), torch.float16, {"reprolora": "{}"})
    assert {t.dtype for t in load_file(path).values()} == {torch.float16}
    assert set(load_file(path)) == {"unet.down.to_q.lora_A.weight", "unet.down.to_q.lora_B.weight"}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["reprolora"] == "{}"
    assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 2


def test_the_scale_is_in_the_weights_for_loaders_that_read_no_config(tmp_path: Path) -> None:
    """ComfyUI takes α = rank where the file has no α tensors."""
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    write_diffusers(tmp_path / FILE_NAME, one_layer(a, b, 3.0), torch.float32, {})
    loaded = load_file(tmp_path / FILE_NAME)
    delta = loaded["unet.down.to_q.lora_B.weight"] @ loaded["unet.down.to_q.lora_A.weight"]
    torch.testing.assert_close(delta, 3.0 / 2 * b @ a)


def test_the_same_content_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """The library's own writer orders metadata by a random hash."""
    script = (
        "import sys, torch; from pathlib import Path; from pipeline.safetensors_file import write_safetensors\n"
        "write_safetensors(Path(sys.argv[1]), {n: torch.arange(3.) for n in 'bca'}, {k: k for k in 'zyxwvutsrq'})"
    )
    hashes = set()
    for i in range(3):
        path = tmp_path / f"{i}.safetensors"
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, cwd=Path(__file__).parent.parent)
        hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(hashes) == 1
    assert load_file(tmp_path / "0.safetensors")["a"].tolist() == [0, 1, 2]
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert file.metadata() == {k: k for k in "zyxwvutsrq"}


@pytest.mark.parametrize("metadata", [None, {"k": "v"}])
def test_the_bytes_are_those_of_the_librarys_own_writer(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    """Of every type, of none at all, of one number, of what is no rectangle in memory, and of what is trained."""
    types = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
    tensors = {str(dtype): torch.tensor([[1, 0, 3], [0, 2, 1]]).to(dtype) for dtype in types}
    tensors |= {"none": torch.zeros(0, 3), "one": torch.tensor(3.5), "turned": torch.arange(6.0).view(2, 3).T}
    write_safetensors(tmp_path / "ours", tensors | {"trained": torch.ones(2, requires_grad=True)}, metadata)
    save_file({name: t.contiguous() for name, t in tensors.items()} | {"trained": torch.ones(2)}, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("text", ["", "é✓", "x" * 5, "x" * 6, "x" * 7])
def test_header_stays_aligned_whatever_the_metadata(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"t": torch.arange(5, dtype=torch.float64)}, {"k": text})
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert load_file(path)["t"].tolist() == [0, 1, 2, 3, 4]


def test_text_from_outside_is_inert_in_the_card() -> None:
    hostile = "<script>alert(1)</script> | `x` [a](http://b) **c**\n# d"
    safe = escape_markdown(hostile)
    assert "<script" not in safe and "\n" not in safe
    for mark in ("|", "`", "[", "*", "#"):
        assert f"\\{mark}" in safe and not any(safe[i] == mark and safe[i - 1] != "\\" for i in range(1, len(safe)))


def test_a_fact_that_is_missing_is_an_error() -> None:
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        render_card({"license": None}, {"title": "x"})


def test_a_metric_that_is_not_finite_is_said_and_breaks_nothing() -> None:
    from pipeline.evaluate.gate import judge
    from pipeline.export.card import model_index

    listed = model_index("x", {"held_out_loss": None, "clip_score": 20.0}, "data")
    assert listed and [m["type"] for m in listed[0]["results"][0]["metrics"]] == ["clip_score"]
    [finding] = judge({"held_out_loss": None}, {"held_out_loss": Threshold(max=1.0)})
    assert not finding.passed and "nan" in finding.sentence()
