"""The building blocks of a config section: frozen models, each field with its bounds and its effect on the result.

A field is *identity* (it changes the result, so it enters the step's key) unless it is declared with `operational`.
The sections hold fields and validators only. This package is not part of the code hash, so a value that a section
computed could change an artifact under an unchanged key; `tests/config/test_identity_border.py` refuses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator

from qlora_retrain.config.bounded_yaml import MAX_INTEGER

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bfloat16", "float32"]


def identity(default: Any, consequence: str, **bounds: Any) -> Any:
    """Declare a field that changes the result; `bounds` are pydantic's (`gt`, `le`, ...)."""
    return Field(default, description=consequence, **bounds)


def operational(default: Any, consequence: str, **bounds: Any) -> Any:
    """Declare a field that changes how the work is done and never its result; it stays out of the key."""
    # The mark travels in the JSON schema, where `operational_fields` finds it.
    return Field(default, description=consequence, json_schema_extra={"operational": True}, **bounds)


class Section(BaseModel):
    """A frozen part of the config that refuses unknown fields."""

    # No NaN or infinity: JSON has neither, so such a config would have no key.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    _reasons: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("*")
    @classmethod
    def _fits_into_json(cls, value: Any) -> Any:
        # A text of digits is a number here too.
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise ValueError(f"expected a whole number of at most {MAX_INTEGER}")
        return value

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why each field that was `auto` has its value; shown in reports, no part of the config."""
        return self._reasons

    def with_reasons(self, reasons: Mapping[str, str]) -> Self:
        """Return the same section with the reasons of automatic choices, by field."""
        copy = self.model_copy()
        copy._reasons = dict(reasons)
        return copy

    @classmethod
    def operational_fields(cls) -> frozenset[str]:
        """Return the names of the fields that stay out of the key."""
        return frozenset(
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational")
        )

    def identity(self) -> dict[str, Any]:
        """Return the fields that enter the key, as JSON values."""
        # Defaults too: another default is another result, so it must be another key.
        return self.model_dump(mode="json", exclude=set(self.operational_fields()))
