"""The models of `params.yaml`: one frozen class per section, unknown keys refused. Imports no torch.

Read as YAML 1.2, so that `1e-4` is a number and `no` is a string, as DVC reads it too.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline.errors import UserError
from pipeline.metrics import DEFINITIONS, NAMES


def _known_metric(name: str) -> str:
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        raise ValueError(f"no such metric: {f'did you mean {near[0]}?' if near else 'there are: ' + ', '.join(NAMES)}")
    return name


Metric = Annotated[str, AfterValidator(_known_metric)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Revision = Annotated[str, Field(pattern=r"^([0-9a-f]{40}|sha256:[0-9a-f]{64})$")] | None
Format = Literal[
    "auto", "sidecar", "two-folders", "imagefolder", "kohya", "kohya-json", "parquet", "webdataset"
]  # of a dataset's folder; `auto` looks at the names in it
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]


class Section(BaseModel):
    """What all sections share: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Concept(Section):
    """One of `dataset.concepts`: a sub-folder with settings of its own."""

    path: Annotated[str, Field(min_length=1, description="sub-folder, relative to dataset.path")]
    format: Format | None = Field(default=None, description="as dataset.format; null: that")
    repeats: PositiveInt = Field(default=1, description="times that each picture is shown in an epoch")
    prefix: str | None = Field(default=None, description="before every caption; null: dataset.prefix")
    suffix: str | None = Field(default=None, description="after every caption; null: dataset.suffix")
    instance_prompt: str | None = Field(
        default=None, description="caption of pictures without one; null: dataset.instance_prompt"
    )
    regularisation: bool = Field(
        default=False, description="pictures of the class: never held out, never given the trigger word"
    )
    masks: str | None = Field(default=None, description="as dataset.masks; null: that")


class Buckets(Section):
    """`dataset.buckets`: pictures keep about their aspect ratio instead of being cut square."""

    step: Annotated[int, Field(ge=8, le=256, multiple_of=8, description="pixels that sides are multiples of")] = 64
    min_side: Annotated[int, Field(ge=8, le=4096, multiple_of=8, description="least side, pixels")] = 256
    max_side: Annotated[int, Field(ge=8, le=8192, multiple_of=8, description="greatest side, pixels")] = 1024

    @model_validator(mode="after")
    def _sides_fit(self) -> Buckets:
        if self.min_side > self.max_side:
            raise ValueError(f"min_side {self.min_side} is greater than max_side {self.max_side}")
        for key in ("min_side", "max_side"):
            if getattr(self, key) % self.step:
                raise ValueError(f"{key} {getattr(self, key)} is not a multiple of step {self.step}")
        return self


