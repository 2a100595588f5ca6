"""The models of `params.yaml`: one frozen class per section, unknown keys refused. Imports no torch.

Read as YAML 1.2, so that `1e-4` is a number and `no` is a string, as DVC reads it too.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline.errors import UserError

Metric = Literal[
    "base_held_out_loss",
    "held_out_loss",
    "held_out_loss_ratio",
    "base_train_loss",
    "train_loss",
    "base_clip_score",
    "clip_score",
    "style_shift",
]  # what validate measures
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Revision = Annotated[str, Field(pattern=r"^([0-9a-f]{40}|sha256:[0-9a-f]{64})$")] | None
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]


class Section(BaseModel):
    """What all sections share: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Dataset(Section):
    """`dataset`: which pictures and captions, and how they are cut."""

    path: Annotated[str, Field(min_length=1)]
    resolution: Annotated[int, Field(ge=8, le=4096, multiple_of=8)]
    caption_extension: Annotated[str, Field(pattern=r"^\.[A-Za-z0-9]+$")] = ".txt"
    trigger: str = ""
    held_out_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    max_rejected: Annotated[int, Field(ge=0)] = 0
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 100_000_000  # the bound is Pillow's own


class Model(Section):
    """`model`: the base that the adapter is made for."""

    family: Literal["sd", "sdxl"]
    base: Annotated[str, Field(min_length=1)]
    revision: Revision = None
    variant: Name | None = None


class Encode(Section):
    """`encode`: how latents and text embeddings are computed and stored."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    flip: bool = False


class Lora(Section):
    """`lora`: the shape of the adapter."""

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    )


class Train(Section):
    """`train`: the optimisation; everything that changes the adapter's bytes and is not in `lora`."""

    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: Annotated[float, Field(gt=0, le=10)]
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    caption_dropout: Fraction = 0.0
    mixed_precision: Literal["no", "bf16"] = "no"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _warmup_fits(self) -> Train:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        return self


class Validate(Section):
    """`validate`: what is sampled and measured."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    negative_prompt: str = ""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)] = (0,)
    scales: Annotated[tuple[Annotated[float, Field(ge=-4, le=4)], ...], Field(min_length=1)] = (1.0,)
    scheduler: Literal["ddim", "euler", "dpm++"] = "ddim"
    inference_steps: Annotated[int, Field(ge=1, le=1000)] = 25
    guidance_scale: Annotated[float, Field(ge=1, le=50)] = 7.5
    batch_size: PositiveInt = 4
    loss_timesteps: Annotated[int, Field(ge=1, le=1000)] = 8
    loss_samples: PositiveInt = 64
    clip_model: str | None = None
    clip_revision: Revision = None

    @model_validator(mode="after")
    def _no_repeats(self) -> Validate:
        for key in ("prompts", "seeds", "scales"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} holds the same value twice: {list(values)}")
        if 0.0 in self.scales:
            raise ValueError("scales must not hold 0: the base without the adapter is always sampled beside them")
        return self


class Threshold(Section):
    """One gate: a metric of `reports/validate/metrics.json` must lie within [min, max]."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Threshold:
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is greater than max {self.max}: no value can pass")
        return self


class Export(Section):
    """`export`: the files that leave the project and the facts about them that only a person knows."""

    name: Name
    title: str = ""
    author: str = ""
    description: str = ""
    license: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


class Runtime(Section):
    """`runtime`: how the hardware is used, never what is computed. No stage's result depends on it."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    micro_batch: PositiveInt | None = None
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2


class Tracking(Section):
    """`tracking`: where MLflow mirrors the files. No stage's result depends on it."""

    enabled: bool = True
    uri: str | None = None
    experiment: Annotated[str, Field(min_length=1)] = "reprolora"
    required: bool = False


