"""A base model on disk: fetched from the Hub where needed, pinned, fingerprinted. Imports no torch.

Only `safetensors` weights are taken; a folder or repository that offers pickles alone is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import files_under, hash_json
from pipeline.progress import say
from pipeline.remembered import hash_weights
from pipeline.workspace import Workspace

_CONTENT = (".json", ".txt", ".model", ".safetensors")  # configs, vocabularies, sentencepiece models, weights
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


@dataclass(frozen=True)
class ModelSource:
    """Which model: a local folder, a Hub id or a single file, its pin, and the weights' variant (`fp16`) if any."""

    base: str
    revision: str | None = None
    variant: str | None = None
    family: str = ""  # of a base: what a single file is converted as
    config: str | None = None  # of a single file: where its configs and tokenizers are
    vae: ModelSource | None = None  # instead of the base's own

    def is_local(self, root: Path) -> bool:
        return (root / self.base).exists()


@dataclass(frozen=True)
class LocalModel:
    """A model that lies on disk, in the diffusers or transformers layout."""

    path: Path
    variant: str | None
    commit: str | None  # the Hub commit, where it came from the Hub
    vae: LocalModel | None = None  # an `AutoencoderKL` that stands in for the base's own

    def fingerprint(self, *components: str) -> str:
        """Identity of the named sub-folders, or of everything: the Hub commit, or sha256 of the files that matter."""
        if self.vae and "vae" in components:
            rest = [c for c in components if c != "vae"]
            return hash_json([self.vae.fingerprint(), self.fingerprint(*rest) if rest else ""])
        if self.commit:
            return hash_json([self.commit, self.variant, sorted(components)])
        roots = [self.path / c for c in components] if components else [self.path]
        files = {p.relative_to(self.path).as_posix(): hash_weights(p) for root in roots for p in _content_files(root)}
        return hash_json([self.variant, files])

    def pixels_per_cell(self) -> int:
        """Of the VAE that encodes for this base."""
        folder = self.path / "vae" if self.vae is None else self.vae.path
        return pixels_per_cell(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def pixels_per_cell(vae_config: Mapping[str, Any]) -> int:
    """A latent cell's side in pixels: every level of an `AutoencoderKL` but the last halves the picture."""
    return 1 << len(vae_config["block_out_channels"]) - 1


def pin_of(folder: Path) -> str:
    """The `sha256:…` pin of a local model: over the names and bytes of configs, vocabularies and weights, or over the one file."""
    if folder.is_file():
        return "sha256:" + hash_weights(folder)
    return "sha256:" + hash_json({p.relative_to(folder).as_posix(): hash_weights(p) for p in _content_files(folder)})


def resolve(source: ModelSource, root: Path, key: str = "model.base") -> LocalModel:
    """Bring the model to disk and check its pin.

    Args:
        source: what `params.yaml` names.
        root: folder that a relative `base` starts from.
        key: the setting's name, for messages.

    Raises:
        UserError: no such model, no safetensors, the content differs from the pin, or no pin although `REPROLORA_STRICT` is
            set, as in CI.
    """
    if not source.revision:
        text = f"{key}: {source.base} is not pinned and may change unnoticed; `reprolora pin` fills it in"
        if os.environ.get("REPROLORA_STRICT", "") not in ("", "0"):
            raise UserError(text)
        say(f"  note: {text}")
    if source.vae:
        return replace(resolve(replace(source, vae=None), root, key), vae=resolve(source.vae, root, "model.vae"))
    if (root / source.base).is_dir():
        return _resolve_local(source, root, key)
    if (root / source.base).is_file():
        return _resolve_file(source, root, key)
    if not _HUB_ID.match(source.base):
        raise UserError(
            f"{key}: {source.base!r} is no folder here and no Hub id of the form owner/name: "
            "give a folder in the diffusers layout or a Hub id"
        )
    return _resolve_hub(source, key)


def _resolve_local(source: ModelSource, root: Path, key: str) -> LocalModel:
    folder = root / source.base
    if not (folder / "model_index.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{key}: {source.base} is no model: neither model_index.json (diffusers) nor config.json (transformers) is in it"
        )
    _refuse_pickles(list(folder.rglob("*")), source.base, key)
    _refuse_unpinned_content(source, folder, key)
    return LocalModel(folder, source.variant, commit=None)


def _resolve_file(source: ModelSource, root: Path, key: str) -> LocalModel:
    """A single file in the original layout, as the folder that it was converted to."""
    file = root / source.base
    if file.suffix != ".safetensors" or not source.family:
        pickled = file.suffix in _PICKLES
        why = "a pickle, which can run code when loaded" if pickled else "a file; a folder in the diffusers layout is needed"
        raise UserError(f"{key}: {source.base} is {why}" + (": a .safetensors file is needed" if pickled else ""))
    found = _refuse_unpinned_content(source, file, key) or pin_of(file)
    here = Workspace(root, Path(os.environ.get("DVC_ROOT", root)))
    local = source.config and (root / source.config).is_dir()
    config_pin = pin_of(root / str(source.config)) if local else source.config
    folder = here.work / "models" / hash_json([found, source.family, config_pin])[:16]
    if not folder.is_dir():
        config = source.config and (str(root / source.config) if (root / source.config).is_dir() else source.config)
        import_module("pipeline.single_file").convert(file, source.family, config, folder)  # by name: it needs torch
    return LocalModel(folder, None, commit=None)


def _refuse_unpinned_content(source: ModelSource, path: Path, key: str) -> str | None:
    """Hold local files against their pin; returns their hash if it was taken."""
    if source.revision and source.revision.startswith("sha256:"):
        found = pin_of(path)
        if found != source.revision:
            raise UserError(
                f"{key}: the files of {source.base} are not the pinned ones: pinned {source.revision[:19]}…, "
                f"found {found[:19]}…. Restore the files, or accept them with `reprolora pin`"
            )
        return found
    if source.revision:
        raise UserError(
            f"{key}: {source.revision[:12]}… is a Hub commit, but {source.base} lies here: `reprolora pin` fills in its sha256"
        )
    return None


def _resolve_hub(source: ModelSource, key: str) -> LocalModel:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    if source.revision and source.revision.startswith("sha256:"):
        raise UserError(
            f"{key}: a sha256 pin belongs to a local folder, but {source.base} is on the Hub: "
            "`reprolora pin` fills in its commit"
        )
    weights = f"*.{source.variant}*.safetensors" if source.variant else "*.safetensors"
    whole = ["model*.safetensors", "diffusion_pytorch_model*.safetensors"]  # a CLIP's, or a VAE's, at the top
    try:
        path = snapshot_download(
            source.base,
            revision=source.revision,
            # `*` crosses folders: without the second list it takes every variant, and the single-file copies beside them
            allow_patterns=["*.json", "*.txt", "*.model", f"*/{weights}", *whole],
            ignore_patterns=[] if source.variant else ["*/*.*.safetensors", "*.fp16.safetensors", "safety_checker/*"],
        )
    except RepositoryNotFoundError:
        raise UserError(
            f"{key}: the Hub has no model {source.base}, or it is gated: check the name, or log in with `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{key}: {source.base} is neither a folder here nor in the local Hub cache, and the Hub cannot be reached: "
            f"{str(error).splitlines()[0]}"
        ) from None
    folder = Path(path)
    if not any(folder.rglob("*.safetensors")):
        offered = HfApi().list_repo_files(source.base, revision=source.revision)
        _refuse_pickles([folder / name for name in offered], source.base, key)
        raise UserError(f"{key}: {source.base} holds no weights named {weights}: check model.variant")
    return LocalModel(folder, source.variant, commit=folder.name)


def _refuse_pickles(paths: list[Path], base: str, key: str) -> None:
    if not any(p.suffix == ".safetensors" for p in paths):
        pickles = [p.name for p in paths if p.suffix in _PICKLES]
        what = f"only {pickles[0]}, a pickle, which can run code when loaded" if pickles else "no weights"
        raise UserError(f"{key}: {base} has {what}: a model with .safetensors files is needed")


def _content_files(folder: Path) -> list[Path]:
    return [p for p in files_under(folder) if p.suffix in _CONTENT]
