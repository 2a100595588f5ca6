"""What `check` foretells, against the models' own counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from project import PARAMS, REPOSITORY

from pipeline.config import Params
from pipeline.estimate import disk_line, memory_line, steps_line, time_line, weights_in
from pipeline.workspace import Workspace

# family, side in pixels, weights of the denoiser and those of its linear layers
FULL = {
    "sd15": ("sd", 512, (859_520_964, 270_049_280)),
    "sdxl": ("sdxl", 1024, (2_567_463_684, 2_232_647_680)),
}


def params(**sections: dict) -> Params:
    asked = {name: {**section, **sections.get(name, {})} for name, section in PARAMS.items()}
    return Params.model_validate_json(json.dumps(asked))


def test_weights_are_counted_from_the_headers(sd_folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    count, linear = unet.num_parameters(), sum(m.weight.numel() for m in unet.modules() if isinstance(m, torch.nn.Linear))
    assert weights_in(sd_folder / "unet") == (count, linear)
    assert f"{count * 4 / 2**20:.0f} MiB for the denoiser's" in memory_line(params(), sd_folder / "unet")
    assert "not known" in memory_line(params(), sd_folder / "nothing")


def test_memory_is_what_was_measured_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of bench/results/memory.json within a tenth."""
    rows = json.loads((REPOSITORY / "bench" / "results" / "memory.json").read_text())["measured"]
    for row in rows:
        family, resolution, weights = FULL[row["size"]]
        monkeypatch.setattr("pipeline.estimate.weights_in", lambda folder, weights=weights: weights)
        asked = params(
            model={"family": family},
            dataset={"resolution": resolution},
            train={"mixed_precision": "bf16", "batch_size": 8},
            runtime={"micro_batch": row["micro_batch"], "gradient_checkpointing": row["gradient_checkpointing"]},
        )
        told = memory_line(asked, tmp_path)
        foretold = float(told.removeprefix("about ").split()[0])
        assert foretold == pytest.approx(row["peak MiB"] / 1024, rel=0.1), (row, told)


def test_a_quantised_base_takes_what_the_recipes_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its linear layers alone are in 8 or 4 bits."""
    page = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    for kind in ("int8", "nf4"):
        row = next(line for line in page.splitlines() if f"`train.quantise_base: {kind}`" in line and line.startswith("|"))
        for size, stated in zip(("sd15", "sdxl"), row.split("|")[2:4], strict=True):
            family, _, weights = FULL[size]
            monkeypatch.setattr("pipeline.estimate.weights_in", lambda folder, weights=weights: weights)
            train = {"mixed_precision": "bf16", "quantise_base": kind}
            told = memory_line(params(model={"family": family}, train=train), tmp_path)
            shown = told.split(": ")[1].split(" for the denoiser")[0]
            gib = float(shown.split()[0]) / (1024 if "MiB" in shown else 1)
            assert gib == pytest.approx(float(stated), abs=0.11), told


def test_pictures_at_once_are_a_processs_share_and_no_more(sd_folder: Path) -> None:
    def told(**runtime: object) -> str:
        return memory_line(params(train={"batch_size": 8}, runtime=runtime), sd_folder / "unet")

    assert "for 8 pictures at once" in told()
    assert "for 8 pictures at once" in told(micro_batch=16)
    assert "for 3 pictures at once" in told(micro_batch=3)
    assert "for 2 pictures at once" in told(processes=2, machines=2, main_address="a:1")
    text = memory_line(params(lora={"text_encoder": True}, runtime={"sample_every": 2}), sd_folder / "unet")
    assert text.endswith("; the text encoders that learn come on top; so do previews")


def test_latents_are_as_large_as_the_vae_makes_them(sd_folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(sd_folder / "vae")
    mean = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
    for flip in (False, True):
        mib = 2 * mean.numel() * 4 * (1 + flip) * 5000 / 2**20
        assert disk_line(params(encode={"flip": flip}), sd_folder / "vae" / "config.json", 5000).startswith(f"{mib:,.1f} MiB")


def test_steps_and_time(tmp_path: Path) -> None:
    asked = params(dataset={"held_out_fraction": 0.2}, train={"steps": 40, "batch_size": 4})
    assert steps_line(asked, 10) == "40 steps of 4: each of some 8 pictures to train on is shown 20 times"
    epochs = params(dataset={"held_out_fraction": 0.2}, train={"steps": None, "epochs": 3, "batch_size": 4})
    assert steps_line(epochs, 10).startswith("6 steps of 4")
    workspace = Workspace(tmp_path, tmp_path)
    workspace.pace.parent.mkdir()
    workspace.pace.write_text(json.dumps({"seconds_per_picture": 0.5, "resolution": 16}))
    assert time_line(workspace, asked, 10).startswith("some 5 min")  # 40 steps of 4 at twice the side: 320 s
