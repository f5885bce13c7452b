"""Who is told how a run of a line ended, and which servers load the model that production names now.

Both are lists in `platform.yaml`. Each entry names an Airflow connection, which has the address and the secret. A line
can name none, so its author can send nothing anywhere.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora_retrain.config.fields import Section, operational

LineName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,61}[a-z0-9]$")]
# It becomes a part of a task's name too, where a dot would mean a group.
ConnectionName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,99}$")]
Address = Annotated[str, Field(pattern=r"^[^@\s,;<>\"]{1,64}@[A-Za-z0-9.-]{1,253}$")]
Event = Literal["failure", "refused", "published", "deadline"]


class NotifyConfig(Section):
    """A message to people when a run of a line ends in one of these ways."""

    events: Annotated[tuple[Event, ...], Field(min_length=1)] = operational(
        ...,
        "failure: a task failed; refused: a gate said no; published: there is a new version; deadline: the run has not "
        "ended after runtime.deadline_hours",
    )
    line: LineName | Literal["*"] = operational("*", "the line; *: every line")
    connection: ConnectionName = operational(..., "the Airflow connection with the address and the secret")
    kind: Literal["webhook", "email", "apprise"] = operational(
        ..., "webhook: JSON by POST; email: by SMTP; apprise: Slack and whatever else Apprise knows"
    )
    to: tuple[Address, ...] = operational((), "email: the addresses")

    @model_validator(mode="after")
    def _only_emails_have_addresses(self) -> NotifyConfig:
        if (self.kind == "email") != bool(self.to):
            raise ValueError(
                f"{self.connection}: `to` lists the addresses for kind: email, which needs them; leave it out for any "
                "other kind"
            )
        return self


class HookConfig(Section):
    """A signed request to a server after the alias `production` of a line moved."""

    line: LineName | Literal["*"] = operational(..., "the line; *: every line")
    connection: ConnectionName = operational(
        ..., "the Airflow connection: its host is the server's URL, its password the key that signs"
    )
