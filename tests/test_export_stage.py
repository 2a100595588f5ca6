"""export-and-card: what it writes, what it says of it, and that it refuses what does not load as it was trained."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from finished import TRIGGER, export, finish
from project import Project, make_project
from safetensors.torch import load_file

import stages.export_and_card as stage_code
from pipeline.errors import UserError
from pipeline.export.adapter_file import read_metadata
from pipeline.export.lineage import LINKS
from pipeline.families import family
from pipeline.files import hash_tree, write_json
from pipeline.model_source import LocalModel
from pipeline.safetensors_file import write_safetensors


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path, clip_folder: Path, pictures_folder: Path) -> Project:
    root = tmp_path_factory.mktemp("finished") / "p"
    project = finish(make_project(root, sd_folder, clip_folder, pictures_folder), license="apache-2.0", tags=["glow"])
    export(project)
    return project


def test_both_files_the_card_and_the_lineage_are_there(finished: Project) -> None:
    dist = finished.path("dist/adapter")
    names = {p.relative_to(dist).as_posix() for p in dist.rglob("*") if p.is_file()}
    assert names >= {"pytorch_lora_weights.safetensors", "tiny.safetensors", "README.md", "gate.json", "lineage.json"}
    kohya = load_file(dist / "tiny.safetensors")
    assert {float(t) for k, t in kohya.items() if k.endswith(".alpha")} == {4.0}  # rank 2: lora.alpha as it was set
    lineage = json.loads((dist / "lineage.json").read_text())
    assert set(LINKS) < set(lineage) and re.fullmatch("sha256:[0-9a-f]{64}", lineage["base"])
    for name in ("pytorch_lora_weights.safetensors", "tiny.safetensors"):
        stated = json.loads(read_metadata(dist / name)["reprolora"])["lineage"]
        assert stated == {link: lineage[link] for link in LINKS}
        assert lineage[f"file {name}"] == hashlib.sha256((dist / name).read_bytes()).hexdigest()
        assert all(value in (dist / "README.md").read_text() for value in stated.values())


def test_the_header_tells_other_programs_what_they_look_for_and_no_time(finished: Project) -> None:
    path = finished.path("dist/adapter/tiny.safetensors")
    header = read_metadata(path)
    assert header["ss_output_name"] == "tiny" and header["ss_network_module"] == "networks.lora"
    assert header["ss_base_model_version"] == "sd_v1" and header["ss_v2"] == "False"
    assert (header["ss_network_dim"], header["ss_network_alpha"], header["ss_network_args"]) == ("2", "4", "{}")
    assert header["ss_resolution"] == "(32, 32)" and header["ss_num_train_images"] == "3"
    assert json.loads(header["ss_tag_frequency"]) == {"tiny": {"*bold*": 3, "a red circle": 3, "zyx": 3}}
    assert json.loads(header["ss_bucket_info"]) == {"buckets": {"0": {"resolution": [32, 32], "count": 3}}}
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora" and header["modelspec.resolution"] == "32x32"
    assert header["modelspec.trigger_phrase"] == TRIGGER and header["modelspec.license"] == "apache-2.0"
    assert header["modelspec.prediction_type"] == "epsilon" and header["modelspec.title"] == "tiny"
    raw = path.read_bytes()
    data = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert header["sshs_model_hash"] == data and header["modelspec.hash_sha256"] == f"0x{data}"
    assert re.fullmatch("[0-9a-f]{8}", header["sshs_legacy_hash"])
    assert not [key for key in header if key.endswith(("_at", ".date"))]
    assert all(isinstance(value, str) for value in header.values())


def test_two_exports_are_byte_identical(finished: Project) -> None:
    """The second one by the command, in the harness, in a process with other hashes."""
    before = hash_tree(finished.path("dist/adapter"))
    done = finished.cli("stage", "export-and-card", PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny.safetensors: loaded by diffusers" in done.stdout
    assert hash_tree(finished.path("dist/adapter")) == before


@pytest.mark.parametrize("judged_in", ["float32", "bfloat16"])
def test_float16_is_within_rounding_and_merge_draws_the_same(
    new_project: Callable[[], Project], capsys: pytest.CaptureFixture[str], judged_in: str
) -> None:
    """Merged into the base in float32, whatever it was judged in."""
    from diffusers import StableDiffusionPipeline

    project = new_project()
    project.set("validate", dtype=judged_in)
    finish(project, dtype="float16", merge=True, formats=["kohya"])
    dist = export(project)
    assert "tiny.safetensors: loaded by diffusers" in capsys.readouterr().out
    assert not (dist / "pytorch_lora_weights.safetensors").exists()
    dtypes = {k.split(".", 1)[1]: t.dtype for k, t in load_file(dist / "tiny.safetensors").items()}
    assert dtypes["lora_up.weight"] == torch.float16 and dtypes["alpha"] == torch.float32
    merged = StableDiffusionPipeline.from_pretrained(dist / "merged", safety_checker=None)
    loaded = StableDiffusionPipeline.from_pretrained(project.path("base"), safety_checker=None)
    loaded.load_lora_weights(dist / "tiny.safetensors")
    pictures = []
    for pipeline in (merged, loaded):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        drawn = pipeline("a", num_inference_steps=2, height=32, width=32, generator=generator, output_type="np")
        pictures.append(drawn.images[0])
    np.testing.assert_allclose(pictures[0], pictures[1], atol=5e-3)
    texts = [p.read_text() for p in (dist / "merged").rglob("*.json")]
    assert texts and not any(str(project.root) in text for text in texts)


def spoil_alpha(tensors: dict) -> dict:
    return {k: t * 2 if k.endswith(".alpha") else t for k, t in tensors.items()}


def forget_a_layer(tensors: dict) -> dict:
    first = min(tensors).split(".")[0]
    return {k: t for k, t in tensors.items() if not k.startswith(first + ".")}


def mix_up_a_name(tensors: dict) -> dict:
    return {k.replace("to_q", "to_x"): t for k, t in tensors.items()}


def one_nan(tensors: dict) -> dict:
    key = min(k for k in tensors if k.endswith("lora_up.weight"))
    return {**tensors, key: tensors[key] * float("nan")}


def test_layers_with_ranks_and_alphas_of_their_own_load_everywhere(new_project: Callable[[], Project]) -> None:
    """The stage compares ΔW layer by layer: diffusers takes one alpha for all layers of a Kohya file, so that one is written."""
    project = new_project()
    project.set("lora", rank_pattern={"to_k": 3}, alpha_pattern={"to_k": 5.0})
    dist = export(finish(project))
    kohya = load_file(dist / "tiny.safetensors")
    assert {float(t) for k, t in kohya.items() if k.endswith(".alpha")} == {4.0}
    assert {t.shape[0] for k, t in kohya.items() if k.endswith(".lora_down.weight")} == {2, 3}


def test_the_header_says_what_the_base_was_trained_to_predict(new_project: Callable[[], Project]) -> None:
    project = new_project()
    project.set("model", prediction="v_prediction")
    dist = export(finish(project))
    header = read_metadata(dist / "tiny.safetensors")
    assert header["ss_base_model_version"] == "sd_v1_v" and header["modelspec.prediction_type"] == "v"


def test_the_files_of_an_sdxl_say_that_they_are(
    tmp_path: Path, sdxl_folder: Path, clip_folder: Path, pictures_folder: Path
) -> None:
    project = make_project(tmp_path / "sdxl", sdxl_folder, clip_folder, pictures_folder)
    project.set("model", family="sdxl")
    for path in export(finish(project)).glob("*.safetensors"):
        header = read_metadata(path)
        assert header["ss_base_model_version"] == "sdxl_base_v1-0"
        assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_alpha, "is not what was trained"),
        (forget_a_layer, "was loaded without its layer"),
        (mix_up_a_name, "was written, but cannot be loaded|was loaded without its layer"),
        (one_nan, "is not what was trained"),
    ],
)
def test_a_file_that_loads_as_something_else_fails_the_stage(
    finished: Project, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[dict], dict], said: str
) -> None:
    written = stage_code.write_kohya

    def damaged(path: Path, *rest: object) -> None:
        written(path, *rest)
        write_safetensors(path, spoil(load_file(path)), read_metadata(path))

    monkeypatch.setattr(stage_code, "write_kohya", damaged)
    with pytest.raises(UserError, match=said):
        export(finished, work=f"damaged-{spoil.__name__}")


def test_the_card_passes_the_hubs_own_checks(finished: Project) -> None:
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import metadata_load
    from huggingface_hub.repocard_data import model_index_to_eval_results

    path = finished.path("dist/adapter/README.md")
    card = ModelCard(path.read_text(), ignore_metadata_errors=False)
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "diffusers" and data["instance_prompt"] == TRIGGER
    assert "glow" in data["tags"] and "base_model" not in data  # the base is a folder: its name is nobody's repository
    [widget] = data["widget"]
    assert (path.parent / widget["output"]["url"]).is_file() and widget["text"] == "a red circle"
    _, results = model_index_to_eval_results(metadata_load(path)["model-index"])
    assert {r.metric_type: r.metric_value for r in results}["held_out_loss_ratio"] == 0.5
    assert {r.task_type for r in results} == {"text-to-image"}
    text = card.text
    for word in ("ComfyUI", "A1111", "load_lora_weights", "## Limitations", "## Lineage", "<lora:tiny:1>", "zyx, \\*bold\\*"):
        assert word in text
    assert "Licence: apache-2.0" in text and "none is granted" not in text


def test_a_card_with_hostile_texts_stays_one_card(new_project: Callable[[], Project]) -> None:
    from huggingface_hub import ModelCard

    hostile = "---\n</script><script>alert(1)</script> | `x` [a](javascript:b) {{ 7 * 7 }} ```"
    project = finish(new_project(), title=hostile, author=hostile, description=hostile, formats=["diffusers"])
    project.set("validate", prompts=[hostile])
    card = ModelCard((export(finish_again(project)) / "README.md").read_text(), ignore_metadata_errors=False)
    data = card.data.to_dict()
    assert data["widget"][0]["text"] == hostile and "license" not in data and "none is granted" in card.text
    outside_code = re.sub(r"```python.*?```\n", "", card.text, flags=re.S)
    assert "<script" not in outside_code and "{{ 7 * 7 }}" in outside_code.replace("\\", "")
    assert "](javascript" not in outside_code.replace("\\]", "")
    assert "A1111" not in card.text  # no Kohya file, no word on how to use one


def finish_again(project: Project) -> Project:
    import shutil

    for folder in ("build", "reports"):
        shutil.rmtree(project.path(folder))
    return finish(project)


@pytest.mark.parametrize(
    ("family_name", "width", "prediction", "kohya", "architecture"),
    [
        ("sd", 768, "epsilon", "sd_v1", "stable-diffusion-v1"),
        ("sd", 1024, "epsilon", "sd_v2", "stable-diffusion-v2-512"),
        ("sd", 1024, "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v"),
        ("sdxl", 2048, "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    ],
)
def test_the_base_is_called_what_other_programs_call_it(
    tmp_path: Path, family_name: str, width: int, prediction: str, kohya: str, architecture: str
) -> None:
    """A1111 takes a file for SDXL by `sdxl_`, for SD 2.x by `ss_v2`, and for SD 1.x otherwise."""
    write_json(tmp_path / "unet/config.json", {"cross_attention_dim": width, "layers_per_block": 2})
    write_json(tmp_path / "scheduler/scheduler_config.json", {"prediction_type": prediction})
    version = family(family_name).base_version(LocalModel(tmp_path, None, None))
    assert (version.kohya, version.architecture) == (kohya, architecture)
    assert version.v2 is (width == 1024) and version.prediction == prediction[: 1 if prediction[0] == "v" else None]


def test_sd3_is_exported_for_diffusers(
    tmp_path: Path, sd3_folder: Path, clip_folder: Path, pictures_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = make_project(tmp_path / "sd3", sd3_folder, clip_folder, pictures_folder)
    project.set("model", family="sd3")
    project.set("validate", scheduler="base")
    dist = export(finish(project, formats=["diffusers"]))
    assert "pytorch_lora_weights.safetensors: loaded by diffusers" in capsys.readouterr().out
    assert [p.name for p in dist.glob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]
    header = read_metadata(dist / "pytorch_lora_weights.safetensors")
    assert header["modelspec.architecture"] == "stable-diffusion-3/lora" and "modelspec.prediction_type" not in header
    assert "StableDiffusion3Pipeline" in (dist / "README.md").read_text()
