"""What the pages name exists: files, functions, tests, knobs and local links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from qlora_retrain.config.cluster_profile import ClusterProfile, PodConfig
from qlora_retrain.config.line import LineConfig
from qlora_retrain.config.platform import RuntimeConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "components/*/README.md", "pipelines/demo/*.md")
    for page in ROOT.glob(pattern)
)
TOPS = ("src", "components", "dags", "pipelines", "images", "manifests", "benchmarks", "tests", "docs")
TREE = [path.relative_to(ROOT).as_posix() for top in TOPS for path in (ROOT / top).rglob("*")]
PYTHON = {path: (ROOT / path).read_text() for path in TREE if path.endswith(".py")}
TESTS = set(re.findall(r"^def (test_\w+)", "\n".join(PYTHON.values()), re.MULTILINE))
SECTIONS = {
    name: set(field.annotation.model_fields)
    for name, field in LineConfig.model_fields.items()
    if hasattr(field.annotation, "model_fields")
} | {"runtime": set(RuntimeConfig.model_fields)}
FILE = r"[\w./*<>-]+\.(?:py|yaml|md|sh|toml|lock|Dockerfile)"
EXAMPLES = {"pipelines/my-line.yaml", "LICENCE.md"}  # a reader's own line, a file of a published version
SUFFIXES = {"json", "jsonl", "csv", "html", "py", "md"}  # `train.jsonl` is a file and no knob


def exists(path: str) -> bool:
    """Whether the tree has the file, named from the root or by the end of its path; `*` and `<step>` match any name."""
    if path in EXAMPLES or (ROOT / path).exists():
        return True
    pattern = re.escape(path).replace(r"\*", "[^/]*").replace("<step>", "[^/]+")
    return any(re.search(rf"(^|/){pattern}$", candidate) for candidate in TREE)


def wrong_names(text: str, folder: Path) -> Iterator[str]:
    """Every name on the page that the tree does not have."""
    # An anchor is checked by `make docs`, which knows the ids of headings.
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        if not (folder / target).exists():
            yield f"link {target}"
    for path in re.findall(rf"`({FILE})`", text) + re.findall(rf"(?<![\w/])((?:{'|'.join(TOPS)})/{FILE})", text):
        if not exists(path):
            yield f"file {path}"
    for path, name in re.findall(r"`([\w./-]+\.py)::(\w+)`", text):
        sources = [source for candidate, source in PYTHON.items() if f"/{candidate}".endswith(f"/{path}")]
        if not any(re.search(rf"^\s*(?:(?:def|class) )?{name}\b", source, re.MULTILINE) for source in sources):
            yield f"name {path}::{name}"
    yield from (f"test {name}" for name in re.findall(r"`(test_\w+)`", text) if name not in TESTS)
    for section, knob in re.findall(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z][a-z0-9_]*)\b", text):
        if knob not in SECTIONS[section] | SUFFIXES:
            yield f"knob {section}.{knob}"
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        for section, knobs in yaml.safe_load(block).items():
            # Lines' sources are a section; the platform's are a list.
            names = set(knobs) if isinstance(knobs, dict) else set()
            yield from (f"knob {section}.{knob}" for knob in names - SECTIONS.get(section, names))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_what_a_page_names_exists(page: Path) -> None:
    assert list(wrong_names((ROOT / page).read_text(), (ROOT / page).parent)) == []


def test_a_page_with_wrong_names_is_refused() -> None:
    text = """[a](none.md) `none.py` in src/qlora_retrain/none.py, `core/graph.py::none`, `test_none`, train.none
```yaml
merge: {none: 1}
```
and what is right: [b](README.md#x) `core/graph.py::step`, `components/<step>/step.py`, train.rank, train.jsonl"""
    kinds = [name.split()[0] for name in wrong_names(text, ROOT)]
    assert " ".join(kinds) == "link file file name test knob knob"


def test_the_tables_of_knobs_without_their_section_name_fields() -> None:
    table = (ROOT / "docs" / "lines.md").read_text().split("## The verdict")[1].split("## ")[0]
    cells = " ".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", cells)) <= SECTIONS["evaluate"]

    profile_fields = set(re.findall(r"profile's `(\w+)`", "".join((ROOT / page).read_text() for page in PAGES)))
    assert profile_fields
    assert profile_fields <= set(ClusterProfile.model_fields) | set(PodConfig.model_fields)
