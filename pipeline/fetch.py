"""Datasets of the Hub as pinned snapshots under `data/`, each with a small tracked file that says where it came from.

`data/owner--name/` holds the files of one commit; `data/owner--name.source.json` beside it names source, commit and content, and
belongs into git: with it the snapshot can be fetched again, the same to the byte. The Hub's own cache keeps the downloads, so that
a retry or an update asks for nothing twice; a snapshot is a copy of it, whose files may be looked at and moved without harm.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from errno import ENOSPC
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import hash_file, hash_json, hash_tree, write_json

DATA = Path("data")
_LEFT_BEHIND = (".DS_Store", "Thumbs.db", "desktop.ini")  # by file managers, in every folder that somebody looked into
_SUFFIX = ".source.json"
_SOURCE = re.compile(r"hf://(?:datasets/)?([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*?)(?:@([\w][\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Pin:
    """What a `.source.json` says."""

    repo: str  # owner/name of a dataset on the Hub
    revision: str  # branch, tag or commit that was asked for; --update looks at it again
    commit: str  # 40 hex digits
    content: str  # sha256 over the names and bytes of all files

    @property
    def folder(self) -> Path:
        """Of the snapshot, relative to the project."""
        return DATA / self.repo.replace("/", "--")

    @property
    def file(self) -> Path:
        """Of this record, relative to the project."""
        return self.folder.with_name(self.folder.name + _SUFFIX)


def fetch(root: Path, source: str, update: bool = False) -> str:
    """Bring a snapshot under `data/`: as pinned, or with `update` at the newest commit of its revision.

    Args:
        root: the project's folder.
        source: hf://owner/name[@revision]; the revision is a branch, a tag or a commit, by default main.
        update: whether an existing pin may move.

    Returns:
        One line that says what was done.

    Raises:
        UserError: not such a source, no such dataset, no network, or files that somebody edited are in the way.
    """
    repo, revision = _parsed(source)
    wanted = Pin(repo, revision or "main", "", "")
    pin = _read(root / wanted.file) if (root / wanted.file).exists() else None
    if pin and not update and revision not in (None, pin.revision, pin.commit):
        raise UserError(
            f"{pin.file} pins {repo} at {pin.commit[:12]} ({pin.revision}), not at {revision}: "
            f"`reprolora fetch {source} --update` moves the pin"
        )
    _refuse_edited(root, pin or wanted, pin)
    if pin and not update:
        return _restore(root, pin)
    revision = revision or (pin.revision if pin else "main")
    commit = _commit_of(repo, revision)
    if pin and commit == pin.commit and revision == pin.revision:
        _restore(root, pin)
        return f"{repo}: nothing new, {pin.folder} is at {commit[:12]} ({revision})"
    new = _replace(root, repo, revision, commit)
    if pin:
        return f"{repo}: {pin.commit[:12]} → {commit[:12]} ({revision}) in {new.folder}"
    return f"{repo}: {commit[:12]} ({revision}) in {new.folder}; keep {new.file} in git"


def folder_of(source: str) -> Path:
    """Where `fetch` puts a source, relative to the project."""
    return Pin(_parsed(source)[0], "", "", "").folder


def update_all(root: Path) -> list[str]:
    """Move every recorded pin to the newest commit of its revision; one line for each.

    Raises:
        UserError: nothing is recorded, or one of them cannot be updated; those before it are.
    """
    pins = [_read(path) for path in sorted((root / DATA).glob(f"*{_SUFFIX}"))]
    if not pins:
        raise UserError(f"no dataset was fetched yet: {DATA}/ has no *{_SUFFIX}; begin with `reprolora fetch hf://owner/name`")
    return [fetch(root, f"hf://{pin.repo}", update=True) for pin in pins]


def _parsed(source: str) -> tuple[str, str | None]:
    match = _SOURCE.fullmatch(source)
    if not match or ".." in source or "--" in match[1] + match[2]:  # the Hub forbids both, and `--` joins the folder's name
        raise UserError(f"{source} is no dataset of the Hub: give hf://owner/name or hf://owner/name@revision")
    return f"{match[1]}/{match[2]}", match[3]


def _restore(root: Path, pin: Pin) -> str:
    if (root / pin.folder).exists():
        return f"{pin.repo}: {pin.folder} is there as pinned, at {pin.commit[:12]}"
    _replace(root, pin.repo, pin.revision, pin.commit, pin.content)
    return f"{pin.repo}: restored {pin.folder} as pinned, at {pin.commit[:12]}"


def _replace(root: Path, repo: str, revision: str, commit: str, content: str = "") -> Pin:
    """Put the snapshot of a commit in place of what is there. After each step a crash leaves a state that `fetch` mends: a
    record without its folder is restored as it says, and a folder stands only where the record says the same."""
    downloaded = _download(repo, commit)
    folder = root / Pin(repo, revision, commit, "").folder
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(downloaded, fresh)  # follows the cache's links: plain files arrive
    pin = Pin(repo, revision, commit, _content(fresh))
    if content and pin.content != content:
        shutil.rmtree(fresh)
        raise UserError(
            f"{pin.file}: commit {commit[:12]} of {repo} does not have the recorded content: the record or the Hub's local cache is "
            f"damaged. Restore the record from git, or clear the cache (`hf cache rm dataset/{repo}`)"
        )
    if folder.exists():
        folder.rename(old)
    write_json(root / pin.file, {"kind": "hub-dataset", **asdict(pin)})
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return pin


def _refuse_edited(root: Path, place: Pin, pin: Pin | None) -> None:
    """Fail where replacing the folder would lose something that was not fetched."""
    folder = root / place.folder
    if not folder.exists() and not folder.is_symlink():
        return
    if not pin:
        raise UserError(f"{place.folder} is there and was not fetched ({place.file} is missing): move it away first")
    if _content(folder) != pin.content:
        raise UserError(
            f"{place.folder} was edited since it was fetched{_edited(folder, pin)}: nothing is overwritten. Move the folder away to keep "
            "your version, or remove it; then fetch again"
        )


def _edited(folder: Path, pin: Pin) -> str:
    """The edited files by name, where the Hub's cache still holds the snapshot to compare with."""
    from huggingface_hub import snapshot_download

    try:
        cached = Path(snapshot_download(pin.repo, repo_type="dataset", revision=pin.commit, local_files_only=True))
    except (OSError, ValueError):
        return ""
    now, then = hash_tree(folder), {p.relative_to(cached).as_posix(): hash_file(p) for p in cached.rglob("*") if p.is_file()}
    names = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    return f" ({', '.join(names[:5])}{' and others' if len(names) > 5 else ''})" if names else ""