class Dataset(Section):
    """`dataset`: which pictures and captions, and how they are cut."""

    path: Annotated[str, Field(min_length=1)]
    format: Format = "auto"
    concepts: tuple[Concept, ...] = ()
    resolution: Annotated[int, Field(ge=8, le=4096, multiple_of=8)]
    buckets: Buckets | None = None
    allow_upscaling: bool = False
    crop: Literal["centre", "random", "mask"] = "centre"
    background: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")] = "#ffffff"
    masks: str | None = None
    duplicates: Literal["keep", "drop"] = "keep"
    caption_extension: Annotated[str, Field(pattern=r"^\.[A-Za-z0-9]+$")] = ".txt"
    caption_column: Annotated[str, Field(min_length=1)] = "text"
    image_column: Annotated[str, Field(min_length=1)] = "image"
    caption_lines: bool = False
    missing_caption: Literal["refuse", "folder-name", "auto"] = "refuse"
    instance_prompt: str | None = None
    auto_caption: str | None = None
    auto_caption_revision: Revision = None
    trigger: str = ""
    prefix: str = ""
    suffix: str = ""
    template: Annotated[str, Field(pattern=r"\{caption\}")] = "{caption}"
    shuffle_tags: bool = False
    keep_tags: Annotated[int, Field(ge=0)] = 0
    variants: Annotated[int, Field(ge=1, le=64)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    held_out_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    max_rejected: Annotated[int, Field(ge=0)] = 0
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 100_000_000  # the bound is Pillow's own

    @model_validator(mode="after")
    def _keys_agree(self) -> Dataset:
        if self.missing_caption == "auto" and not self.auto_caption:
            raise ValueError("missing_caption is auto, but auto_caption names no captioning model")
        if self.variants > 1 and not self.shuffle_tags:
            raise ValueError(f"variants {self.variants} would all be the same: variants are orders of tags, set shuffle_tags")
        if self.buckets and self.resolution < self.buckets.min_side:
            raise ValueError(
                f"resolution {self.resolution} is less than buckets.min_side {self.buckets.min_side}: no bucket fits"
            )
        if self.crop == "mask" and not self.masks and not any(c.masks for c in self.concepts):
            raise ValueError("crop is mask, but masks names no masks")
        return self


class Model(Section):
    """`model`: the base that the adapter is made for."""

    family: Literal["sd", "sdxl", "sd3"]
    base: Annotated[str, Field(min_length=1)]
    revision: Revision = None
    variant: Name | None = None
    config: Annotated[str, Field(min_length=1)] | None = None
    vae: Annotated[str, Field(min_length=1)] | None = None
    vae_revision: Revision = None
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    zero_terminal_snr: bool = False


class Encode(Section):
    """`encode`: how latents and text embeddings are computed and stored."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    flip: bool = False
    tiling: bool = False
    clip_skip: Annotated[int, Field(ge=0, le=11)] = 0
    caption_chunks: Annotated[int, Field(ge=1, le=8)] = 1


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
    method: Literal["lora", "loha", "lokr"] = "lora"
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "gaussian", "pissa"] = "default"
    init_from: Annotated[str, Field(min_length=1)] | None = None
    text_encoder: bool = False
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}

    @model_validator(mode="after")
    def _keys_agree(self) -> Lora:
        if self.method != "lora":
            for key in ("rslora", "dora", "dropout"):
                if getattr(self, key):
                    raise ValueError(f"{key} belongs to method lora, but method is {self.method}")
            if self.init != "default":
                raise ValueError(f"init {self.init} belongs to method lora, but method is {self.method}")
        if self.init == "pissa" and self.dora:
            raise ValueError("init pissa and dora exclude each other: what pissa leaves of the base has other lengths")
        if self.init_from and (
            self.method != "lora" or self.init != "default" or self.rslora or self.rank_pattern or self.alpha_pattern
        ):
            raise ValueError("init_from takes a plain adapter: method lora, init default, no rslora, no patterns")
        return self


class OptimiserArgs(Section):
    """`train.optimiser_args`: what an optimiser takes beyond rate and decay; null leaves the library's default."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = Field(
        default=None, description="decay of the means of gradient and square; not for adafactor"
    )
    eps: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="added to the denominator; adamw, adamw8bit, prodigy, schedule-free-adamw"
    )
    d_coef: Annotated[float, Field(gt=0)] | None = Field(default=None, description="factor on prodigy's estimate of the rate")

    def given(self) -> dict[str, Any]:
        """What is not null."""
        return {key: value for key, value in self if value is not None}


_OPTIMISER_ARGS = {
    "adamw": {"betas", "eps"},
    "adamw8bit": {"betas", "eps"},
    "adafactor": set[str](),
    "prodigy": {"betas", "eps", "d_coef"},
    "lion": {"betas"},
    "schedule-free-adamw": {"betas", "eps"},
}  # what each takes


class HuberLoss(Section):
    """`train.huber`: pseudo-Huber instead of the mean square."""

    c: Annotated[float, Field(gt=0, description="errors well above it count linearly, not squared")]
    schedule: Literal["constant", "exponential", "snr"] = Field(
        "exponential", description="c over the timesteps: c itself, or from 1 where pictures are clean down to c"
    )
    scale: Literal["huber", "smooth-l1"] = Field(default="smooth-l1", description="form of the loss")


