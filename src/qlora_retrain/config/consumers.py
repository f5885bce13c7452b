"""Which lines Airflow follows as a consumer: where their models are pulled to, and what they must answer.

It is a mapping in `platform.yaml`, by a line's name. The folders and files in it are of the worker's machine, so no
line and no form can name them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qlora_retrain.config.fields import Section, operational
from qlora_retrain.core.aliases import PRODUCTION

AliasName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
# The working folder of a task is another one at every try.
AbsolutePath = Annotated[str, Field(pattern=r"^/[^\x00\n]{1,4000}$")]


class ConsumerConfig(Section):
    """A consumer of a line's models: each new version is pulled, loaded, and asked questions with known answers."""

    alias: AliasName = operational(PRODUCTION, "the alias that is followed")
    folder: AbsolutePath = operational(
        ..., "the folder that `pull` writes to: an absolute path, for this line alone, that every worker can see"
    )
    questions: AbsolutePath = operational(
        ..., "an absolute path of a file with golden questions, as `qlora-retrain ask-golden` reads them"
    )
    min_right_fraction: float = operational(
        1.0, "the run fails (11) if a smaller share of the answers is right", ge=0.0, le=1.0
    )
    answers: AbsolutePath | None = operational(
        None, "an absolute path of a file that gets every answer of the last run; null: none, and no log has their text"
    )
    max_new_tokens: int = operational(64, "a longer answer is cut", ge=1, le=4096)
    base: AbsolutePath | None = operational(None, "the folder of the base model, for versions that are adapters alone")
    verify_key: str | None = operational(
        None, "the publisher's key: a PEM file or a fingerprint; null: the key of the first pull", min_length=1
    )
