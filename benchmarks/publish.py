"""Publish, upload and pull beside boto3's `copy`, `upload_file` and `download_file`: the same server, the same bytes.

    store_copy  copies the weights inside the store
    publish     copies them, reads and hashes every byte of the copy, writes the manifest and moves an alias
    upload      as a step's artifact is uploaded
    pull        hashes every byte; boto3 hashes none

`publish` stands beside two calls: `copy`, which verifies nothing, and `copy` followed by `download_fileobj` into a
hash, which is the same work in boto3's words.

The tools take turns, each in a process of its own, and both are warm. Seconds are medians. A ratio is boto3's time by
ours in the same round, so above 1 we are faster. Memory is what a transfer adds to the peak of its process: it must not
grow with the file. The server is `s3_server.py`, which is fast, so what we do beside the transfer shows.

Command: `python benchmarks/publish.py [--mib 512] [--rounds 5] [--folder /dev/shm]`
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import io
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from qlora_retrain.core import hashing
from qlora_retrain.storage import artifact, open_store, pull, registry
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

_LINE, _ALIAS, _WEIGHTS = "benchmark", "production", "model/model.safetensors"
# What is measured, and boto3's call that moves the same bytes.
_PAIRS = (
    ("store_copy", "copy"),
    ("publish", "copy"),
    ("publish", "copy_and_hash"),
    ("upload", "upload_file"),
    ("pull", "download_file"),
)
_PORT = 5599
_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{_PORT}",
    "NO_PROXY": "127.0.0.1",
}


@contextlib.contextmanager
def server(folder: Path) -> Iterator[None]:
    """Start an S3 server over a folder as a process of its own, with one bucket."""
    import boto3

    os.environ.update(_ENVIRONMENT)
    program = Path(__file__).with_name("s3_server.py")
    with subprocess.Popen([sys.executable, program, folder, str(_PORT)]) as process:
        try:
            for _ in range(100):
                with contextlib.suppress(urllib.error.URLError):
                    urllib.request.urlopen(f"{_ENVIRONMENT['AWS_ENDPOINT_URL']}/?list-type=2").close()
                    break
                time.sleep(0.2)
            boto3.client("s3").create_bucket(Bucket=_LINE)
            yield
        finally:
            process.terminate()


def publish(store: Store, weights: File) -> None:
    """Publish a version with the weights, as the step does: the files first, then the manifest, then the alias."""
    content = hashing.content_hash([(_WEIGHTS, weights.sha256)])
    release = Release(
        line=_LINE,
        # Each has a name of its own, so that there is something to copy.
        version=f"20260101T000000Z-{uuid.uuid4().hex[:12]}",
        content_hash=content,
        created_at="",
        files=(weights,),
        adapter_key="",
        judgement="",
        keys={},
        base={},
        numbers={},
        provenance={},
    )
    folder = registry.version_folder(_LINE, release.version)
    store.copy([(f"artifact/{_WEIGHTS}", f"{folder}/{_WEIGHTS}")])
    assert registry.first_fault(store, folder, release.files) is None
    release = registry.complete_version(store, release)
    registry.move_alias(store, _LINE, _ALIAS, release, reason="a benchmark", is_verified=True)


class Digest(io.RawIOBase):
    """Hash what is written, in its order."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        """Say that it takes bytes."""
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Hash them."""
        self.sha256.update(data)
        return len(data)


def copy_and_hash(client: Any, bucket: str, source: str, target: str, sha256: str) -> None:
    """Copy an object with boto3, and read the copy back to compare its hash."""
    client.copy({"Bucket": bucket, "Key": source}, bucket, target)
    digest = Digest()
    client.download_fileobj(bucket, target, digest)
    assert digest.sha256.hexdigest() == sha256


