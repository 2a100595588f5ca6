"""The header of an adapter file: what A1111, Forge and ComfyUI show and sort by, modelspec 1.0.1, and our lineage.

Keys and values as sd-scripts writes them (`train_network.py`, `library/sai_model_spec.py`); the specification is at
https://github.com/Stability-AI/ModelSpec. `ss_training_started_at`, `ss_training_finished_at` and `modelspec.date` are left out: with
them two exports of the same inputs would differ. Programs take their absence well; the file's own date stands in.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.export.adapter import Adapter
from pipeline.families.base import BaseVersion
from pipeline.safetensors_file import safetensors_bytes


@dataclass(frozen=True)
class Picture:
    """What the header tells of a training picture."""

    caption: str
    size: tuple[int, int]  # width, height in pixels
    repeats: int = 1  # how often an epoch shows it


@dataclass(frozen=True)
class Facts:
    """All that goes into the header; each from what really ran, or from `export` where only a person can know it."""

    name: str
    title: str
    author: str
    description: str
    license: str | None
    tags: Sequence[str]
    trigger: str
    base: str
    version: BaseVersion
    rank: int
    alpha: float
    pictures: Sequence[Picture]  # that are trained on, without regularisation pictures
    regularisation: int  # how many of those
    clip_skip: int  # in diffusers' count
    train: Mapping[str, Any]
    lineage: Mapping[str, str]


def header(facts: Facts, adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The text entries for a file that holds `tensors`: pure in its arguments."""
    training = {key: value if isinstance(value, str) else json.dumps(value) for key, value in _training(facts, adapter).items()}
    spec = {f"modelspec.{key}": value for key, value in _modelspec(facts, tensors).items() if value}
    ours = {"name": facts.name, "trigger": facts.trigger, "lineage": dict(facts.lineage)}
    return {
        "format": "pt",
        **training,
        "sshs_model_hash": tensor_hash(tensors),
        "sshs_legacy_hash": _legacy_hash(tensors, training),
        **spec,
        "reprolora": json.dumps(ours, sort_keys=True, ensure_ascii=False),
    }


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of a safetensors file's bytes after its header, in hex: the same whatever the metadata."""
    plain = safetensors_bytes(tensors)
    return hashlib.sha256(plain[8 + int.from_bytes(plain[:8], "little") :]).hexdigest()


def _training(facts: Facts, adapter: Adapter) -> dict[str, Any]:
    """sd-scripts' `ss_` entries; what it writes with `str` is text here too (`True`, `(512, 512)`, `None`)."""
    module, arguments = _network(adapter)
    sizes: Counter[tuple[int, int]] = Counter()
    for picture in facts.pictures:
        sizes[picture.size] += picture.repeats
    tags = Counter(tag for p in facts.pictures for tag in (part.strip() for part in p.caption.split(",")) if tag)
    commonest = max(sizes, key=lambda size: (sizes[size], size), default=None)
    train = facts.train
    return {
        "ss_output_name": facts.name,
        "ss_base_model_version": facts.version.kohya,
        "ss_sd_model_name": facts.base,
        "ss_v2": str(facts.version.v2),
        "ss_clip_skip": str(facts.clip_skip + 1) if facts.clip_skip else "None",  # there, 1 is the last layer
        "ss_network_module": module,
        "ss_network_dim": str(facts.rank),
        "ss_network_alpha": f"{facts.alpha:g}",
        "ss_network_args": arguments,
        "ss_resolution": str(commonest),
        "ss_num_train_images": str(sum(picture.repeats for picture in facts.pictures)),
        "ss_num_reg_images": str(facts.regularisation),
        "ss_tag_frequency": {facts.name: dict(sorted(tags.items(), key=lambda item: (-item[1], item[0])))},
        "ss_bucket_info": {
            "buckets": {str(i): {"resolution": list(size), "count": sizes[size]} for i, size in enumerate(sorted(sizes))}
        },
        **{f"ss_{theirs}": str(train[ours]) for ours, theirs in _SETTINGS.items() if ours in train},
    }


_SETTINGS = {
    "steps": "steps",
    "batch_size": "total_batch_size",
    "learning_rate": "learning_rate",
    "schedule": "lr_scheduler",
    "warmup_steps": "lr_warmup_steps",
    "max_grad_norm": "max_grad_norm",
    "caption_dropout": "caption_dropout_rate",
    "mixed_precision": "mixed_precision",
    "seed": "seed",
}


def _network(adapter: Adapter) -> tuple[str, dict[str, Any]]:
    """The module of sd-scripts or LyCORIS that such a network comes from there, and its arguments."""
    kind = adapter.kinds[0]
    if kind == "lora":
        return "networks.lora", {}
    return "lycoris.kohya", {"algo": kind} if kind != "dora" else {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}


def _modelspec(facts: Facts, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    width, height = max((p.size for p in facts.pictures), key=lambda s: s[0] * s[1], default=(0, 0))
    return {
        "sai_model_spec": "1.0.1",
        "architecture": f"{facts.version.architecture}/lora",
        "implementation": facts.version.implementation,
        "title": facts.title or facts.name,
        "resolution": f"{width}x{height}" if width else "",
        "author": facts.author,
        "description": facts.description,
        "license": facts.license or "",
        "trigger_phrase": facts.trigger,
        "tags": ", ".join(facts.tags),
        "prediction_type": facts.version.prediction,
        "hash_sha256": f"0x{tensor_hash(tensors)}",
    }


def _legacy_hash(tensors: Mapping[str, Tensor], training: Mapping[str, str]) -> str:
    """The first 8 digits of sha256 over 64 KiB from the first MiB on: how sd-webui-additional-networks knows old files. Like
    sd-scripts, of the file as it would be with the `ss_` entries alone."""
    plain = safetensors_bytes(tensors)
    length = int.from_bytes(plain[:8], "little")
    text = json.dumps(
        {"__metadata__": dict(sorted(training.items())), **json.loads(plain[8 : 8 + length])}, separators=(",", ":")
    )
    padded = text.encode() + b" " * (-len(text.encode()) % 8)
    whole = len(padded).to_bytes(8, "little") + padded + plain[8 + length :]
    return hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
