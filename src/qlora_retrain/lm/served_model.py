"""Load the form of a model that ships: a merged model, or an adapter alone over the base that it needs.

    <version>/model/base.json    which base: the hashes of its files, and its 4-bit form where it is served over that
    <version>/model/             the tokenizer, the chat format and the generation config; no weights
    <version>/adapter/           the adapter

Without `base.json`, `model/` is the whole model. Whoever loads an adapter over another base than it was certified over
gets another model, so the files of the base are compared by their hashes first.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.core.safety import read_json
from qlora_retrain.lm import base_formats, loading
from qlora_retrain.lm.base_formats import FourBits
from qlora_retrain.lm.loading import LoadOptions
from qlora_retrain.lm.model_files import weight_paths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "base.json"
ORIGINAL, DEQUANTIZED = "original", "dequantized"


@dataclass(frozen=True, slots=True)
class BaseReference:
    """The base of an adapter that ships alone; `base.json` has these names.

    Attributes:
        form: `original`: the 16-bit weights; `dequantized`: their packed form, which `quantization` describes.
        files: The sha256 of each file of the original base by its path: its weights and config.json.
        quantization: The entry `quantization_config` of the packed form's config.json.
    """

    form: str
    files: dict[str, str]
    quantization: dict[str, Any] | None = None

    @classmethod
    def from_folders(cls, form: str, base_model: Path, base_nf4: Path) -> BaseReference:
        """Describe the bases of a run; one that is not packed has the original form alone.

        Raises:
            UsageError: If the packed form is one that its config.json does not describe.
        """
        if form == ORIGINAL:
            return cls(form, hashes(base_model))
        quantization = read_json(base_nf4 / "config.json", base_nf4.name).get("quantization_config")
        if not isinstance(quantization, dict):
            raise UsageError(
                f"{base_nf4.name}: its config.json does not say how it is packed, so nobody could serve an adapter "
                "alone over it; set merge.base: original"
            )
        return cls(form, hashes(base_model), quantization)

    @classmethod
    def read(cls, model: Path) -> BaseReference | None:
        """Read what a model folder says; None where it holds the whole model.

        Raises:
            IntegrityError: If the file is damaged.
        """
        if not (model / FILE).is_file():
            return None
        document = read_json(model / FILE, model.name)
        try:
            reference = cls(**document)
        except TypeError as error:
            raise IntegrityError(f"{model.name}/{FILE}: expected form, files and quantization: {error}") from error
        if reference.form not in (ORIGINAL, DEQUANTIZED) or not isinstance(reference.files, dict):
            raise IntegrityError(
                f"{model.name}/{FILE}: the form {reference.form!r} is none of {ORIGINAL}, {DEQUANTIZED}"
            )
        return reference

    def write(self, model: Path) -> None:
        """Write it to a model folder."""
        (model / FILE).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def refuse_other(self, base_model: Path, label: str) -> None:
        """Raise `UsageError` for a base with other files than these; `label` is what needs the base."""
        actual = hashes(base_model)
        if different := [path for path in {**self.files, **actual} if self.files.get(path) != actual.get(path)]:
            raise UsageError(
                f"{label}: is an adapter over another base model than {base_model}: {sorted(different)[0]} has "
                f"{_short(actual.get(different[0]))} there and {_short(self.files.get(different[0]))} in {FILE}; give "
                "the base that it was trained over"
            )


def load(model: Path, adapter: Path, base_model: Path, base_nf4: Path | None, **options: Unpack[LoadOptions]) -> Any:
    """Load a form in evaluation mode.

    Args:
        model: The folder of the form: a whole model, or one with `base.json`.
        adapter: The adapter of the latter.
        base_model: The original base that is there.
        base_nf4: Its packed form that is there, if any; where it is packed otherwise, the original is packed anew.
        options: As the loaders take them.

    Raises:
        UsageError: If the base is another one than the adapter's, or its packed form cannot be made.
        IntegrityError: If a folder is unsafe or damaged.
    """
    reference = BaseReference.read(model)
    if reference is None:
        return loading.load_base(model, **options)
    reference.refuse_other(base_model, model.parent.name)
    return loading.attach_adapter(load_base(reference, base_model, base_nf4, options), adapter)


def load_base(
    reference: BaseReference, base_model: Path, base_nf4: Path | None, options: LoadOptions
) -> PreTrainedModel:
    """Load a base in the form that a reference names; it must be the reference's."""
    if reference.quantization is None:
        return loading.load_base(base_model, **options)
    settings = {"quantization_config": reference.quantization}
    if (
        base_nf4
        and read_json(base_nf4 / "config.json", base_nf4.name).get("quantization_config") == reference.quantization
    ):
        return loading.load_nf4(base_nf4, **options)
    base_format = base_formats.from_model_config(settings, FILE)
    if not isinstance(base_format, FourBits):
        raise UsageError(
            f"{FILE}: its adapter is served over a base in a form that only `quantize_model` makes; give that form too"
        )
    return _pack(reference, base_format, base_model, options)


def _pack(reference: BaseReference, base_format: FourBits, base_model: Path, options: LoadOptions) -> PreTrainedModel:
    """Pack the original while it is read, as `quantize_model` does: the same codes."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig.from_dict(reference.quantization)

    def from_pretrained(_: str) -> PreTrainedModel:
        packed: LoadOptions = {**options, "dtype": base_format.compute_dtype}
        return loading.load_base(base_model, **packed, quantization=quantization)

    dtype = loading.resolve_dtype(options["dtype"], options["device"])
    return base_format.load(from_pretrained, is_float32=dtype == "float32")


def hashes(base_model: Path) -> dict[str, str]:
    """Return the sha256 of the files of a base that decide what it computes, by path."""
    paths = [base_model / "config.json", *weight_paths(base_model)]
    return {path.relative_to(base_model).as_posix(): _sha256(path, *_state(path)) for path in paths}


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache
def _sha256(path: Path, size_bytes: int, modified_ns: int) -> str:
    """Hash a file once for as long as it stays as it is, since a step loads several forms over one base."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(sha256: str | None) -> str:
    return "no such file" if sha256 is None else f"the sha256 {sha256[:12]}"
