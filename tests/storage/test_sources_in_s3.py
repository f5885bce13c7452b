"""Sources in S3: pinned by ETag, so a changed object is a changed source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.pipeline import make_plan
from qlora_retrain.storage import open_store, sources


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


def test_an_object_given_as_a_folder_is_told_how_to_be_named(bucket_folder: str) -> None:
    with pytest.raises(UsageError, match="give its folder as uri and its name in files"):
        sources.pin("raw_data", f"{bucket_folder}/rows.jsonl", ["**"])


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
