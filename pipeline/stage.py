"""What every stage runs in: snapshot guard, fingerprinted work directory, lock, signals, journal.

DVC deletes a stage's outs before it runs the stage, reads the parameters a second time after it, and leaves the stage
behind when it is killed itself. Hence: work lives in `.work/<stage>/<fingerprint>/`; outs are built there and moved into
place only when parameters, dependencies, model and code are still what they were at the start; a stage whose parent dies
saves its work and leaves.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ruamel.yaml import YAML

from pipeline.base_model import base_source
from pipeline.config import Params, load_params
from pipeline.errors import AlreadyRunning, Interrupted, UserError
from pipeline.files import hash_file, hash_json, hash_tree
from pipeline.lock import held
from pipeline.model_source import ModelSource, pin_of
from pipeline.progress import say
from pipeline.sources import CODE_JSON, confirmed, is_source, source_files
from pipeline.workspace import Workspace

_INSTALLED = "the installed reprolora"  # among the dependencies of a project without code of its own
_SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh"}


@dataclass(frozen=True)
class Declaration:
    """What `dvc.yaml` says of a stage."""

    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]
    code: str | None = None  # where code.json states the stage's code; None: the code is among deps


@dataclass(frozen=True)
class Snapshot:
    """All that a stage's result depends on, as it was at one moment."""

    params: dict[str, Any]
    deps: dict[str, dict[str, str]]
    base: dict[str, str]  # pins of local base models and of the adapter to start from: DVC does not see those files

    @property
    def fingerprint(self) -> str:
        """Names the work directory, so that a checkpoint is never resumed under other settings."""
        return hash_json([self.params, self.deps, self.base])[:16]

    def fingerprint_without(self, section: str, *keys: str) -> str:
        """The fingerprint as it would be if these keys of a section did not count."""
        rest = {key: value for key, value in self.params[section].items() if key not in keys}
        return hash_json([{**self.params, section: rest}, self.deps, self.base])[:16]

    @property
    def identity(self) -> str:
        """Names the result: like the fingerprint, but without the code, so that a comment there makes no other adapter."""
        data = {path: files for path, files in self.deps.items() if not is_source(path) and path != _INSTALLED}
        return hash_json([self.params, data, self.base])[:16]


@dataclass
class StopRequest:
    """Set by SIGTERM, Ctrl-C or the parent's death; long work asks it between two items."""

    reason: str = ""
    _event: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> bool:
        return self._event.is_set()

    def set(self, reason: str) -> None:
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    def check(self, saved: str = "") -> None:
        """Raise `Interrupted` if asked to stop; `saved` says what the next run goes on from."""
        if self():
            raise Interrupted(f"{self.reason}; {saved or 'what is finished is kept'}: run again to go on")


@dataclass(frozen=True)
class Stage:
    """What a stage's code is given."""

    name: str
    params: Params
    workspace: Workspace
    work: Path
    identity: str
    stop: StopRequest
    snapshot: Snapshot

    def source(self) -> ModelSource:
        return base_source(self.params.model)

    def out(self, path: Path) -> Path:
        """An empty folder that becomes the out `path` when the stage ends well."""
        staged = self.work / "outs" / path
        staged.mkdir(parents=True, exist_ok=True)
        return staged


def run_stage(name: str, body: Callable[[Stage], None], after: Callable[[Stage], None] | None = None) -> None:
    """Run one stage's body in the harness; `after` follows when its outs are in place.

    Raises:
        UserError: bad input, or parameters or dependencies were edited meanwhile; nothing is recorded or lost.
        AlreadyRunning: another process holds the work directory.
        Interrupted: asked to stop; the work directory holds all that is done.
    """
    workspace = Workspace.here()
    say(f"{name}: reading its inputs")
    stop = StopRequest()
    with _disk_full_is_the_users(workspace), _signals_to(stop), _journal(workspace, name):
        declaration = declared(workspace, name)
        params = load_params(workspace.params)
        before = snapshot(workspace, declaration, params)
        work = workspace.work / name / before.fingerprint
        work.mkdir(parents=True, exist_ok=True)
        with held(work / "lock", f"{name} is already running with these settings"):
            if os.environ.get("REPROLORA_FORCE") == "1":
                _empty(work)
            shutil.rmtree(work / "outs", ignore_errors=True)
            stage = Stage(name, params, workspace, work, before.identity, stop, before)
            body(stage)
            _refuse_edits(workspace, declaration, before, name)
            _publish(stage, declaration)
            if after:
                after(stage)
                _refuse_edits(workspace, declaration, before, name)  # DVC reads the parameters only after this


