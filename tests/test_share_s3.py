"""Results shared through S3: moto's server on loopback is the far end; the credentials are in the environment only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from project import Project, commit, git
from test_share import gets_everything

pytest.importorskip("dvc_s3")
moto = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")

pytestmark = pytest.mark.slow

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",  # else whoever has no credentials asks a machine of Amazon's for them
}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 without buckets."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_a_clean_clone_gets_everything_from_s3_and_runs_nothing(
    new_project: Callable[[], Project], tmp_path: Path, endpoint: str
) -> None:
    project = new_project()
    assert project.dvc("add", "data").returncode == 0
    assert project.dvc("remote", "add", "--default", "shared", "s3://bucket/style").returncode == 0
    assert project.dvc("remote", "modify", "shared", "endpointurl", endpoint).returncode == 0

    refused = project.cli("run", "prepare-dataset", "--push")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert (
        "Traceback" not in refused.stderr
        and "could not be pushed" in refused.stderr
        and "bucket does not exist" in refused.stderr
    )
    s3 = boto3.client("s3", endpoint_url=endpoint)
    s3.create_bucket(Bucket="bucket")
    done = project.cli("run", "--push")
    assert done.returncode == 0 and "to the remote" in done.stdout, done.stdout + done.stderr
    keys = [
        entry["Key"] for page in s3.get_paginator("list_objects_v2").paginate(Bucket="bucket") for entry in page["Contents"]
    ]
    assert keys and all(key.startswith("style/") for key in keys) and any("/runs/" in key for key in keys)

    git(tmp_path, "init", "--bare", "-q", "bare.git")
    commit(project.root)
    git(project.root, "push", "-q", str(tmp_path / "bare.git"), "HEAD:refs/heads/main")
    git(tmp_path, "clone", "-q", "--branch", "main", "bare.git", "clone")
    other = Project(tmp_path / "clone")
    assert not other.path("data").exists() and not other.path("build").exists()
    gets_everything(other, project)
    for name in CREDENTIALS.values():
        assert name not in other.path(".dvc/config").read_text()
