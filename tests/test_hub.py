"""Publishing, against a stand-in for the Hub on loopback (tests/hub_stub.py): the real client, no real Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from hub_stub import Stub, hub
from project import Project

from pipeline.files import write_json, write_text
from pipeline.safetensors_file import write_safetensors

SECRET = "hf_thisIsASecretThatMustNotBeSeen"


@pytest.fixture
def served() -> Iterator[tuple[Stub, str]]:
    with hub() as found:
        yield found


@pytest.fixture
def exported(project: Project) -> Project:
    import torch

    dist = project.path("dist/adapter")
    write_json(dist / "gate.json", {"passed": True, "findings": ["held_out_loss_ratio 0.5: passes (at most 0.9)"]})
    write_json(dist / "lineage.json", {"dataset": "d" * 64, "weights": "w" * 64})
    write_text(dist / "README.md", "---\nlicense: mit\n---\n# x\n")
    write_safetensors(dist / "tiny.safetensors", {"a": torch.arange(4.0)})
    (dist / "samples").mkdir()
    (dist / "samples" / "one.png").write_bytes(b"\x89PNG one")
    project.set("export", push_to_hub={"repo": "me/tiny", "private": True})
    return project


def push(project: Project, url: str, *arguments: str, token: str = SECRET) -> CompletedProcess[str]:
    home = str(project.path("hf-home"))
    done = project.cli(
        "push", *arguments, HF_ENDPOINT=url, HF_TOKEN=token, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", HF_HOME=home
    )
    assert SECRET not in done.stdout + done.stderr
    return done


def test_what_goes_there_goes_once(exported: Project, served: tuple[Stub, str]) -> None:
    stub, url = served
    done = push(exported, url, "--dry-run")
    assert done.returncode == 0 and "me/tiny (private): tiny, weights wwwwwwwwwwww" in done.stdout
    assert "  samples/one.png  8 bytes" in done.stdout and not stub.repos and not stub.tokens
    done = push(exported, url)
    assert done.returncode == 0, done.stderr
    assert stub.repos == {"me/tiny": True} and stub.tokens == {f"Bearer {SECRET}"}
    local = {p.relative_to(exported.path("dist/adapter")).as_posix(): p for p in exported.path("dist/adapter").rglob("*.*")}
    assert stub.files == {name: path.read_bytes() for name, path in local.items()}
    [commit] = stub.commits
    assert commit["summary"] == "tiny, weights wwwwwwwwwwww" and "dataset: " + "d" * 64 in commit["description"]
    done = push(exported, url)
    assert done.returncode == 0 and "the Hub has everything" in done.stdout and len(stub.commits) == 1
    # one file changes, one sample gives way to another: just these go
    samples: Path = exported.path("dist/adapter/samples")
    (samples / "one.png").rename(samples / "two.png")
    write_text(exported.path("dist/adapter/README.md"), "---\nlicense: mit\n---\n# y\n")
    done = push(exported, url)
    assert done.returncode == 0, done.stderr
    assert sorted(stub.commits[1]["files"]) == ["README.md", "samples/two.png"]
    assert stub.commits[1]["deleted"] == ["samples/one.png"]


def test_nothing_goes_without_gate_token_or_right(exported: Project, served: tuple[Stub, str]) -> None:
    stub, url = served
    done = push(exported, url, token="")
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr
    stub.refuse = True
    done = push(exported, url)
    assert done.returncode == 2 and "me/tiny could not be published" in done.stderr and "Traceback" not in done.stderr
    stub.refuse = False
    gate = exported.path("dist/adapter/gate.json")
    failed = ["held_out_loss 1: passes (at most 2)", "held_out_loss_ratio 0.95: fails (at most 0.9)"]
    gate.write_text(json.dumps({"passed": False, "findings": failed}))
    for arguments in ((), ("--dry-run",)):
        done = push(exported, url, *arguments)
        assert done.returncode == 2 and "held_out_loss_ratio 0.95: fails" in done.stderr and "passes" not in done.stderr
    gate.write_text(json.dumps({"passed": True, "findings": []}))
    exported.set("export", push_to_hub=None)
    assert "export.push_to_hub is null" in push(exported, url).stderr
    exported.set("export", push_to_hub={"repo": "no-owner"})
    assert "export.push_to_hub.repo" in push(exported, url).stderr
    exported.set("export", push_to_hub={"repo": "me/tiny", "privat": True})
    assert "unknown key export.push_to_hub.privat: did you mean export.push_to_hub.private?" in push(exported, url).stderr
    assert not stub.commits and not stub.files


def test_a_repository_that_is_public_already_gets_nothing_private(exported: Project, served: tuple[Stub, str]) -> None:
    stub, url = served
    stub.repos["me/tiny"] = False
    done = push(exported, url)
    assert done.returncode == 2 and "me/tiny is public on the Hub, but private is true: nothing was sent" in done.stderr
    assert not stub.files
