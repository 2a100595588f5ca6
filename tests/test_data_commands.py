"""`data` and `cache`, as somebody calls them in a terminal."""

from __future__ import annotations

import json

from PIL import Image
from project import Project

from pipeline.files import hash_tree


def test_preview_shows_what_would_be_and_writes_nothing_that_is_tracked(project: Project) -> None:
    (project.path("data") / "[red]broken.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 40), "red").save(project.path("data/bare.png"))
    (project.path("data") / "odd.txt").write_text("<b>more</b>")
    Image.new("RGB", (40, 40), "blue").save(project.path("data/odd.png"))
    before = hash_tree(project.path("data"))
    done = project.cli("data", "preview", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert "[red]broken.png" in done.stdout  # as it is called, and no markup
    assert "bare.png: has no caption" in done.stdout and "rejected (2)" in done.stdout
    assert project.path(".work/preview/contact-sheet.png").is_file() and not project.path("build").exists()
    assert "<b>more" not in project.path(".work/preview/index.html").read_text()
    assert hash_tree(project.path("data")) == before and not project.path("dvc.lock").exists()


def test_inspect_prints_what_the_stages_found_and_cache_counts_what_they_keep(project: Project) -> None:
    refused = project.cli("data", "inspect")
    assert refused.returncode == 2 and "data preview" in refused.stderr
    nothing = project.cli("cache", "gc")
    assert nothing.returncode == 2 and "run the pipeline first" in nothing.stderr
    first = sorted(project.path("data").glob("*.txt"))[0]
    first.write_text("a very long caption " * 40)
    done = project.cli("run", "precompute-latents-and-embeddings")
    assert done.returncode == 0, done.stderr
    told = project.cli("data", "inspect", COLUMNS="200").stdout
    summary = json.loads(project.path("reports/dataset/summary.json").read_text())
    tokens = json.loads(project.path("build/encoded/tokens.json").read_text())
    assert f"train               {summary['train']}" in told and "captions cut off (1)" in told
    assert f"{first.with_suffix('.png').name}: " in told.partition("captions cut off")[2]  # not by what its file holds
    assert f"the encoder reads {tokens['limit']}" in told and "contact-sheet.png" in told
    words = told.partition("frequent words: ")[2].partition("\n")[0].split(", ")
    assert [int(word.rsplit(" ", 1)[1]) for word in words] == sorted(summary["frequent_words"].values(), reverse=True)[:15]
    stats = project.cli("cache", "stats").stdout
    held, _, rest = stats.partition(" encodings in ")
    assert rest.strip().endswith(f"{held} of them are in use")
    first.write_text("short")
    assert project.cli("run", "precompute-latents-and-embeddings").returncode == 0
    assert project.cli("cache", "gc", "--dry-run").stdout.startswith("1 encodings would be")
    assert project.cli("cache", "gc").stdout.startswith("1 encodings were")
    assert project.cli("cache", "verify").returncode == 0
    victim = next(project.path(".work/store").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-9])
    damaged = project.cli("cache", "verify")
    assert damaged.returncode == 1 and "encodes them again" in damaged.stdout + damaged.stderr
