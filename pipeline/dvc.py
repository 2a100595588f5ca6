"""Driving DVC: reproduce, and say which stages would run and why."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ruamel.yaml import YAML

from pipeline import live
from pipeline.dvc_process import Waiting, answer
from pipeline.errors import UserError
from pipeline.files import hash_file, hash_tree
from pipeline.lock import held, refusal
from pipeline.progress import LIVE_FILE
from pipeline.sources import CODE_JSON, hash_of
from pipeline.stage import Declaration, declarations, value_changes
from pipeline.workspace import DATASET, Workspace

_SHOWN = 5  # changed files that are named


@dataclass(frozen=True)
class StageStatus:
    """Whether a stage would run. No reason: it is up to date."""

    name: str
    reasons: tuple[str, ...]
    last_seconds: float | None  # how long its last complete execution here took


@dataclass(frozen=True)
class StageOutcome:
    """What became of a stage in one `run`."""

    name: str
    what: str  # ran, restored, up to date, not reached, killed, or the journal's word for how it ended
    seconds: float | None


def reproduce(
    workspace: Workspace, dvc: Waiting, stage: str | None, force: bool, pull: bool = False
) -> tuple[int, list[StageOutcome]]:
    """`dvc repro`, with its output passed through; returns its exit code and what became of each stage.

    Args:
        dvc: not told anything yet.
        pull: let DVC fetch what its run cache knows and its cache lacks.

    Raises:
        AlreadyRunning: a `dvc repro` works here.
    """
    _refuse_beside_dvc(workspace)
    run = uuid.uuid4().hex[:12]
    before, complete = workspace.recorded(), {n: _outs_exist(workspace, d) for n, d in declarations(workspace).items()}
    options = [*(["--force"] if force else []), *(["--pull"] if pull else []), *([stage] if stage else [])]
    view = live.View(_up_to(list(complete), stage), workspace.work / "live.json") if dvc.process.stdout else None
    shown = {LIVE_FILE: str(view.file)} if view else {}
    dvc.tell("repro", *options, **shown, REPROLORA_RUN=run, **({"REPROLORA_FORCE": "1"} if force else {}))
    code, interrupted = _wait_for(dvc.process, view)
    executed = {e["stage"]: e for e in journal(workspace) if e["run"] == run}
    if code and not executed:
        _refuse_beside_dvc(workspace)  # it came between
    after, wanted = workspace.recorded(), _up_to(list(complete), stage)
    broken = [name for name, entry in executed.items() if entry["outcome"] != "done"]
    lost = wanted.index(broken[0]) if broken else 0 if code else len(wanted)  # from here on nothing was reached
    outcomes = []
    for i, name in enumerate(wanted):
        if name in executed:
            what = {"done": "ran", "started": "killed"}.get(executed[name]["outcome"], executed[name]["outcome"])
            outcomes.append(StageOutcome(name, what, executed[name].get("seconds")))
        elif i >= lost:
            outcomes.append(StageOutcome(name, "not reached", None))
        elif before.get(name) != after.get(name) or not complete[name]:
            outcomes.append(StageOutcome(name, "restored", None))
        else:
            outcomes.append(StageOutcome(name, "up to date", None))
    return (130 if interrupted and code == 0 else code), outcomes


def _wait_for(process: subprocess.Popen[str], view: live.View | None) -> tuple[int, bool]:
    """Wait until DVC ends, under the view of the stages if there is one; its exit code, and whether there was a Ctrl-C."""
    interrupted = False
    with _sigterm_to_the_stage_of(process):
        if view:
            viewer = threading.Thread(target=live.show, args=(view, process.stdout))
            viewer.start()
        while True:
            try:
                code = process.wait()
                if view:
                    viewer.join()
                return code, interrupted
            except KeyboardInterrupt:  # the whole group got it: DVC and the stage save and leave, we wait for them
                interrupted = True


def status(workspace: Workspace, asked: subprocess.Popen[str], pending: Sequence[str] = ()) -> list[StageStatus]:
    """Which stages changed, and why, in words.

    Args:
        asked: `dvc status --json`, started.
        pending: `section.key old → new`, changes that are only considered: counted as made.

    Raises:
        UserError: DVC cannot tell.
        AlreadyRunning: since a stage runs.
    """
    with ThreadPoolExecutor(1) as beside:  # while DVC looks; what cannot be read is DVC's to tell
        files = beside.submit(lambda: (declarations(workspace), workspace.recorded(), _yaml(workspace.params)))
        told, complaint = answer(asked)
    try:
        changed: dict[str, list[Any]] = json.loads(told)
    except json.JSONDecodeError:
        with sole_run(workspace):  # where somebody runs, say who
            _refuse_beside_dvc(workspace)
        raise UserError(f"dvc status failed: {(complaint or told).strip()}") from None
    declared, locked, current = files.result()
    lasting = {e["stage"]: e["seconds"] for e in journal(workspace) if e["outcome"] == "done"}
    statuses: list[StageStatus] = []
    producer: dict[str, str] = {}
    for name, declaration in declared.items():
        if name not in locked:
            reasons = ["has never run"]
        else:
            reasons = _code_reasons(declaration, locked[name])
            reasons += _reasons(changed.get(name, []), locked[name], current, _dataset_changes(workspace))
            reasons += [change for change in pending if change.split(".")[0] in declaration.params]
            stale = {producer[d] for d in declaration.deps if d in producer}
            reasons += [f"after {s.name}" for s in statuses if s.name in stale and s.reasons]
        producer |= dict.fromkeys(declaration.outs, name)
        statuses.append(StageStatus(name, tuple(reasons), lasting.get(name)))
    return statuses


@contextlib.contextmanager
def sole_run(workspace: Workspace) -> Iterator[None]:
    """Hold the project: two runs would delete each other's outs, and change params.yaml under each other.

    Raises:
        AlreadyRunning: another run holds it.
    """
    with held(workspace.work / "run.lock", "this project is already running"):
        yield


def _refuse_beside_dvc(workspace: Workspace) -> None:
    """Tell a bare `dvc repro` by what DVC notes of the outs that it is about to write: else it would be DVC's error, and exit 1."""
    note = workspace.root / ".dvc" / "tmp" / "rwlock"
    writers: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(OSError, json.JSONDecodeError):  # none, or half written
        writers = json.loads(note.read_text(encoding="utf-8")).get("write", {})
    for writer in writers.values():
        if _lives(writer["pid"]):
            program, *arguments = writer["cmd"].split(" ")
            what = " ".join(["dvc" if "dvc" in program else program, *arguments])
            raise refusal("this project is already running", f"{writer['pid']}: {what}")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def journal(workspace: Workspace) -> list[dict[str, Any]]:
    """All stage executions here, oldest first."""
    if not workspace.journal.is_file():
        return []
    entries = []
    for line in workspace.journal.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the line that a power cut left half
            entries.append(json.loads(line))
    return entries


