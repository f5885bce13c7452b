"""A repository of the Hugging Face Hub on loopback that can be written to: commits, branches, tags, large files (LFS).

The Hub's own client talks to it. It keeps everything in memory, and checks what the Hub checks: the token, the parent
of a commit, the hash of a large file.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

NAME = "owner/model"
TOKEN = "hf_a-token-of-a-test"
ATTRIBUTES = ".gitattributes"
_PAGE = 5
_API = f"/api/models/{NAME}"


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its bytes, or of a large one its hash and size."""

    data: bytes = b""
    lfs: str = ""
    size: int = 0

    def entry(self, path: str) -> dict[str, Any]:
        data = self.data
        if self.lfs:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.lfs}\nsize {self.size}\n".encode()
        blob_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"lfs": {"oid": self.lfs, "size": self.size, "pointerSize": len(data)}} if self.lfs else {}
        return {"type": "file", "path": path, "oid": blob_id, "size": self.size or len(data), **lfs}


class HubRepository(ThreadingHTTPServer):
    """A repository.

    Attributes:
        commits: The files of each commit.
        branches: The commit of each branch.
        tags: The commit of each tag.
        large: The large files by their hash.
        requests: The method and the path of what was asked for.
        before: Called with the method and the path before a request is handled; returns a status to answer instead.
        after: Called before the answer is sent; returns whether the answer is lost.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, dict[str, Blob]] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.before: Callable[[str, str], int] = lambda method, path: 0
        self.after: Callable[[str, str], bool] = lambda method, path: False
        self.lock = threading.RLock()
        self.branches["main"] = self.add_commit({ATTRIBUTES: Blob(b"*.safetensors filter=lfs\n")})

    def add_commit(self, files: dict[str, Blob]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        return oid

    def commit_of(self, revision: str) -> str | None:
        return (
            self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)
        )

    def content(self, revision: str) -> dict[str, bytes]:
        """The files of a revision, without the Hub's own."""
        commit = self.commit_of(revision)
        assert commit is not None
        return {
            path: self.large[blob.lfs] if blob.lfs else blob.data
            for path, blob in self.commits[commit].items()
            if path != ATTRIBUTES
        }


class _Handler(BaseHTTPRequestHandler):
    server: HubRepository

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def do_DELETE(self) -> None:
        self._handle("DELETE")

    def _handle(self, method: str) -> None:
        parts = urlsplit(self.path)
        path, body = unquote(parts.path), self.rfile.read(int(self.headers.get("content-length") or 0))
        # The client streams what it uploads.
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        with self.server.lock:
            self.server.requests.append(f"{method} {path}")
            status = self.server.before(method, path)
            if not status and not path.startswith("/lfs/") and self.headers.get("authorization") != f"Bearer {TOKEN}":
                status = 401
            answer: Any = {"error": f"status {status}"}
            if not status:
                status, answer = self._answer(method, path, parse_qs(parts.query), body)
            is_lost = self.server.after(method, path)
        if is_lost:
            self.close_connection = True
            return
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        if self._next:
            self.send_header("Link", f'<{self.server.url}{parts.path}?recursive=true&cursor={self._next}>; rel="next"')
        if status == 404:
            self.send_header("X-Error-Code", self._error_code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    _next, _error_code = 0, "RepoNotFound"

    def _answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any]:
        hub, self._next, self._error_code = self.server, 0, "RepoNotFound"
        if path == "/api/validate-yaml":
            return 200, {"warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        if path.startswith("/lfs/"):
            oid = path.rpartition("/")[2]
            if method == "PUT":
                if hashlib.sha256(body).hexdigest() != oid:
                    return 422, {"error": "the bytes are not those of the hash"}
                hub.large[oid] = body
            return 200, {}
        if path == f"/{NAME}.git/info/lfs/objects/batch":
            return 200, {"transfer": "basic", "objects": [self._upload(item) for item in json.loads(body)["objects"]]}
        if path.startswith(f"/{NAME}/resolve/"):
            revision, _, name = path.removeprefix(f"/{NAME}/resolve/").partition("/")
            return 200, hub.commits[str(hub.commit_of(revision))][name].data
        if not path.startswith(f"{_API}/"):
            return 404, {"error": "Repository not found"}

        verb, _, name = path.removeprefix(f"{_API}/").partition("/")
        if verb == "refs":
            return 200, {
                kind: [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in refs.items()]
                for kind, refs in (("branches", hub.branches), ("tags", hub.tags), ("converts", {}))
            }
        if verb == "branch":
            return self._branch(method, name, json.loads(body or b"{}"))
        if hub.commit_of(name) is None:
            self._error_code = "RevisionNotFound"
            return 404, {"error": f"no revision {name}"}
        files = hub.commits[str(hub.commit_of(name))]
        if verb == "revision":
            return 200, {"id": NAME, "sha": hub.commit_of(name)}
        if verb == "tree":
            paths, start = sorted(files), int(query.get("cursor", ["0"])[0])
            self._next = start + _PAGE if start + _PAGE < len(paths) else 0
            return 200, [files[p].entry(p) for p in paths[start : start + _PAGE]]
        if verb == "paths-info":
            names = parse_qs(body.decode())["paths"]
            return 200, [files[p].entry(p) for p in names if p in files]
        if verb == "preupload":
            listed = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [self._mode(path, files.get(path)) for path in listed]}
        if verb == "tag":
            tag = json.loads(body)["tag"]
            if tag in hub.tags:
                return 409, {"error": "exists"}
            hub.tags[tag] = str(hub.commit_of(name))
            return 200, {}
        assert verb == "commit", path
        return self._commit(name, [json.loads(line) for line in body.split(b"\n") if line])

    def _upload(self, item: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.url}/lfs/{item['oid']}"
        actions = {"actions": {"upload": {"href": f"{href}?X-Amz-Signature=secret"}, "verify": {"href": href}}}
        return {"oid": item["oid"], "size": item["size"], **({} if item["oid"] in self.server.large else actions)}

    def _mode(self, path: str, current: Blob | None) -> dict[str, Any]:
        mode = "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"
        oid = {"oid": current.lfs or current.entry(path)["oid"]} if current else {}
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, **oid}

    def _branch(self, method: str, name: str, document: dict[str, Any]) -> tuple[int, Any]:
        hub = self.server
        if method == "DELETE":
            self._error_code = "BranchNotFound"
            return (200, {}) if hub.branches.pop(name, None) else (404, {"error": "no such branch"})
        if name in hub.branches:
            return 409, {"error": "exists"}
        hub.branches[name] = str(hub.commit_of(document.get("startingPoint", "main")))
        return 200, {}

    def _commit(self, branch: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        hub, header = self.server, lines[0]["value"]
        if header.get("parentCommit") not in (None, hub.branches[branch]):
            return 412, {"error": "the branch has moved"}
        files = dict(hub.commits[hub.branches[branch]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = Blob(lfs=value["oid"], size=len(hub.large[value["oid"]]))
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        hub.branches[branch] = oid = hub.add_commit(files)
        return 200, {"commitUrl": f"{hub.url}/{NAME}/commit/{oid}", "commitOid": oid}


@contextlib.contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubRepository]:
    """Have a mirror talk to a new repository."""
    from huggingface_hub import constants

    with HubRepository() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name, value in (("HF_ENDPOINT", server.url), ("HF_TOKEN", TOKEN), ("HF_HUB_DISABLE_XET", "1")):
            monkeypatch.setenv(name, value)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
