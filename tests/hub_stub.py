"""A stand-in for the Hub's HTTP API on loopback: as much of it as creating a repository and committing files needs.

Written after what huggingface_hub asks; the real Hub was never asked.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Stub:
    """What the Hub holds and what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, bool] = {}  # name -> private
        self.files: dict[str, bytes] = {}
        self.large: set[str] = set()
        self.objects: dict[str, bytes] = {}  # large files by sha256
        self.commits: list[dict[str, Any]] = []
        self.tokens: set[str] = set()
        self.refuse = False


@contextmanager
def hub() -> Iterator[tuple[Stub, str]]:
    """Serve a fresh stub; yields it with its address."""
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def answer(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return content
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def handle_one(self) -> None:
            content, path = self.body(), unquote(urlsplit(self.path).path)
            if not path.startswith("/object/"):
                stub.tokens.add(self.headers.get("Authorization", ""))
            if stub.refuse:
                return self.answer({"error": f"no right to write, {self.headers['Authorization']}"}, 403)
            if path == "/api/repos/create":
                asked = json.loads(content)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if name in stub.repos:
                    return self.answer({"error": "exists", "url": f"http://{self.headers['Host']}/{name}"}, 409)
                stub.repos[name] = bool(asked.get("private") or asked.get("visibility") == "private")
                return self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if "/tree/" in path:
                return self.answer([self.entry(name) for name in sorted(stub.files)])
            if "/preupload/" in path:
                found = [
                    {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".png")) else "regular"}
                    for f in json.loads(content)["files"]
                ]
                return self.answer({"files": [{**f, "shouldIgnore": False, "oid": None} for f in found]})
            if path.endswith("/info/lfs/objects/batch"):
                asked = json.loads(content)
                objects = []
                for item in asked["objects"]:
                    address = f"http://{self.headers['Host']}/object/{item['oid']}"
                    there = item["oid"] in stub.objects
                    objects.append({**item, **({} if there else {"actions": {"upload": {"href": address}}})})
                return self.answer({"transfer": "basic", "objects": objects})
            if path.startswith("/object/"):
                oid = path.rsplit("/", 1)[1]
                assert hashlib.sha256(content).hexdigest() == oid
                stub.objects[oid] = content
                return self.answer({})
            if "/commit/" in path:
                lines = [json.loads(line) for line in content.splitlines()]
                commit: dict[str, Any] = {"files": [], "deleted": []}
                for line in lines:
                    value = line["value"]
                    if line["key"] == "header":
                        commit |= {"summary": value["summary"], "description": value["description"]}
                    elif line["key"] == "file":
                        stub.files[value["path"]] = b64decode(value["content"])
                        commit["files"].append(value["path"])
                    elif line["key"] == "lfsFile":
                        stub.files[value["path"]] = stub.objects[value["oid"]]
                        stub.large.add(value["path"])
                        commit["files"].append(value["path"])
                    elif line["key"] == "deletedFile":
                        del stub.files[value["path"]]
                        commit["deleted"].append(value["path"])
                stub.commits.append(commit)
                return self.answer(
                    {"commitOid": "0" * 40, "commitUrl": f"http://{self.headers['Host']}/me/x/commit/{'0' * 40}"}
                )
            if model := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path):
                private = stub.repos.get(model[1], False)
                return self.answer({"id": model[1], "sha": "0" * 40, "siblings": [], "private": private})
            return self.answer({"error": f"the stub does not know {path}"}, 404)

        def entry(self, name: str) -> dict[str, Any]:
            content = stub.files[name]
            blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            found: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
            if name in stub.large:
                oid = hashlib.sha256(content).hexdigest()
                found["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
            return found

        do_GET = do_POST = do_PUT = do_HEAD = handle_one

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield stub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
