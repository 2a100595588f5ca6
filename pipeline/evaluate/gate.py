"""The gate: thresholds on the metrics of validate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config import Threshold
from pipeline.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One threshold held against its metric."""

    metric: str
    value: float
    minimum: float | None
    maximum: float | None
    passed: bool

    def sentence(self) -> str:
        """`held_out_loss_ratio 0.62: passes (at most 0.95)`"""
        limits = (("at least", self.minimum), ("at most", self.maximum))
        bounds = [f"{word} {limit:g}" for word, limit in limits if limit is not None]
        return f"{self.metric} {self.value:.4g}: {'passes' if self.passed else 'fails'} ({' and '.join(bounds)})"


def judge(metrics: Mapping[str, float], thresholds: Mapping[str, Threshold]) -> list[Finding]:
    """Hold every threshold against its metric, sorted by name; an empty list passes.

    Raises:
        UserError: a threshold names no metric.
    """
    findings = []
    for name, threshold in sorted(thresholds.items()):
        if name not in metrics:
            raise UserError(f"gate.{name}: no such metric was measured; there are: {', '.join(sorted(metrics))}")
        value = metrics[name]
        passed = (threshold.min is None or value >= threshold.min) and (threshold.max is None or value <= threshold.max)
        findings.append(Finding(name, value, threshold.min, threshold.max, passed))
    return findings
