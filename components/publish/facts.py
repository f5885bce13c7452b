"""Hold what the documents of a version are written from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.publish.base_model import BaseId
from qlora_retrain.config.publish import PublishConfig
from qlora_retrain.pipeline.plan import Plan

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class VersionFacts:
    """A version that is about to be published.

    Attributes:
        config: The section `publish`.
        plan: The run's plan.
        version: The version's name.
        verdict: `evaluation.json`.
        numbers: The numbers of each artifact, by its name.
        certificate: `certificate.json`.
        profile: The profile of the data.
        stop_ids: The tokens that end an answer, by the model's generation config.
        cost: `cost.json`.
        base_id: The base's id on the Hub, if it has one.
        is_alone: Whether the version is an adapter without a model.
    """

    config: PublishConfig
    plan: Plan
    version: str
    verdict: Document
    numbers: Mapping[str, Document]
    certificate: Document
    profile: Document = field(default_factory=dict)
    stop_ids: Sequence[int] = ()
    cost: Document = field(default_factory=dict)
    base_id: BaseId | None = None
    is_alone: bool = False

    @property
    def train(self) -> Document:
        """The settings of training."""
        return self.plan.step("train_qlora").identity

    @property
    def shipped_form(self) -> Document:
        """The numbers of the form that ships, by its certificate; empty where it has none."""
        exports = self.certificate.get("exports") or {}
        form: Document = exports.get("adapter" if self.is_alone else "bf16") or {}
        return form

    @property
    def confidence(self) -> float:
        """The confidence level of every interval."""
        level = (self.verdict.get("settings") or {}).get("confidence")
        return float(level) if level is not None else 0.95
