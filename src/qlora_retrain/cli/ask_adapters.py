"""Answer with several adapters over one base that is loaded once.

Adapters of one of PEFT's kinds are in memory together, and PEFT switches between them. Of another kind, one is attached
after the other. An adapter states the hashes of its base in its version, and one of another base is refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.cli.ask_base import OPTIONS, manifest_of, model_files, refuse_no_model
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.safety import read_json
from qlora_retrain.lm import attach_own, loading, served_model
from qlora_retrain.lm.adapter_kind import BOTTLENECK, CONFIG_FILE, PREFIX, PROMPT, adapter_kind
from qlora_retrain.lm.served_model import BaseReference

if TYPE_CHECKING:
    from qlora_retrain.lm.generation import Completion

Ask = Callable[[Any, "Adapter"], "list[Completion]"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that is asked.

    Attributes:
        name: The caller's for it.
        folder: PEFT's two files.
        chat_folder: The folder with the tokenizer of its version; None: it has none, and the base's is taken.
        system: The system turn of its training.
        base_pins: The sha256 of its base's files by path, as its version states them; empty where nothing states them.
        reference: What its version says of the base that it is served over, where it is an adapter alone.
    """

    name: str
    folder: Path
    chat_folder: Path | None = None
    system: str | None = None
    base_pins: Mapping[str, str] = field(default_factory=dict)
    reference: BaseReference | None = None

    @classmethod
    def from_argument(cls, argument: str, find_root: Callable[[], str]) -> Adapter:
        """Parse `NAME=VERSION` or `VERSION`: a pulled one, LINE@ALIAS of a store, or a folder with PEFT's two files.

        Args:
            argument: What the caller gave.
            find_root: Returns the store's URI, where one is needed.

        Raises:
            UsageError: If it is none of these.
        """
        name, equals, path = argument.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name):
            name, path = Path(argument).name, argument
        folder = Path(path)
        if "@" in path and not folder.exists():
            return cls._from_store(name, path, find_root())
        if (folder / "recipe.json").is_file():
            return cls._from_version(name, folder, manifest_of(folder).get("base", {}))
        if not (folder / CONFIG_FILE).is_file():
            raise UsageError(
                f"--adapter {argument}: expected a pulled version (recipe.json), an adapter's folder "
                f"({CONFIG_FILE}) or LINE@ALIAS, found none of them"
            )
        return cls(name, folder)

    @classmethod
    def _from_store(cls, name: str, reference: str, root: str) -> Adapter:
        from qlora_retrain.storage import cache, open_store, pull, registry

        store = open_store(root)
        release, _ = pull.resolve(store, reference)
        files = tuple(
            file
            for file in release.parts("adapter", "model", "recipe.json")
            if not (file.path.startswith("model/") and file.path.endswith((".safetensors", ".gguf")))
        )
        prefix = registry.version_folder(release.line, release.version)

        def download(target: Path) -> None:
            store.download(prefix, [file.path for file in files], target)

        return cls._from_version(name, cache.fetch("asked_adapter", release.sha256, download, files), release.base)

    @classmethod
    def _from_version(cls, name: str, folder: Path, base: Mapping[str, Any]) -> Adapter:
        from qlora_retrain.cli.ask import system_turn

        if not (folder / "adapter" / CONFIG_FILE).is_file():
            raise UsageError(
                f"--adapter {name}: {folder} has no adapter, since all of its weights trained or publish.parts leaves "
                "it out; ask it alone"
            )
        reference = BaseReference.read(folder / "model")
        pins = base.get("files", {})
        hashes = {path: pin.removeprefix("sha256:") for path, pin in pins.items() if pin.startswith("sha256:")}
        system = system_turn(folder / "recipe.json")
        return cls(name, folder / "adapter", folder / "model", system, hashes, reference)

    def refuse_other_base(self, base: Path) -> None:
        """Compare the base with the hashes that the adapter's version states; say where nothing states them.

        Raises:
            UsageError: If a file differs.
        """
        if self.reference is not None:
            self.reference.refuse_other(base, f"--adapter {self.name}")
            return
        actual = served_model.hashes(base)
        common = self.base_pins.keys() & actual.keys()
        if not common:
            print(f"note: nothing says over which base {self.name} was trained; this one is taken", file=sys.stderr)
        if different := sorted(path for path in common if self.base_pins[path] != actual[path]):
            raise UsageError(
                f"--adapter {self.name}: was trained over another base than {base}: {different[0]} has the sha256 "
                f"{actual[different[0]][:12]} there, and {self.base_pins[different[0]][:12]} in its manifest; give the "
                "base that it was trained over"
            )

    @property
    def group(self) -> str:
        """What PEFT holds together: one kind of its own; empty where an adapter must be alone."""
        kind = adapter_kind(self.folder)
        # DoRA's row scales are computed once for a layer.
        is_dora = read_json(self.folder / CONFIG_FILE, self.name).get("use_dora")
        return "" if kind in (PROMPT, BOTTLENECK, PREFIX) or is_dora else str(kind)


def answer_over_base(base: Path, adapters: Sequence[Adapter], ask: Ask) -> dict[str, list[Completion]]:
    """Return what `ask` returns for each adapter over the base, by name, in the order of the adapters.

    Raises:
        UsageError: If two adapters have one name, or one is of another base, or they need several forms of it.
    """
    names = [adapter.name for adapter in adapters]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"--adapter: two are called {repeated}; name them with --adapter NAME=FOLDER")
    refuse_no_model(base)
    for adapter in adapters:
        adapter.refuse_other_base(base)
    references = {adapter.name: adapter.reference for adapter in adapters}
    forms = {str(reference and reference.quantization) for reference in references.values()}
    if len(forms) > 1:
        raise UsageError(
            "--adapter: some are served over the base in 16 bits and others over a packed base; ask those of each form "
            "in a command of its own"
        )

    reference = next((reference for reference in references.values() if reference), None)
    with model_files(base) as folder:
        model: Any = (
            served_model.load_base(reference, folder, None, OPTIONS)
            if reference
            else loading.load_base(folder, **OPTIONS)
        )
    answers: dict[str, list[Completion]] = {}
    for group, members in groupby(sorted(adapters, key=lambda adapter: adapter.group), lambda adapter: adapter.group):
        for adapter, adapted in _attached(model, list(members), is_together=bool(group)):
            answers[adapter.name] = ask(adapted, adapter)
    return {name: answers[name] for name in names}


def _attached(base: Any, adapters: Sequence[Adapter], *, is_together: bool) -> Iterator[tuple[Adapter, Any]]:
    """Yield each adapter with the model that computes with it; the base is as before after the last."""
    if not is_together:
        for adapter in adapters:
            adapted = loading.attach_adapter(base, adapter.folder)
            yield adapter, adapted
            attach_own.detach(adapted)
        return
    model = base
    # By numbers, since PEFT takes no dot in a name.
    for number, adapter in enumerate(adapters):
        model = loading.attach_adapter(model, adapter.folder, str(number))
    for number, adapter in enumerate(adapters):
        model.set_adapter(str(number))
        yield adapter, model.eval()
    attach_own.detach(model)