def declared(workspace: Workspace, name: str) -> Declaration:
    """The stage's entry in `dvc.yaml`, with `${section.key}` filled in from `params.yaml`."""
    stages, values = _stages(workspace)
    return _declaration(stages[name], values)


def declarations(workspace: Workspace) -> dict[str, Declaration]:
    """All stages of `dvc.yaml`, in its order."""
    stages, values = _stages(workspace)
    return {name: _declaration(entry, values) for name, entry in stages.items()}


def _stages(workspace: Workspace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of `dvc.yaml`, and all of `params.yaml`.

    Raises:
        UserError: this is no project's folder.
    """
    if not workspace.dvc_yaml.is_file():
        raise UserError(
            f"there is no dvc.yaml in {workspace.root}: go to the project's folder, or make one with `reprolora init DIR`"
        )
    document = YAML(typ="safe").load(workspace.dvc_yaml.read_text(encoding="utf-8"))
    values = YAML(typ="safe").load(workspace.params.read_text(encoding="utf-8"))
    return document["stages"], values or {}


def _declaration(entry: dict[str, Any], values: dict[str, Any]) -> Declaration:
    def fill(text: str) -> str:
        while "${" in text:
            head, _, rest = text.partition("${")
            key, _, tail = rest.partition("}")
            value: Any = values
            for part in key.split("."):
                value = value.get(part, "") if isinstance(value, dict) else ""
            text = f"{head}{value}{tail}"
        return text

    def paths(items: list[Any]) -> tuple[str, ...]:
        return tuple(fill(item if isinstance(item, str) else next(iter(item))) for item in items)

    outs = [*entry.get("outs", []), *entry.get("metrics", []), *entry.get("plots", [])]
    sections = tuple(item for item in entry["params"] if isinstance(item, str))
    code = [fill(key) for item in entry["params"] if isinstance(item, dict) for key in item.get(CODE_JSON, [])]
    return Declaration(paths(entry["deps"]), sections, paths(outs), code[0] if code else None)


def code_files(workspace: Workspace, name: str) -> dict[str, Path]:
    """The stage's source files by their names in `dvc.yaml`: the project's own, or the installed ones."""
    declaration = declared(workspace, name)
    if declaration.code:
        return source_files(name, load_params(workspace.params).model.family)
    return {dep: workspace.root / dep for dep in declaration.deps if is_source(dep)}


def snapshot(workspace: Workspace, declaration: Declaration, params: Params) -> Snapshot:
    """Hash everything the stage depends on.

    Raises:
        UserError: a dependency is missing, or code.json does not state the installed code.
    """
    deps = {_INSTALLED: {".": confirmed(workspace.root, declaration.code)}} if declaration.code else {}
    for dep in declaration.deps:
        path = workspace.root / dep
        if not path.exists():
            hint = "set dataset.path" if dep == params.dataset.path else "run the stages before it: `reprolora run`"
            raise UserError(f"{dep} is missing: {hint}")
        deps[dep] = hash_tree(path)
    base = {}
    folders = {
        "dataset": params.dataset.auto_caption,
        "model": params.model.base,
        "model.config": params.model.config,
        "model.vae": params.model.vae,
        "validate": params.validate_.clip_model,
        "validate.dino_model": params.validate_.dino_model,
    }
    for key, folder in folders.items():
        if key.partition(".")[0] in declaration.params and folder and (workspace.root / folder).exists():
            base[key] = pin_of(workspace.root / folder)
    start = params.lora.init_from
    if "lora" in declaration.params and start and (workspace.root / start).is_file():
        base["lora.init_from"] = hash_file(workspace.root / start)
    return Snapshot({s: params.section(s) for s in declaration.params}, deps, base)


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """What changed, one line each: `train.learning_rate 0.0001 → 0.0002`, `build/encoded`, …"""
    lines = value_changes(before.params, after.params)
    for dep in {**before.deps, **after.deps}:
        old, new = before.deps.get(dep, {}), after.deps.get(dep, {})
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if changed:
            lines.append(dep if changed == ["."] else f"{dep}: {', '.join(changed[:3])}{' …' if len(changed) > 3 else ''}")
    lines += [
        f"the files of {section if '.' in section else section + chr(39) + 's model'}"
        for section in before.base
        if before.base[section] != after.base.get(section)
    ]
    return lines


def value_changes(before: Any, after: Any, prefix: str = "") -> list[str]:
    """`key old → new` for every leaf that differs between two nested mappings."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(k for k in after if k not in before)]
        return [
            line
            for key in keys
            for line in value_changes(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else str(key))
        ]
    return [] if before == after else [f"{prefix} {_short(before)} → {_short(after)}"]


def _short(value: Any) -> str:
    text = "(unset)" if value is None else str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _refuse_edits(workspace: Workspace, declaration: Declaration, before: Snapshot, name: str) -> None:
    try:
        after = snapshot(workspace, declared(workspace, name), load_params(workspace.params))
        changed = differences(before, after)
    except UserError as error:
        changed = [str(error)]
    if changed:
        listed = "\n".join(f"  {line}" for line in changed)
        raise UserError(
            f"{name}: its inputs were edited while it ran:\n{listed}\n"
            "Nothing was recorded, and nothing is lost: run again to use the new values, or change them back first to keep this result"
        )


def _publish(stage: Stage, declaration: Declaration) -> None:
    """Move the staged outs into place. They replace what is there only now, when nothing can fail but the disk."""
    for out in declaration.outs:
        staged, final = stage.work / "outs" / out, stage.workspace.root / out
        assert staged.exists(), f"{stage.name} did not write its out {out}"
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            shutil.rmtree(final)  # were it left, the new folder would be moved into it
        shutil.move(staged, final)
    shutil.rmtree(stage.work / "outs")


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _journal(workspace: Workspace, name: str) -> Iterator[None]:
    """Append a line when the execution starts and one on how it went; `status` and the summary of `run` read them."""
    start = time.time()
    entry: dict[str, Any] = {"stage": name, "run": os.environ.get("REPROLORA_RUN", ""), "outcome": "failed"}

    def write(**more: Any) -> None:
        workspace.work.mkdir(parents=True, exist_ok=True)
        with workspace.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, "started_at": round(start, 3), **more}) + "\n")

    write(outcome="started")  # all that a killed stage leaves behind
    try:
        yield
        entry["outcome"] = "done"
    except Interrupted:
        entry["outcome"] = "interrupted"
        raise
    except AlreadyRunning:
        entry["outcome"] = "already running"
        raise
    except UserError:
        entry["outcome"] = "refused"
        raise
    finally:
        with contextlib.suppress(OSError):  # on a full disk the reason matters more than the record
            write(seconds=round(time.time() - start, 3))


