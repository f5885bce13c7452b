"""Which files of a folder hold rows, and by their first bytes in which format; anything else is refused by name.

A suffix is only a hint: a file that ends in .json may hold JSON lines, and a login page may end in .csv.
"""

from __future__ import annotations

import json
import re
import shlex
import zipfile
from collections.abc import Sequence
from pathlib import Path

from components.validate_data.readers.source_file import SourceFile
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.evaluation.data_files import SUFFIXES, Format, find_beside_data

_TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
# First bytes of formats that are not read, with what to do.
_OTHER_FORMATS = (
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel or Word file", "save it as CSV UTF-8"),
    (b"SQLite format 3\x00", "an SQLite database", "export the table as CSV: `sqlite3 -header -csv FILE 'select ...'`"),
    (b"%PDF-", "a PDF", "extract the rows from it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and name the folder"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it and name the folder"),
    (b"\x93NUMPY", "a NumPy array", "write its rows as JSON lines"),
    (b"\x89HDF", "an HDF5 file", "write its rows as JSON lines"),
    (b"Obj\x01", "an Avro file", "write its rows as JSON lines or Parquet"),
    (b"ORC", "an ORC file", "write its rows as Parquet"),
    (b"FEA1", "a Feather file of version 1", "write its rows as Parquet"),
    (b"\x89PNG", "an image", "only text is trained on"),
    (b"\xff\xd8\xff", "an image", "only text is trained on"),
    (b"GIF8", "an image", "only text is trained on"),
    (b"RIFF", "an image or a sound", "only text is trained on"),
    (b"{\\rtf", "an RTF document", "save it as plain text"),
    (b"<?xml", "XML", "write its rows as JSON lines"),
)  # fmt: skip
_MAX_ERROR_BYTES = 1000
_MAX_SHOWN_CHARACTERS = 200
_SAMPLE_LINES = 20
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HTML = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_JSON_OBJECT = re.compile(r'\s*(\[\s*)*\{\s*("|\})')
# What servers answer instead of a file that is not there or not allowed.
_ERROR_TEXT = re.compile(
    rb"(404: )?not found\s*$|entry not found|repository not found|access (denied|to \S+ \S+ is restricted)|"
    rb"invalid (username|credentials)|unauthorized\s*$|forbidden\s*$|<\?xml[^>]*>\s*<error>",
    re.IGNORECASE,
)
# Words in the name of a file that is for evaluation.
_EVALUATION_NAME = re.compile(r"(^|[^a-z])(test|dev|val|valid|validation|eval|evaluation|heldout)([^a-z]|$)")


def list_files(folder: Path, config: DataConfig) -> tuple[list[SourceFile], list[str]]:
    """Return the files that may hold rows, in the order of their names, and the names of those that hold none.

    Raises:
        UsageError: For a data set of `datasets` whose rows are those of an index.
    """
    paths = sorted((p.relative_to(folder).as_posix(), p) for p in folder.rglob("*") if p.is_file())
    # `datasets` keeps further Arrow files beside those that its state names, e.g. of an earlier `map`.
    states = {path.parent: _saved_files(path) for _, path in paths if path.name == "state.json"}
    saved = {parent: names for parent, names in states.items() if names is not None}
    # Spark writes it last; then an empty part of its output is whole too.
    complete = {path.parent for _, path in paths if path.name == "_SUCCESS"}

    beside_data = {*find_beside_data([name for name, _ in paths], config.format)}
    files, skipped = [], []
    for name, path in paths:
        is_left_over = path.parent in saved and path.name not in saved[path.parent]
        is_empty_part = path.parent in complete and not path.stat().st_size
        if name in beside_data or is_left_over or is_empty_part:
            skipped.append(name)
        else:
            files.append(SourceFile(name, path, len(paths)))
    return files, skipped


def evaluation_files(names: Sequence[str]) -> list[str]:
    """Return the names that say that a file is for evaluation, where others say nothing like it."""
    matching = [name for name in names if _EVALUATION_NAME.search(name.lower())]
    return matching if len(matching) < len(names) else []


def recognise(file: SourceFile, config: DataConfig, source: str) -> Format:
    """Return a file's format.

    Raises:
        UsageError: If it has none that is read; the message says what the file is.
    """
    _refuse_other_formats(file, config)
    is_parquet, is_arrow = file.head.startswith(b"PAR1"), file.head.startswith((b"ARROW1", b"\xff\xff\xff\xff"))
    declared = "json" if config.format == "jsonl" else config.format
    if is_parquet or is_arrow:
        format_: Format = "parquet" if is_parquet else "arrow"
        if declared not in ("auto", format_):
            raise UsageError(f"{file.name}: the file is {format_}, and data.format says {declared}; leave it out")
        return format_

    hint = declared if declared != "auto" else SUFFIXES.get(file.suffix)
    if hint in ("parquet", "arrow"):
        expected = "PAR1" if hint == "parquet" else "ARROW1 or a stream's mark"
        state = "is empty" if not file.head else f"begins with {file.head[:4]!r}"
        raise UsageError(
            f"{file.name}: expected {hint}, which begins with {expected}; the file {state}. Fetch it again, or set "
            "data.format"
        )
    text = file.head.decode(file.encoding, "replace")
    # The first bytes of JSON objects are those of no CSV header.
    if declared == "auto" and _JSON_OBJECT.match(text):
        return "json"
    if hint != "json" and "\0" in text:
        raise UsageError(
            f"{file.name}: the file is binary: byte {file.head.index(0)} is zero, and text was expected. Leave it out "
            f"with sources.{source}.files"
        )
    if hint:
        return hint
    if config.text_field and file.suffix in _TEXT_SUFFIXES:
        return "text"
    if file.suffix in (".yaml", ".yml"):
        raise UsageError(
            f"{file.name}: this is YAML, which is not read; write its rows as JSON lines, or leave the file out with "
            f"sources.{source}.files"
        )
    raise UsageError(
        f"{source}: {file.name}: its format cannot be told by its suffix or its first bytes; expected JSON, or a file "
        f"that ends in {', '.join(SUFFIXES)}. {_suggestion(text)}, or leave the file out with sources.{source}.files"
    )


def _suggestion(text: str) -> str:
    lines = [line for line in text.split("\n")[:_SAMPLE_LINES] if line.strip()]
    if lines and all(line.startswith("__label__") for line in lines):
        return (
            "It is fastText's: write a line `label<tab>text`, and below it the lines of the file with a tab behind the "
            "label, into a file that ends in .tsv: `sed -E 's/^__label__([^ ]+) /\\1\\t/' FILE`"
        )
    # Prose has commas too, but not as many in each line. A field may go on in a further line.
    counts = {delimiter: [line.count(delimiter) for line in lines] for delimiter in "\t,;|"}
    has_tabs = bool(lines) and counts["\t"][0] > 0 and sum(count > 0 for count in counts["\t"]) * 4 > len(lines)
    if has_tabs or any(
        numbers and numbers[0] and numbers.count(numbers[0]) * 5 > len(numbers) * 4 for numbers in counts.values()
    ):
        return "Its first line has tabs, commas or the like: if they separate fields, set data.format: csv"
    return "If it is plain text, set data.format: text and data.text_field: text"


def _refuse_other_formats(file: SourceFile, config: DataConfig) -> None:
    """Refuse what holds no rows, whatever its suffix says."""
    head = file.head
    if head.startswith(_LFS_POINTER):
        raise UsageError(
            f"{file.name}: this is a git-lfs pointer, not the data: {_lfs_size(head)}. Run `git lfs pull` in the "
            "repository it comes from, and fetch the file again"
        )
    # Plain text may be about HTML.
    if config.format != "text" and _HTML.match(head):
        raise UsageError(
            f"{file.name}: this is a web page, probably of a login or an error; expected data. Download the file "
            "itself (the `raw` or `resolve` address), with your token where it needs one"
        )
    if config.format != "text" and len(head) < _MAX_ERROR_BYTES and _ERROR_TEXT.match(head):
        raise UsageError(
            f"{file.name}: this is a server's error message, {_beginning(head)!r}, in the place of the data; "
            " fetch the file again, with your token where it needs one"
        )
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        raise UsageError(f"{file.name}: {_describe_zip(file)}")
    if head[257:262] == b"ustar":
        command = f"`tar -xf {shlex.quote(file.name)}`"
        raise UsageError(f"{file.name}: this is a tar archive; unpack it ({command}) and name the folder")
    if _PICKLE.match(head):
        raise UsageError(f"{file.name}: this is a pickle, which can run code when it is read; write JSON lines instead")
    for magic, description, advice in _OTHER_FORMATS:
        # Text may begin like one of the short ones.
        if head.startswith(magic) and (len(magic) > 4 or b"\0" in head[:512]):
            raise UsageError(f"{file.name}: this is {description}, which is not read; {advice}")


def _beginning(head: bytes) -> str:
    text = " ".join(head.decode("utf-8", "replace").split())
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}…"


