"""The verbs of `models` as a person and a program call them; the Python example of the documentation runs as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.cli.main import main
from qlora_retrain.core.errors import TryAgain
from qlora_retrain.pipeline import version_summary
from qlora_retrain.registry import Registry
from qlora_retrain.storage import export_folder, open_store, range_download, registry
from qlora_retrain.storage.registry import LATEST, PRODUCTION, Release
from tests import published
from tests.storage import small_versions

LINE = "intents"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"


@pytest.fixture
def root(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


@pytest.fixture
def releases(root: str, tmp_path: Path) -> list[Release]:
    """Two versions with reports and verdicts; production and latest name the second."""
    store = open_store(root)
    releases = [published.publish_version(store, tmp_path / str(n), n, accuracy=0.7 + n / 100) for n in (1, 2)]
    for release in releases:
        for name in (LATEST, PRODUCTION):
            registry.move_alias(store, LINE, name, release, reason="passed both gates in run r")
    return releases


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


class Caller:
    """Calls verbs of `models` on a store; keeps what they print."""

    def __init__(self, root: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys = root, capsys
        self.out, self.err = "", ""

    def __call__(self, *arguments: str) -> int:
        self._capsys.readouterr()
        code = call("models", *arguments, "--root", self.root)
        self.out, self.err = self._capsys.readouterr()
        return code

    def document(self, *arguments: str, code: int = 0) -> Any:
        assert self(*arguments, "--json") == code
        return json.loads(self.out)


@pytest.fixture
def models(root: str, capsys: pytest.CaptureFixture[str]) -> Caller:
    return Caller(root, capsys)


def test_list_show_and_diff_say_who_published_what_and_what_differs(models: Caller, releases: list[Release]) -> None:
    first, second = (release.version for release in releases)
    assert models("list", LINE) == 0
    assert models.out.split("\n")[:2] == [f"{LINE}@{n}: {second}, generation 2" for n in ("latest", "production")]
    assert re.search(rf"^{first}  pass  accuracy 0.7100 \(0.6600 to 0.7600\)$", models.out, re.MULTILINE)
    assert [entry["release"]["version"] for entry in models.document("list", LINE)["versions"]] == [second, first]

    assert models("show", f"{LINE}@production") == 0
    for text in ("named by: latest, production", "run r", "production 2  os:", "verdict: pass: passed 8 rules"):
        assert text in models.out
    assert models.document("show", f"{LINE}@{first}")["named_by"] == []

    assert models("diff", f"{LINE}@{first}", f"{LINE}@production") == 0
    assert "recipe: train_qlora.rank: 1 -> 2" in models.out
    assert "metric: accuracy: 0.7100 (0.6600 to 0.7600) -> 0.7200 (0.6700 to 0.7700)" in models.out
    assert models.document("diff", f"{LINE}@{first}", f"{LINE}@{second}")["same_judgement"] is True

    assert models("list", "another") == 12
    assert models("show", f"{LINE}@staging") == 12


def test_what_an_alias_names_is_listed_beside_the_newest_versions(
    models: Caller, releases: list[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (release.version for release in releases)
    assert models("promote", LINE, first, "--reason", "it was better") == 0
    monkeypatch.setattr(version_summary, "MAX_VERSIONS", 1)
    assert models("list", LINE) == 0
    versions = [line.split() for line in models.out.splitlines() if line.startswith("2026")]
    assert [(words[0], words[-1]) for words in versions] == [(second, "latest"), (first, "production")]


def test_moves_and_rejections_are_the_same_below_models_and_say_so_to_programs(
    models: Caller, releases: list[Release]
) -> None:
    first, second = (release.version for release in releases)
    rolled_back = models.document("rollback", LINE, "--reason", "it swears", "--from", second)
    assert rolled_back == {"line": LINE, "alias": "production", "version": first, "left": second, "generation": 3}
    assert models.document("rollback", LINE, "--reason", "it swears", "--from", second) == rolled_back
    assert models("rollback", LINE, "--reason", "it swears") == 12
    assert f"--from {second}" in models.err
    assert models("promote", LINE, second, "--reason", "x") == 11

    assert models("list", LINE) == 0
    assert "generation 3, 1 rejected" in models.out
    assert [line.split()[0] for line in models.out.splitlines() if "  rejected for production" in line] == [second]
    assert models("show", f"{LINE}@{second}") == 0
    assert "rejected for production: os:" in models.out
    assert models.document("unreject", LINE, second, "--reason", "x")["changed"] is True
    assert models("reject", LINE, second, "--reason", "x") == 0
    assert models("reject", LINE, second, "--reason", "x") == 0
    assert "is rejected (already)" in models.out
    assert [move["action"] for move in models.document("history", LINE)][-3:] == ["rollback", "unreject", "reject"]


def test_verify_reads_every_byte_and_repair_says_what_it_cannot_mend(
    models: Caller, releases: list[Release], root: str
) -> None:
    first, second = (release.version for release in releases)
    assert models("verify", f"{LINE}@production") == 0
    assert models.document("verify", LINE, "--all") == [
        {"reference": f"{LINE}@{version}", "fault": None} for version in (first, second)
    ]
    assert models("repair", LINE) == 0
    assert "nothing to mend" in models.out

    store = open_store(root)
    store.delete([f"{registry.version_folder(LINE, first)}/recipe.json"])
    store.delete([f"{registry.version_folder(LINE, second)}/manifest.json"])
    assert models("verify", LINE, "--all") == 13
    assert "recipe.json: missing" in models.out
    assert "the audit trail says that it had one" in models.out
    assert models("verify", f"{LINE}@20990101T000000Z-{0:012x}") == 12
    findings = models.document("repair", LINE, "--dry-run", code=13)
    assert [finding["subject"] for finding in findings] == ["latest", "production"]


def test_an_export_comes_as_a_file_or_a_folder_whole_or_not_at_all(models: Caller, root: str, tmp_path: Path) -> None:
    store = open_store(root)
    release = small_versions.publish(store, 1)
    right = small_versions.files_of(1)[small_versions.EXPORT]
    for destination, file in (("a/model.gguf", "a/model.gguf"), ("folder", "folder/model-q8_0.gguf")):
        for _ in range(2):
            assert models("export", f"{LINE}@production", "gguf-q8_0", str(tmp_path / destination)) == 0
            assert (tmp_path / file).read_bytes() == right
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["model.gguf"]

    assert models("export", f"{LINE}@production", "gguf-q8_0", str(tmp_path / ("n" * 300))) == 12
    assert "File name too long" in models.err

    (tmp_path / "mine.gguf").write_text("of a person")
    assert models("export", f"{LINE}@production", "gguf-q8_0", str(tmp_path / "mine.gguf")) == 12
    assert models("export", f"{LINE}@production", "gguf-q4_0", str(tmp_path / "b")) == 12
    assert "it has gguf-q8_0" in models.err

    path = Path(root.removeprefix("file://")) / registry.version_folder(LINE, release.version) / small_versions.EXPORT
    path.write_bytes(right[:-1] + b"x")
    assert models("export", f"{LINE}@production", "gguf-q8_0", str(tmp_path / "c.gguf")) == 13
    assert not (tmp_path / "c.gguf").exists()
    assert not list(tmp_path.glob(".export-*"))


def test_an_export_that_is_interrupted_goes_on_where_it_stopped_and_leaves_nothing(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(root)
    release = small_versions.publish(store, 1)
    right = small_versions.files_of(1)[small_versions.EXPORT]
    ranges: list[int] = []
    interruptions: list[BaseException] = [TryAgain("the store is busy"), KeyboardInterrupt()]

    def read_range(self: Any, path: str, start: int, size_bytes: int) -> bytes:
        ranges.append(start)
        if start == 300 and interruptions:
            raise interruptions.pop()
        return right[start : start + size_bytes]

    monkeypatch.setattr(range_download, "RANGE_BYTES", 100)
    monkeypatch.setattr(type(store), "read_range", read_range)
    for error in (KeyboardInterrupt, TryAgain):
        with pytest.raises(error):
            Registry(root).export(f"{LINE}@{release.version}", "gguf-q8_0", tmp_path / "model.gguf")
        assert not (tmp_path / "model.gguf").exists()
    ranges.clear()
    Registry(root).export(f"{LINE}@{release.version}", "gguf-q8_0", tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == right
    assert min(ranges) == 300
    assert not list(tmp_path.glob(".export-*"))

    # In a folder that somebody else has prepared, nothing is assembled.
    foreign = export_folder.folder_of(tmp_path, f"{LINE} gguf-q8_0 b.gguf")
    foreign.symlink_to(tmp_path / "a")
    Registry(root).export(f"{LINE}@{release.version}", "gguf-q8_0", tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == right
    assert not (tmp_path / "a").exists()


def test_a_probe_and_a_pull_print_one_document(models: Caller, releases: list[Release], tmp_path: Path) -> None:
    assert models.document("probe")["conditional_writes"] is True
    # Of a version without weights, whose content is none.
    assert models("pull", f"{LINE}@production", str(tmp_path / "model"), "--json") == 13
    release = small_versions.publish(Registry(models.root).store, 3)
    pulled = models.document("pull", f"{LINE}@production", str(tmp_path / "model"))
    assert (pulled["version"], pulled["manifest_sha256"]) == (release.version, release.sha256)


def test_the_documents_for_programs_have_the_documented_fields(models: Caller, tmp_path: Path) -> None:
    store = open_store(models.root)
    first, _, third = (small_versions.publish(store, number) for number in (1, 2, 3))
    production, reason = f"{LINE}@production", ("--reason", "x")
    calls = {
        "show": (production,),
        "diff": (f"{LINE}@{first.version}", production),
        "verify": (production,),
        "pull": (production, str(tmp_path / "model")),
        "export": (production, "gguf-q8_0", str(tmp_path / "export")),
        "promote": (LINE, first.version, "--alias", "staging", *reason),
        "rollback": (LINE, *reason),
        "reject": (LINE, first.version, *reason),
        "unreject": (LINE, first.version, *reason),
        "gc": (),
        "probe": (),
    }
    rows = re.findall(r"^\| (`[^|]+`) \| (.*`.*) \|$", DOCS.read_text().partition("## For programs")[2], re.MULTILINE)
    documented = {verb: (text.startswith("a list"), re.findall(r"`([a-z0-9_]+)`", text))
                  for verbs, text in rows for verb in re.findall("`([a-z]+)`", verbs)}  # fmt: skip
    for verb, (is_list, names) in documented.items():
        if verb == "repair":
            store.delete([f"models/{LINE}/aliases/staging.json"])
        document = models.document(verb, *calls.get(verb, (LINE,)))
        fields = document[0] if is_list else document
        # `null` is a value; a state without rejections has no such field.
        left_out = {"null", "rejections"} if is_list else {"null"}
        assert set(fields) - left_out == set(names) - left_out, verb
    details = models.document("show", f"{LINE}@{third.version}")
    assert details["summary"]["release"]["manifest_sha256"] == third.sha256


def test_a_download_shows_a_bar_on_a_terminal_alone(
    models: Caller, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_versions.publish(open_store(root), 1)
    assert models("pull", f"{LINE}@production", str(tmp_path / "quiet")) == 0
    assert "%" not in models.err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert models("pull", f"{LINE}@production", str(tmp_path / "shown")) == 0
    assert "download: 100%" in models.err


def test_the_example_of_the_documentation_runs(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        small_versions.publish(open_store(root), number)
    (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert "s3://models/qlora" in example
    monkeypatch.chdir(tmp_path)
    example = example.replace("s3://models/qlora", root).replace("support-intents", LINE)
    scope: dict[str, Any] = {}
    exec(compile(example, str(DOCS), "exec"), scope)
    assert (tmp_path / "model" / "manifest.json").is_file()
    assert (tmp_path / "model.gguf").is_file()
    state, _ = registry.read_alias(open_store(root), LINE, PRODUCTION)
    assert state is not None
    assert state.action == "rollback"
