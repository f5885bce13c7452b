"""`pull` beside boto3's `download_file`: the same server, the same bytes, in turns, each in a process of its own.

`pull` hashes every byte, and boto3 does not. Seconds are those of the transfer, without imports. Memory is the peak of
the process above its start, for two sizes of the file: it must not grow with the file.

Command: `python benchmarks/publish.py [--mib 512] [--rounds 7]`
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from qlora_retrain.core import hashing
from qlora_retrain.storage import artifact, open_store, pull, registry
from qlora_retrain.storage.registry import Release

_LINE, _ALIAS, _WEIGHTS = "benchmark", "production", "model/model.safetensors"
_TOOLS = ("pull", "download_file")
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
def server() -> Iterator[None]:
    """Start moto's S3 server as a process of its own, with one bucket."""
    import boto3

    os.environ.update(_ENVIRONMENT)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(_PORT)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(_ENVIRONMENT["AWS_ENDPOINT_URL"]).close()
                    break
                time.sleep(0.2)
            boto3.client("s3").create_bucket(Bucket=_LINE)
            yield
        finally:
            process.terminate()


def publish(root: str, folder: Path, num_bytes: int) -> Release:
    """Publish a version whose weights have this many random bytes."""
    (folder / "model").mkdir(parents=True)
    (folder / _WEIGHTS).write_bytes(os.urandom(num_bytes))
    files = artifact.list_files(folder)
    content = hashing.content_hash((file.path, file.sha256) for file in files)
    release = Release(
        line=_LINE,
        version=f"20260101T000000Z-{content[:12]}",
        content_hash=content,
        created_at="",
        files=files,
        adapter_key="",
        judgement="",
        keys={},
        base={},
        numbers={},
        provenance={},
    )
    store = open_store(root)
    store.upload(folder, registry.version_folder(_LINE, release.version), [file.path for file in files])
    release = registry.complete_version(store, release)
    registry.move_alias(store, _LINE, _ALIAS, release, reason="a benchmark", is_verified=True)
    return release


def measure(tool: str, root: str, version: str) -> tuple[float, int]:
    """Fetch the version with a tool into a new folder; return the seconds, and the bytes of memory that this added."""
    import boto3

    store, client = open_store(root), boto3.client("s3")
    # Both tools have their modules and a connection.
    pull.resolve(store, f"{_LINE}@{_ALIAS}")
    client.list_buckets()
    with tempfile.TemporaryDirectory() as folder:
        start_bytes, start = _peak_bytes(), time.perf_counter()
        if tool == "pull":
            pull.pull(store, f"{_LINE}@{_ALIAS}", Path(folder))
        else:
            bucket, _, prefix = root.removeprefix("s3://").partition("/")
            key = f"{prefix}/{registry.version_folder(_LINE, version)}/{_WEIGHTS}"
            client.download_file(bucket, key, f"{folder}/weights")
        return time.perf_counter() - start, _peak_bytes() - start_bytes


def _peak_bytes() -> int:
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    (line,) = (text for text in Path("/proc/self/status").read_text().split("\n") if text.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print both tools' seconds, the ratio of each pair of rounds, and the memory for two sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="of the larger file; the smaller one has a quarter")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")
    with (
        server(),
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool,
    ):
        for mib in (arguments.mib // 4, arguments.mib):
            root = f"s3://{_LINE}/{mib}"
            version = publish(root, Path(folder, str(mib)), mib * 2**20).version
            rounds = [
                {tool: pool.submit(measure, tool, root, version).result() for tool in _TOOLS[:: (-1) ** number]}
                for number in range(arguments.rounds)
            ]
            ratios = [result["download_file"][0] / result["pull"][0] for result in rounds]
            for tool in _TOOLS:
                seconds = statistics.median(result[tool][0] for result in rounds)
                peak_mib = max(result[tool][1] for result in rounds) / 2**20
                print(f"{mib} MiB  {tool:13}  {seconds:.2f} s  {mib / seconds:.0f} MiB/s  memory +{peak_mib:.0f} MiB")
            print(f"{mib} MiB  speed of pull / download_file: median {statistics.median(ratios):.2f}, all {ratios}")


if __name__ == "__main__":
    main()