class Params(Section):
    """All of `params.yaml`."""

    dataset: Dataset
    model: Model
    encode: Encode
    lora: Lora
    train: Train
    validate_: Annotated[Validate, Field(alias="validate")]
    gate: dict[Metric, Threshold]
    export: Export
    runtime: Runtime
    tracking: Tracking

    @model_validator(mode="after")
    def _sections_agree(self) -> Params:
        if self.runtime.micro_batch and self.lora.dropout > 0:
            raise ValueError("runtime.micro_batch would change the masks of lora.dropout: set one of them to null or 0")
        if not self.dataset.held_out_fraction and any("held_out" in name for name in self.gate):
            raise ValueError("gate: a held-out loss is gated, but dataset.held_out_fraction is 0: nothing is held out")
        if not self.validate_.clip_model and any("clip" in name or "style" in name for name in self.gate):
            raise ValueError("gate: a CLIP metric is gated, but validate.clip_model is null")
        return self

    def section(self, name: str) -> Any:
        """The normalised values of one section, as JSON types: equal for `2e-4` and `0.0002`, whatever the key order."""
        return self.model_dump(mode="json", by_alias=True)[name]


SECTIONS = tuple(field.alias or name for name, field in Params.model_fields.items())


def load_params(path: Path) -> Params:
    """Read and check `params.yaml`.

    Raises:
        UserError: the file is missing, is no YAML, or a key or value in it is wrong; every fault is listed, with its line.
    """
    return check_params(load_yaml(path), where=path.name)


def load_yaml(path: Path) -> CommentedMap:
    """The document with its comments and line numbers, as `ruamel.yaml` keeps them."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path.name} is missing: expected it at {path}. Run in the project's folder, or copy one from presets/."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} cannot be read as UTF-8 text: {error}") from None
    try:
        yaml = YAML(typ="rt")
        yaml.preserve_quotes = True
        document = yaml.load(text)
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        place = f":{mark.line + 1}" if mark else ""
        problem = error.problem if isinstance(error, MarkedYAMLError) else str(error).splitlines()[0]
        raise UserError(f"{path.name}{place}: not valid YAML: {problem}") from None
    if not isinstance(document, CommentedMap):
        raise UserError(f"{path.name} must hold a mapping of sections ({', '.join(SECTIONS)}), not {type(document).__name__}")
    return document


def check_params(document: CommentedMap, where: str = "params.yaml") -> Params:
    """Validate a loaded document; `where` names it in messages."""
    try:
        return Params.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        faults = [_explain(document, dict(fault), where) for fault in error.errors()]
        raise UserError("\n".join(faults)) from None


def _explain(document: CommentedMap, fault: dict[str, Any], where: str) -> str:
    """One line for a person out of one of pydantic's errors."""
    loc = tuple(part for part in fault["loc"] if part != "[key]")
    dotted = ".".join(str(part) for part in loc)
    line = _line_of(document, loc)
    place = f"{where}:{line}" if line else where
    if fault["type"] == "extra_forbidden":
        known = _keys_at(loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*map(str, loc[:-1]), near[0]])}?" if near else f"known keys: {', '.join(known)}"
        return f"{place}: unknown key {dotted}: {hint}"
    if fault["type"] == "missing":
        return f"{place}: {dotted} is missing: add it (presets/ shows every key with its meaning)"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if not loc:
        return f"{where}: {message}"
    message = message[0].lower() + message[1:]
    value = fault["input"]
    shown = "" if isinstance(value, dict) else f" is {json.dumps(value, ensure_ascii=False)[:200]}"
    return f"{place}: {dotted}{shown}: {message}"


def _line_of(document: Any, loc: tuple[Any, ...]) -> int | None:
    """The 1-based line where the deepest existing part of `loc` stands."""
    line: int | None = None
    node = document
    for part in loc:
        try:
            line = (node.lc.key(part)[0] if isinstance(node, CommentedMap) else node.lc.item(part)[0]) + 1
            node = node[part]
        except (KeyError, IndexError, TypeError, AttributeError):
            break
    return line


def _keys_at(loc: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Params
    for part in loc:
        if part == "gate":
            return list(Threshold.model_fields)
        field = next(f for n, f in model.model_fields.items() if (f.alias or n) == part)
        annotation = field.annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return [f.alias or n for n, f in model.model_fields.items()]
