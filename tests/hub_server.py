"""A small Hugging Face Hub on loopback: one repository at one commit, served from a folder.

The Hub's own client talks to it, so the tests need no network and no stand-in for the client.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
URI = f"hf://owner/model@{COMMIT}"


class HubServer(ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        requests: The paths of what was asked for.
        status: What every request is answered with instead; 0: what was asked for.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.status = 0

    def files(self) -> dict[str, Path]:
        return {p.relative_to(self.folder).as_posix(): p for p in sorted(self.folder.rglob("*")) if p.is_file()}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, *, has_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        api, files = "/api/models/owner/model", self.server.files()
        if self.server.status:
            self._refuse(self.server.status, "GatedRepo" if self.server.status == 403 else "")
        elif path == f"{api}/revision/{COMMIT}":
            siblings = [{"rfilename": name, **_metadata(file, "sha256")} for name, file in files.items()]
            self._send(json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings}).encode(), has_body)
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            entries = [{"type": "file", "path": name, **_metadata(file, "oid")} for name, file in files.items()]
            self._send(json.dumps(entries).encode(), has_body)
        elif (name := path.removeprefix(f"/owner/model/resolve/{COMMIT}/")) in files:
            self._send(files[name].read_bytes(), has_body)
        else:
            self._refuse(404, "RevisionNotFound")

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, data: bytes, has_body: bool) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if has_body:
            self.wfile.write(data)


def _metadata(file: Path, hash_name: str) -> dict[str, Any]:
    """Describe a file as the Hub does: the sha256 of weights, and git's id of every other file."""
    data = file.read_bytes()
    blob_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = {hash_name: hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    is_large = file.suffix in (".safetensors", ".bin")
    return {"size": len(data), "oid": blob_id, "blobId": blob_id, **({"lfs": lfs} if is_large else {})}


@contextlib.contextmanager
def serve(folder: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Have the Hub's client ask a server of that folder, and keep what it remembers below `state`."""
    from huggingface_hub import constants

    with HubServer(folder) as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(state / "client-cache"))
        monkeypatch.setenv("XDG_STATE_HOME", str(state / "planner"))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the Hub's client make no request from now on."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
