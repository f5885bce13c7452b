"""The section `data`: where a row has its chat, how a chat is written, which rows are good enough, and the split."""

from __future__ import annotations

import datetime
import string
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qlora_retrain.config import data_checks
from qlora_retrain.config.data_checks import Severity
from qlora_retrain.config.fields import Section, identity, operational

Version = Annotated[str, Field(pattern=r"^\d{8}T\d{6}Z-[0-9a-f]{12}$")]
LineName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,61}[a-z0-9]$")]
Role = Literal["system", "user", "assistant", "tool"]

# Arguments of transformers' `apply_chat_template` that are no variables of a template.
_TEMPLATE_NAMES = frozenset(
    "messages conversation tools documents add_generation_prompt continue_final_message chat_template tokenize padding "
    "truncation max_length return_tensors return_dict tokenizer_kwargs return_assistant_tokens_mask strftime_now "
    "raise_exception sanitize_control_tokens".split()
)


class DataConfig(Section):
    """How raw files become chats, which rows are good enough, and which of them are for evaluation."""

    # Where a row has its chat.
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "arrow", "text"] = identity(
        "auto", "the files' format; auto: by each file's suffix and its first bytes"
    )
    messages_field: str | None = identity(None, "field that holds the chat; null: recognised, e.g. conversations")
    prompt_field: str | None = identity(None, "field that holds the user's text; null: recognised, e.g. instruction")
    prompt_template: str | None = identity(
        None,
        "the user's text from several fields, e.g. '{instruction}\\n\\n{input}'; a line with empty fields is left out",
    )
    response_field: str | None = identity(None, "field that holds the answer; null: recognised, e.g. output")
    system_field: str | None = identity(None, "field that holds a row's own system turn; null: recognised")
    tools_field: str | None = identity(None, "field that holds the tools a row may call; null: tools")
    text_field: str | None = identity(None, "field that holds a whole text; alone it needs train.loss: all")
    answer_after: str | None = identity(
        None, "with text_field: the answer is what follows this marker, e.g. '### Response:'"
    )
    roles: dict[str, Role] = identity({}, "further names of roles, e.g. {client: user}; common ones are recognised")
    keep: dict[str, str | int | float | bool] = identity({}, "only rows whose fields have these values are read")
    ignore_fields: tuple[str, ...] = identity(
        (),
        "fields that nothing reads on purpose; others that vary by row may be refused, since their text would be lost",
    )
    language_field: str | None = identity(
        None, "field that holds a row's language, for slices; null: the script of its letters"
    )
    group_field: str | None = identity(
        None, "field whose value puts rows on one side of the split: a document, a user, a template; null: the prompt"
    )
    task: Literal["text", "labels"] = identity("text", "labels: the answers are a closed set, scored by accuracy")

    # How a chat is written.
    system: str | None = identity(None, "system turn for rows that have none; it is part of every prompt")
    template: str | None = identity(
        None, "a named chat template, one of the tokenizer's own by name, or a Jinja file; null: the tokenizer's"
    )
    template_kwargs: dict[str, Any] = identity({}, "variables of the chat template, e.g. {enable_thinking: false}")
    template_date: Annotated[str, Field(pattern=r"^(auto|\d{4}-\d{2}-\d{2})$")] | None = identity(
        "auto", "the day that a template which reads the clock sees; auto: the champion's, else the day of the plan"
    )
    stop_tokens: tuple[str, ...] = identity((), "further tokens at which the servers of this model stop")
    missing_end: Literal["append", "refuse"] = identity(
        "append", "where the template writes no end after an answer: append the end-of-sequence token, or refuse"
    )
    marks_in_text: Literal["refuse", "allow"] = identity(
        "refuse", "rows whose text holds a mark with which the template begins or ends a turn, so that it forges one"
    )

    # What rows say; `data_checks` lists the checks.
    checks: dict[str, Any] = identity(
        {},
        "checks of what rows say, by name: off, warn, redact, drop or refuse; docs/data.md lists them",
        validate_default=True,
    )

    near_duplicate_threshold: float = identity(
        0.8, "training rows whose words have at least this Jaccard similarity are near-duplicates", ge=0.5, le=1.0
    )
    near_evaluation_threshold: float = identity(
        0.7,
        "training rows with at least this similarity to an evaluation or golden row are near-copies of it",
        ge=0.5,
        le=1.0,
    )
    label_error_threshold: float = identity(
        0.1, "rows whose label is wrong with at least this probability are found by label_errors", gt=0.0, le=1.0
    )

    # Replay: general rows beside the line's own.
    replay_fraction: float | None = identity(
        None,
        "with sources.replay_data: its rows are at most this fraction of all rows that train, chosen by hash; null: "
        "all of them train",
        gt=0.0,
        lt=1.0,
    )

    # Drift from a version that the line names.
    reference_version: Version | None = identity(
        None, "version to compare the data with: refuse drift before training; null: only `evaluate` checks drift"
    )
    max_drift_psi: float = identity(
        0.25, "with reference_version: refuse when the data has certainly drifted by more (PSI)", gt=0.0
    )

    # The split and the limits.
    split_seed: str | None = identity(
        None, "seeds the split by hash; null: the line's name. Another seed moves rows across the split"
    )
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | Literal["auto"] = identity(
        "auto", "fraction of prompts for evaluation, chosen by hash; auto: what min_eval_prompts needs, up to a half"
    )
    min_eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = identity(
        None, "with eval_fraction: auto, never less; null: the champion's, so that no evaluation row is learnt"
    )
    shared_openings: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")], ...] | None = identity(
        None, "beginnings that do not decide a chat's side of the split, as hashes; null: the champion's, else detected"
    )
    # Operational, since the history that the plan pins is an input of its own.
    history_of: LineName | None = operational(
        None, "a line whose evaluation prompts this line never trains on either: the former name of a renamed line"
    )
    judge_fraction: float | None = identity(
        None,
        "set by qlora-retrain lab alone: this fraction of the training prompts is the evaluation, in place of the "
        "line's own evaluation and golden rows",
        gt=0.0,
        le=0.5,
    )
    max_eval_rows: int = identity(
        2000, "largest number of evaluation rows; higher: narrower intervals, slower", ge=1, le=1_000_000
    )
    max_length_tokens: int = identity(1024, "longer rows are quarantined, never truncated", ge=16, le=131_072)
    min_train_rows: int = identity(10, "refuse data with fewer training rows than this", ge=1)
    min_eval_prompts: int = identity(
        30,
        "refuse data whose evaluation rows have fewer different prompts; not set: as many as evaluate.min_prompts and "
        "merge.min_prompts need",
        ge=1,
    )
    # Operational, since it refuses before anything is made.
    min_golden_prompts: int = operational(
        1,
        "refuse golden_data with fewer different prompts; not set: as many as evaluate.min_golden_prompts needs",
        ge=1,
    )
    max_quarantined_fraction: float = identity(0.05, "refuse when a larger fraction of the rows is bad", ge=0.0, le=1.0)
    max_duplicates_fraction: float = identity(
        0.2, "refuse when a larger fraction of the rows repeats another", ge=0.0, le=1.0
    )

    @field_validator("template_date", mode="before")
    @classmethod
    def _day_as_text(cls, value: Any) -> Any:
        # YAML reads 2026-01-31 without quotes as a date.
        return value.isoformat() if isinstance(value, datetime.date) else value

    @field_validator("template_date")
    @classmethod
    def _is_a_day(cls, value: str | None) -> str | None:
        if value not in (None, "auto"):
            datetime.date.fromisoformat(str(value))
        return value

    @field_validator("checks")
    @classmethod
    def _every_check(cls, value: dict[str, Any]) -> dict[str, Severity]:
        return data_checks.complete(value)

    @field_validator("template_kwargs")
    @classmethod
    def _names_of_its_own(cls, value: dict[str, Any]) -> dict[str, Any]:
        if reserved := sorted(_TEMPLATE_NAMES & value.keys()):
            raise ValueError(f"{', '.join(reserved)}: the pipeline sets this variable of the template itself")
        return value

    @field_validator("prompt_template")
    @classmethod
    def _names_fields(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = list(string.Formatter().parse(value))
        except ValueError as error:
            raise ValueError(f"{error}; write a brace that is no field twice: {{{{ or }}}}") from None

        names = [name for _, name, _, _ in parts if name is not None]
        if not names or not all(name.strip() for name in names):
            raise ValueError("no field is named; write each field's name in braces, e.g. {instruction}")
        if any(conversion or format_spec for _, _, format_spec, conversion in parts):
            raise ValueError("a field is its name alone, without ! and : behind it, e.g. {instruction}")
        return value

    @model_validator(mode="after")
    def _fields_go_together(self) -> DataConfig:
        if (self.prompt_field or self.prompt_template) and self.response_field is None:
            raise ValueError("response_field is missing: the prompt's fields are set, and the answer's is not")
        if self.response_field and not (self.prompt_field or self.prompt_template):
            raise ValueError(
                "prompt_field or prompt_template is missing: the answer's field is set, the prompt's is not"
            )
        if self.prompt_field and self.prompt_template:
            raise ValueError("prompt_field and prompt_template exclude each other: name the field in the template")
        if self.messages_field and self.response_field:
            raise ValueError("messages_field excludes response_field: turns that only ask are named in prompt_field")
        if self.answer_after and not self.text_field:
            raise ValueError("answer_after needs text_field: the field whose text holds the marker")
        if self.text_field and (self.messages_field or self.response_field):
            raise ValueError("text_field excludes messages_field and response_field: a row is a text or a chat")
        return self