def _reasons(
    changes: list[Any], locked: dict[str, Any], current: dict[str, Any], files: Callable[[str], list[str]]
) -> list[str]:
    reasons: list[str] = []
    for change in changes:
        if isinstance(change, str):
            reasons.append(change)
            continue
        for path, what in change.get("changed deps", {}).items():
            if path == CODE_JSON:
                continue  # `run` writes it anew: what counts is the installed code
            if isinstance(what, dict):
                old = locked.get("params", {}).get(path, {})
                for section in what:
                    lines = value_changes(old.get(section), current.get(section), section)
                    reasons += lines or [f"{section} was not recorded before"]
            else:
                reasons += files(path) or [f"{path} {what}"]
        reasons += [f"{path} {what}" for path, what in change.get("changed outs", {}).items()]
    return reasons


def _dataset_changes(workspace: Workspace) -> Callable[[str], list[str]]:
    """For the dataset's folder, which of its files changed since prepare-dataset made what lies in `build/dataset`, where that is
    known here; nothing for other paths."""

    def changes(path: str) -> list[str]:
        manifest = workspace.root / DATASET / "manifest.jsonl"
        record = workspace.dataset_files / f"{hash_file(manifest) if manifest.is_file() else ''}.json"
        told = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        if told.get("folder") != path:
            return []
        before, now = told["files"], hash_tree(workspace.root / path)
        words = {name: "added" if name not in before else "removed" if name not in now else "edited" for name in before | now}
        changed = sorted(name for name in words if before.get(name) != now.get(name))
        shown = [f"{path}/{name} {words[name]}" for name in changed[:_SHOWN]]
        return shown + ([f"{path}: {len(changed) - _SHOWN} more files"] if len(changed) > _SHOWN else [])

    return changes


def _code_reasons(declaration: Declaration, locked: dict[str, Any]) -> list[str]:
    """Whether the installed code is another than the one that made the outs. Of another family there is none to compare."""
    if not declaration.code:
        return []
    used = locked.get("params", {}).get(CODE_JSON, {}).get(declaration.code)
    return ["the installed reprolora has other code for it"] if used and used != hash_of(declaration.code) else []


def _up_to(names: list[str], stage: str | None) -> list[str]:
    """The pipeline is a chain: what `dvc repro STAGE` covers is all up to it."""
    return names[: names.index(stage) + 1] if stage else names


def _outs_exist(workspace: Workspace, declaration: Declaration) -> bool:
    return all((workspace.root / out).exists() for out in declaration.outs)


def _yaml(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
    return loaded


@contextlib.contextmanager
def _sigterm_to_the_stage_of(process: subprocess.Popen[str]) -> Iterator[None]:
    """Hand SIGTERM on to the stage that DVC runs, which saves and leaves, and then DVC does: DVC itself would die at once, and we
    would not know when the stage has saved."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=_end_after_its_stage, args=(process,), daemon=True).start()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = [int(pid) for pid in children.read_text().split()] if children.is_file() else []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_after_its_stage(process: subprocess.Popen[str]) -> None:
    """End DVC once no stage of its runs any more: one that was through by then must not be followed by the next."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and children.is_file() and children.read_text().strip():
        time.sleep(0.1)
    if process.poll() is None:
        process.terminate()
