"""Sources in S3: pinned by sha256, so a changed object is a changed source."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from qlora_retrain.core import uris
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.pipeline import make_plan
from qlora_retrain.storage import open_store, s3_hashes, sources
from qlora_retrain.storage.s3 import S3Store


@pytest.fixture
def bucket_folder(s3_uri: str, tmp_path: Path) -> str:
    put(s3_uri, tmp_path, "{}")
    return s3_uri


def put(uri: str, tmp_path: Path, text: str) -> None:
    (tmp_path / "up").mkdir(exist_ok=True)
    (tmp_path / "up" / "rows.jsonl").write_text(text)
    open_store(uri).upload(tmp_path / "up", "", ["rows.jsonl"])


def test_an_object_of_the_same_size_with_other_bytes_has_another_key(bucket_folder: str, tmp_path: Path) -> None:
    before = sources.pin("raw_data", bucket_folder, ["**"])
    put(bucket_folder, tmp_path, "[]")
    after = sources.pin("raw_data", bucket_folder, ["**"])
    assert before.files[0].size_bytes == after.files[0].size_bytes
    assert before.key() != after.key()


def test_an_object_that_changed_since_the_plan_is_refused(bucket_folder: str, tmp_path: Path) -> None:
    pinned = sources.pin("raw_data", bucket_folder, ["**"])
    (tmp_path / "out").mkdir()
    sources.fetch(pinned, tmp_path / "out")
    assert (tmp_path / "out" / "rows.jsonl").read_text() == "{}"
    put(bucket_folder, tmp_path, "[]")
    with pytest.raises(IntegrityError, match="plan again"):
        sources.fetch(pinned, tmp_path / "out")


def test_a_pin_is_the_sha256_of_the_bytes_whatever_the_etag_says(
    bucket_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = sources.pin("raw_data", bucket_folder, ["**"])
    assert pinned.files[0].pin == f"sha256:{hashlib.sha256(b'{}').hexdigest()}"

    # An object with other bytes, the same size and the same ETag, as a collision of MD5 is.
    entries = list(open_store(bucket_folder).list(""))
    put(bucket_folder, tmp_path, "[]")
    monkeypatch.setattr(S3Store, "list", lambda self, prefix: iter(entries))
    (tmp_path / "out").mkdir()
    with pytest.raises(IntegrityError, match="not what the plan pinned"):
        sources.fetch(pinned, tmp_path / "out")
    assert sources.pin("raw_data", bucket_folder, ["**"]).key() != pinned.key()


def test_the_servers_own_checksum_spares_the_reading(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = S3Store(s3_uri)
    bucket, prefix = uris.bucket_and_prefix(s3_uri)
    store.client.put_object(Bucket=bucket, Key=f"{prefix}/rows.jsonl", Body=b"{}", ChecksumAlgorithm="SHA256")
    monkeypatch.setattr(s3_hashes, "_hash_object", forbidden)
    assert sources.pin("raw_data", s3_uri, ["**"]).files[0].pin == f"sha256:{EMPTY_OBJECT}"


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("the object was read")


EMPTY_OBJECT = hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_a_version_of_an_object_is_read_once_and_what_others_could_write_is_not_believed(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    memory = tmp_path / "state/qlora-retrain/object-hashes"
    memory.mkdir(parents=True)
    memory.chmod(mode)
    # A bucket of its own, since versioning would change what other tests see.
    client, bucket = S3Store(s3_uri).client, f"versioned-{mode}"
    client.create_bucket(Bucket=bucket)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    uri = f"s3://{bucket}/rows"
    put(uri, tmp_path, "{}")
    before = sources.pin("raw_data", uri, ["**"])
    assert before.files[0].pin == f"sha256:{EMPTY_OBJECT}"
    assert len(list(memory.iterdir())) == (1 if mode == 0o700 else 0)

    # What is remembered counts for this version of the object alone.
    for file in memory.iterdir():
        file.write_text("f" * 64)
        assert sources.pin("raw_data", uri, ["**"]).files[0].pin == f"sha256:{'f' * 64}"
        file.write_text("damaged")
        assert sources.pin("raw_data", uri, ["**"]) == before
    put(uri, tmp_path, "[]")
    assert sources.pin("raw_data", uri, ["**"]).files[0].pin == f"sha256:{hashlib.sha256(b'[]').hexdigest()}"


def test_an_object_given_as_a_folder_is_told_how_to_be_named(bucket_folder: str) -> None:
    with pytest.raises(UsageError, match="give its folder as uri and its name in files"):
        sources.pin("raw_data", f"{bucket_folder}/rows.jsonl", ["**"])


def test_other_files_of_a_base_in_a_bucket_are_neither_read_nor_pinned(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"config.json": "{}", "model.safetensors": "weights", "README.md": "x", "old/pytorch_model.bin": "x"}
    for path, text in texts.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    open_store(s3_uri).upload(tmp_path, "", texts)
    read: list[str] = []
    hash_objects = S3Store.pinnable_hashes
    monkeypatch.setattr(
        S3Store, "pinnable_hashes", lambda self, paths: hash_objects(self, [read.append(p) or p for p in paths])
    )
    pinned = sources.pin("base_model", s3_uri, ["**"])
    assert [f.path for f in pinned.files] == read == ["config.json", "model.safetensors"]
    assert pinned.left_out == ("README.md", "old/pytorch_model.bin")

    (tmp_path / "config.json").write_text('{"text_config": {"auto_map": "x.Y"}}')
    open_store(s3_uri).upload(tmp_path, "", ["config.json"])
    with pytest.raises(IntegrityError, match="auto_map"):
        sources.pin("base_model", s3_uri, ["**"])


def test_a_base_model_in_a_bucket_is_asked_what_a_folder_is(
    s3_uri: str, tiny_model: Path, tickets: Path, tmp_path: Path
) -> None:
    # Without the type in config.json, only the header of the weights has it.
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text()) | {"n_routed_experts": 8}
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
    open_store(s3_uri).upload(base, "", [p.name for p in base.iterdir()])

    messages = []
    for uri in (base.as_uri(), s3_uri):
        line = tmp_path / "line.yaml"
        line.write_text(f"line: tickets\nsources: {{raw_data: {tickets}, base_model: '{uri}'}}\n")
        settings = ["quantize.compute_dtype=float16", "train.precision=float32"]
        with pytest.raises(UsageError) as caught:
            make_plan.make_plan(line, (tmp_path / "store").as_uri(), overrides=settings)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "n_routed_experts: 8" in messages[1]
    assert "is stored in bfloat16" in messages[1]


@pytest.mark.parametrize("key", ["a//b.jsonl", "../b.jsonl", "a\x1b[2J.jsonl", ".store-b.jsonl"])
def test_an_object_whose_name_no_file_may_have_is_refused_by_the_plan(bucket_folder: str, key: str) -> None:
    bucket, prefix = uris.bucket_and_prefix(bucket_folder)
    S3Store(bucket_folder).client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=b"{}")
    with pytest.raises(UsageError, match=r"sources\.raw_data: .*not a path in a store"):
        sources.pin("raw_data", bucket_folder, ["**", key])  # `**` takes no hidden one
    # One that is not among the files that count does not matter.
    assert len(sources.pin("raw_data", bucket_folder, ["rows.jsonl"]).files) == 1


def test_objects_that_no_pattern_takes_are_counted_and_named(s3_uri: str, tmp_path: Path) -> None:
    names = ["rows.jsonl", "sub/rows.jsonl", "README.md"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    open_store(s3_uri).upload(tmp_path, "", names)
    bucket, prefix = uris.bucket_and_prefix(s3_uri)
    S3Store(s3_uri).client.put_object(Bucket=bucket, Key=f"{prefix}/.hidden.jsonl", Body=b"{}")

    pinned = sources.pin("raw_data", s3_uri, ["*.jsonl"])
    assert [file.path for file in pinned.files] == ["rows.jsonl"]
    assert [(group.reason, group.names) for group in pinned.unmatched] == [
        ("pattern", ("README.md", "sub/rows.jsonl")),
        ("hidden", (".hidden.jsonl",)),
    ]
    with pytest.raises(UsageError, match=r"it has 4 files: .*\*\*/\*\.md takes 1 of them; for one object"):
        sources.pin("raw_data", s3_uri, ["x/*.md"])
