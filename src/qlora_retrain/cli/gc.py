"""The verb that collects garbage: gc."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from qlora_retrain.cli.options import Options
from qlora_retrain.core.arguments import store_root
from qlora_retrain.core.visible_text import escape_controls

if TYPE_CHECKING:
    from qlora_retrain.pipeline.collect import Collection
    from qlora_retrain.pipeline.garbage import Item


def add_verbs(verbs: Any, options: Options) -> None:
    """Add the verb to a parser's subparsers."""
    verb = verbs.add_parser(
        "gc", help="list what the store no longer needs; --delete removes it", parents=[options.stored]
    )
    verb.add_argument(
        "--delete", action="store_true", help="remove what is listed; without this option nothing is changed"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON document instead of lines")
    verb.add_argument(
        "--run-days",
        type=_run_days,
        default=180,
        metavar="DAYS",
        help="remove the logs and pages of runs that are older, 30 at least (180)",
    )
    verb.set_defaults(run=_gc)


def _run_days(text: str) -> int:
    # A plan counts for 30 days; a larger number than that of a century is a slip of the finger.
    if not text.isdecimal() or not 30 <= int(text) <= 36_500:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of days, 30 at least and 36500 at most, found {text!r}"
        )
    return int(text)


def _gc(args: argparse.Namespace) -> int:
    from qlora_retrain.core import signals
    from qlora_retrain.pipeline.collect import collect
    from qlora_retrain.storage import open_store

    store = open_store(store_root(args))

    def print_item(item: Item) -> None:
        if not args.json:
            verb = "removed" if args.delete else "would remove"
            text = f"{verb} {item.path}  {_format_size(item.size_bytes)}: {item.reason}"
            print(escape_controls(text), flush=True)

    # A timer's machine may stop it. It takes its mark away then, for which others would wait.
    with signals.terminate_as_interrupt():
        collection = collect(store, is_dry_run=not args.delete, run_days=args.run_days, on_removed=print_item)
    if not args.delete:
        for item in collection.items:
            print_item(item)
    print(_as_json(store.uri, collection, is_deleted=args.delete) if args.json else _as_text(collection, args.delete))
    return 0


def _as_text(collection: Collection, is_deleted: bool) -> str:
    counts = Counter(item.kind for item in collection.items)
    kinds = ", ".join(
        f"{count:,} {kind}{'' if count == 1 or kind == 'scratch' else 's'}" for kind, count in counts.items()
    )
    size = _format_size(sum(item.size_bytes for item in collection.items))
    lines = [f"left {escape_controls(note)}" for note in collection.notes]
    lines += [f"left {escape_controls(item.path)}: something names it by now" for item in collection.spared]
    summary = f"{kinds}; {size}" if counts else "nothing"
    if is_deleted:
        return "\n".join([*lines, f"removed: {summary}"])
    return "\n".join([*lines, f"garbage: {summary}", *(["remove it with: --delete"] if counts else [])])


def _as_json(root: str, collection: Collection, *, is_deleted: bool) -> str:
    document = {
        "root": root,
        "at": collection.at.isoformat(timespec="seconds"),
        "deleted": is_deleted,
        "size_bytes": sum(item.size_bytes for item in collection.items),
        "items": [_as_dict(item) for item in collection.items],
        "spared": [_as_dict(item) for item in collection.spared],
        "notes": list(collection.notes),
    }
    return json.dumps(document, indent=1)


def _as_dict(item: Item) -> dict[str, Any]:
    return {"kind": item.kind, "path": item.path, "size_bytes": item.size_bytes, "reason": item.reason}


def _format_size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"
