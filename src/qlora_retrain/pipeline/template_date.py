"""Resolve `data.template_date`: the one day that a chat template which reads the clock sees in a whole line."""

from __future__ import annotations

import json
from datetime import datetime

from qlora_retrain.config.data import DataConfig
from qlora_retrain.storage import open_store
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.sources import PinnedSource

# Where a model folder may have its chat template.
_TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
_CLOCK = "strftime_now"


def resolve_template_date(
    config: DataConfig, base: PinnedSource | None, champion: Release | None, at: datetime
) -> tuple[str | None, str]:
    """Return the day and the reason for it; no day where the template does not read the clock.

    The champion's day is kept. Otherwise each plan would have a day of its own, so unchanged data would be trained on
    again every day, and the champion would be asked another question than it was trained for.

    Args:
        config: Its `template_date` is `auto`.
        base: The base model; its template counts where the line names none.
        champion: The version in production.
        at: The time of the plan.
    """
    if not _reads_clock(config, base):
        return None, "the chat template does not read the clock"
    kept_day = champion.numbers.get("dataset", {}).get("template_date") if champion else None
    if isinstance(kept_day, str):
        return kept_day, "the day of the version in production"
    return at.date().isoformat(), "the day of the plan, since the chat template reads the clock"


def _reads_clock(config: DataConfig, base: PinnedSource | None) -> bool:
    # The name of one of the tokenizer's own templates is looked up in its files.
    if config.template and ("{%" in config.template or "{{" in config.template):
        return _CLOCK in config.template
    if base is None:
        return False
    # The files of a commit are not here before a step fetches them, so its template may read the clock.
    if base.uri.startswith("hf://"):
        return True

    store = open_store(base.uri)
    names = [f.path for f in base.files if f.path in _TEMPLATE_FILES or f.path.startswith("additional_chat_templates/")]
    return any(_CLOCK in _template_text(name, store.read(name).data) for name in names)


def _template_text(name: str, data: bytes) -> str:
    """Return what a file says of templates; a damaged file is reported by the step that loads it."""
    text = data.decode("utf-8", errors="replace")
    if not name.endswith(".json"):
        return text
    try:
        return json.dumps(json.loads(text).get("chat_template"))
    except (ValueError, AttributeError, RecursionError):
        return ""
