"""The sources of a line: where each is, and which of its files count."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from qlora_retrain.config.fields import Section, operational
from qlora_retrain.core import braces, source_access, uris
from qlora_retrain.core.source_access import SourceAccess

# What braces in a glob may stand for: `{a,b}{c,d}` for four.
_MAX_CHOICES = 100
Glob = Annotated[str, Field(max_length=1000)]


class SourceConfig(Section):
    """Where a source is, and which of its files count."""

    uri: str = operational(..., "a path (from the YAML's folder), file://, s3:// or hf://owner/name@commit")
    files: tuple[Glob, ...] = operational(
        ("**",), "globs of the files to read, as Bash reads them with globstar", max_length=100
    )

    @field_validator("files")
    @classmethod
    def _has_few_choices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for glob in value:
            braces.expand(glob, _MAX_CHOICES)
        return value

    @field_validator("uri")
    @classmethod
    def _may_be_read(cls, value: str, info: ValidationInfo) -> str:
        uris.refuse_secrets(value)
        # One form, so that all code that reads the source means the same place.
        value = source_access.canonical(value) if "://" in value else value
        access: SourceAccess | None = (info.context or {}).get("access")
        if access is not None and (refusal := access.refusal(value)):
            raise ValueError(refusal)
        return value


def expand_short_form(value: Any) -> Any:
    """Return a source that is written as a URI alone in its long form."""
    return {"uri": value} if isinstance(value, str) else value


class SourcesConfig(Section):
    """The line's sources. The champion is not one of them: the plan finds it in the store."""

    raw_data: SourceConfig
    base_model: SourceConfig
    golden_data: SourceConfig | None = None
    replay_data: SourceConfig | None = None
    eval_data: SourceConfig | None = None
    reference_data: SourceConfig | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return expand_short_form(value)

    def declared_uris(self) -> dict[str, str]:
        """Return the URI of every source that the line has, by the source's name."""
        sources = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: source.uri for name, source in sources.items() if source is not None}