@contextmanager
def _disk_full_is_the_users(workspace: Workspace) -> Iterator[None]:
    """A full disk is no bug of ours: say so."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(workspace.home).free / 2**20
        where = error.filename or workspace.work
        raise UserError(
            f"the disk is full: {where} could not be written ({free:.0f} MiB free at {workspace.home}). "
            "What was finished is kept: make room (`.work/` and `.dvc/cache` are the large ones) and run again"
        ) from error


@contextmanager
def _signals_to(stop: StopRequest) -> Iterator[None]:
    """Turn SIGTERM, Ctrl-C, a closed terminal and the parent's death into a request to stop; a second Ctrl-C stops at once."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.reason == "SIGINT":  # when the parent dies, SIGTERM may follow our own notice
            raise KeyboardInterrupt
        stop.set(signal.Signals(number).name)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup a closed terminal is to be ignored
        numbers.append(signal.SIGHUP)
    old = {number: signal.signal(number, on_signal) for number in numbers}
    _ask_kernel_about_parent()
    threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _ask_kernel_about_parent() -> None:
    """Linux: SIGTERM to us when the parent dies (prctl(2), PR_SET_PDEATHSIG = 1). Elsewhere polling must do."""
    if sys.platform == "linux" and "DVC_ROOT" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0)


def _watch_parent(stop: StopRequest) -> None:
    """Poll the parents that DVC stands among: the kernel tells nothing of DVC's death when a shell stands between."""
    if "DVC_ROOT" not in os.environ:
        return
    watched = _ancestors()
    while not stop():
        if _ancestors()[: len(watched)] != watched:
            stop.set("the process that started this stage is gone")
            return
        time.sleep(0.5)


def _ancestors() -> list[int]:
    """Our parent, and its parent too where ours is only the shell that DVC started."""
    parent = os.getppid()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text()
    except OSError:
        return [parent]
    name, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :]
    return [parent, int(rest.split()[1])] if name in _SHELLS else [parent]