def _content(folder: Path) -> str:
    return hash_json(
        {name: digest for name, digest in hash_tree(folder).items() if name.rpartition("/")[2] not in _LEFT_BEHIND}
    )


def _read(path: Path) -> Pin:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        pin = Pin(**{key: fields[key] for key in ("repo", "revision", "commit", "content")})
        whole = f"hf://{pin.repo}@{pin.revision}"
        if not _SOURCE.fullmatch(whole) or not _COMMIT.fullmatch(pin.commit) or pin.file.name != path.name:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is no record of a fetched dataset: restore it from git, or remove it and fetch again"
        ) from None
    return pin


def _commit_of(repo: str, revision: str) -> str:
    from huggingface_hub import HfApi

    if _COMMIT.fullmatch(revision):
        return revision
    with _hub_errors(repo, revision):
        commit: str | None = HfApi().dataset_info(repo, revision=revision).sha
    assert commit is not None
    return commit


def _download(repo: str, commit: str) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(repo, commit):
        return Path(snapshot_download(repo, repo_type="dataset", revision=commit))


@contextmanager
def _hub_errors(repo: str, revision: str) -> Iterator[None]:
    """What the Hub's client raises, in words of what to do."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, XetDownloadError

    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{repo} is a gated dataset: ask for access on its page on the Hub, and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"the Hub has no dataset {repo}, or it is private: check the name, or log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"the dataset {repo} has no revision {revision}: give a branch, a tag or a commit of it") from None
    except (HTTPError, XetDownloadError, OSError) as error:
        if isinstance(error, OSError) and error.errno == ENOSPC:
            raise UserError(f"no space is left for {repo}: free some, or set HF_HOME to another disk") from None
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{repo} at {revision[:12]} cannot be had from the Hub: {said}\nNothing here was changed; what was downloaded is kept. "
            "Try again when the network is there"
        ) from None
