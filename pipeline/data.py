"""Looking at the dataset from the terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.config import load_params
from pipeline.dataset.counts import frequent, in_ranges, recurring
from pipeline.dataset.manifest import read_lines, read_manifest
from pipeline.dataset.prepare import prepare
from pipeline.dataset.report import summarise, write_report
from pipeline.dataset.source import Reject
from pipeline.errors import UserError
from pipeline.workspace import DATASET, DATASET_REPORT, ENCODED, Workspace

_LISTED = 20


def inspect(workspace: Workspace) -> None:
    """Print the report of the last prepare-dataset, and the captions that are cut off, if they are encoded.

    Raises:
        UserError: the stage has not run yet.
    """
    report, tokens = workspace.root / DATASET_REPORT, workspace.root / ENCODED / "tokens.json"
    if not (report / "summary.json").is_file():
        raise UserError(f"{DATASET_REPORT} is missing: run the pipeline first, or `reprolora data preview`")
    rejects, left_out = (
        [Reject(**row) for row in read_lines(workspace.root / DATASET / name)] for name in ("rejects.jsonl", "left-out.jsonl")
    )
    summary = json.loads((report / "summary.json").read_text(encoding="utf-8"))
    lengths = json.loads(tokens.read_text(encoding="utf-8")) if tokens.is_file() else None
    if lengths and lengths["cut_off"]:  # told by content, so that a rename changes no encoding
        paths = {sample.id: sample.path for sample in read_manifest(workspace.root / DATASET).samples}
        for row in lengths["cut_off"]:
            row["sample"] = paths.get(row["sample"], row["sample"])
    _print(summary, rejects, left_out, lengths, report)


def preview(workspace: Workspace) -> None:
    """Do what prepare-dataset would do, in `.work/preview/`, and print its report. Pictures without a caption are listed:
    no model writes captions here."""
    settings = load_params(workspace.params).dataset
    out = workspace.work / "preview"
    shutil.rmtree(out, ignore_errors=True)
    unpacked = out / "images"
    unpacked.mkdir(parents=True)
    prepared = prepare(workspace.root, settings, lambda: None, unpacked)
    if not prepared.manifest.samples:
        _print(summarise(prepared), prepared.rejects, prepared.left_out, None, None)
        return
    write_report(out, workspace.root, prepared, settings, unpacked)
    _print(summarise(prepared), prepared.rejects, prepared.left_out, None, out)


def _print(
    summary: dict[str, Any],
    rejects: list[Reject],
    left_out: list[Reject],
    tokens: dict[str, Any] | None,
    report: Path | None,
) -> None:
    console = Console(highlight=False)
    counts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key in (
        "train",
        "train_with_repeats",
        "held_out",
        "regularisation",
        "masked",
        "rejected",
        "left_out",
        "distinct_captions",
    ):
        counts.add_row(key.replace("_", " "), str(summary[key]))
    console.print(counts)
    _histogram(console, "training size, pixels", summary["sizes"])
    _histogram(console, "original, megapixels", summary["original_megapixels"])
    _histogram(console, "caption, words", summary["caption_words"])
    if tokens:
        _histogram(console, f"caption, tokens (the encoder reads {tokens['limit']})", tokens["lengths"])
        _listing(
            console,
            "captions cut off",
            [(row["sample"], f"{row['tokens']} tokens: {row['caption']}") for row in tokens["cut_off"]],
        )
    console.print(f"\nfrequent words: {_most(summary['frequent_words'])}")
    if tags := recurring(summary["tags"]):
        console.print(f"tags: {_most(tags)}")
    if summary["near_duplicates"]:
        console.print(f"near-duplicates: {summary['near_duplicates']}, listed on the page")
    for title, key in (
        ("used, with something to know", "notes_by_reason"),
        ("rejected, by reason", "rejected_by_reason"),
        ("left out, by reason", "left_out_by_reason"),
    ):
        if summary.get(key):
            _histogram(console, title, summary[key])
    _listing(console, "rejected", [(r.path, r.reason) for r in rejects])
    _listing(console, "left out", [(r.path, r.reason) for r in left_out])
    if report:
        console.print(f"\npage: {report / 'index.html'}\nsheet: {report / 'contact-sheet.png'}", soft_wrap=True)


def _most(counts: dict[str, int]) -> str:
    return escape(", ".join(f"{name} {count}" for name, count in frequent(counts, 15).items()))


def _histogram(console: Console, title: str, counts: dict[str, int]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    most = max(counts.values(), default=1)
    for name, count in in_ranges(counts).items():
        table.add_row(name, str(count), "█" * max(1, round(24 * count / most)))
    console.print(f"\n{title}")
    console.print(table)


def _listing(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    if rows:
        console.print(f"\n{title} ({len(rows)})")
        for name, text in rows[:_LISTED]:
            console.print(f"  {escape(name)}: {escape(text[:160])}")
        if len(rows) > _LISTED:
            console.print(f"  … and {len(rows) - _LISTED} more")
