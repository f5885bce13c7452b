"""Links, pipes and other people's folders in a source: read where that is allowed, else refused by name."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.config.platform import PLATFORM_VARIABLE
from qlora_retrain.core import local_files
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.core.source_access import SourceAccess
from qlora_retrain.pipeline import make_plan
from qlora_retrain.storage import open_store, sources

SECRET = "root:secret"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of allowed data, beside a file that is nobody's source."""
    (tmp_path / "shadow").write_text(SECRET)
    (tmp_path / "private" / "rows").mkdir(parents=True)
    (tmp_path / "private" / "rows" / "b.jsonl").write_text(SECRET)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("{}")
    return folder


@pytest.fixture
def access(data: Path) -> SourceAccess:
    return SourceAccess((data.as_uri(),))


def refusal(folder: Path, access: SourceAccess, patterns: tuple[str, ...] = ("**",)) -> str:
    with pytest.raises(UsageError) as caught:
        sources.pin("raw_data", folder.as_uri(), patterns, access)
    assert caught.value.exit_code == 12
    message = str(caught.value)
    assert message.startswith("sources.raw_data: ")
    assert SECRET not in message
    return message


@pytest.mark.parametrize("target", ["shadow", "private", "private/rows/b.jsonl"])
@pytest.mark.parametrize("place", ["", "sub/deep"])
@pytest.mark.parametrize("is_relative", [False, True])
def test_a_link_out_of_the_allowed_sources_is_refused_by_name(
    data: Path, access: SourceAccess, target: str, place: str, is_relative: bool
) -> None:
    link = data / place / "link"
    link.parent.mkdir(parents=True, exist_ok=True)
    outside = data.parent / target
    link.symlink_to(os.path.relpath(outside, link.parent) if is_relative else outside)
    message = refusal(data, access)
    assert f"{link}: a link to {outside}: not below an allowed source" in message
    assert sources.pin("raw_data", data.as_uri(), ["*.jsonl", "!link", "!sub"], access).files[0].path == "a.jsonl"
    # Without settings of the platform's, what this user may read is a source.
    assert len(sources.pin("raw_data", data.as_uri(), ["**"], SourceAccess()).files) == 2


def test_a_link_is_followed_through_every_link_that_it_leads_to(data: Path, access: SourceAccess) -> None:
    (data / "first").symlink_to(data / "second")
    (data / "second").symlink_to(data.parent / "shadow")
    assert "shadow: not below an allowed source" in refusal(data, access, ("first",))


@pytest.mark.parametrize("path", ["link", "link/rows", "link/rows/b.jsonl", "a.jsonl/../../shadow"])
def test_a_link_in_the_middle_of_a_path_is_one_too(data: Path, access: SourceAccess, path: str) -> None:
    (data / "link").symlink_to(data.parent / "private")
    with pytest.raises(UsageError, match=r"not below an allowed source|parts \. and \.\."):
        sources.pin("raw_data", f"{data.as_uri()}/{path}", ["**"], access)


def test_a_cache_of_links_below_an_allowed_source_is_read_by_its_names(data: Path, access: SourceAccess) -> None:
    """Hugging Face's cache has a snapshot of links to files that are named by their hashes."""
    snapshot, blobs = data / "models--a--b" / "snapshots" / "0123", data / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, text in {"config.json": "{}", "model.safetensors": "weights"}.items():
        (blobs / f"hash of {name}").write_text(text)
        (snapshot / name).symlink_to(f"../../blobs/hash of {name}")
    pinned = sources.pin("base_model", snapshot.as_uri(), ["**"], access)
    assert [file.path for file in pinned.files] == ["config.json", "model.safetensors"]
    (data.parent / "out").mkdir()
    sources.fetch(pinned, data.parent / "out", access)
    copied = data.parent / "out" / "model.safetensors"
    assert (copied.read_text(), copied.is_symlink()) == ("weights", False)
    assert sources.pin("raw_data", (snapshot / "config.json").as_uri(), ["**"], access).files[0].path == "config.json"


def test_a_folder_behind_a_link_is_read(data: Path, access: SourceAccess) -> None:
    (data / "v3").mkdir()
    (data / "v3" / "rows.jsonl").write_text("{}")
    (data / "latest").symlink_to("v3")
    pinned = sources.pin("raw_data", data.as_uri(), ["latest/*.jsonl"], access)
    assert [file.path for file in pinned.files] == ["latest/rows.jsonl"]


