"""A small S3 server over a folder, for benchmarks: its speed is that of the disk, and it never holds a file in memory.

It knows what this project's store and boto3's transfers ask for: objects with ranges and conditions, copies, uploads in
parts, and lists. It checks no signature. moto's server is for tests: it reads a whole object for each of its ranges.

Command: `python benchmarks/s3_server.py FOLDER PORT`
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sys
import threading
import uuid
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

_CHUNK_BYTES = 2**20
_LOCK = threading.Lock()


# ruff: noqa: D102, N815 - the names and meanings are those of HTTP's methods
class Handler(BaseHTTPRequestHandler):
    """One connection. The path of a request is /BUCKET/KEY, and an object is a file with its ETag beside it."""

    protocol_version = "HTTP/1.1"
    root: Path

    def setup(self) -> None:
        super().setup()
        # Without it a small answer waits for the client to acknowledge its header.
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def object_path(self, path: str) -> Path:
        # One file for each key, whatever folders its name has.
        bucket, _, key = unquote(path).lstrip("/").partition("/")
        return self.root / bucket / quote(key, safe="")

    def parse(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        return url.path, {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}

    def answer(self, status: int, body: str = "", **headers: str) -> None:
        data = body.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>")

    def do_GET(self) -> None:
        path, query = self.parse()
        if path == "/":
            return self.answer(200)
        if "list-type" in query:
            return self.list_objects(path.strip("/"), query.get("prefix", ""), query.get("delimiter", ""))
        try:
            with self.object_path(path).open("rb") as file:
                self.send_object(file.fileno(), etag_of(self.object_path(path)))
        except (FileNotFoundError, IsADirectoryError):
            self.fail(404, "NoSuchKey")

    do_HEAD = do_GET

    def send_object(self, file: int, etag: str) -> None:
        size_bytes = os.fstat(file).st_size
        start, end = 0, size_bytes - 1
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or end), end)
            if start >= size_bytes:
                return self.fail(416, "InvalidRange")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{size_bytes}")
        else:
            self.send_response(200)
        for name, value in {"ETag": etag, "Last-Modified": formatdate(0, usegmt=True)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(end - start + 1))
        self.end_headers()
        while self.command == "GET" and start <= end:
            start += os.sendfile(self.connection.fileno(), file, start, end - start + 1)

    def list_objects(self, bucket: str, prefix: str, delimiter: str) -> None:
        keys = sorted(unquote(p.name) for p in (self.root / bucket).iterdir() if not p.name.startswith("."))
        keys = [key for key in keys if key.startswith(prefix)]
        folders = {prefix + key[len(prefix) :].partition("/")[0] + "/" for key in keys if "/" in key[len(prefix) :]}
        if delimiter:
            keys = [key for key in keys if "/" not in key[len(prefix) :]]
        files = [(key, self.root / bucket / quote(key, safe="")) for key in keys]
        contents = [
            f"<Contents><Key>{escape(key)}</Key><Size>{file.stat().st_size}</Size><ETag>{etag_of(file)}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, file in files
        ]
        prefixes = [f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in sorted(folders)]
        self.answer(
            200, f"<ListBucketResult>{''.join(contents)}{''.join(prefixes * bool(delimiter))}</ListBucketResult>"
        )

    def do_PUT(self) -> None:
        path, query = self.parse()
        target = self.object_path(path)
        if "/" not in path.strip("/"):
            (self.root / path.strip("/")).mkdir(exist_ok=True)
            return self.answer(200)
        if "partNumber" in query:
            target = self.root / ".uploads" / query["uploadId"] / f"{int(query['partNumber']):05d}"
        # No file is half there, and no other writer comes between the condition and the rename.
        temporary = self.root / ".uploads" / uuid.uuid4().hex
        etag = f'"{uuid.uuid4().hex}"'
        is_copy = self.receive(temporary)
        with _LOCK:
            if not self.is_allowed(target):
                temporary.unlink()
                return self.fail(412, "PreconditionFailed")
            os.setxattr(temporary, "user.etag", etag.encode())
            temporary.replace(target)
        if is_copy:
            root = "CopyPartResult" if "partNumber" in query else "CopyObjectResult"
            return self.answer(200, f"<{root}><ETag>{etag}</ETag></{root}>")
        return self.answer(200, ETag=etag)

    def is_allowed(self, target: Path) -> bool:
        if self.headers.get("If-None-Match") == "*":
            return not target.exists()
        expected = self.headers.get("If-Match")
        return expected is None or (target.exists() and expected == etag_of(target))

    def receive(self, target: Path) -> bool:
        """Write what the request brings, or what it names as its source; return whether it is a copy."""
        source = self.headers.get("x-amz-copy-source")
        if source is None:
            remaining = int(self.headers.get("Content-Length", 0))
            with target.open("wb") as file:
                while remaining:
                    chunk = self.rfile.read(min(_CHUNK_BYTES, remaining))
                    file.write(chunk)
                    remaining -= len(chunk)
            return False
        with self.object_path(source).open("rb") as original, target.open("wb") as file:
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("x-amz-copy-source-range", ""))
            start, end = (int(match[1]), int(match[2]) + 1) if match else (0, os.fstat(original.fileno()).st_size)
            original.seek(start)
            while start < end:
                start += os.copy_file_range(original.fileno(), file.fileno(), end - start)
        return True

    def do_POST(self) -> None:
        path, query = self.parse()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "uploads" in query:
            upload = uuid.uuid4().hex
            (self.root / ".uploads" / upload).mkdir()
            answer = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            return self.answer(200, answer)
        if "delete" in query:
            for key in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                self.object_path(f"{path.rstrip('/')}/{key}").unlink(missing_ok=True)
            return self.answer(200, "<DeleteResult/>")
        if "uploadId" not in query:
            # The audit trail asks for the name of the account, of another service than S3.
            return self.fail(501, "NotImplemented")
        parts = self.root / ".uploads" / query["uploadId"]
        first, *others = sorted(parts.iterdir())
        with first.open("ab") as target:
            for part in others:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target, 4 * _CHUNK_BYTES)
        etag = f'"{uuid.uuid4().hex}-{len(others) + 1}"'
        os.setxattr(first, "user.etag", etag.encode())
        first.replace(self.object_path(path))
        shutil.rmtree(parts)
        result = f"<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>"
        return self.answer(200, result)

    def do_DELETE(self) -> None:
        self.object_path(self.parse()[0]).unlink(missing_ok=True)
        self.answer(204)


def etag_of(file: Path) -> str:
    """Return the tag that was written with a file."""
    return os.getxattr(file, "user.etag").decode()


def main() -> None:
    """Serve a folder until this process is ended."""
    Handler.root = Path(sys.argv[1])
    (Handler.root / ".uploads").mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
    server.daemon_threads = True
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