def _lfs_size(head: bytes) -> str:
    size = re.search(rb"^size (\d+)", head, re.MULTILINE)
    return f"it stands for a file of {int(size[1]):,} bytes" if size else "the file itself was not fetched"


def _describe_zip(file: SourceFile) -> str:
    try:
        with file.open() as stream, zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        names = []
    if any(name.startswith("xl/") for name in names):
        return "this is an Excel workbook; save the sheet as CSV UTF-8 (File, Save as), and name that file"
    if any(name.startswith("word/") for name in names):
        return "this is a Word document; save it as plain text"
    return f"this is a zip archive; unpack it (`unzip {shlex.quote(file.name)}`) and name the folder or the file in it"


def _saved_files(state: Path) -> frozenset[str] | None:
    """Return the names of the files that `Dataset.save_to_disk` says it wrote; None for a file of another program.

    Raises:
        UsageError: If the rows are those of an index beside the data.
    """
    try:
        document = json.loads(state.read_text(encoding="utf-8"))
        names = frozenset(str(entry["filename"]) for entry in document["_data_files"])
    except (ValueError, KeyError, TypeError, OSError):
        return None
    if document.get("_indices_files") or document.get("_indices_data_files"):
        raise UsageError(
            f"{state.parent.name}: this data set keeps its rows by an index beside the data; write it anew with "
            "`load_from_disk(FOLDER).flatten_indices().save_to_disk(NEW)`"
        )
    return names
