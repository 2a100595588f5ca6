"""What differs between a commit or experiment and what lies here: settings, metrics, samples."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.evaluate.sampling import Shot
from pipeline.files import write_text
from pipeline.history import bytes_at, metrics_at, params_at
from pipeline.metrics import DEFINITIONS
from pipeline.page.html import number, picture, render
from pipeline.stage import value_changes
from pipeline.workspace import VALIDATE_REPORT, Workspace

PAGE = Path("reports/diff.html")
_SHOTS = 12
_SMALL = 256  # pixels: smaller samples are enlarged without smoothing


@dataclass(frozen=True)
class Difference:
    """One line of a table."""

    what: str
    then: str
    now: str
    better: bool | None = None  # whether now is; None where that has no meaning


def differences(workspace: Workspace, revision: str) -> tuple[list[Difference], list[Difference]]:
    """Settings and metrics that are not the same.

    Raises:
        UserError: the revision or its results cannot be had, or nothing has been validated here.
    """
    then, now = params_at(workspace, revision), load_params(workspace.params)
    params = []
    for line in value_changes(then.model_dump(mode="json", by_alias=True), now.model_dump(mode="json", by_alias=True)):
        what, _, values = line.partition(" ")
        before, _, after = values.partition(" → ")
        params.append(Difference(what, before, after))
    path = workspace.root / VALIDATE_REPORT / "metrics.json"
    if not path.is_file():
        raise UserError(f"{VALIDATE_REPORT}/metrics.json is missing: `reprolora run` makes it")
    old, new = metrics_at(workspace, revision), json.loads(path.read_text(encoding="utf-8"))
    metrics = []
    for name in dict.fromkeys([*DEFINITIONS, *old, *new]):
        a, b = old.get(name), new.get(name)
        if (name in old or name in new) and (name in old, number(a)) != (name in new, number(b)):
            before, after = (number(v) if name in side else "–" for v, side in ((a, old), (b, new)))
            metrics.append(Difference(name, before, after, _better(name, a, b)))
    return params, metrics


def write_diff(workspace: Workspace, revision: str) -> Path:
    """Write `reports/diff.html`: both tables, and the samples of prompts that both have, side by side."""
    params, metrics = differences(workspace, revision)
    export = load_params(workspace.params).export
    words = {True: ("better", "good"), False: ("worse", "bad"), None: ("", "")}
    pairs, small = _samples(workspace, revision)
    page = render(
        "diff.html.jinja",
        name=export.title or export.name,
        then=revision,
        params=params,
        metrics=[{**vars(m), "word": words[m.better][0], "verdict": words[m.better][1]} for m in metrics],
        pairs=pairs,
        small=small,
    )
    write_text(workspace.root / PAGE, page)
    return workspace.root / PAGE


def _samples(workspace: Workspace, revision: str) -> tuple[list[dict[str, str]], bool]:
    old = json.loads(bytes_at(workspace, revision, f"{VALIDATE_REPORT}/validation.json"))
    new = json.loads((workspace.root / VALIDATE_REPORT / "validation.json").read_text(encoding="utf-8"))
    pairs, small = [], False
    for prompt in [p for p in new["settings"]["prompts"] if p in old["settings"]["prompts"]][:_SHOTS]:
        names = [Shot(prompt, v["settings"]["seeds"][0], v["main_scale"]).file_name for v in (old, new)]
        then = bytes_at(workspace, revision, f"{VALIDATE_REPORT}/samples/{names[0]}")
        now = workspace.root / VALIDATE_REPORT / "samples" / names[1]
        small |= Image.open(io.BytesIO(then)).width < _SMALL
        pairs.append({"prompt": prompt, "then": picture(then), "now": picture(now)})
    return pairs, small


def _better(name: str, then: Any, now: Any) -> bool | None:
    if name not in DEFINITIONS or DEFINITIONS[name].better == "neither" or then is None or now is None or then == now:
        return None
    return bool(now < then) if DEFINITIONS[name].better == "lower" else bool(now > then)
