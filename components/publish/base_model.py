"""Say by which id everybody finds the base model, where it is on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_retrain.config.publish import PublishConfig
from qlora_retrain.pipeline.plan import Plan

# What an adapter names as its base where nobody else could find it. With the dot it is a folder for every loader, and
# never the name of somebody's model on the Hub.
FOLDER = "./base_model"


@dataclass(frozen=True, slots=True)
class BaseId:
    """A model on the Hub.

    Attributes:
        repository: Its id, `owner/name`.
        commit: The commit; None where the line names the id alone.
    """

    repository: str
    commit: str | None = None

    @property
    def page(self) -> str:
        """The address of its page."""
        return f"https://huggingface.co/{self.repository}"


def find(config: PublishConfig, plan: Plan) -> BaseId | None:
    """Return the base's id: what the line says, or that of an `hf://` source; None where neither is there."""
    if config.base_model_id is not None:
        return BaseId(config.base_model_id)
    base = plan.sources["base_model"]
    if base is None or not base.is_commit:
        return None
    repository, _, commit = base.uri.removeprefix("hf://").partition("@")
    return BaseId(repository, commit)
