"""The gate outside the pipeline: the present metrics against the settings, and against another commit's."""

from __future__ import annotations

import json

from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.evaluate.gate import Finding, compare, judge
from pipeline.history import metrics_at
from pipeline.metrics import DEFINITIONS
from pipeline.workspace import VALIDATE_REPORT, Workspace


def verdict(workspace: Workspace, against: str | None, tolerance: float) -> list[Finding]:
    """Hold the last validation's metrics against `gate` and, where `against` names a commit, against the same metrics there.

    Raises:
        UserError: nothing has been validated yet, or the commit's metrics cannot be had.
    """
    path = workspace.root / VALIDATE_REPORT / "metrics.json"
    if not path.is_file():
        raise UserError(f"{VALIDATE_REPORT}/metrics.json is missing: `reprolora run` makes it")
    metrics = json.loads(path.read_text(encoding="utf-8"))
    thresholds = load_params(workspace.params).gate
    findings = judge(metrics, thresholds)
    if against:
        counted = list(thresholds) or [
            name for name in metrics if name in DEFINITIONS
        ]  # no gate: everything that has a direction
        findings += compare(metrics, metrics_at(workspace, against), counted, tolerance, against)
    return findings