def measure(tool: str, root: str, folder: Path, weights: File) -> tuple[float, int]:
    """Move the weights with a tool; return the seconds, and the bytes of memory that this added to the peak."""
    import boto3

    store, client = open_store(root), boto3.client("s3")
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    source, target = f"{prefix}/artifact/{_WEIGHTS}", f"{prefix}/other/{_WEIGHTS}"
    # Both have a connection.
    next(store.children("artifact"))
    client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/artifact/")
    with tempfile.TemporaryDirectory(dir=folder) as destination:
        calls = {
            "store_copy": lambda: store.copy([(f"artifact/{_WEIGHTS}", f"copy/{_WEIGHTS}")]),
            "publish": lambda: publish(store, weights),
            "copy": lambda: client.copy({"Bucket": bucket, "Key": source}, bucket, target),
            "copy_and_hash": lambda: copy_and_hash(client, bucket, source, target, weights.sha256),
            "upload": lambda: store.upload(folder, "other", [_WEIGHTS]),
            "upload_file": lambda: client.upload_file(str(folder / _WEIGHTS), bucket, target),
            "pull": lambda: pull.pull(store, f"{_LINE}@{_ALIAS}", Path(destination)),
            "download_file": lambda: client.download_file(bucket, source, f"{destination}/weights"),
        }
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start_bytes, start = _peak_bytes(), time.perf_counter()
        calls[tool]()
        result = time.perf_counter() - start, _peak_bytes() - start_bytes
    _remove_earlier(store)
    return result


def _remove_earlier(store: Store) -> None:
    """Remove the versions that the alias names no longer, so that the disk holds two copies of the weights, not ten."""
    current = pull.resolve(store, f"{_LINE}@{_ALIAS}")[0].version
    folders = [registry.version_folder(_LINE, name) for name in store.children(f"models/{_LINE}/versions")]
    store.delete([f"{folder}/{_WEIGHTS}" for folder in folders if not folder.endswith(current)])


def _peak_bytes() -> int:
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    (line,) = (text for text in Path("/proc/self/status").read_text().split("\n") if text.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def compare(tools: tuple[str, str], root: str, folder: Path, weights: File, num_rounds: int) -> None:
    """Let two tools move the same bytes in turns, and print what it took."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as ours, ProcessPoolExecutor(1, mp_context=spawn) as theirs:
        pools = dict(zip(tools, (ours, theirs), strict=True))
        rounds = []
        # The first round has the imports.
        for number in range(num_rounds + 1):
            order = tools[:: (-1) ** number]
            rounds.append({tool: pools[tool].submit(measure, tool, root, folder, weights).result() for tool in order})
    mib = weights.size_bytes / 2**20
    for tool in tools:
        seconds = statistics.median(result[tool][0] for result in rounds[1:])
        peak_mib = max(result[tool][1] for result in rounds) / 2**20
        print(f"{mib:.0f} MiB  {tool:13}  {seconds:.2f} s  {mib / seconds:.0f} MiB/s  memory +{peak_mib:.0f} MiB")
    ratios = sorted(result[tools[1]][0] / result[tools[0]][0] for result in rounds[1:])
    middle = f"median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}"
    print(f"{mib:.0f} MiB  speed of {tools[0]} / {tools[1]}: {middle}", flush=True)


def main() -> None:
    """Compare for two sizes of the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="of the larger file; the smaller one has a quarter")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="of all files; /dev/shm measures without a disk")
    parser.add_argument("--only", choices=sorted({tool for tool, _ in _PAIRS}), help="one tool of ours")
    arguments = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="benchmark-publish-", dir=arguments.folder))
    try:
        with server(folder / "server"):
            for mib in (arguments.mib // 4, arguments.mib):
                root, local = f"s3://{_LINE}/{mib}", folder / str(mib)
                (local / "model").mkdir(parents=True)
                (local / _WEIGHTS).write_bytes(os.urandom(mib * 2**20))
                (weights,) = artifact.list_files(local)
                open_store(root).upload(local, "artifact", [_WEIGHTS])
                publish(open_store(root), weights)
                for tools in _PAIRS:
                    if arguments.only in (None, tools[0]):
                        compare(tools, root, local, weights, arguments.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
