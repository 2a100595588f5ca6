"""Other trainers' settings as `params.yaml`: Kohya's TOML, ai-toolkit's YAML, the command line of diffusers' example scripts.

What has the same meaning is carried over; what has none here is listed, with the reason where there is one. Nothing is guessed
in silence: what comes out is a preset with these values in it, and says so.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.config import check_params, load_yaml
from pipeline.edit import assign, dumped
from pipeline.errors import UserError
from pipeline.files import write_text


@dataclass
class Translation:
    """What a file says in our terms."""

    family: str = "sd"
    values: dict[str, Any] = field(default_factory=dict)  # section.key -> value
    carried: list[str] = field(default_factory=list)  # one line per option
    dropped: list[str] = field(default_factory=list)  # options without an equivalent, with the reason where there is one


_SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine-with-restarts",
    "polynomial": "polynomial",
}
_OPTIMISERS = {
    "adamw": "adamw",
    "adamw8bit": "adamw8bit",
    "pagedadamw8bit": "adamw8bit",
    "lion": "lion",
    "prodigy": "prodigy",
    "adafactor": "adafactor",
    "adamwschedulefree": "schedule-free-adamw",
}
_DTYPES = {"float": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# options that need nothing: what they ask for is always so, or is found out
_ALWAYS = {
    "cache_latents": "latents are always cached, by content",
    "cache_latents_to_disk": "latents are always cached, by content",
    "cache_text_encoder_outputs": "embeddings are always cached, by content",
    "save_model_as": "adapters are safetensors",
    "xformers": "torch's own attention is used (runtime.attention)",
    "sdpa": "torch's own attention is used (runtime.attention)",
    "mem_eff_attn": "torch's own attention is used (runtime.attention)",
    "enable_xformers_memory_efficient_attention": "torch's own attention is used (runtime.attention)",
    "output_dir": "results lie in dist/adapter/",
    "logging_dir": "MLflow keeps the curves",
    "log_with": "MLflow keeps the curves",
    "report_to": "MLflow keeps the curves",
    "center_crop": "pictures are cut in the middle (dataset.crop)",
    "resume_from_checkpoint": "a training always goes on from its last checkpoint",
    "persistent_data_loader_workers": "the training reads encodings, not pictures",
    "max_data_loader_n_workers": "the training reads encodings, not pictures",
    "dataloader_num_workers": "the training reads encodings, not pictures",
    "network_module": "see lora.method",
    "device": "the device is found (runtime.device)",
    "training_folder": "results lie in dist/adapter/",
    "datasets.cache_latents": "latents are always cached, by content",
    "datasets.cache_latents_to_disk": "latents are always cached, by content",
    "save.max_step_saves_to_keep": "snapshots are all kept, checkpoints as runtime.keep_checkpoints has it",
    "train.train_unet": "the denoiser is always trained",
    "sample.width": "samples have the size that is trained on",
    "sample.height": "samples have the size that is trained on",
}


def import_config(source: Path, preset_folder: Path, out: Path, family: str | None = None) -> Translation:
    """Write `out`, a preset with the file's values.

    Args:
        source: a `.toml` of sd-scripts, a `.yaml` of ai-toolkit, or a text file with the command line of a diffusers example script.
        family: sd or sdxl; None: as the file's names suggest.

    Raises:
        UserError: the file is neither, `out` exists, or the values do not go together.
    """
    if out.exists():
        raise UserError(f"{out} exists: move it away, or give --out another name")
    translation = translate(source, family)
    document = load_yaml(preset_folder / f"{'sdxl' if translation.family == 'sdxl' else 'sd15'}.yaml")
    for key, value in translation.values.items():
        assign(document, key, value)
    check_params(document, where=out.name)
    write_text(out, dumped(document))
    return translation


def translate(source: Path, family: str | None = None) -> Translation:
    """Read a file of another trainer's."""
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read: {error}") from None
    if source.suffix == ".toml":
        try:
            options = _flat(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{source}: not valid TOML: {error}") from None
        found = _translated(options, _KOHYA, family or _family(text, source))
        found.values.setdefault("lora.alpha", 1.0)  # sd-scripts' own defaults
        found.values.setdefault("train.warmup_steps", 0)
        if not options.get("network_train_unet_only") and "text_encoder_lr" not in options:
            found.values["lora.text_encoder"] = True
            found.carried.append("no network_train_unet_only → lora.text_encoder: True, as sd-scripts has it")
        return found
    if source.suffix in (".yaml", ".yml"):
        options = _trainer_of(text, source)
        base = " ".join(f"{key} {value}" for key, value in options.items() if key.startswith("model.") and value)
        found = _translated(options, _AI_TOOLKIT, family or ("sdxl" if options.get("model.is_xl") else _family(base, source)))
        found.values.setdefault("lora.rank", 4)  # ai-toolkit's own defaults
        found.values.setdefault("lora.alpha", 1.0)
        found.values |= {"train.warmup_steps": 0, "dataset.trigger": found.values.get("dataset.trigger", "")}
        trigger = found.values["dataset.trigger"]
        if "validate.prompts" in found.values:
            found.values["validate.prompts"] = [str(p).replace("[trigger]", trigger) for p in found.values["validate.prompts"]]
        return found
    options = _command_line(text, source)
    found = _translated(options, _DIFFUSERS, family or _family(text, source))
    found.values.setdefault("train.warmup_steps", 0)
    found.values.setdefault("lora.alpha", found.values.get("lora.rank", 4))  # the scripts have no alpha: it is the rank
    found.values.setdefault("lora.rank", 4)
    return found


def _family(text: str, source: Path) -> str:
    """As names in the file tell it."""
    if other := re.search(r"flux|sd3|stable-diffusion-3|lumina|hunyuan", text, re.I):
        raise UserError(f"{source}: it names {other[0]}: settings for sd and sdxl can be translated")
    return "sdxl" if re.search(r"sdxl|xl[-_]base|stable-diffusion-xl", text, re.I) else "sd"


_TRAINERS = ("sd_trainer", "diffusion_trainer", "ui_trainer")
_ARCHITECTURES = ("sd1", "sd15", "sd2", "sdxl")


def _trainer_of(text: str, source: Path) -> dict[str, Any]:
    """The options of an ai-toolkit job's one trainer, as `table.key`; of several datasets the first."""
    try:
        document = YAML(typ="safe").load(text)
        config = document["config"]
        (trainer,) = (process for process in config["process"] if process["type"] in _TRAINERS)
    except YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{source}: not a job of ai-toolkit: config.process with one entry of type {' or '.join(_TRAINERS)} is expected"
        ) from None
    if (architecture := trainer.get("model", {}).get("arch", "sd1")) not in _ARCHITECTURES:
        raise UserError(f"{source}: model.arch {architecture}: settings for {', '.join(_ARCHITECTURES)} can be translated")
    options = {"name": config["name"]} if "name" in config else {}
    for key, value in trainer.items():
        first, rest = (value[0], value[1:]) if isinstance(value, list) and value and isinstance(value[0], dict) else (value, [])
        options |= {f"{key}.{inner}": v for inner, v in first.items()} if isinstance(first, dict) else {key: first}
        if rest:
            options[f"{key} 2 and on"] = f"{len(rest)} more: see dataset.concepts"
    return options


