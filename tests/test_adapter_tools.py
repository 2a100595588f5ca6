"""show, verify, convert, combine: on our files, on foreign ones, on what is none."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from finished import export, finish
from hypothesis import given
from hypothesis import strategies as st
from project import Project, make_project
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import cli
from pipeline.errors import UserError
from pipeline.export.adapter import delta
from pipeline.export.adapter_file import read_adapter, read_metadata
from pipeline.export.convert import combine, convert, parse_weighted
from pipeline.export.show import facts, lines
from pipeline.export.verify import verify
from pipeline.safetensors_file import write_safetensors
from pipeline.workspace import Workspace


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path, clip_folder: Path, pictures_folder: Path) -> Project:
    root = tmp_path_factory.mktemp("finished") / "p"
    done = finish(make_project(root, sd_folder, clip_folder, pictures_folder))
    export(done)
    return done


@pytest.fixture
def file(project: Project) -> Path:
    return project.path("dist/adapter/tiny.safetensors")


def foreign(path: Path, width: int = 2048, name: str = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k") -> Path:
    tensors = {f"{name}.lora_down.weight": torch.ones(4, width), f"{name}.lora_up.weight": torch.ones(8, 4)}
    save_file({**tensors, f"{name}.alpha": torch.tensor(2.5)}, path)
    return path


def test_show_tells_our_files_facts(file: Path) -> None:
    done = CliRunner().invoke(cli.app, ["show", str(file)])
    assert done.exit_code == 0, done.output
    for line in ("format      kohya", "rank        2", "alpha       4", "dtype       float32", "kind        lora"):
        assert line in done.output
    assert "sd (the header says sd_v1)" in done.output and "trigger     zyx" in done.output and "  dataset: " in done.output
    as_json = json.loads(CliRunner().invoke(cli.app, ["show", str(file), "--json"]).output)
    assert as_json["metadata"]["ss_output_name"] == "tiny" and as_json["layers"] == {
        "unet": len(read_adapter(file).adapter.layers)
    }
    other = facts(file.parent / "pytorch_lora_weights.safetensors")
    assert other["format"] == "diffusers" and other["alpha"] == "4"  # though α is in the weights there


@pytest.mark.parametrize(
    ("width", "family"), [(768, "Stable Diffusion 1.x"), (1024, "2.x"), (2048, "sdxl"), (99, "text of width 99")]
)
def test_show_guesses_a_foreign_files_family(tmp_path: Path, width: int, family: str) -> None:
    found = facts(foreign(tmp_path / "f.safetensors", width))
    assert family in found["family"] and found["alpha"] == "2.5" and found["trigger"] is None
    assert any("metadata" in line and "none" in line for line in lines(found))


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps({"a": 1}))
    save_file({"model.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    for name, said in {
        "evil.pt": "a pickle can run code",
        "evil.safetensors": "damaged or no safetensors file",
        "model.safetensors": "no adapter for Stable Diffusion",
        "none.safetensors": "there is no file",
    }.items():
        with pytest.raises(UserError, match=said):
            facts(tmp_path / name)


@given(
    names=st.lists(
        st.sampled_from(["lora_unet_", "lora_te_", "unet.", "text_encoder_2.", ""]).flatmap(
            lambda start: st.text("adnoptu_.0123", max_size=24).map(lambda rest: start + rest)
        ),
        min_size=1,
        max_size=4,
        unique=True,
    ),
    part=st.sampled_from([".lora_down.weight", ".lora_A.weight", ".hada_w1_a", ".lokr_w1", ".alpha", ""]),
    header=st.sampled_from([{}, {"lora_adapter_metadata": "{"}, {"lora_adapter_metadata": "[]"}, {"reprolora_alpha": "3"}]),
)
def test_whatever_a_files_names_and_header_are_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], part: str, header: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "wild.safetensors"
    write_safetensors(path, {name + part: torch.ones(2, 2) for name in names}, header)
    with contextlib.suppress(UserError):
        assert read_adapter(path).adapter.layers


def test_verify_says_what_matches_and_what_does_not(project: Project, file: Path) -> None:
    here = Workspace(project.root, project.root)
    assert {f.verdict for f in verify(here, file)} == {"matches"} and len(verify(here, file)) == 7
    params = project.params()
    project.set("train", learning_rate=0.5)
    source = project.path("pipeline/optim.py")
    code = source.read_bytes()
    source.write_bytes(code + b"# changed\n")
    manifest = project.path("build/dataset/manifest.jsonl")
    manifest.rename(manifest.with_suffix(".away"))
    try:
        found = {f.link: f for f in verify(here, file)}
        assert found["params"].verdict == "differs" and found["dataset"].verdict == "cannot be checked"
        # other sources with the same weights: no other adapter
        assert found["sources"].verdict == "cannot be checked" and "the same weights" in found["sources"].note
        done = project.cli("verify", str(file))
        assert done.returncode == 1 and "differs            params" in done.stdout, done.stderr
    finally:
        project.write(params)
        source.write_bytes(code)
        manifest.with_suffix(".away").rename(manifest)
    assert {f.verdict for f in verify(here, file)} == {"matches"}


def test_verify_sees_changed_tensors_and_foreign_files(project: Project, file: Path, tmp_path: Path) -> None:
    here = Workspace(project.root, project.root)
    tensors = load_file(file)
    key = min(tensors)
    write_safetensors(tmp_path / "changed.safetensors", {**tensors, key: tensors[key] + 1}, read_metadata(file))
    assert {f.link: f.verdict for f in verify(here, tmp_path / "changed.safetensors")}["content"] == "differs"
    with pytest.raises(UserError, match="states no lineage"):
        verify(here, foreign(tmp_path / "f.safetensors"))


def test_convert_goes_both_ways_and_keeps_alpha_and_lineage(project: Project, file: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    done = CliRunner().invoke(cli.app, ["convert", str(file), str(there), "--to", "diffusers"])
    assert done.exit_code == 0, done.output
    convert(there, back, "kohya")
    before, after = load_file(file), load_file(back)
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=1e-6, atol=1e-7)
        if key.endswith(".alpha"):
            assert float(after[key]) == 4.0
    assert {f.verdict for f in verify(Workspace(project.root, project.root), back)} == {"matches"}
    exported = load_file(file.parent / "pytorch_lora_weights.safetensors")
    assert load_file(there).keys() == exported.keys()
    assert all(torch.equal(t, exported[k]) for k, t in load_file(there).items())
    assert read_metadata(there)["ss_output_name"] == "tiny"
    convert(file, tmp_path / "half.safetensors", "kohya", dtype="float16", rank=1)
    half = facts(tmp_path / "half.safetensors")
    assert half["rank"] == "1" and half["alpha"] == "2" and half["dtype"] == "float16"
    assert half["metadata"]["ss_network_dim"] == "1"


def test_convert_a_foreign_file_tells_the_family_or_asks(tmp_path: Path) -> None:
    convert(foreign(tmp_path / "xl.safetensors"), tmp_path / "d.safetensors", "diffusers")
    [name] = {key.rsplit(".lora_", 1)[0] for key in load_file(tmp_path / "d.safetensors")}
    assert name == "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    convert(tmp_path / "d.safetensors", tmp_path / "k.safetensors", "kohya")
    assert load_file(tmp_path / "k.safetensors").keys() == load_file(tmp_path / "xl.safetensors").keys()
    assert {float(t) for k, t in load_file(tmp_path / "k.safetensors").items() if k.endswith("alpha")} == {2.5}
    odd = foreign(tmp_path / "odd.safetensors", 99, "lora_unet_down_blocks_0_attentions_0_proj_in")
    with pytest.raises(UserError, match="give --family"):
        convert(odd, tmp_path / "x.safetensors", "kohya")
    convert(odd, tmp_path / "x.safetensors", "kohya", family_name="sdxl")
    assert "lora_unet_input_blocks_1_1_proj_in.alpha" in load_file(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        convert(odd, tmp_path / "x.bin", "kohya", family_name="sd")


def test_combine_weighs_and_says_of_what(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.safetensors"
    other = file.parent / "pytorch_lora_weights.safetensors"  # the same adapter in another format
    done = CliRunner().invoke(cli.app, ["combine", f"{file}:0.5", f"{other}:1.5", "--out", str(out)])
    assert done.exit_code == 0, done.output
    single, both = read_adapter(file).adapter, read_adapter(out).adapter
    for name, layer in single.layers.items():
        torch.testing.assert_close(delta(both.layers[name]), 2.0 * delta(layer), rtol=1e-4, atol=1e-5)
    assert read_metadata(out)["modelspec.merged_from"] == "tiny.safetensors × 0.5, pytorch_lora_weights.safetensors × 1.5"
    combine([(file, 0.5), (other, 1.5)], out, "kohya", "float32", rank=2)
    again = read_adapter(out).adapter
    name = min(again.layers)  # two copies of one rank-2 matrix: nothing is lost by going back to rank 2
    torch.testing.assert_close(delta(again.layers[name]), 2.0 * delta(single.layers[name]), rtol=1e-3, atol=1e-4)
    assert parse_weighted("a/b.safetensors") == (Path("a/b.safetensors"), 1.0)
    with pytest.raises(UserError, match="expected FILE:WEIGHT"):
        parse_weighted("a:b")
