"""State how a line writes its chats: the settings beside the tokenizer that training, evaluation and consumers share.

`validate_data` writes them into the dataset and `merge_adapter` into the published model, as `chat_format.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_retrain.core.errors import IntegrityError

if TYPE_CHECKING:
    from qlora_retrain.config.data import DataConfig

FILE = "chat_format.json"
# A template that reads the clock sees this day where no plan has resolved one, so that no result depends on the clock.
DEFAULT_DATE = "2025-01-01"


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The settings with which chats are rendered and answers end.

    Attributes:
        template: A named template, the name of one of the tokenizer's, or Jinja text; None: the tokenizer's default.
        template_kwargs: Variables that the template reads.
        date: The day (YYYY-MM-DD) that a template which reads the clock sees.
        stop_tokens: Further tokens at which servers of the model stop.
        missing_end: What happens to an answer after which the template writes no end.
        answer_start: Where a prompt without a known answer ends: after the template's generation prompt, or where an
            answer starts in a rendered history, as for models whose generation prompt opens a reasoning block.
        system: The system turn of rows that have none.
    """

    template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None
    stop_tokens: tuple[str, ...] = ()
    missing_end: Literal["append", "refuse"] = "append"
    answer_start: Literal["generation_prompt", "history"] = "generation_prompt"
    system: str | None = None

    @classmethod
    def from_config(cls, config: DataConfig) -> ChatFormat:
        """Take the settings from the line; the plan has resolved `template_date` to a day, or to none."""
        date = None if config.template_date == "auto" else config.template_date
        # A text brings its own marks, so a base's template for chats would only add to it.
        template = config.template or ("plain" if config.text_field else None)
        return cls(
            template=template,
            template_kwargs=config.template_kwargs,
            date=date,
            stop_tokens=config.stop_tokens,
            missing_end=config.missing_end,
            system=config.system,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> ChatFormat:
        """Read the settings from a dataset or a model folder; a folder without the file has the defaults.

        Raises:
            IntegrityError: If the file is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return cls()

        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**document, "stop_tokens": tuple(document["stop_tokens"])})
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError(f"{path.parent.name}/{FILE}: not the settings of chats: {error!r}") from error

    def write(self, folder: Path) -> None:
        """Write the settings into a folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8", newline="\n")
