"""A small stand-in for the Hub on loopback: the four requests of its HTTP API that fetching a dataset makes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Datasets by name: branch -> commit, commit -> files."""

    url: str = ""
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)  # files whose download breaks
    served: list[str] = field(default_factory=list)  # files sent, in order

    def push(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit the files as the whole content of a branch; its 40 hex digits."""
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        self.branches.setdefault(repo, {})[branch] = commit
        self.commits[commit] = files
        return commit


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            return

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def error(self, status: int, code: str) -> None:
            self.send(status, b'{"error": "refused"}', X_Error_Code=code, X_Error_Message=code, Content_Type="application/json")

        def answer(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            parts = parts[1:] if parts[0] == "api" else parts
            repo, verb, rest = "/".join(parts[1:3]), parts[3] if len(parts) > 3 else "revision", parts[4:]
            if parts[0] != "datasets" or repo not in hub.branches:
                return self.error(404, "RepoNotFound")
            if repo in hub.gated:
                return self.error(403, "GatedRepo")
            if verb == "revision":
                revision = "/".join(rest) or "main"
                commit = hub.branches[repo].get(revision, revision)
            else:
                commit = rest[0]
            if commit not in hub.commits:
                return self.error(404, "RevisionNotFound")
            files = hub.commits[commit]
            if verb == "revision":
                info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                return self.send(200, json.dumps(info).encode(), Content_Type="application/json")
            oid = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
            if verb == "tree":
                tree = [{"type": "file", "path": n, "oid": oid[n], "size": len(c)} for n, c in files.items()]
                return self.send(200, json.dumps(tree).encode(), Content_Type="application/json")
            name = "/".join(rest[1:])
            if name not in files:
                return self.error(404, "EntryNotFound")
            if self.command == "GET":
                if name in hub.broken:
                    return self.error(500, "Broken")
                hub.served.append(name)
            return self.send(200, files[name], ETag=f'"{oid[name]}"', X_Repo_Commit=commit)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)  # seconds between looks for the end
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
