"""Sources: pinned by content, checked against the pin; of a base, only what a model is loaded from."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm.tokenizer_files import TOKENIZER_FILES
from qlora_retrain.storage import globs, sources

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "a base"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return folder


def test_a_folder_is_pinned_by_the_sha256_of_each_file(base: Path) -> None:
    pinned = sources.pin("base_model", base.as_uri(), ["**"])
    assert {f.path: f.pin for f in pinned.files} == {
        p.name: f"sha256:{hashlib.sha256(p.read_bytes()).hexdigest()}" for p in base.iterdir()
    }


def test_the_key_depends_on_the_content_and_not_on_the_place(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    here = sources.pin("base_model", base.as_uri(), ["**"])
    there = sources.pin("base_model", (tmp_path / "copy").as_uri(), ["**"])
    assert here.key() == there.key()
    (tmp_path / "copy" / "config.json").write_text("[]")
    assert sources.pin("base_model", (tmp_path / "copy").as_uri(), ["**"]).key() != here.key()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows [1] ü%20?.jsonl", "*.jsonl"])
def test_a_single_file_is_pinned_without_its_neighbours(tmp_path: Path, name: str) -> None:
    (tmp_path / "old").mkdir()
    for path in (tmp_path / name, tmp_path / "old" / name, tmp_path / "other.jsonl"):
        path.write_text("{}")
    pinned = sources.pin("raw_data", (tmp_path / name).as_uri(), ["**"])

    assert [f.path for f in pinned.files] == [name]
    (tmp_path / "out").mkdir()
    sources.fetch(pinned, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a.jsonl", "*.jsonl", True),
        ("sub/a.jsonl", "*.jsonl", False),
        ("sub/a.jsonl", "*/*.jsonl", True),
        (".a.jsonl", "*.jsonl", False),
        (".a.jsonl", ".*", True),
        (".git/a.jsonl", "**", False),
        ("a.jsonl", "**/*.jsonl", True),
        ("x/y/a.jsonl", "**/*.jsonl", True),
        ("a.jsonl", "**", True),
        ("a.csv", "*.jsonl", False),
        ("sub/a.jsonl", "other/*.jsonl", False),
        ("rows[1].csv", "rows[1].csv", True),
        ("a", "", False),
        ("data/a.jsonl", "data/**/*.jsonl", True),
        ("data/x/y/a.jsonl", "data/**/*.jsonl", True),
        ("data/a.jsonl", "data", True),
        ("data/x/a.jsonl", "./data/", True),
        ("database/a.jsonl", "data", False),
        ("a.csv", "*.{jsonl,csv}", True),
        ("{train,test}/a.txt", "{train,test}/a.txt", True),
        ("test/a.csv", "{train,dev}/*.{csv,tsv}", False),
    ],
)
def test_which_files_count(path: str, pattern: str, expected: bool) -> None:
    assert bool(globs.matches_any(path, [pattern])) is expected


def test_a_glob_in_the_place_of_a_folder_is_refused_with_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        sources.pin("raw_data", (tmp_path / "data" / "*.jsonl").as_uri(), ["**"])
    assert f'Globs belong in files: {{uri: {tmp_path}/data, files: ["*.jsonl"]}}' in str(caught.value)


def test_data_of_a_commit_may_be_packed_and_a_base_has_the_patterns_it_had(tmp_path: Path) -> None:
    uri = f"hf://owner/name@{COMMIT}"
    assert {"*.jsonl", "*.gz", "*.arrow"} <= {*sources.pin("raw_data", uri, ["**"]).patterns}
    assert "*.gz" not in sources.pin("base_model", uri, ["**"]).patterns
    assert sources.pin("raw_data", uri, ["data", "!*.csv"]).patterns == ("./data", "!./*.csv")


def test_the_tokenizer_files_are_a_part_with_a_key_of_its_own(base: Path) -> None:
    part = sources.pin("base_model", base.as_uri(), ["**"]).subset(TOKENIZER_FILES)
    assert sorted(f.path for f in part.files) == ["config.json", "generation_config.json", "tokenizer.json"]
    (base / "model.safetensors").write_text("others")
    assert sources.pin("base_model", base.as_uri(), ["**"]).subset(TOKENIZER_FILES).key() == part.key()


def test_fetching_gives_exactly_what_was_pinned(base: Path, tmp_path: Path) -> None:
    (base / "notes.md").write_text("not asked for")
    pinned = sources.pin("base_model", base.as_uri(), ["*.json", "*.safetensors"])
    (tmp_path / "out").mkdir()
    sources.fetch(pinned, tmp_path / "out")
    fetched = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert fetched == {p.name: p.read_bytes() for p in base.iterdir() if p.suffix != ".md"}


@pytest.mark.parametrize("change", ["same size", "other size", "removed"])
def test_a_file_that_changed_since_the_plan_is_refused(base: Path, tmp_path: Path, change: str) -> None:
    pinned = sources.pin("base_model", base.as_uri(), ["**"])
    path = base / "model.safetensors"
    if change == "removed":
        path.unlink()
    else:
        path.write_text("WEIGHTS" if change == "same size" else "more weights")
    (tmp_path / "out").mkdir()

    with pytest.raises(IntegrityError, match=r"model\.safetensors.*plan again"):
        sources.fetch(pinned, tmp_path / "out")


OTHERS = (
    *("README.md", "modeling_x.py", "x.pyc", "pytorch_model.bin", "sub/model.PT", "x.npz", "model.onnx", "photo.png"),
    *("model.gguf", ".gitattributes", ".cache/huggingface/download/config.json.metadata"),
)


def test_other_files_of_a_base_are_named_and_left_out(base: Path, tmp_path: Path) -> None:
    before = sources.pin("base_model", base.as_uri(), ["**"])
    for name in OTHERS:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("anything")
    pinned = sources.pin("base_model", base.as_uri(), ["**"])
    # Neither the key nor what is fetched depends on them.
    assert set(pinned.left_out) == set(OTHERS)
    assert pinned.key() == before.key()
    (tmp_path / "out").mkdir()
    sources.fetch(pinned, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").rglob("*")} == {f.path for f in before.files}

    # What the patterns leave out is not named; data is of any kind.
    assert sources.pin("base_model", base.as_uri(), ["*.json", "*.safetensors"]).left_out == ()
    assert sources.pin("raw_data", base.as_uri(), ["**"]).left_out == ()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "sub/model.PT", "x.pkl", "flax.msgpack"])
def test_a_base_that_has_pickles_alone_is_refused_with_the_way_to_convert(base: Path, name: str) -> None:
    (base / "model.safetensors").unlink()
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_text("x")
    for uri, files in ((base.as_uri(), ["**"]), ((base / name).as_uri(), ["**"]), (base.as_uri(), [name])):
        with pytest.raises(IntegrityError, match=r"is a pickle.*save_pretrained\(NEW\)"):
            sources.pin("base_model", uri, files)
    # Of a preview only the tokenizer's files are wanted.
    sources.pin("base_model", base.as_uri(), TOKENIZER_FILES)


def test_a_base_of_files_that_no_model_is_loaded_from_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("soon")
    with pytest.raises(UsageError, match="has no files that match"):
        sources.pin("base_model", tmp_path.as_uri(), ["**"])


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json", "sub/config.json"])
def test_a_base_model_that_names_code_is_refused(base: Path, name: str) -> None:
    (base / name).parent.mkdir(exist_ok=True)
    for document in ({"auto_map": {"AutoModel": "x.y"}}, {"text_config": {"auto_map": {"AutoConfig": "x.y"}}}):
        (base / name).write_text(json.dumps(document))
        with pytest.raises(IntegrityError, match=f"base_model: {name} .*auto_map"):
            sources.pin("base_model", base.as_uri(), ["**"])
    for text, reason in (("{", "not valid JSON"), ("[" * 10**5, "levels deep"), (" " * (2**23 + 1), "at most 8 MiB")):
        (base / name).write_text(text)
        with pytest.raises(IntegrityError, match=reason):
            sources.pin("base_model", base.as_uri(), ["**"])


def test_a_source_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"sources\.raw_data: .* does not exist"):
        sources.pin("raw_data", (tmp_path / "none").as_uri(), ["**"])
    with pytest.raises(UsageError, match=r"has no files that match \*\.jsonl"):
        sources.pin("raw_data", tmp_path.as_uri(), ["*.jsonl"])


def test_a_hugging_face_source_is_pinned_by_its_commit() -> None:
    pinned = sources.pin("base_model", f"hf://owner/name@{COMMIT}", ["**"])
    assert [f.pin for f in pinned.files] == [f"commit:{COMMIT}"]
    assert "*.py" not in pinned.patterns
    assert "*.bin" not in pinned.patterns
    assert pinned.subset(TOKENIZER_FILES).key() != pinned.key()
    assert sources.pin("base_model", f"hf://owner/name@{COMMIT[::-1]}", ["**"]).key() != pinned.key()


@pytest.mark.parametrize("uri", ["hf://owner/name", "hf://owner/name@main", f"hf://name@{COMMIT}", "hf://a/b@0123abc"])
def test_a_branch_or_a_short_commit_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="40 hex of a commit"):
        sources.pin("base_model", uri, ["**"])


def test_a_commit_that_cannot_be_reached_is_a_usage_error(tmp_path: Path) -> None:
    pinned = sources.pin("base_model", f"hf://owner/name@{COMMIT}", ["**"])
    # The tests run with HF_HUB_OFFLINE=1, so no request is made.
    with pytest.raises(UsageError, match="cannot be reached"):
        sources.fetch(pinned, tmp_path)


def test_a_file_of_holes_is_refused_before_it_is_hashed(tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(UsageError, match=r"rows\.jsonl: expected a file with its bytes on the disk, found 4,398,"):
        sources.pin("raw_data", tmp_path.as_uri(), ["**"])


def folder_of(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("{}")
    return tmp_path / "data"


def test_files_that_no_pattern_takes_are_counted_by_the_reason(tmp_path: Path) -> None:
    names = ["a.jsonl", ".b.jsonl", ".git/config", "old/a.jsonl", *(f"{i}.csv" for i in range(9))]
    data = folder_of(tmp_path, *names)
    (tmp_path / "far").mkdir()
    (data / "far").symlink_to(tmp_path / "far")
    pinned = sources.pin("raw_data", data.as_uri(), ["*.jsonl"])
    assert [file.path for file in pinned.files] == ["a.jsonl"]
    assert [(group.reason, group.count, group.names) for group in pinned.unmatched] == [
        ("pattern", 11, (".git/config", "0.csv", "1.csv", "2.csv", "3.csv")),
        ("hidden", 1, (".b.jsonl",)),
        ("folder", 1, ("far/",)),
    ]
    assert pinned.key() == sources.pin("raw_data", (data / "a.jsonl").as_uri(), ["**"]).key()


@pytest.mark.parametrize(
    ("names", "pattern", "words"),
    [
        (["sub/a.jsonl", "sub/b.csv"], "*.jsonl", "it has 2 files: sub/a.jsonl, …; **/*.jsonl takes 1 of them"),
        (["sub/a.jsonl", "sub/b.csv"], "*", "sub/a.jsonl, sub/b.csv; **/* takes 2 of them"),
        (["sub/a.jsonl"], "s*", "its one file is: sub/a.jsonl; s*/** takes 1 of them"),
        (["sub/a.jsonl"], "*/", "*/** takes 1 of them"),
        (["a.jsonl.gz"], "*.jsonl", "*.jsonl* takes 1 of them"),
        (["A.JSONL"], "*.jsonl", "**/*.JSONL takes 1 of them"),
        ([".a.jsonl"], "**", "**/.* takes 1 of them"),
        (["a.csv", "train.csv"], "trian.csv", "it has 2 files: train.csv, a.csv; ** takes every file"),
        ([], "**", "it is empty"),
    ],
)
def test_a_pattern_that_takes_no_file_is_told_the_nearest_ones(
    tmp_path: Path, names: list[str], pattern: str, words: str
) -> None:
    data = folder_of(tmp_path, *names)
    data.mkdir(exist_ok=True)
    with pytest.raises(UsageError) as caught:
        sources.pin("raw_data", data.as_uri(), [pattern])
    assert f"has no files that match {pattern}; " in str(caught.value)
    assert words in str(caught.value)


def test_patterns_that_leave_everything_out_are_named(tmp_path: Path) -> None:
    data = folder_of(tmp_path, "a.csv")
    with pytest.raises(UsageError, match=r"a\.csv; !\*\.csv leaves all of them out"):
        sources.pin("raw_data", data.as_uri(), ["**", "!*.csv"])