class Train(Section):
    """`train`: the optimisation; everything that changes the adapter's bytes and is not in `lora`."""

    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    batch_size: PositiveInt
    optimiser: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "lion", "schedule-free-adamw"] = "adamw"
    optimiser_args: OptimiserArgs = OptimiserArgs()
    learning_rate: Annotated[float, Field(gt=0, le=10)]
    text_encoder_learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    scale_learning_rate: Literal["none", "linear", "sqrt"] = "none"
    schedule: Literal["constant", "linear", "cosine", "cosine-with-restarts", "polynomial"] = "constant"
    schedule_cycles: Annotated[int, Field(ge=1, le=1000)] | None = None
    schedule_power: Annotated[float, Field(gt=0, le=10)] | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    huber: HuberLoss | None = None
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None
    debiased: bool = False
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    pyramid_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    input_perturbation: Annotated[float, Field(ge=0, le=1)] = 0.0
    timestep_range: tuple[Fraction, Fraction] = (0.0, 1.0)
    timestep_logit_normal: tuple[float, Annotated[float, Field(gt=0)]] | None = None
    timestep_power: Annotated[float, Field(gt=0, le=10)] | None = None
    flow_shift: Annotated[float, Field(gt=0, le=100)] | None = None
    caption_dropout: Fraction = 0.0
    prior_weight: Annotated[float, Field(ge=0)] = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    quantise_base: Literal["int8", "nf4"] | None = None
    held_out_every: PositiveInt | None = None
    snapshot_every: PositiveInt | None = None
    keep: Literal["last", "best"] = "last"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _length_is_stated_once(self) -> Train:
        if self.steps is None and self.epochs is None:
            raise ValueError("steps is missing: set steps, or epochs instead")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps {self.steps} and epochs {self.epochs} both state the length: set one of them to null")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        return self

    @model_validator(mode="after")
    def _keys_agree(self) -> Train:
        for key, schedule in (("schedule_cycles", "cosine-with-restarts"), ("schedule_power", "polynomial")):
            if (getattr(self, key) is not None) != (self.schedule == schedule):
                raise ValueError(f"{key} is for schedule {schedule}, and needed there; schedule is {self.schedule}")
        foreign = sorted(set(self.optimiser_args.given()) - _OPTIMISER_ARGS[self.optimiser])
        if foreign:
            takes = ", ".join(sorted(_OPTIMISER_ARGS[self.optimiser])) or "none"
            raise ValueError(f"optimiser_args.{foreign[0]}: {self.optimiser} does not take it (it takes {takes})")
        if self.optimiser == "schedule-free-adamw" and (self.schedule != "constant" or self.ema_decay):
            raise ValueError("optimiser schedule-free-adamw averages by itself: set schedule to constant and ema_decay to null")
        if self.min_snr_gamma is not None and self.debiased:
            raise ValueError("min_snr_gamma and debiased are two weights for the same purpose: set one of them")
        if self.timestep_logit_normal and self.timestep_power:
            raise ValueError("timestep_logit_normal and timestep_power exclude each other: set one of them to null")
        if self.timestep_range[0] >= self.timestep_range[1]:
            raise ValueError(f"timestep_range {list(self.timestep_range)} is empty: the first must be less than the second")
        if self.keep == "best" and self.held_out_every is None:
            raise ValueError("keep is best, but held_out_every is null: nothing is measured to choose by")
        return self

    def length(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole training.

        Raises:
            UserError: the warm-up is not shorter.
        """
        steps = self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch
        if self.warmup_steps >= steps:
            raise UserError(
                f"train.warmup_steps: {self.warmup_steps} must be less than the training's {steps} steps "
                f"(train.epochs {self.epochs} × {steps_per_epoch} steps an epoch)"
            )
        return steps


class Validate(Section):
    """`validate`: what is sampled and measured."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    negative_prompt: str = ""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)] = (0,)
    scales: Annotated[tuple[Annotated[float, Field(ge=-4, le=4)], ...], Field(min_length=1)] = (1.0,)
    scheduler: Literal["ddim", "euler", "dpm++", "base"] = "ddim"
    inference_steps: Annotated[int, Field(ge=1, le=1000)] = 25
    guidance_scale: Annotated[float, Field(ge=1, le=50)] = 7.5
    batch_size: PositiveInt = 4
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    loss_timesteps: Annotated[int, Field(ge=1, le=1000)] = 8
    loss_samples: PositiveInt = 64
    clip_model: str | None = None
    clip_revision: Revision = None
    dino_model: str | None = None
    dino_revision: Revision = None
    untriggered_prompts: tuple[str, ...] = ()
    checkpoints: Literal["last", "all"] = "last"

    @model_validator(mode="after")
    def _no_repeats(self) -> Validate:
        for key in ("prompts", "seeds", "scales", "untriggered_prompts"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} holds the same value twice: {list(values)}")
        if 0.0 in self.scales:
            raise ValueError("scales must not hold 0: the base without the adapter is always sampled beside them")
        return self


class Threshold(Section):
    """One gate: a metric of `reports/validate/metrics.json` must lie within [min, max], and within shares of the base's value."""

    min: float | None = Field(default=None, description="least value that passes")
    max: float | None = Field(default=None, description="greatest value that passes")
    min_of_base: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="least value, as a share of the base's own"
    )
    max_of_base: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="greatest value, as a share of the base's own"
    )

    @model_validator(mode="after")
    def _says_something(self) -> Threshold:
        if all(value is None for _, value in self):
            raise ValueError("a gate needs min, max, min_of_base or max_of_base")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is greater than max {self.max}: no value can pass")
        return self


