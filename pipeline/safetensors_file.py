"""safetensors files whose bytes are a pure function of their content.

The library writes metadata in the order of a randomised hash map: two saves of the same thing differ. Here the header is
rewritten with sorted keys; the format stays the plain one that every loader reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import TensorSpec, serialize, serialize_file
from safetensors.torch import load_file
from torch import Tensor

from pipeline.files import atomic_file, write_bytes


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors (detached, moved to the CPU) and text metadata, atomically."""
    if not metadata:  # nothing to order: the library streams it, where bytes would hold it all a second time
        kept = _kept(tensors)
        with atomic_file(path) as partial:
            serialize_file(_specs(kept), partial)
        return
    plain = safetensors_bytes(tensors)
    length = int.from_bytes(plain[:8], "little")
    header = json.loads(plain[8 : 8 + length])
    ordered = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    plain = len(text).to_bytes(8, "little") + text + plain[8 + length :]
    write_bytes(path, plain)


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A file of tensors (detached, moved to the CPU) without metadata."""
    kept = _kept(tensors)
    return bytes(serialize(_specs(kept)))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU."""
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def _kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(tensors)}


def _specs(kept: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Where the tensors' bytes lie, as the library's `save_file` finds out too, in five times the time: a store has thousands of
    small ones. `kept` must outlive it."""
    return {
        name: TensorSpec(dtype=str(t.dtype).removeprefix("torch."), shape=t.shape, data_ptr=t.data_ptr(), data_len=t.nbytes)
        for name, t in kept.items()
    }
