"""A headless Chromium, spoken to over its DevTools protocol."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
]


class Page:
    """One open page."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.errors, self._id = socket, [], 0
        self.call("Runtime.enable")
        self.call("Log.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        self.socket.send(json.dumps({"id": self._id, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == self._id:
                return message["result"]
            if message["method"] == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"]["text"])
            elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.errors.append(message["params"]["entry"]["text"])

    def evaluate(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait_for(self, script: str, seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"{script} did not come true; errors: {self.errors}"
            time.sleep(0.2)
        return value


@contextmanager
def page(url: str, profile: Path) -> Iterator[Page]:
    """The page at `url` in a fresh browser."""
    from websockets.sync.client import connect

    process = subprocess.Popen(
        ["chromium", *OPTIONS, f"--user-data-dir={profile}", url], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stderr
        port = next(m[1] for line in process.stderr if (m := re.search(r"DevTools listening on ws://[\d.]+:(\d+)/", line)))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
            target = next(t for t in json.loads(answer.read()) if t["type"] == "page")
        with connect(target["webSocketDebuggerUrl"], max_size=2**26) as socket:
            yield Page(socket)
    finally:
        process.kill()
        process.wait(timeout=20)
