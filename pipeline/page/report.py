"""`reports/index.html`: the page to open after a run. It is made anew from the files each time, and tracked by nothing: what it
says of the last commit changes without any input changing."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config import Params, load_params
from pipeline.dataset.counts import frequent, in_ranges, recurring
from pipeline.errors import UserError
from pipeline.evaluate.gate import judge
from pipeline.evaluate.sampling import Shot
from pipeline.files import write_text
from pipeline.history import metrics_at, params_at
from pipeline.metrics import DEFINITIONS
from pipeline.page.html import line_chart, number, picture, render, smoothed
from pipeline.page.stamp import PAGE, stamped
from pipeline.stage import value_changes
from pipeline.workspace import ADAPTER, DATASET, DATASET_REPORT, DIST, ENCODED, TRAIN_REPORT, VALIDATE_REPORT, Workspace

_SHOTS = 12
_BARS = 20  # of a histogram
_SMALL = 256  # pixels: smaller samples are enlarged without smoothing
_HISTOGRAMS = {
    "sizes": "Sizes",
    "original_megapixels": "Original megapixels",
    "caption_words": "Words a caption",
    "rejected_by_reason": "Rejected",
}


def write_page(workspace: Workspace) -> Path:
    """Write the page from what the last run left.

    Raises:
        UserError: something is missing that it shows.
    """
    root = workspace.root
    missing = [str(p) for p in (DATASET_REPORT, TRAIN_REPORT, VALIDATE_REPORT, DIST) if not (root / p).is_dir()]
    if missing:
        raise UserError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: `reprolora run` makes them")
    page = render("report.html.jinja", **_facts(workspace, load_params(workspace.params)))
    write_text(root / PAGE, stamped(workspace, page))
    return root / PAGE


def _facts(workspace: Workspace, params: Params) -> dict[str, Any]:
    root = workspace.root
    training, validation = _json(root / ADAPTER / "training.json"), _json(root / VALIDATE_REPORT / "validation.json")
    metrics, gate = _json(root / VALIDATE_REPORT / "metrics.json"), _json(root / DIST / "gate.json")
    summary = _json(root / DATASET_REPORT / "summary.json")
    asked, spec = validation["settings"], training["lora"]
    scales, samples = [0.0, *asked["scales"]], root / VALIDATE_REPORT / "samples"
    shots = [
        {
            "prompt": prompt,
            "seed": seed,
            "pictures": [picture(samples / Shot(prompt, seed, scale).file_name) for scale in scales],
        }
        for prompt, seed in list(itertools.product(asked["prompts"], asked["seeds"]))[:_SHOTS]
    ]
    side = Image.open(samples / Shot(asked["prompts"][0], asked["seeds"][0], 0.0).file_name).width
    return {
        "title": params.export.title or params.export.name,
        "description": params.export.description,
        "kind": "DoRA" if spec["dora"] else {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}[spec["method"]],
        "base": training["params"]["model"]["base"],
        "rank": spec["rank"],
        "trainable": f"{training['trainable_parameters']:,}",
        "steps": training["steps"],
        "trigger": _json(root / DATASET / "dataset.json")["trigger"],
        "passed": gate["passed"],
        "findings": gate["findings"],
        "scales": scales,
        "chosen": scales.index(validation["main_scale"]),
        "small": side < _SMALL,
        "shots": shots,
        "metrics": _rows(metrics, params),
        "changes": _since_the_last_commit(workspace, params, metrics),
        "charts": _curves(root),
        "checkpoint_charts": _checkpoint_charts(root / VALIDATE_REPORT / "checkpoints.csv"),
        "untriggered": _optional(root / VALIDATE_REPORT / "untriggered.png"),
        "nearest": _optional(root / VALIDATE_REPORT / "nearest.png"),
        "data": summary,
        "contact_sheet": picture(root / DATASET_REPORT / "contact-sheet.png", 1600),
        "histograms": _histograms(summary, root / ENCODED / "tokens.json"),
        "params": _flat({**params.model_dump(mode="json", by_alias=True), **training["params"], "validate": asked}),
        "lineage": _json(root / DIST / "lineage.json"),
    }


def _histograms(summary: dict[str, Any], tokens: Path) -> dict[str, dict[str, int]]:
    """Title -> name -> count, in the order of the page. Tokens are counted where the tokenizer is: `tokens` is the encoders' file,
    which a clone that pulled the reports alone does not have."""
    found = {title: summary.get(key) for key, title in _HISTOGRAMS.items()}
    if tokens.is_file():
        told = _json(tokens)
        found[f"Tokens a caption ({told['limit']} are read)"] = told["lengths"]
    shown = {title: dict(list(in_ranges(counts).items())[:_BARS]) for title, counts in found.items() if counts}
    tags = recurring(summary.get("tags", {}))
    return {**shown, "Tags": frequent(tags, _BARS)} if tags else shown


def _rows(metrics: dict[str, float | None], params: Params) -> list[dict[str, Any]]:
    """The adapter's metrics in the order of their definitions, each with the base's value and the gate's word."""
    findings = {f.metric: f for f in judge(metrics, {n: t for n, t in params.gate.items() if n in metrics})}
    rows = []
    for name, definition in DEFINITIONS.items():
        if name in metrics:
            finding = findings.get(name)
            verdict = finding.sentence().partition(": ")[2] if finding else ""
            rows.append(
                {
                    "name": name,
                    "base": metrics.get(f"base_{name}"),
                    "value": metrics[name],
                    "verdict": verdict,
                    "passed": finding.passed if finding else True,
                    "meaning": definition.meaning,
                    "better": definition.better,
                }
            )
    return rows


