"""Load a pulled version: its model, or its adapter over the base that it names.

The base of an adapter alone is the folder that `--base` names; else, by `--root`, the packed base in the store or the
source that the version's run was planned with; else what the version names on the Hugging Face Hub. Its files must have
the hashes that the version states.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlora_retrain.core import graph, safety
from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.lm import base_formats, loading, served_model
from qlora_retrain.lm.loading import LoadOptions
from qlora_retrain.lm.served_model import BaseReference

OPTIONS: LoadOptions = {"device": "cpu", "attn_implementation": "eager", "dtype": "auto"}


def load_version(folder: Path, base: Path | None, root: str | None) -> Any:
    """Load a pulled version, or a model folder, in evaluation mode.

    Args:
        folder: The folder.
        base: The original base of an adapter alone, where the caller has it.
        root: The store's URI, where the run's base may be.

    Raises:
        UsageError: If there is no base, or it is another one.
    """
    model, adapter = (folder / "model", folder / "adapter") if (folder / "model").is_dir() else (folder, folder)
    reference = BaseReference.read(model)
    if reference is None:
        if base is not None:
            raise UsageError(f"--base: {folder} has a model of its own, and needs no base; leave --base out")
        # The export of `merge.exports: [nf4]` is a model folder too.
        is_packed = base_formats.from_folder(model).is_packed
        load = loading.load_nf4 if is_packed else loading.load_base
        if model != folder:
            return load(model, **OPTIONS)
        with model_files(folder) as base:
            return load(base, **OPTIONS)
    # A store that the caller names comes before the Hub, which may be out of reach.
    if base is None and root is not None and (stored := _base_of_the_store(folder, reference, root)):
        return loading.attach_adapter(loading.load_nf4(stored, **OPTIONS), adapter)
    if base is None:
        base = (root is not None and _base_of_the_plan(folder, root)) or _base_of_the_hub(folder)
    if base is None:
        weights = next(path for path in reference.files if path.endswith(".safetensors"))
        raise UsageError(
            f"{folder}: is an adapter alone, and needs its base model, whose {weights} has the sha256 "
            f"{reference.files[weights]}; give its folder with --base, or with --root the store in which it was trained"
        )
    refuse_no_model(base)
    reference.refuse_other(base, folder.name)
    with model_files(base) as base:
        return loading.attach_adapter(served_model.load_base(reference, base, None, OPTIONS), adapter)


def refuse_no_model(base: Path) -> None:
    """Raise `UsageError` where a base that a person named is no model folder."""
    if not (base / "config.json").is_file():
        raise UsageError(f"{base}: expected the folder of a base model (config.json), found none")


@contextlib.contextmanager
def model_files(folder: Path) -> Iterator[Path]:
    """Lend a folder with the files of a base from which a model is loaded, as a run takes them.

    A base from the Hugging Face Hub has others, such as `.gitattributes`. The loaders refuse them, since they read what
    this project wrote.
    """
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    model_paths = [path for path in paths if safety.is_model_file(path)]
    if model_paths == paths:
        yield folder
        return
    safety.refuse_only_pickles(model_paths, paths, str(folder))
    with TemporaryDirectory(prefix="qlora-retrain-base-") as temporary:
        # By the same name, which messages have.
        links = Path(temporary) / (folder.absolute().name or "base")
        for path in model_paths:
            (links / path).parent.mkdir(parents=True, exist_ok=True)
            (links / path).symlink_to((folder / path).absolute())
        yield links


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return the manifest of a pulled version; empty where the folder has none."""
    path = folder / "manifest.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return document


def _base_of_the_hub(folder: Path) -> Path | None:
    """Return the base that a version names on the Hub, through the cache of this machine; None where it names none."""
    from qlora_retrain.storage import sources

    uri = manifest_of(folder).get("base", {}).get("source")
    if uri is None:
        return None
    return _fetch(sources.pin(sources.BASE, uri, ("**",)))


def _base_of_the_plan(folder: Path, root: str) -> Path | None:
    """Return the base that the version's run was planned with; None where that plan is gone, or its source is."""
    from qlora_retrain.pipeline.plan import Plan
    from qlora_retrain.storage import sources

    run = manifest_of(folder).get("provenance", {}).get("run_id")
    try:
        source = Plan.of_run(root, run).sources[sources.BASE] if run else None
        return _fetch(source) if source else None
    except Problem:
        return None


def _fetch(source: Any) -> Path:
    from qlora_retrain.storage import cache, sources

    return cache.fetch(sources.BASE, source.key(), lambda target: sources.fetch(source, target), source.as_files())


def _base_of_the_store(folder: Path, reference: BaseReference, root: str) -> Path | None:
    """Return the base of the version's run, where the store has it in the form that the adapter is served over."""
    from qlora_retrain.pipeline import fetch
    from qlora_retrain.storage import artifact, open_store

    key = manifest_of(folder).get("keys", {}).get(graph.producer_name("base_nf4"))
    store = open_store(root)
    manifest = artifact.find_manifest(store, "base_nf4", key) if key else None
    if manifest is None:
        return None
    stored = fetch.fetch_artifact(store, manifest)
    is_packed = base_formats.from_folder(stored).is_packed
    return stored if is_packed == (reference.form == served_model.DEQUANTIZED) else None