@pytest.mark.parametrize("patterns", [["*.jsonl"], ["**", "!link"], ["**", "!link/**"], ["other/**", "a.jsonl"]])
def test_a_link_that_no_pattern_follows_is_named_and_not_followed(
    data: Path, access: SourceAccess, patterns: list[str]
) -> None:
    (data / "link").symlink_to(data.parent / "private")
    pinned = sources.pin("raw_data", data.as_uri(), patterns, access)
    assert [file.path for file in pinned.files] == ["a.jsonl"]
    assert [(group.reason, group.names) for group in pinned.unmatched] == [("folder", ("link/",))]
    for followed in (["link/*"], ["*/x"], ["l*/**"], ["link"], ["**", "!link/*"], ["{a.jsonl,link/rows/b.jsonl}"]):
        assert f"{data / 'link'}: a link to " in refusal(data, access, tuple(followed))


@pytest.mark.parametrize("make", ["itself", "nothing", "above", "two"])
@pytest.mark.parametrize("is_limited", [False, True])
def test_a_link_that_ends_nowhere_is_refused_by_name(
    data: Path, access: SourceAccess, make: str, is_limited: bool
) -> None:
    link = data / "link"
    link.symlink_to({"itself": "link", "nothing": "gone", "above": ".", "two": "other"}[make])
    if make == "two":
        (data / "other").symlink_to("link")
    assert str(link) in refusal(data, access if is_limited else SourceAccess(), ("**", "!other"))
    assert len(sources.pin("raw_data", data.as_uri(), ["**", "!link", "!other"], access).files) == 1


def make_special(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    else:
        path.symlink_to({"device": "/dev/zero", "link to a pipe": "a pipe"}[kind])
        if kind == "link to a pipe":
            os.mkfifo(path.with_name("a pipe"))


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "link to a pipe"])
@pytest.mark.parametrize("is_source_itself", [False, True])
@pytest.mark.timeout(200)
def test_what_is_no_file_is_refused_by_name_at_once(data: Path, kind: str, is_source_itself: bool) -> None:
    make_special(kind, data / "rows")
    message = refusal(data / "rows" if is_source_itself else data, SourceAccess())
    assert f"{data / 'rows'}: expected a file, found a {kind.rpartition(' ')[2]}" in message or "a pipe" in message
    # What the patterns leave out is nobody's business.
    assert len(sources.pin("raw_data", data.as_uri(), ["*.jsonl"], SourceAccess()).files) == 1


