"""Code identity: what changes a result changes the key; what only carries, shows or explains it does not."""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.pipeline import code_identity

STEPS = [s.name for s in graph.STEPS]
Edit = Callable[[str, Callable[[str], str]], set[str]]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what code identity looks at."""
    root = code_identity.project_root()
    keep = shutil.ignore_patterns("__pycache__", "*.md")
    shutil.copytree(root / "components", tmp_path / "copy" / "components", ignore=keep)
    shutil.copytree(root / "src", tmp_path / "copy" / "src", ignore=keep)
    shutil.copy(root / "constraints.txt", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def edit(tree: Path) -> Edit:
    """Edit a file of the tree; which steps have another identity afterwards."""

    def identities() -> dict[str, str]:
        code_identity.code_hash.cache_clear()
        code_identity._pins.cache_clear()
        return {name: code_identity.code_hash(name, tree) for name in STEPS}

    def apply(path: str, change: Callable[[str], str]) -> set[str]:
        before = identities()
        text = (tree / path).read_text()
        assert change(text) != text
        (tree / path).write_text(change(text))
        after = identities()
        return {name for name in STEPS if before[name] != after[name]}

    return apply


def importers(tree: Path, package: str, module: str) -> set[str]:
    """The steps whose files import a library module, one import deep: found apart from the code under test."""
    library = [p for name in code_identity.HASHED_PACKAGES for p in (tree / "src/qlora_retrain" / name).rglob("*.py")]
    names = {(package, module)} | {(p.parent.name, p.stem) for p in library if _imports_name(p, package, module)}
    return {
        step
        for step in STEPS
        for path in (tree / "components" / step).glob("*.py")
        if any(_imports_name(path, *name) for name in names)
    }


def _imports_name(path: Path, package: str, module: str) -> bool:
    return any(
        isinstance(node, ast.ImportFrom)
        and (
            (node.module == f"qlora_retrain.{package}" and module in [a.name for a in node.names])
            or node.module == f"qlora_retrain.{package}.{module}"
        )
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_a_copy_of_the_tree_elsewhere_has_the_same_identities(tree: Path) -> None:
    assert {n: code_identity.code_hash(n, tree) for n in STEPS} == {n: code_identity.code_hash(n) for n in STEPS}


def test_every_step_has_another_identity() -> None:
    assert len({code_identity.code_hash(n) for n in STEPS}) == len(STEPS)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "# a comment\n\n\n" + text,
        lambda text: text + "\n\n# the end\n",
        lambda text: text.replace('"""', '"""Another explanation. ', 1),
        lambda text: ast.unparse(ast.parse(text)),  # all comments gone, all lines laid out anew
    ],
    ids=["comment before", "comment after", "docstring", "format"],
)
@pytest.mark.parametrize("path", ["components/publish/step.py", "src/qlora_retrain/lm/chat.py"])
def test_what_only_explains_code_changes_no_identity(edit: Edit, path: str, change: Callable[[str], str]) -> None:
    assert edit(path, change) == set()


CARRIERS = (
    "cli/main pipeline/plan pipeline/execute storage/registry pipeline/explain core/progress core/html core/errors"
)


@pytest.mark.parametrize("name", CARRIERS.split())
def test_a_change_of_what_only_carries_results_changes_no_identity(edit: Edit, name: str) -> None:
    assert edit(f"src/qlora_retrain/{name}.py", lambda text: text + "\nMORE = 1\n") == set()


def test_a_change_of_the_config_models_changes_no_identity_by_itself(edit: Edit) -> None:
    assert edit("src/qlora_retrain/config/sections.py", lambda text: text + "\nMORE = 1\n") == set()


def test_a_change_of_one_steps_helper_changes_that_step_alone(edit: Edit) -> None:
    assert edit("components/publish/documents.py", lambda text: text + "\nMORE = 1\n") == {"publish"}


def test_a_change_of_chat_changes_every_step_that_imports_it(edit: Edit, tree: Path) -> None:
    expected = importers(tree, "lm", "chat")
    assert {"validate_data", "train_qlora", "merge_adapter"} <= expected
    assert "publish" not in expected
    assert edit("src/qlora_retrain/lm/chat.py", lambda text: text + "\nMORE = 1\n") == expected


def test_a_change_of_the_tokenizer_files_changes_the_steps_that_copy_them(edit: Edit) -> None:
    without_vocab = edit("src/qlora_retrain/lm/tokenizer_files.py", lambda text: text.replace('    "vocab*",\n', ""))
    assert without_vocab == {"quantize_model", "merge_adapter"}


def test_a_changed_constant_counts(edit: Edit) -> None:
    changed = edit("components/publish/contents.py", lambda text: text.replace('("adapter", "model")', "('adapter',)"))
    assert changed == {"publish"}


def test_another_version_of_a_package_changes_the_steps_that_import_it(edit: Edit) -> None:
    changed = edit("constraints.txt", lambda text: text.replace("\nbitsandbytes==", "\nbitsandbytes==9."))
    assert "quantize_model" in changed
    assert not changed & {"validate_data", "publish"}


def test_a_package_below_transformers_counts_though_nobody_imports_it_by_name(edit: Edit) -> None:
    assert "quantize_model" in edit("constraints.txt", lambda text: text.replace("\ntokenizers==", "\ntokenizers==9."))


def test_a_package_that_shapes_no_result_changes_nothing(edit: Edit) -> None:
    assert edit("constraints.txt", lambda text: text.replace("\napache-airflow==", "\napache-airflow==9.")) == set()


def test_a_package_without_a_pin_is_refused(edit: Edit) -> None:
    with pytest.raises(UsageError, match="pins no version of bitsandbytes"):
        edit("constraints.txt", lambda text: text.replace("\nbitsandbytes==", "\n# bitsandbytes=="))


def test_a_step_without_files_is_refused(tree: Path) -> None:
    with pytest.raises(UsageError, match="no Python files"):
        code_identity.code_hash("train", tree)


def test_no_library_module_imports_relatively_because_identity_does_not_follow_that() -> None:
    for path in (code_identity.project_root() / "src").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        assert not [n.lineno for n in nodes if isinstance(n, ast.ImportFrom) and n.level], path


def test_no_component_imports_another() -> None:
    for step in STEPS:
        for path in (code_identity.project_root() / "components" / step).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
                assert not [n for n in names if n.startswith("components.") and n.split(".")[1] != step], path


def test_the_library_imports_nothing_heavy_when_it_is_loaded() -> None:
    heavy = {
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "boto3",
        "botocore",
        "airflow",
        "kfp",
        "pandas",
        "datasets",
    }
    for path in (code_identity.project_root() / "src" / "qlora_retrain").rglob("*.py"):
        if {"runtimes", "demo"} & set(path.parts):
            continue
        for node in ast.parse(path.read_text()).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            tops = {n.partition(".")[0] for n in names}
            assert not tops & heavy, path
            assert tops <= {*sys.stdlib_module_names, "qlora_retrain", "pydantic", "yaml"}, path


RULES = sorted(p.name for p in (code_identity.project_root() / "src/qlora_retrain/evaluation/rules").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", ["stats.py", "rows.py", "verdict.py", *(f"rules/{name}" for name in RULES)])
def test_a_change_of_a_rule_makes_no_data_set_and_no_adapter_again(edit: Edit, name: str) -> None:
    changed = edit(f"src/qlora_retrain/evaluation/{name}", lambda text: f"{text}\nCHANGED = True\n")
    assert "evaluate" in changed
    assert not changed & {"validate_data", "quantize_model", "train_qlora"}


# What steps use of library modules that are not hashed, and why it cannot change the bytes of an artifact that another
# step or a consumer reads. A constant needs no line here: its value is hashed.
UNHASHED = {
    "config.evaluate": "models of settings: fields and validators; the values that they let through are in the key",
    "config.data": "the same for the section `data`",
    "config.merge": "the same for the section `merge`",
    "config.publish": "the same for the section `publish`",
    "config.quantize": "the same for the section `quantize`",
    "config.sections": "models of settings: fields and validators; the values that they let through are in the key",
    "core.aliases": "names the alias that a run moves; a version has the same bytes, whichever it is",
    "core.bounds": "ends what takes too long or too much memory; a step that is ended so makes no artifact",
    "core.errors": "exceptions: a step that raises one makes no artifact; a refusal's text is no input of any step",
    "core.hashing": "sha256 and canonical JSON: with another one, no manifest and no key would be found any more",
    "core.html": "renders report.html, which people read and no step does",
    "core.json_depth": "parses JSON, and refuses what a walk by recursion could not read",
    "core.json_lines": "a writer, and a reader that gives back what the file holds, whatever its texts hold",
    "core.outcome": "a pair of numbers and a refusal, handed on as it is",
    "core.progress": "prints",
    "core.safety": "only refuses",
    "storage.release_files": "only refuses",
    "core.signals": "asks whether to stop; training resumes to the same bytes",
    "core.supervisor": "ends processes",
    "core.uris": "masks secrets in a message of the log",
    "pipeline.code_identity": "the project's folder, whose pins and code the key covers",
    "pipeline.cost": "adds what manifests say that steps cost; no part of a version's content",
    "pipeline.plan": "the plan as it is, for `publish`",
    "pipeline.step_main": "a step's command line",
    "storage.artifact": "manifests as they are, for `publish`",
    "storage.keys": "signs: whose signature a document has is no part of what was made",
    "storage.audit": "paths of the audit trail, and what is in it",
    "storage.registry": "the protocol of publishing; what it stores is what the step hands to it",
    "storage.rejections": "only refuses",
    "storage.versions": "a part of the protocol of publishing",
    "storage.version_repair": "compares bytes with hashes, and brings those that have them",
    "storage.retention": "says how long a server keeps what was written, and changes no byte of it",
    "storage.pinned_source": "a source as the plan pins it, for `publish`",
    "storage.store": "reads and writes bytes",
}


def test_all_that_a_step_uses_outside_the_hashed_packages_has_a_reason() -> None:
    root = code_identity.project_root()
    uses = {
        (module, name)
        for step in STEPS
        for _, tree in code_identity.hashed_files(step, root)
        for module, name in code_identity.library_uses(root, tree)
        if f"{module}.{name}" not in code_identity.constants(root, tree)
    }
    assert {module for module, _ in uses} == UNHASHED.keys()


def test_a_step_uses_unhashed_modules_only_in_ways_that_code_identity_sees() -> None:
    """Else a value could change under an unchanged key: imports by `import`, `*` or a dot, aliases and `getattr`."""
    for step in STEPS:
        for path, tree in code_identity.hashed_files(step, code_identity.project_root()):
            modules, attribute_owners = set(), set()
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    assert not [a.name for a in node.names if a.name.startswith("qlora_retrain")], path
                elif isinstance(node, ast.ImportFrom):
                    assert not node.level, path
                    is_ours = node.module is not None and node.module.startswith("qlora_retrain")
                    assert not (is_ours and node.names[0].name == "*"), path
                    modules |= {a.asname or a.name for a in node.names if is_ours and _is_module(node.module, a.name)}
                elif isinstance(node, ast.Attribute):
                    attribute_owners.add(id(node.value))
            for node in ast.walk(tree):
                is_name = isinstance(node, ast.Name) and node.id in modules
                assert not is_name or id(node) in attribute_owners, (
                    f"{path}: a module is used other than as module.name"
                )


def _is_module(package: str | None, name: str) -> bool:
    return code_identity._module_file(code_identity.project_root(), f"{package}.{name}".partition(".")[2]) is not None


def test_what_a_step_uses_of_unhashed_modules_is_defined_there_in_one_statement() -> None:
    """An annotated constant, one of several in a statement, one that is changed later: none of them would be hashed."""
    root = code_identity.project_root()
    uses = {
        use
        for step in STEPS
        for _, tree in code_identity.hashed_files(step, root)
        for use in code_identity.library_uses(root, tree)
    }
    # Types that these modules import from another one.
    reexported = {
        ("pipeline.step_main", "StepFunction"),
        ("storage.registry", "Release"),
        ("config.sections", "EvaluateConfig"),
    }
    for module, name in uses - reexported:
        path = code_identity._module_file(root, module)
        assert path is not None
        tree = ast.parse(path.read_text())
        named = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
        assigned = [n for n in tree.body if isinstance(n, ast.Assign) and [ast.unparse(t) for t in n.targets] == [name]]
        bound = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store)]
        assert (len(named), len(assigned), len(bound)) in ((1, 0, 0), (0, 1, 1)), f"{module}.{name}"


def test_no_step_reads_a_report() -> None:
    """The reason given for `core.html`: a page's name is only ever written."""
    for step in STEPS:
        for path, tree in code_identity.hashed_files(step, code_identity.project_root()):
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    is_reading = node.func.attr in ("read_text", "read_bytes", "open", "read")
                    assert not (is_reading and ".html" in ast.unparse(node)), path


def test_a_constant_of_an_unhashed_module_counts_for_the_steps_that_use_it(edit: Edit) -> None:
    users = edit("src/qlora_retrain/core/graph.py", lambda text: text.replace("data/profile.json", "data/drift.json"))
    assert users == {"validate_data", "train_qlora", "evaluate"}


def test_every_hashed_constant_is_a_literal_so_that_its_source_is_its_value() -> None:
    root = code_identity.project_root()
    for step in STEPS:
        for _, tree in code_identity.hashed_files(step, root):
            for name, source in code_identity.constants(root, tree).items():
                if name != "core.outcome.Number":  # a type
                    assert ast.literal_eval(source) is not None, name
