"""Datasets of the Hub: pinned, restored, moved; against a stand-in for the Hub's HTTP API on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub as stand_in
import pytest

from pipeline.errors import UserError
from pipeline.fetch import fetch, update_all
from pipeline.files import hash_tree

ROOT = Path(__file__).parent.parent
CATS = "hf://someone/cats"
FIRST = {"metadata.csv": b"file_name,text\na.png,a cat\n", "images/a.png": b"not really a picture", ".gitattributes": b"x"}
SECOND = {**FIRST, "images/b.png": b"another", "metadata.csv": b"file_name,text\nimages/a.png,a cat\n"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def record(root: Path) -> dict[str, str]:
    return json.loads((root / "data/someone--cats.source.json").read_text())


def refusal(root: Path, source: str = CATS, update: bool = False) -> str:
    before = hash_tree(root)
    with pytest.raises(UserError) as caught:
        fetch(root, source, update)
    assert hash_tree(root) == before, "a refusal changes nothing"
    return str(caught.value)


def test_a_snapshot_arrives_whole_with_its_record(hub: stand_in.Hub, root: Path) -> None:
    commit = hub.push("someone/cats", FIRST)
    said = fetch(root, CATS)
    folder = root / "data/someone--cats"
    assert content(folder) == FIRST and not any(p.is_symlink() for p in folder.rglob("*"))
    assert record(root)["commit"] == commit and record(root)["revision"] == "main" and commit[:12] in said
    assert sorted(p.name for p in (root / "data").iterdir()) == ["someone--cats", "someone--cats.source.json"]
    assert str(root) not in (root / "data/someone--cats.source.json").read_text()


def test_a_pin_is_restored_as_pinned_though_the_branch_moved(hub: stand_in.Hub, root: Path, tmp_path: Path) -> None:
    commit = hub.push("someone/cats", FIRST)
    fetch(root, CATS)
    hub.push("someone/cats", SECOND)
    assert "is there as pinned" in fetch(root, CATS)
    shutil.rmtree(root / "data/someone--cats")
    shutil.rmtree(tmp_path / "cache")  # as in a fresh clone on another machine
    assert "restored" in fetch(root, CATS)
    assert content(root / "data/someone--cats") == FIRST and record(root)["commit"] == commit


def test_update_moves_the_pin_and_fetches_what_is_new_alone(hub: stand_in.Hub, root: Path) -> None:
    old = hub.push("someone/cats", FIRST)
    fetch(root, CATS)
    assert "nothing new" in fetch(root, CATS, update=True)
    new = hub.push("someone/cats", SECOND)
    hub.served.clear()
    assert fetch(root, CATS, update=True).startswith(f"someone/cats: {old[:12]} → {new[:12]} (main)")
    assert content(root / "data/someone--cats") == SECOND and record(root)["commit"] == new
    assert sorted(hub.served) == ["images/b.png", "metadata.csv"]
    hub.push("someone/cats", FIRST)
    fetch(root, CATS, update=True)
    assert content(root / "data/someone--cats") == FIRST, "what the newer commit added is gone"


def test_update_alone_updates_every_record(hub: stand_in.Hub, root: Path) -> None:
    with pytest.raises(UserError, match="no dataset was fetched yet"):
        update_all(root)
    hub.push("someone/cats", FIRST)
    hub.push("other/dogs", FIRST)
    fetch(root, CATS)
    fetch(root, "hf://other/dogs@main")
    hub.push("other/dogs", SECOND)
    assert [" → " in line for line in update_all(root)] == [True, False]
    assert content(root / "data/other--dogs") == SECOND


def test_branches_tags_and_commits_can_be_named(hub: stand_in.Hub, root: Path) -> None:
    main = hub.push("someone/cats", FIRST)
    converted = hub.push("someone/cats", SECOND, branch="refs/convert/parquet")
    fetch(root, f"{CATS}@refs/convert/parquet")
    assert record(root)["commit"] == converted and record(root)["revision"] == "refs/convert/parquet"
    assert "--update` moves the pin" in refusal(root, f"{CATS}@{main}")
    fetch(root, f"{CATS}@{main}", update=True)
    assert record(root)["commit"] == record(root)["revision"] == main and content(root / "data/someone--cats") == FIRST
    assert "nothing new" in fetch(root, CATS, update=True), "a commit never moves"


@pytest.mark.parametrize("how", ["edited", "added", "removed"])
def test_edited_files_are_never_overwritten(hub: stand_in.Hub, root: Path, how: str) -> None:
    hub.push("someone/cats", FIRST)
    fetch(root, CATS)
    hub.push("someone/cats", SECOND)
    table, more = root / "data/someone--cats/metadata.csv", root / "data/someone--cats/mine.txt"
    if how == "edited":
        table.write_text("file_name,text\na.png,a much better caption\n")
    elif how == "added":
        more.write_text("mine")
    else:
        table.unlink()
    for update in (False, True):
        said = refusal(root, update=update)
        assert "was edited since it was fetched" in said and (more if how == "added" else table).name in said


def test_what_a_file_manager_leaves_behind_is_no_edit(hub: stand_in.Hub, root: Path) -> None:
    hub.push("someone/cats", FIRST)
    fetch(root, CATS)
    (root / "data/someone--cats/images/.DS_Store").write_bytes(b"x")
    assert "is there as pinned" in fetch(root, CATS)
    hub.push("someone/cats", SECOND)
    fetch(root, CATS, update=True)
    assert content(root / "data/someone--cats") == SECOND


def test_a_folder_of_the_users_own_is_left_alone(hub: stand_in.Hub, root: Path) -> None:
    hub.push("someone/cats", FIRST)
    (root / "data/someone--cats").mkdir(parents=True)
    (root / "data/someone--cats/mine.png").write_bytes(b"mine")
    assert "was not fetched" in refusal(root)


@pytest.mark.parametrize(("setting", "value"), [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")])
def test_without_network_nothing_is_lost(
    hub: stand_in.Hub, root: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: object
) -> None:
    """Told to stay offline, and with nobody who answers."""
    import huggingface_hub.constants as constants

    hub.push("someone/cats", FIRST)
    fetch(root, CATS)
    hub.push("someone/cats", SECOND)
    monkeypatch.setattr(constants, setting, value)
    assert "is there as pinned" in fetch(root, CATS)
    assert "cannot be had from the Hub" in refusal(root, update=True)
    assert "cannot be had from the Hub" in refusal(root, "hf://someone/else")
    shutil.rmtree(root / "data/someone--cats")
    assert "restored" in fetch(root, CATS), "from the Hub's local cache"
    assert content(root / "data/someone--cats") == FIRST


def test_a_download_that_breaks_leaves_the_old_and_goes_on_later(hub: stand_in.Hub, root: Path) -> None:
    hub.push("someone/cats", FIRST)
    fetch(root, CATS)
    hub.push("someone/cats", SECOND)
    hub.broken.add("images/b.png")
    assert "Nothing here was changed" in refusal(root, update=True)
    hub.broken.clear()
    hub.served.clear()
    fetch(root, CATS, update=True)
    assert content(root / "data/someone--cats") == SECOND and "images/a.png" not in hub.served


@pytest.mark.parametrize("step", ["write_json", "rename"])
def test_a_crash_while_replacing_is_mended_by_the_next_fetch(
    hub: stand_in.Hub, root: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    import pipeline.fetch

    hub.push("someone/cats", FIRST)
    fetch(root, CATS)
    hub.push("someone/cats", SECOND)
    with monkeypatch.context() as patch:
        rename = Path.rename

        def fail(*args: object) -> None:
            raise KeyboardInterrupt

        def fail_at_last(path: Path, target: Path) -> Path:
            return fail() if path.name.endswith(".new") else rename(path, target)  # type: ignore[func-returns-value]

        if step == "rename":
            patch.setattr(Path, "rename", fail_at_last)
        else:
            patch.setattr(pipeline.fetch, "write_json", fail)
        with pytest.raises(KeyboardInterrupt):
            fetch(root, CATS, update=True)
    assert "restored" in fetch(root, CATS)
    assert content(root / "data/someone--cats") == (SECOND if step == "rename" else FIRST)
    assert sorted(p.name for p in (root / "data").iterdir()) == ["someone--cats", "someone--cats.source.json"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hf://someone/nothing", "the Hub has no dataset someone/nothing"),
        ("hf://someone/gated", "is a gated dataset"),
        ("hf://someone/cats@nowhere", "has no revision nowhere"),
        (f"hf://someone/cats@{'a' * 40}", "has no revision aaaa"),
        *[
            (s, "is no dataset of the Hub: give hf://")
            for s in ("cats", "someone/cats", "https://x.y/z", "hf://a", "hf://../..")
        ],
        *[
            (s, "is no dataset of the Hub")
            for s in ("hf://a/b/c", "hf://a/..", "hf://a/b@../../x", "hf://a--b/c", "hf://a/b\n")
        ],
    ],
)
def test_what_cannot_be_fetched_is_said_in_words(hub: stand_in.Hub, root: Path, source: str, said: str) -> None:
    hub.push("someone/cats", FIRST)
    hub.push("someone/gated", FIRST)
    hub.gated.add("someone/gated")
    assert said in refusal(root, source)


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"repo": "a/b"}', '{"repo":"../x","revision":"main","commit":"%s","content":""}' % ("a" * 40)]
)
def test_a_damaged_record_is_named(hub: stand_in.Hub, root: Path, damage: str) -> None:
    hub.push("someone/cats", FIRST)
    fetch(root, CATS)
    (root / "data/someone--cats.source.json").write_text(damage)
    assert "someone--cats.source.json is no record of a fetched dataset" in refusal(root)
    with pytest.raises(UserError, match="is no record"):
        update_all(root)


def test_a_record_that_lies_about_the_content_is_refused(hub: stand_in.Hub, root: Path) -> None:
    hub.push("someone/cats", FIRST)
    fetch(root, CATS)
    shutil.rmtree(root / "data/someone--cats")
    file = root / "data/someone--cats.source.json"
    file.write_text(file.read_text().replace(record(root)["content"], "0" * 64))
    assert "does not have the recorded content" in refusal(root)


def test_the_command_line(hub: stand_in.Hub, root: Path, tmp_path: Path) -> None:
    hub.push("someone/cats", FIRST)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}

    def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "cli.py"), "fetch", *arguments]
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)

    done = cli(CATS)
    assert done.returncode == 0 and "keep data/someone--cats.source.json in git" in done.stdout, done.stderr
    hub.push("someone/cats", SECOND)
    assert " → " in cli("--update").stdout
    refused = cli("hf://someone/nothing")
    assert refused.returncode == 2 and refused.stderr.startswith("error: the Hub has no dataset")
    assert "which dataset?" in cli().stderr