def _curves(root: Path) -> list[Any]:
    rows = _csv(root / TRAIN_REPORT / "curve.csv")
    held_out = root / TRAIN_REPORT / "held-out.csv"
    loss = smoothed([(r["step"], r["loss"]) for r in rows], max(1, min(50, len(rows) // 10)))
    series: dict[str, Any] = {"training loss, smoothed": loss}
    if held_out.is_file():
        series["held-out loss"] = [(r["step"], r["held_out_loss"]) for r in _csv(held_out)]
    return [
        line_chart(series, "step"),
        line_chart({"learning rate": smoothed([(r["step"], r["learning_rate"]) for r in rows], 1)}, "step"),
        line_chart({"gradient norm, smoothed": smoothed([(r["step"], r["grad_norm"]) for r in rows], 20)}, "step"),
    ]


def _checkpoint_charts(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    rows = _csv(path)
    return [line_chart({name: [(r["step"], r[name]) for r in rows]}, "step") for name in rows[0] if name != "step"]


def _since_the_last_commit(workspace: Workspace, params: Params, metrics: dict[str, float | None]) -> list[dict[str, str]]:
    """Settings and metrics that differ from HEAD's; empty where HEAD holds no run."""
    tracked = subprocess.run(["git", "cat-file", "-e", "HEAD:./dvc.lock"], cwd=workspace.root, capture_output=True, check=False)
    if tracked.returncode:
        return []
    changes = []
    try:
        now = params.model_dump(mode="json", by_alias=True)
        for line in value_changes(params_at(workspace, "HEAD").model_dump(mode="json", by_alias=True), now):
            what, _, values = line.partition(" ")
            then, _, new = values.partition(" → ")
            changes.append({"what": what, "then": then, "now": new})
        before = metrics_at(workspace, "HEAD")
    except UserError:
        return changes
    for name, value in metrics.items():
        if name in before and number(before[name]) != number(value):
            changes.append({"what": name, "then": number(before[name]), "now": number(value)})
    return changes


def _optional(path: Path) -> str | None:
    return picture(path, 1200) if path.is_file() else None


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) and item else {f"{prefix}{key}": item}
    return flat


def _csv(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