@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", ["link", "folder link", "pipe"])
def test_what_is_put_in_after_the_plan_is_not_read(data: Path, access: SourceAccess, kind: str) -> None:
    (data / "sub").mkdir()
    (data / "sub" / "b.jsonl").write_text(SECRET)
    pinned = sources.pin("raw_data", data.as_uri(), ["**"], access)
    (data / "sub" / "b.jsonl").unlink()
    if kind == "folder link":
        (data / "sub").rmdir()
        (data / "sub").symlink_to(data.parent / "private" / "rows")
    elif kind == "link":
        (data / "sub" / "b.jsonl").symlink_to(data.parent / "private" / "rows" / "b.jsonl")
    else:
        os.mkfifo(data / "sub" / "b.jsonl")
    out = data.parent / "out"
    out.mkdir()
    with pytest.raises(UsageError):
        sources.fetch(pinned, out, access)
    assert not any(SECRET in path.read_text() for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("part", ["file", "folder"])
def test_a_link_that_is_put_in_after_the_check_leads_nowhere(
    data: Path, access: SourceAccess, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "sub").mkdir()
    (data / "sub" / "b.jsonl").write_text("{}")
    resolve = local_files.resolve

    def then_exchange(path: Path, access: SourceAccess) -> str:
        resolved = resolve(path, access)
        changed = data / "sub" / "b.jsonl" if part == "file" else data / "sub"
        changed.rename(data / "before")
        changed.symlink_to(data.parent / "private" / "rows" / ("b.jsonl" if part == "file" else ""))
        return resolved

    monkeypatch.setattr(local_files, "resolve", then_exchange)
    with pytest.raises(UsageError, match=r"b\.jsonl: "):
        local_files.open_file(data / "sub" / "b.jsonl", access)


def test_no_read_wins_a_race_against_the_check(data: Path, access: SourceAccess) -> None:
    path, inside, outside = data / "b.jsonl", data / "a.jsonl", data.parent / "shadow"
    stop = threading.Event()

    def exchange() -> None:
        for number in range(10**9):
            if stop.is_set():
                return
            (data / "new").symlink_to(outside if number % 2 else inside)
            (data / "new").replace(path)

    path.symlink_to(inside)
    thread = threading.Thread(target=exchange)
    thread.start()
    texts, refusals = set(), 0
    try:
        # Both outcomes are chance; on a machine that is busy one of them may need many more reads.
        num_reads = 0
        while num_reads < 2000 or (num_reads < 1_000_000 and not (texts and refusals)):
            num_reads += 1
            try:
                with local_files.open_file(path, access) as file:
                    texts.add(file.read())
            except UsageError:
                refusals += 1
    finally:
        stop.set()
        thread.join()
    assert texts == {b"{}"}
    assert refusals


def test_a_tree_of_links_has_an_end(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "_MAX_ENTRIES", 1000)
    for number in range(20):
        (data / f"f{number}").mkdir()
        for name in ("x", "y"):
            (data / f"f{number}" / name).symlink_to(data / f"f{number + 1}")
    (data / "f20").mkdir()
    assert "at most 1,000 files and folders" in refusal(data, SourceAccess())


@pytest.fixture
def limit(data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def limit_to(*prefixes: str) -> None:
        path = data.parent / "platform.yaml"
        path.write_text(f"sources: {list(prefixes)}\n")
        monkeypatch.setenv(PLATFORM_VARIABLE, str(path))

    return limit_to


@pytest.mark.parametrize("is_link", [False, True])
def test_a_line_cannot_read_what_another_line_has_in_the_store(
    line: Path, made_plan: object, root_uri: str, tmp_path: Path, limit: Callable[..., None], is_link: bool
) -> None:
    store = tmp_path / "store"
    (store / "artifacts" / "dataset").mkdir(parents=True)
    (store / "artifacts" / "dataset" / "rows.jsonl").write_text(SECRET)
    source = store / "artifacts" / "dataset"
    if is_link:
        source = tmp_path / "line" / "mine"
        source.symlink_to(store / "artifacts" / "dataset")
    limit(tmp_path.as_uri())
    with pytest.raises(UsageError, match="in one of the store's own folders"):
        make_plan.make_plan(line, root_uri, overrides=[f"sources.raw_data={source}"])
    # Nor by a folder around all of it.
    with pytest.raises(UsageError, match="in one of the store's own folders"):
        make_plan.make_plan(line, root_uri, overrides=[f"sources.raw_data={tmp_path}"])
    history = store / "histories" / "others"
    history.mkdir(parents=True)
    (history / "rows.jsonl").write_text(SECRET)
    with pytest.raises(UsageError, match="in one of the store's own folders"):
        make_plan.make_plan(line, root_uri, overrides=[f"sources.raw_data={history}"])
    # Its owner may allow a part, as a base that another line has published.
    limit(tmp_path.as_uri(), (store / "artifacts").as_uri())
    assert make_plan.make_plan(line, root_uri, overrides=[f"sources.raw_data={source}"])


def test_a_plan_with_a_source_that_is_not_allowed_is_not_finished(
    line: Path, root_uri: str, limit: Callable[..., None]
) -> None:
    plan = make_plan.make_plan(line, root_uri)
    assert make_plan.find_plan(open_store(root_uri), plan.run_id) == plan
    limit("s3://data/")
    with pytest.raises(UsageError, match=r"file:///.*: not below an allowed source"):
        make_plan.find_plan(open_store(root_uri), plan.run_id)


@pytest.mark.parametrize("is_link", [False, True])
def test_a_prefix_may_be_one_file(data: Path, tmp_path: Path, limit: Callable[..., None], is_link: bool) -> None:
    (data / "b.jsonl").write_text(SECRET)
    limit((data / "a.jsonl").as_uri())
    named = tmp_path / "link.jsonl" if is_link else data / "a.jsonl"
    if is_link:
        named.symlink_to(data / "a.jsonl")
    pinned = sources.pin("raw_data", named.as_uri(), ["**"])
    (tmp_path / "out").mkdir()
    sources.fetch(pinned, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [named.name]
    with pytest.raises(UsageError, match="not below an allowed source"):
        sources.pin("raw_data", (data / "b.jsonl").as_uri(), ["**"])


def test_a_step_reads_no_source_that_the_platform_does_not_allow(
    data: Path, tmp_path: Path, limit: Callable[..., None]
) -> None:
    pinned = sources.pin("raw_data", data.as_uri(), ["**"])
    limit("s3://data/", "hf://org/")
    hub = sources.PinnedSource(uri=f"hf://evil/model@{'0' * 40}", files=pinned.files)
    s3 = pinned.model_copy(update={"uri": "s3://data-of-others/x"})
    for source in (pinned, hub, s3):
        with pytest.raises(UsageError, match="not below an allowed source"):
            sources.fetch(source, tmp_path / "out")


def test_a_name_in_a_plan_leads_out_of_no_folder(data: Path, access: SourceAccess) -> None:
    pinned = sources.pin("raw_data", data.as_uri(), ["**"], access)
    evil = pinned.model_copy(update={"files": (pinned.files[0].model_copy(update={"path": "../shadow"}),)})
    with pytest.raises((UsageError, IntegrityError)):
        sources.fetch(evil, data.parent / "out", SourceAccess())
