"""params.yaml: what is let in, and what is said about the rest."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline.config import SECTIONS, check_params, load_params
from pipeline.edit import set_values
from pipeline.errors import UserError
from pipeline.workspace import Workspace

ROOT = Path(__file__).parent.parent
SHIPPED = (ROOT / "params.yaml").read_text(encoding="utf-8")
for key, value in {"  steps": "300", "  rank": "8", "  learning_rate": "2e-3", "  warmup_steps": "10"}.items():
    SHIPPED = re.sub(rf"^{key}: \S+", f"{key}: {value}", SHIPPED, flags=re.M)  # what the tests below break, whatever is shipped


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path: Path, old: str, new: str) -> str:
    assert old in SHIPPED
    with pytest.raises(UserError) as caught:
        load_params(write(tmp_path, SHIPPED.replace(old, new, 1)))
    return str(caught.value)


def line_of(text: str, needle: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if needle in line)


def test_every_shipped_file_is_valid() -> None:
    for path in [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]:
        load_params(path)
    assert len(list((ROOT / "presets").glob("*.yaml"))) >= 2


def test_every_key_of_the_models_stands_in_the_shipped_file_with_a_comment() -> None:
    document = YAML(typ="safe").load(SHIPPED)
    full = load_params(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
    for section in SECTIONS:
        if section != "gate":
            assert list(document[section]) == list(full[section]), section
            for key in document[section]:
                assert re.search(rf"^(  # .*\n)*  {key}:.* # |^  # .*\n  {key}:", SHIPPED, re.M), (
                    f"{section}.{key} has no comment"
                )


def test_unknown_key_names_the_nearest_and_its_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, "learning_rate:", "learning_rat:")
    line = line_of(SHIPPED, "learning_rate:")
    assert f"params.yaml:{line}: unknown key train.learning_rat: did you mean train.learning_rate?" in message
    assert "train.learning_rate is missing" in message
    nested = refusal(tmp_path, "  huber: null", "  huber: {c: 0.1, schedul: snr}")
    assert "unknown key train.huber.schedul: did you mean train.huber.schedule?" in nested


def test_unknown_section_and_far_off_key_list_what_is_known(tmp_path: Path) -> None:
    assert "known keys: dataset, model" in refusal(tmp_path, "gate:", "zzz:\n  a: 1\ngate:")
    assert "known keys: rank, alpha, dropout, targets, method" in refusal(tmp_path, "  rank:", "  qqqq: 1\n  rank:")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  steps: 300", "  steps: many", 'train.steps is "many": input should be a valid integer'),
        ("  steps: 300", "  steps: 3.5", "train.steps is 3.5"),
        ("  steps: 300", "  steps: true", "train.steps is true"),
        ("  steps: 300", "  steps: 0", "greater than or equal to 1"),
        ("  rank: 8", '  rank: "8"', 'lora.rank is "8"'),
        ("learning_rate: 2e-3", "learning_rate: .nan", "learning_rate"),
        ("learning_rate: 2e-3", "learning_rate: .inf", "learning_rate"),
        ("learning_rate: 2e-3", "learning_rate: -1e-3", "greater than 0"),
        ("warmup_steps: 10 ", "warmup_steps: 300 ", "warmup_steps 300 must be less than steps 300"),
        ("  epochs: null", "  epochs: 3", "steps 300 and epochs 3 both state the length"),
        ("  steps: 300", "  steps: null", "steps is missing: set steps, or epochs instead"),
        ("schedule_cycles: null", "schedule_cycles: 2", "schedule_cycles is for schedule cosine-with-restarts"),
        ("  schedule: cosine", "  schedule: polynomial", "schedule_power is for schedule polynomial, and needed there"),
        ("optimiser_args: {}", "optimiser_args: {d_coef: 2.0}", "adamw does not take it (it takes betas, eps)"),
        ("optimiser: adamw", "optimiser: schedule-free-adamw", "set schedule to constant"),
        ("timestep_range: [0.0, 1.0]", "timestep_range: [0.5, 0.5]", "is empty"),
        ("keep: last", "keep: best", "held_out_every is null"),
        ("flow_shift: null", "flow_shift: 3.0", "train.flow_shift is for flow matching"),
        ("family: sd ", "family: sd3 ", "set it to base for family sd3"),
        ("family: sd ", "family: flux ", "'sd', 'sdxl' or 'sd3'"),
        ("revision: ", "revision: main # ", "string should match pattern"),
        ("scales: [0.5, 1.0]", "scales: [0.0, 1.0]", "scales must not hold 0"),
        ("seeds: [0", "seeds: [0, 0", "holds the same value twice"),
        ("    max: 0.9", "    maximum: 0.9", "unknown key gate.held_out_loss_ratio.maximum"),
        ("  name: nightglow", "  name: ../evil", "export.name"),
    ],
)
def test_wrong_values_are_refused_with_key_and_value(tmp_path: Path, old: str, new: str, said: str) -> None:
    message = refusal(tmp_path, old, new)
    assert said in message
    assert message.startswith("params.yaml:")


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("train", {"min_snr_gamma": 5.0, "debiased": True}, "two weights for the same purpose"),
        ("train", {"timestep_power": 2.0, "timestep_logit_normal": [0.0, 1.0]}, "exclude each other"),
        ("lora", {"method": "loha", "dora": True}, "dora belongs to method lora"),
        ("lora", {"method": "lokr", "init": "pissa"}, "init pissa belongs to method lora"),
        ("lora", {"init": "pissa", "dora": True}, "exclude each other"),
        ("lora", {"init_from": "a.safetensors", "rslora": True}, "init_from takes a plain adapter"),
    ],
)
def test_settings_that_exclude_each_other(section: str, values: dict, said: str) -> None:
    document = YAML(typ="rt").load(SHIPPED)
    document[section].update(values)
    with pytest.raises(UserError, match=said):
        check_params(document)


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("export", {"formats": ["diffusers", "kohya"]}, r"kohya files of family sd3 are not written: set it to \[diffusers\]"),
        (
            "lora",
            {"method": "lokr"},
            "lora.method lokr is exported in the kohya format only, which is not written for family sd3",
        ),
        ("encode", {"caption_chunks": 2}, "caption_chunks 2 is for CLIP's 75 tokens; family sd3 reads 255 with its T5"),
    ],
)
def test_what_sd3_cannot_do_is_said_before_anything_runs(section: str, values: dict, said: str) -> None:
    document = YAML(typ="rt").load((ROOT / "presets" / "sd3.yaml").read_text(encoding="utf-8"))
    document[section].update(values)
    with pytest.raises(UserError, match=said):
        check_params(document)


def test_a_kind_of_adapter_that_no_asked_for_format_holds_is_refused_before_training() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["lora"]["method"], document["export"]["formats"] = "loha", ["diffusers"]
    with pytest.raises(UserError, match="method loha is exported in the kohya format only: add it to"):
        check_params(document)


def test_every_preset_has_every_key_in_order_with_the_same_meaning() -> None:
    """A preset is params.yaml with other values."""

    def keys(path: Path) -> list[tuple[str, str]]:
        lines = re.findall(r"^  ([a-z_]+):(?:[^#\n]|#(?=[0-9a-f]))*(# .*)?$", path.read_text(encoding="utf-8"), re.M)
        return [(key, comment) for key, comment in lines if key not in ("prompts", "guidance_scale")]

    assert len(keys(ROOT / "params.yaml")) > 90
    for preset in sorted((ROOT / "presets").glob("*.yaml")):
        assert keys(preset) == keys(ROOT / "params.yaml"), preset.name


def test_the_length_in_epochs() -> None:
    document = YAML(typ="rt").load(SHIPPED)
    document["train"].update({"steps": None, "epochs": 3})
    train = check_params(document).train
    assert train.length(7) == 21
    with pytest.raises(UserError, match=r"warmup_steps: 10 must be less than the training's 9 steps \(train.epochs 3 × 3"):
        train.length(3)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = SHIPPED.replace("  rank: 8", "  rank: 0").replace("  steps: 300", "  stepz: 300")
    with pytest.raises(UserError) as caught:
        load_params(write(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "0.0001", "1.0e-4", "+1e-4"])
def test_numbers_as_people_write_them(tmp_path: Path, number: str) -> None:
    params = load_params(write(tmp_path, SHIPPED.replace("learning_rate: 2e-3", f"learning_rate: {number}")))
    assert params.train.learning_rate == 0.0001
    assert params.section("train") == {**params.section("train"), "learning_rate": 0.0001}


def test_bare_no_is_the_word(tmp_path: Path) -> None:
    assert load_params(write(tmp_path, SHIPPED.replace('"no" #', "no #"))).train.mixed_precision == "no"


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "a: [1", "a: 1\na: 2\n", "\x00"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"params\.yaml"):
        load_params(write(tmp_path, text))


def test_missing_file_says_where_it_was_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params\.yaml is missing.*presets"):
        load_params(tmp_path / "params.yaml")


DOCUMENT = YAML(typ="rt").load(SHIPPED)

yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(section=st.sampled_from(SECTIONS), key=st.text(max_size=12), value=yaml_values, whole=st.booleans())
def test_anything_at_all_is_accepted_or_refused_in_words(section: str, key: str, value: object, whole: bool) -> None:
    document = copy.deepcopy(DOCUMENT)
    if whole:
        document[section] = value
    else:
        document[section][key] = value
    try:
        check_params(document)
    except UserError as error:
        assert str(error)


def test_set_changes_one_value_and_keeps_every_comment(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, tmp_path)
    write(tmp_path, SHIPPED)
    assert set_values(workspace, ["train.steps=500", "validate.seeds=[1, 2]"]) == [
        "train.steps 300 → 500",
        "validate.seeds [0] → [1, 2]",
    ]
    after = workspace.params.read_text(encoding="utf-8")
    changed = [(a, b) for a, b in zip(SHIPPED.splitlines(), after.splitlines(), strict=True) if a != b]
    assert len(changed) == 2 and all(b.split("#")[1:] == a.split("#")[1:] for a, b in changed)


@pytest.mark.parametrize("assignment", ["train.steps", "steps=1", "train.stepz=1", "train.steps=[", "train.steps=-1"])
def test_a_bad_set_changes_nothing(tmp_path: Path, assignment: str) -> None:
    workspace = Workspace(tmp_path, tmp_path)
    write(tmp_path, SHIPPED)
    with pytest.raises(UserError, match="--set"):
        set_values(workspace, ["lora.rank=2", assignment])
    assert workspace.params.read_text(encoding="utf-8") == SHIPPED


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    (tmp_path / "prompts.txt").write_text("one: a cat\n\n  two, # not a comment\n", encoding="utf-8")
    workspace = Workspace(tmp_path, tmp_path)
    set_values(workspace, ["validate.prompts=@prompts.txt"])
    assert load_params(tmp_path / "params.yaml").validate_.prompts == ("one: a cat", "two, # not a comment")
    with pytest.raises(UserError, match=r"@none.txt: the file cannot be read"):
        set_values(workspace, ["validate.prompts=@none.txt"])


def test_cudnn_attention_and_the_same_bytes_exclude_each_other(tmp_path: Path) -> None:
    assert "set deterministic to false" in refusal(tmp_path, "  attention: auto", "  attention: cudnn")
    load_params(
        write(
            tmp_path,
            SHIPPED.replace("  attention: auto", "  attention: cudnn").replace(
                "  deterministic: true", "  deterministic: false"
            ),
        )
    )
