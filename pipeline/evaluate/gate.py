"""The gate: thresholds on the metrics of validate, and the comparison with an earlier adapter's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config import Threshold
from pipeline.errors import UserError
from pipeline.metrics import DEFINITIONS

_LEAST = 0.2  # size of a metric that counts as its size where a tolerance is a share of it


@dataclass(frozen=True)
class Finding:
    """One metric held against its limits."""

    metric: str
    value: float
    minimum: float | None
    maximum: float | None
    passed: bool
    note: str = ""  # where the limits come from, if not from `gate`

    def sentence(self) -> str:
        """`held_out_loss_ratio 0.62: passes (at most 0.95)`"""
        limits = (("at least", self.minimum), ("at most", self.maximum))
        bounds = " and ".join(f"{word} {limit:.4g}" for word, limit in limits if limit is not None)
        return f"{self.metric} {self.value:.4g}: {'passes' if self.passed else 'fails'} ({bounds}{self.note})"


def judge(metrics: Mapping[str, float | None], thresholds: Mapping[str, Threshold]) -> list[Finding]:
    """Hold every threshold against its metric, sorted by name; an empty list passes.

    Raises:
        UserError: a threshold names no metric that was measured, or a share of a base's value that was not.
    """
    findings = []
    for name, threshold in sorted(thresholds.items()):
        minimum, maximum = threshold.min, threshold.max
        for share, is_minimum in ((threshold.min_of_base, True), (threshold.max_of_base, False)):
            if share is None:
                continue
            limit = share * _measured(metrics, f"base_{name}")
            if is_minimum:
                minimum = limit if minimum is None else max(minimum, limit)
            else:
                maximum = limit if maximum is None else min(maximum, limit)
        findings.append(_finding(name, _measured(metrics, name), minimum, maximum))
    return findings


def compare(
    metrics: Mapping[str, float | None], earlier: Mapping[str, float | None], names: list[str], tolerance: float, what: str
) -> list[Finding]:
    """Hold metrics against those of an earlier adapter: none may be worse by more than a share `tolerance` of its size.

    Args:
        names: the metrics that count; those that the earlier adapter has no value of are passed over.
        tolerance: of the earlier value's size, or of `_LEAST` where that is smaller: a gap of 0.001 must not fail for 0.002.
        what: the earlier adapter's name, for the sentences.
    """
    findings = []
    for name in sorted(names):
        better = DEFINITIONS[name].better if name in DEFINITIONS else "neither"
        before = earlier.get(name)
        if before is None or better == "neither" or name not in metrics:
            continue
        slack = tolerance * max(abs(before), _LEAST)
        minimum = before - slack if better == "higher" else None
        maximum = before + slack if better == "lower" else None
        findings.append(_finding(name, _measured(metrics, name), minimum, maximum, f", from {before:.4g} at {what}"))
    return findings


def _finding(name: str, value: float, minimum: float | None, maximum: float | None, note: str = "") -> Finding:
    passed = (minimum is None or value >= minimum) and (maximum is None or value <= maximum)  # a NaN passes nothing
    return Finding(name, value, minimum, maximum, passed, note)


def _measured(metrics: Mapping[str, float | None], name: str) -> float:
    if name not in metrics:
        raise UserError(f"gate.{name}: no such metric was measured; there are: {', '.join(sorted(metrics))}")
    value = metrics[name]
    return float("nan") if value is None else value