class PushToHub(Section):
    """`export.push_to_hub`: where `reprolora push` publishes an adapter whose gate passed."""

    repo: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$", description="owner/name on the Hub"
        ),
    ]
    private: bool = Field(default=True, description="the repository is made private")


class Export(Section):
    """`export`: the files that leave the project and the facts about them that only a person knows."""

    name: Name
    title: str = ""
    author: str = ""
    description: str = ""
    license: str | None = None
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    formats: Annotated[tuple[Literal["diffusers", "kohya"], ...], Field(min_length=1)] = ("diffusers", "kohya")
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    merge: bool = False
    push_to_hub: PushToHub | None = None

    @model_validator(mode="after")
    def _formats_differ(self) -> Export:
        if len(set(self.formats)) < len(self.formats):
            raise ValueError(f"formats holds the same value twice: {list(self.formats)}")
        if "kohya" in self.formats and self.name == "pytorch_lora_weights":
            raise ValueError("name pytorch_lora_weights is the diffusers file's own: choose another")
        return self


class Runtime(Section):
    """`runtime`: how the hardware is used, never what is computed. No stage's result depends on it."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    processes: PositiveInt = 1
    machines: PositiveInt = 1
    machine_rank: Annotated[int, Field(ge=0)] = 0
    main_address: Annotated[str, Field(pattern=r"^[^\s:]+:\d{1,5}$")] | None = None
    accelerate_config: Annotated[str, Field(min_length=1)] | None = None
    workers: Annotated[int, Field(ge=0, le=64)] = 1
    micro_batch: PositiveInt | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False
    tf32: bool = False
    attention: Literal["auto", "math", "efficient", "flash", "cudnn"] = "auto"
    deterministic: bool = True
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    sample_every: PositiveInt | None = None
    max_minutes: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _machines_can_meet(self) -> Runtime:
        if self.machine_rank >= self.machines:
            raise ValueError(f"machine_rank {self.machine_rank} must be less than machines {self.machines}: they count from 0")
        if self.machines > 1 and not self.main_address:
            raise ValueError(f"machines {self.machines} need main_address, the first one's host:port")
        return self

    @model_validator(mode="after")
    def _kernel_keeps_the_order(self) -> Runtime:
        if self.attention == "cudnn" and self.deterministic:
            raise ValueError(
                "attention cudnn adds up in any order when it goes backward: set deterministic to false, or attention to auto"
            )
        return self


class Tracking(Section):
    """`tracking`: where MLflow mirrors the files. No stage's result depends on it."""

    enabled: bool = True
    uri: str | None = None
    experiment: Annotated[str, Field(min_length=1)] = "reprolora"
    register_model: bool = True
    tensorboard: bool = False
    wandb_project: Annotated[str, Field(min_length=1)] | None = None
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
        if self.model.family == "sd3" and self.validate_.scheduler != "base":
            raise ValueError(
                f"validate.scheduler {self.validate_.scheduler} cannot sample a flow: set it to base for family sd3"
            )
        if self.model.family == "sd3":
            if "kohya" in self.export.formats:
                raise ValueError("export.formats: kohya files of family sd3 are not written: set it to [diffusers]")
            if self.lora.method != "lora":
                raise ValueError(
                    f"lora.method {self.lora.method} is exported in the kohya format only, which is not written for family sd3: "
                    "set it to lora"
                )
            if self.encode.caption_chunks > 1:
                raise ValueError(
                    f"encode.caption_chunks {self.encode.caption_chunks} is for CLIP's 75 tokens; family sd3 reads 255 with its T5: "
                    "set it to 1"
                )
        if self.train.text_encoder_learning_rate is not None and self.train.optimiser == "prodigy":
            raise ValueError("train.text_encoder_learning_rate: prodigy finds one rate for all: set it to null")
        if self.train.quantise_base and self.lora.init == "pissa":
            raise ValueError(
                "lora.init pissa takes the base's weights apart, which train.quantise_base has rounded: set one of them"
            )
        if self.lora.init_from and self.lora.text_encoder:
            raise ValueError(
                "lora.init_from starts the denoiser's adapter alone: set lora.text_encoder to false, or init_from to null"
            )
        if self.train.text_encoder_learning_rate is not None and not self.lora.text_encoder:
            raise ValueError("train.text_encoder_learning_rate is set, but lora.text_encoder is false: set one of them")
        if self.lora.method != "lora" and "kohya" not in self.export.formats:
            raise ValueError(f"lora.method {self.lora.method} is exported in the kohya format only: add it to export.formats")
        if self.model.family != "sd3" and self.train.flow_shift is not None:
            raise ValueError(f"train.flow_shift is for flow matching, but model.family is {self.model.family}: set it to null")
        if self.runtime.micro_batch and self.lora.dropout > 0:
            raise ValueError("runtime.micro_batch would change the masks of lora.dropout: set one of them to null or 0")
        if not self.dataset.held_out_fraction and any("held_out" in n or n == "overfitting_gap" for n in self.gate):
            raise ValueError("gate: a held-out loss is gated, but dataset.held_out_fraction is 0: nothing is held out")
        for name, threshold in self.gate.items():
            self._can_be_measured(name, threshold)
        if self.validate_.checkpoints == "all" and self.train.snapshot_every is None:
            raise ValueError("validate.checkpoints is all, but train.snapshot_every is null: no checkpoint is kept to compare")
        return self

    def unmeasured(self, name: str) -> str | None:
        """Why these settings do not measure a metric; None where they do."""
        validate, metric = self.validate_, name.removeprefix("base_")
        if not self.dataset.held_out_fraction and ("held_out" in metric or metric == "overfitting_gap"):
            return "dataset.held_out_fraction is 0"
        needs = {
            "dino": (validate.dino_model, "validate.dino_model is null"),
            "leak": (validate.untriggered_prompts, "validate.untriggered_prompts is empty"),
            "drift": (validate.untriggered_prompts, "validate.untriggered_prompts is empty"),
            "similarity": (self.dataset.held_out_fraction or metric == "nearest_similarity", "dataset.held_out_fraction is 0"),
            "cmmd": (len(validate.prompts) * len(validate.seeds) > 1, "validate draws one sample"),
            "diversity": (len(validate.seeds) > 1, "validate.seeds holds one seed"),
        }
        for part, (given, lack) in needs.items():
            if part in metric and not given:
                return lack
        if (
            "loss" not in metric
            and metric not in ("overfitting_gap", "dino_similarity", "memorised_share")
            and not validate.clip_model
        ):
            return "validate.clip_model is null"
        return None

    def _can_be_measured(self, name: str, threshold: Threshold) -> None:
        """Refuse a threshold on what these settings do not measure."""
        if lack := self.unmeasured(name):
            raise ValueError(f"gate.{name}: it is not measured, since {lack}")
        relative = threshold.min_of_base is not None or threshold.max_of_base is not None
        if relative and not (name in DEFINITIONS and DEFINITIONS[name].of_base):
            raise ValueError(f"gate.{name}: the base has no value of its own: set min or max instead of a share of the base's")

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
        if isinstance(part, int):
            continue  # a place in a list: the model is that of its items
        field = next(f for n, f in model.model_fields.items() if (f.alias or n) == part)
        model = _section_in(field.annotation)
    return [f.alias or n for n, f in model.model_fields.items()]


def _section_in(annotation: Any) -> type[BaseModel]:
    """The model in `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_section_in(part) for part in get_args(annotation) if part not in (type(None), Ellipsis))
