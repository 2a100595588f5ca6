"""Checkpoints in the original layout, one `.safetensors` file: converted once to diffusers' folders, by diffusers itself.

Imported by name (`pipeline.model_source`), and only where `model.base` is such a file: everything here is heavy.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.families import family
from pipeline.files import atomic_directory
from pipeline.progress import say
from pipeline.quiet import quiet_libraries


def convert(file: Path, name: str, config: str | None, out: Path) -> None:
    """Write the base in `file` to the folder `out`, in the diffusers layout.

    Args:
        name: the family's.
        config: folder in the diffusers layout, or Hub id, whose configs and tokenizers fit the file (weights are not needed
            there); None: diffusers recognises the file and asks the Hub.

    Raises:
        UserError: diffusers cannot make sense of the file.
    """
    quiet_libraries()
    import diffusers

    say(f"  converting {file.name} to the diffusers layout, once")
    kind = getattr(diffusers, family(name).pipeline_class)
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False} if name == "sd" else {}
    try:
        pipeline = kind.from_single_file(str(file), config=config, dtype=torch.float32, **extra)
    except Exception as error:  # whatever a converter makes of a foreign file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "is model.config the right base's?" if config else "set model.config to a folder or Hub id of the same base"
        raise UserError(f"model.base: {file.name} cannot be read as a base of family {name}: {first[:300]}; {hint}") from error
    with atomic_directory(out) as partial:
        pipeline.save_pretrained(partial, safe_serialization=True)
