"""What `run` and `status` print."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pipeline.dvc import StageOutcome, status
from pipeline.live import is_terminal
from pipeline.page.stamp import PAGE, is_fresh
from pipeline.progress import say
from pipeline.workspace import DATASET_REPORT, DIST, VALIDATE_REPORT, Workspace

_HEADLINES = {
    "base_held_out_loss": "held-out loss, base",
    "held_out_loss": "held-out loss, adapter",
    "base_clip_score": "CLIP score, base",
    "clip_score": "CLIP score, adapter",
    "style_shift": "style shift (0 base, 1 training pictures)",
}


def print_status(
    workspace: Workspace,
    asked: subprocess.Popen[str],
    up_to: str | None = None,
    as_json: bool = False,
    pending: Sequence[str] = (),
) -> None:
    """One block per stage: up to date, or each reason why it would run. `asked` and `pending` as `pipeline.dvc.status` has them."""
    statuses = status(workspace, asked, pending)
    if up_to:
        last = [s.name for s in statuses].index(up_to)
        statuses = statuses[: last + 1]
    if as_json:
        say(json.dumps([{"stage": s.name, "reasons": s.reasons, "last_seconds": s.last_seconds} for s in statuses], indent=2))
        return
    for s in statuses:
        took = f" (took {_duration(s.last_seconds)} last time)" if s.last_seconds is not None else ""
        if len(s.reasons) == 1:
            say(f"{s.name}: {s.reasons[0]}{took}")
        else:
            say(f"{s.name}: {f'{len(s.reasons)} changes' if s.reasons else 'up to date'}{took}")
            for reason in s.reasons:
                say(f"  {reason}")


def print_summary(workspace: Workspace, outcomes: Sequence[StageOutcome]) -> None:
    """What ran and how long, the headline metrics, where the pictures are."""
    say("")
    for outcome in outcomes:
        took = f" {_duration(outcome.seconds)}" if outcome.seconds is not None else ""
        say(f"  {outcome.name:<36}{outcome.what}{took}")
    if [o.name for o in outcomes if o.what in ("ran", "restored", "up to date")][-1:] != ["export-and-card"]:
        return  # stopped before the end
    if not is_fresh(workspace):
        from pipeline.page.report import write_page

        write_page(workspace)
    metrics = json.loads((workspace.root / VALIDATE_REPORT / "metrics.json").read_text(encoding="utf-8"))
    say("")
    for key, title in _HEADLINES.items():
        if metrics.get(key) is not None:
            say(f"  {title:<44}{metrics[key]:.4g}")
    gate = json.loads((workspace.root / DIST / "gate.json").read_text(encoding="utf-8"))
    if gate["findings"]:
        say(
            f"  {'gate':<44}{'passed' if gate['passed'] else 'FAILED: ' + '; '.join(f for f in gate['findings'] if ': fails' in f)}"
        )
    say("")
    say(f"  the page           {_link(workspace, PAGE)}")
    say(f"  before and after   {_link(workspace, VALIDATE_REPORT / 'before-after.png')}")
    say(f"  training pictures  {_link(workspace, DATASET_REPORT / 'contact-sheet.png')}")
    say(f"  adapter and card   {_link(workspace, DIST)}/")


def _link(workspace: Workspace, path: Path) -> str:
    """A path that terminals open at a click (OSC 8); plain elsewhere."""
    if not is_terminal():
        return str(path)
    return f"\x1b]8;;{(workspace.root / path).resolve().as_uri()}\x1b\\{path}\x1b]8;;\x1b\\"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