Rule = Callable[[Translation, dict[str, Any], Any], None]


def _to(key: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """An option that is one key here."""

    def rule(t: Translation, options: dict[str, Any], value: Any) -> None:
        t.values[key] = convert(value)

    return rule


def _named(key: str, names: dict[str, str]) -> Rule:
    """An option with names of its own for the values."""

    def rule(t: Translation, options: dict[str, Any], value: Any) -> None:
        name = re.sub(r"[^a-z0-9_]", "", str(value).lower())
        if name not in names:
            raise _NoEquivalent(f"{key} takes {', '.join(dict.fromkeys(names.values()))}")
        t.values[key] = names[name]
        if names[name] == "cosine-with-restarts":
            t.values["train.schedule_cycles"] = int(options.get("lr_scheduler_num_cycles", 1))
        if names[name] == "polynomial":
            t.values["train.schedule_power"] = float(options.get("lr_scheduler_power", 1.0))
        if names[name] == "schedule-free-adamw":
            t.values["train.schedule"] = "constant"

    return rule


class _NoEquivalent(Exception):
    """Why an option's value cannot be carried over."""


_BATCH_SIZES = ("train_batch_size", "batch_size", "train.batch_size")
_ACCUMULATIONS = ("gradient_accumulation_steps", "train.gradient_accumulation_steps", "train.gradient_accumulation")


def _batch(t: Translation, options: dict[str, Any], value: Any) -> None:
    each, steps = (
        int(next((options[name] for name in names if name in options), 1)) for names in (_BATCH_SIZES, _ACCUMULATIONS)
    )
    t.values["train.batch_size"] = each * steps
    t.values["runtime.micro_batch"] = each if steps > 1 else None


def _steps(t: Translation, options: dict[str, Any], value: Any) -> None:
    t.values |= {"train.steps": int(value), "train.epochs": None}


def _epochs(t: Translation, options: dict[str, Any], value: Any) -> None:
    """Kohya's: they override the steps."""
    t.values |= {"train.epochs": int(value), "train.steps": None}


def _steps_unless_epochs(t: Translation, options: dict[str, Any], value: Any) -> None:
    if "max_train_epochs" in options:
        raise _NoEquivalent("max_train_epochs overrides it")
    _steps(t, options, value)


def _epochs_unless_steps(t: Translation, options: dict[str, Any], value: Any) -> None:
    """diffusers': the steps override them."""
    if "max_train_steps" in options:
        raise _NoEquivalent("max_train_steps overrides it")
    _epochs(t, options, value)


def _warm_up(t: Translation, options: dict[str, Any], value: Any) -> None:
    if str(options.get("lr_scheduler", "constant")).lower() == "constant":
        raise _NoEquivalent("their constant schedule has no warm-up; constant_with_warmup has")
    if 0 < float(value) < 1:
        raise _NoEquivalent("a share of the training; train.warmup_steps counts steps")
    t.values["train.warmup_steps"] = int(value)


def _resolution(t: Translation, options: dict[str, Any], value: Any) -> None:
    sides = [int(part) for part in re.findall(r"\d+", str(value))]
    if not sides or any(side != sides[0] for side in sides):
        raise _NoEquivalent("dataset.resolution is one number; dataset.buckets keeps aspect ratios")
    t.values["dataset.resolution"] = sides[0]


def _buckets(t: Translation, options: dict[str, Any], value: Any) -> None:
    if value:
        step = int(options.get("bucket_reso_steps", 64))
        low, high = int(options.get("min_bucket_reso", 256)), int(options.get("max_bucket_reso", 1024))
        t.values["dataset.buckets"] = {"step": step, "min_side": low // step * step, "max_side": high // step * step}
        t.values["dataset.allow_upscaling"] = not options.get("bucket_no_upscale", False)


def _text_rate(t: Translation, options: dict[str, Any], value: Any) -> None:
    if options.get("network_train_unet_only") or not float(value):
        return
    if re.sub(r"[^a-z]", "", str(options.get("optimizer_type", options.get("optimizer", ""))).lower()) == "prodigy":
        t.values["lora.text_encoder"] = True
        raise _NoEquivalent("prodigy finds one rate for all networks")
    t.values |= {"lora.text_encoder": True, "train.text_encoder_learning_rate": float(value)}


def _both_networks(t: Translation, options: dict[str, Any], value: Any) -> None:
    t.values["lora.text_encoder"] = bool(value)


def _clip_skip(t: Translation, options: dict[str, Any], value: Any) -> None:
    if t.family == "sdxl":
        raise _NoEquivalent("sd-scripts does not heed it for SDXL, whose last layer but one is always read")
    t.values["encode.clip_skip"] = max(0, int(value) - 1)  # theirs counts from 1, the last layer


def _network_args(t: Translation, options: dict[str, Any], value: Any) -> None:
    for part in value if isinstance(value, list) else [value]:
        name, _, given = str(part).partition("=")
        if name == "algo" and given in ("lora", "locon", "loha", "lokr"):
            t.values["lora.method"] = {"locon": "lora"}.get(given, given)
        elif name == "dora_wd" and given.lower() == "true":
            t.values["lora.dora"] = True
        else:
            t.dropped.append(f"network_args {part}")


def _prior(t: Translation, options: dict[str, Any], value: Any) -> None:
    t.values["train.prior_weight"] = float(value)


_KOHYA: dict[str, Rule] = {
    "pretrained_model_name_or_path": _to("model.base"),
    "vae": _to("model.vae"),
    "v_parameterization": _to("model.prediction", lambda v: "v_prediction" if v else "auto"),
    "zero_terminal_snr": _to("model.zero_terminal_snr", bool),
    "train_data_dir": _to("dataset.path"),
    "image_dir": _to("dataset.path"),
    "resolution": _resolution,
    "enable_bucket": _buckets,
    "caption_extension": _to("dataset.caption_extension"),
    "shuffle_caption": _to("dataset.shuffle_tags", bool),
    "keep_tokens": _to("dataset.keep_tags", int),
    "caption_prefix": _to("dataset.prefix"),
    "caption_suffix": _to("dataset.suffix"),
    "class_tokens": _to("dataset.instance_prompt"),
    "random_crop": _to("dataset.crop", lambda v: "random" if v else "centre"),
    "flip_aug": _to("encode.flip", bool),
    "clip_skip": _clip_skip,
    "max_token_length": _to("encode.caption_chunks", lambda v: max(1, int(v) // 75)),
    "network_dim": _to("lora.rank", int),
    "network_alpha": _to("lora.alpha", float),
    "network_dropout": _to("lora.dropout", float),
    "network_args": _network_args,
    "network_weights": _to("lora.init_from"),
    "learning_rate": _to("train.learning_rate", float),
    "unet_lr": _to("train.learning_rate", float),
    "text_encoder_lr": _text_rate,
    "lr_scheduler": _named("train.schedule", _SCHEDULES),
    "lr_warmup_steps": _warm_up,
    "optimizer_type": _named("train.optimiser", _OPTIMISERS),
    "use_8bit_adam": _to("train.optimiser", lambda v: "adamw8bit" if v else "adamw"),
    "max_train_steps": _steps_unless_epochs,
    "max_train_epochs": _epochs,
    "train_batch_size": _batch,
    "batch_size": _batch,
    "gradient_accumulation_steps": _batch,
    "max_grad_norm": _to("train.max_grad_norm", lambda v: float(v) or 1e9),
    "caption_dropout_rate": _to("train.caption_dropout", float),
    "min_snr_gamma": _to("train.min_snr_gamma", float),
    "debiased_estimation_loss": _to("train.debiased", bool),
    "noise_offset": _to("train.noise_offset", float),
    "multires_noise_discount": _to("train.pyramid_noise", float),
    "ip_noise_gamma": _to("train.input_perturbation", float),
    "prior_loss_weight": _prior,
    "mixed_precision": _to("train.mixed_precision", str),
    "seed": _to("train.seed", int),
    "save_every_n_steps": _to("train.snapshot_every", int),
    "sample_every_n_steps": _to("runtime.sample_every", int),
    "gradient_checkpointing": _to("runtime.gradient_checkpointing", bool),
    "torch_compile": _to("runtime.compile", bool),
    "output_name": _to("export.name"),
    "save_precision": _named("export.dtype", _DTYPES),
}
_PART_OF_OTHERS = {  # read together with another option
    "bucket_reso_steps",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_no_upscale",
    "lr_scheduler_num_cycles",
    "lr_scheduler_power",
    "network_train_unet_only",
    "type",
    "model.is_xl",
    "model.is_v2",
    "model.arch",
}
_DIFFUSERS: dict[str, Rule] = {
    "pretrained_model_name_or_path": _to("model.base"),
    "pretrained_vae_model_name_or_path": _to("model.vae"),
    "revision": _to("model.revision"),
    "variant": _to("model.variant"),
    "train_data_dir": _to("dataset.path"),
    "instance_data_dir": _to("dataset.path"),
    "instance_prompt": _to("dataset.instance_prompt"),
    "image_column": _to("dataset.image_column"),
    "caption_column": _to("dataset.caption_column"),
    "resolution": _resolution,
    "random_flip": _to("encode.flip", bool),
    "rank": _to("lora.rank", int),
    "train_text_encoder": _both_networks,
    "learning_rate": _to("train.learning_rate", float),
    "scale_lr": _to("train.scale_learning_rate", lambda v: "linear" if v else "none"),
    "text_encoder_lr": _text_rate,
    "lr_scheduler": _named("train.schedule", _SCHEDULES),
    "lr_warmup_steps": _warm_up,
    "optimizer": _named("train.optimiser", _OPTIMISERS),
    "use_8bit_adam": _to("train.optimiser", lambda v: "adamw8bit" if v else "adamw"),
    "adam_weight_decay": _to("train.weight_decay", float),
    "max_train_steps": _steps,
    "num_train_epochs": _epochs_unless_steps,
    "train_batch_size": _batch,
    "gradient_accumulation_steps": _batch,
    "max_grad_norm": _to("train.max_grad_norm", float),
    "snr_gamma": _to("train.min_snr_gamma", float),
    "noise_offset": _to("train.noise_offset", float),
    "prior_loss_weight": _prior,
    "prediction_type": _to("model.prediction"),
    "mixed_precision": _to("train.mixed_precision", str),
    "seed": _to("train.seed", int),
    "validation_prompt": _to("validate.prompts", lambda v: [v]),
    "gradient_checkpointing": _to("runtime.gradient_checkpointing", bool),
    "allow_tf32": _to("runtime.tf32", bool),
    "checkpointing_steps": _to("runtime.checkpoint_every", int),
    "hub_model_id": _to("export.push_to_hub", lambda v: {"repo": v, "private": True}),
}

_PRECISIONS = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": "no", "float32": "no"}


def _one_size(t: Translation, options: dict[str, Any], value: Any) -> None:
    """ai-toolkit trains on every size of a list, and always in buckets."""
    sizes = value if isinstance(value, list) else [value]
    t.values["dataset.resolution"] = side = max(sizes)
    t.values["dataset.buckets"] = {"step": 64, "min_side": 256, "max_side": 2 * side}
    if len(sizes) > 1:
        t.dropped.append(f"datasets.resolution {value}: one size is trained on, the largest")


def _quantised(t: Translation, options: dict[str, Any], value: Any) -> None:
    t.values["train.quantise_base"] = "int8" if value else None


def _average(t: Translation, options: dict[str, Any], value: Any) -> None:
    average = dict(value)
    if average.get("use_ema"):
        t.values["train.ema_decay"] = float(average.get("ema_decay", 0.999))


_AI_TOOLKIT: dict[str, Rule] = {
    "name": _to("export.name"),
    "trigger_word": _to("dataset.trigger", lambda v: v or ""),
    "network.type": _named("lora.method", {"lora": "lora", "lokr": "lokr"}),
    "network.linear": _to("lora.rank", int),
    "network.rank": _to("lora.rank", int),
    "network.alpha": _to("lora.alpha", float),
    "network.linear_alpha": _to("lora.alpha", float),
    "network.dropout": _to("lora.dropout", lambda v: float(v or 0)),
    "save.dtype": _named("export.dtype", {"float16": "float16", "fp16": "float16", "bf16": "bfloat16", "float32": "float32"}),
    "save.save_every": _to("train.snapshot_every", int),
    "datasets.folder_path": _to("dataset.path"),
    "datasets.caption_ext": _to("dataset.caption_extension", lambda v: f".{str(v).lstrip('.')}"),
    "datasets.default_caption": _to("dataset.instance_prompt"),
    "datasets.caption_dropout_rate": _to("train.caption_dropout", float),
    "datasets.shuffle_tokens": _to("dataset.shuffle_tags", bool),
    "datasets.flip_x": _to("encode.flip", bool),
    "datasets.random_crop": _to("dataset.crop", lambda v: "random" if v else "centre"),
    "datasets.resolution": _one_size,
    "train.batch_size": _batch,
    "train.gradient_accumulation_steps": _batch,
    "train.gradient_accumulation": _batch,
    "train.steps": _steps,
    "train.lr": _to("train.learning_rate", float),
    "train.optimizer": _named("train.optimiser", _OPTIMISERS),
    "train.lr_scheduler": _named("train.schedule", _SCHEDULES),
    "train.max_grad_norm": _to("train.max_grad_norm", float),
    "train.train_text_encoder": _both_networks,
    "train.gradient_checkpointing": _to("runtime.gradient_checkpointing", bool),
    "train.dtype": _named("train.mixed_precision", _PRECISIONS),
    "train.min_snr_gamma": _to("train.min_snr_gamma", float),
    "train.noise_offset": _to("train.noise_offset", float),
    "train.ema_config": _average,
    "model.name_or_path": _to("model.base"),
    "model.vae_path": _to("model.vae"),
    "model.is_v_pred": _to("model.prediction", lambda v: "v_prediction" if v else "auto"),
    "model.quantize": _quantised,
    "sample.sample_every": _to("runtime.sample_every", int),
    "sample.prompts": _to("validate.prompts"),
    "sample.neg": _to("validate.negative_prompt", lambda v: v or ""),
    "sample.guidance_scale": _to("validate.guidance_scale", float),
    "sample.sample_steps": _to("validate.inference_steps", int),
    "sample.seed": _to("validate.seeds", lambda v: [int(v)]),
}


def _translated(options: dict[str, Any], rules: dict[str, Rule], family: str) -> Translation:
    translation = Translation(family)
    # the general learning rate first: those of the networks override it
    for name, value in sorted(options.items(), key=lambda item: (item[0] != "learning_rate", item[0])):
        if name in _ALWAYS:
            translation.carried.append(f"{name}: {_ALWAYS[name]}")
        elif name in rules:
            before = dict(translation.values)
            try:
                rules[name](translation, options, value)
            except (_NoEquivalent, ValueError, TypeError) as why:
                translation.dropped.append(f"{name} {value}: {why}")
                continue
            changed = {k: v for k, v in translation.values.items() if k not in before or before[k] != v}
            for key, made in changed.items():
                translation.carried.append(f"{name} {value} → {key}: {made}")
        elif name not in _PART_OF_OTHERS:
            secret = re.search(r"token|key|password|secret", name, re.I)
            translation.dropped.append(f"{name} {'(not shown)' if secret else value}")
    return translation


def _flat(tables: dict[str, Any]) -> dict[str, Any]:
    """Kohya's TOML in one level: section names are for people, and lists of tables hold one dataset in most files."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            flat |= _flat(value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            flat |= _flat(value[0])
            if len(value) > 1:
                flat[f"{key} 2 and on"] = f"{len(value) - 1} more: see dataset.concepts"
        else:
            flat[key] = value
    return flat


def _command_line(text: str, source: Path) -> dict[str, Any]:
    """The options of `accelerate launch …train_….py --name=value --flag`, and values of the shell variables before it."""
    lines = re.sub(r"\\\r?\n", " ", text)
    variables = dict(re.findall(r"^\s*(?:export\s+)?([A-Z_][A-Z0-9_]*)=[\"']?([^\"'\n]*)[\"']?\s*$", lines, re.M))
    written = [line for line in lines.splitlines() if not line.lstrip().startswith("#")]
    command = next((line for line in written if re.search(r"train_\w+\.py(\s|$)", line)), None)
    if command is None:
        raise UserError(
            f"{source}: neither a .toml of sd-scripts, a .yaml of ai-toolkit, nor the command line of a diffusers script (train_….py)"
        )
    try:
        words = shlex.split(re.sub(r"\$\{?([A-Z_][A-Z0-9_]*)\}?", lambda m: variables.get(m[1], m[0]), command))
    except ValueError as error:
        raise UserError(f"{source}: the command line cannot be read: {error}") from None
    after = next((i for i, word in enumerate(words) if re.search(r"train_\w+\.py$", word)), len(words))
    options: dict[str, Any] = {}
    # of the launcher's options one means something to the training
    rest = [*(word for word in words[:after] if word.startswith("--mixed_precision=")), *words[after + 1 :]]
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            continue
        options[name[2:]] = value if equals else rest.pop(0) if rest and not rest[0].startswith("--") else True
    return options
