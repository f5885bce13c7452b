"""The section `publish`: what consumers see of a version."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qlora_retrain.config import licences
from qlora_retrain.config.fields import Section, identity, operational
from qlora_retrain.config.mirrors import MirrorUri
from qlora_retrain.core import aliases, uris

Part = Literal["adapter", "model", "exports"]
Alias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]


class KeepConfig(Section):
    """Which versions of a line `qlora-retrain gc` leaves, beside those that something still names."""

    versions: int = operational(10, "this many of the line's newest versions are kept", ge=1, le=1_000_000)
    days: int = operational(180, "versions younger than this many days are kept", ge=1, le=36_500)


class PublishConfig(Section):
    """What consumers see."""

    promote_to: Alias | None = identity("production", "alias that moves to the new version; null: only `latest`")
    approval: bool = identity(
        False,
        "a run moves `staging` alone, and a person decides on `production`: in Airflow by an answer, elsewhere with "
        "`qlora-retrain promote`",
    )
    approval_hours: float = operational(
        72.0, "Airflow: a request that nobody has answered after this long is rejected", gt=0.0, le=720.0
    )
    mirror: tuple[MirrorUri, ...] = operational(
        (),
        "Airflow: where the version that `production` names is copied to after each run, of the mirrors that "
        "platform.yaml allows: hf://owner/name, mlflow",
    )
    licence: str = identity(
        "unspecified",
        "the model's licence, for its card: SPDX, a name of the Hugging Face Hub such as llama3.1, or other",
        max_length=200,
    )
    licence_name: str | None = identity(None, "with licence: other, the licence's own name")
    licence_link: str | None = identity(
        None, "where the licence can be read: a URL such as https://acme.example/licence"
    )
    description: str = identity("", "a sentence for the model card")
    parts: list[Part] = identity(
        ["adapter", "model", "exports"],
        "what a version holds; without model there is no merged copy, and the adapter is certified over its base, on "
        "which a server loads it",
    )
    base_model_id: str | None = identity(
        None,
        "the base's id on the Hugging Face Hub, where sources.base_model is a copy of it; null: that of an hf:// "
        "source",
        pattern=r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$",
    )
    retention_days: int = operational(
        14,
        "days in which nobody can delete or replace a version and its audit entries, in a bucket with object lock; "
        "elsewhere without effect; 0: none",
        ge=0,
        le=29,
    )
    keep: KeepConfig = operational(
        KeepConfig(),
        "versions that `qlora-retrain gc` leaves: the newest `versions`, those younger than `days`, and each that an "
        "alias, a rollback or a plan needs",
    )

    @field_validator("licence")
    @classmethod
    def _is_a_licence(cls, value: str) -> str:
        return licences.canonical(value)

    @field_validator("licence_link")
    @classmethod
    def _is_a_public_page(cls, value: str | None) -> str | None:
        if value is None:
            return None
        uris.refuse_secrets(value)
        # A version holds no text of a licence, so the name of a file would lead nowhere.
        if not re.match(r"https?://[^\s/]", value, re.IGNORECASE) or re.search(r"[\s<>]", value):
            raise ValueError(f"expected a URL that begins with https://, found {value!r}; a version holds no such file")
        return value

    @field_validator("parts")
    @classmethod
    def _can_be_compared_with(cls, value: list[Part]) -> list[Part]:
        if len(set(value)) != len(value) or not {"adapter", "model"} & set(value):
            raise ValueError(
                "name each part once, and adapter or model among them: the next run compares its model with one of them"
            )
        return value

    @model_validator(mode="after")
    def _production_is_approved(self) -> PublishConfig:
        # The verdict compares with `production`, so its move alone can be asked for by what it compared with.
        if self.approval and self.promote_to not in (None, aliases.PRODUCTION):
            raise ValueError(
                f"approval is for the alias production, and promote_to is {self.promote_to}; set promote_to: "
                "production, or approval: false"
            )
        return self

    @model_validator(mode="after")
    def _garbage_is_not_retained(self) -> PublishConfig:
        if self.retention_days > self.keep.days:
            raise ValueError(
                f"keep.days is {self.keep.days} and retention_days is {self.retention_days}: a version that may be "
                "collected would still be locked, and its bytes paid for; set keep.days to as many or more"
            )
        return self

    @model_validator(mode="after")
    def _other_has_a_name(self) -> PublishConfig:
        if self.licence == licences.OTHER_LICENCE and not (self.licence_name or "").strip():
            raise ValueError("licence: other needs licence_name, since the model card has to say which one it is")
        if self.licence_name is not None and self.licence != licences.OTHER_LICENCE:
            raise ValueError(f"licence_name goes with licence: other, and the licence is {self.licence}; leave it out")
        return self
