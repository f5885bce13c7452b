"""Where published versions go besides the store: the Hugging Face Hub, and the model registry of an MLflow server.

`mirrors` of `platform.yaml` says which mirrors a line may have and where their tokens are; `publish.mirror` of a line
chooses among them. So an author of a line can send a model nowhere else, and sees no token.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from qlora_retrain.config.fields import Section, operational
from qlora_retrain.config.notify import ConnectionName, LineName

MLFLOW = "mlflow"
HUB_SCHEME = "hf://"
_HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
PATTERN = rf"^({MLFLOW}|{HUB_SCHEME}{_HUB_NAME}/{_HUB_NAME})$"
MirrorUri = Annotated[str, Field(pattern=PATTERN)]
SecretName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]


class MirrorConfig(Section):
    """A mirror that a line may name in `publish.mirror`."""

    line: LineName | Literal["*"] = operational(..., "the line; *: every line, with to: mlflow")
    to: MirrorUri = operational(
        ..., "hf://owner/name, a repository that exists; or mlflow, a model named like the line"
    )
    connection: ConnectionName | None = operational(
        None,
        "local, docker: the Airflow connection; its password is the token, its host the server (of the Hub: only "
        "another one than huggingface.co)",
    )
    secret: SecretName | None = operational(
        None,
        "kubernetes: the secret that the mirror's pod alone sees, with files named like the variables of the token and "
        "the server: HF_TOKEN; MLFLOW_TRACKING_URI, MLFLOW_TRACKING_TOKEN",
    )

    @model_validator(mode="after")
    def _a_repository_has_one_line(self) -> MirrorConfig:
        if self.line == "*" and self.to != MLFLOW:
            raise ValueError(f"{self.to}: a repository holds the versions of one line; name the line instead of *")
        return self

    @model_validator(mode="after")
    def _says_where_the_token_is(self) -> MirrorConfig:
        if self.connection is None and self.secret is None:
            raise ValueError(f"{self.to}: expected connection (local, docker) or secret (kubernetes)")
        return self


def _refuse_shared_repositories(mirrors: tuple[MirrorConfig, ...]) -> tuple[MirrorConfig, ...]:
    """Refuse a repository of two lines: in its `main` each would remove the other's model."""
    lines: dict[str, str] = {}
    for entry in mirrors:
        # The Hub finds a repository by its name in any case.
        first = lines.setdefault(entry.to.lower(), entry.line)
        if entry.to != MLFLOW and first != entry.line:
            raise ValueError(
                f"{entry.to}: a repository holds the versions of one line, and lines {first} and {entry.line} name it; "
                "give each a repository of its own"
            )
    return mirrors


Mirrors = Annotated[tuple[MirrorConfig, ...], AfterValidator(_refuse_shared_repositories)]
