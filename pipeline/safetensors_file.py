"""safetensors files whose bytes are a pure function of their content.

The library writes metadata in the order of a randomised hash map: two saves of the same thing differ. Here the header is
rewritten with sorted keys; the format stays the plain one that every loader reads.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import TensorSpec, serialize, serialize_file
from safetensors.torch import load_file
from torch import Tensor

from pipeline.files import atomic_file, write_bytes


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors (detached, moved to the CPU) and text metadata, atomically."""
    kept = {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(tensors)}
    described = {name: _spec(tensor) for name, tensor in kept.items()}
    if not metadata:  # nothing to order: the library streams it, where `serialize` would hold it all a second time
        with atomic_file(path) as partial:
            serialize_file(described, partial)
        return
    plain = bytes(serialize(described))
    length = int.from_bytes(plain[:8], "little")
    header = json.loads(plain[8 : 8 + length])
    ordered = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    plain = len(text).to_bytes(8, "little") + text + plain[8 + length :]
    write_bytes(path, plain)


def _spec(tensor: Tensor) -> TensorSpec:
    """Where a tensor's bytes lie, as the library's `save_file` finds out too, in five times the time: a store has thousands of small
    ones. The tensor must outlive it."""
    return TensorSpec(
        dtype=str(tensor.dtype).removeprefix("torch."), shape=tensor.shape, data_ptr=tensor.data_ptr(), data_len=tensor.nbytes
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU."""
    tensors: dict[str, Tensor] = load_file(path)
    return tensors
