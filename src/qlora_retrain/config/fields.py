"""What a section of a line's YAML is made of: frozen models whose every field says what it does to the result.

A field is *identity* (it changes the result, so it enters the step's key) unless it is declared with `operational`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bfloat16", "float32"]


def identity(default: Any, consequence: str, **bounds: Any) -> Any:
    """A field that changes the result; `bounds` are pydantic's (`gt`, `le`, ...)."""
    return Field(default, description=consequence, **bounds)


def operational(default: Any, consequence: str, **bounds: Any) -> Any:
    """A field that changes how the work is done and never its result; it stays out of the key."""
    return Field(default, description=consequence, json_schema_extra={"operational": True}, **bounds)


class Section(BaseModel):
    """A frozen part of the config that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    _reasons: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why fields that were `auto` have their values, for whoever reads a report; no part of the config."""
        return self._reasons

    def with_reasons(self, reasons: Mapping[str, str]) -> Self:
        """The same section, with the reasons of automatic choices by field."""
        told = self.model_copy()
        told._reasons = dict(reasons)
        return told

    @classmethod
    def operational_fields(cls) -> frozenset[str]:
        """The names of the fields that stay out of the key."""
        return frozenset(
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational")
        )

    def identity(self) -> dict[str, Any]:
        """The fields that enter the key, as JSON values."""
        return self.model_dump(mode="json", exclude=set(self.operational_fields()))
