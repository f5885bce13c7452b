"""The section `evaluate`: what is measured of the contestants, and the limits that the rules hold it against."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora_retrain.config.fields import Device, Precision, Section, identity

Metric = Literal[
    "loss",
    "perplexity",
    "accuracy",
    "macro_f1",
    "exact_match",
    "rouge_l",
    "chrf",
    "json_validity",
    "field_accuracy",
]
WRITTEN = ("exact_match", "rouge_l", "chrf", "json_validity", "field_accuracy")
Floored = Literal["macro_f1", "exact_match", "rouge_l", "chrf", "json_validity", "field_accuracy"]
Primary = Literal["loss", "accuracy", "exact_match", "rouge_l", "chrf", "json_validity", "field_accuracy"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class EvaluateConfig(Section):
    """What is measured, and the rules that decide whether the challenger may ship."""

    metrics: tuple[Metric, ...] = identity(
        ("loss", "perplexity", "accuracy", "macro_f1"),
        "what the report shows; exact_match, rouge_l, chrf, json_validity and field_accuracy have every contestant "
        "write its answers, which takes longer",
    )
    primary: Primary | None = identity(
        None, "what the rules compare contestants by, one of metrics; null: accuracy for labels, else loss"
    )
    labels_by: Literal["likelihood", "generation"] = identity(
        "likelihood", "likelihood: the likeliest label, fast and never unparsable; generation: what the model writes"
    )
    max_new_tokens: int = identity(128, "a written answer is cut after this many tokens", ge=1, le=32_768)
    min_rows: int = identity(30, "fewer evaluation rows than this are insufficient evidence", ge=1)
    min_golden_rows: int = identity(
        10, "fewer golden rows, where the line has any, are insufficient evidence", ge=1, le=1_000_000
    )
    min_gain_over_base: float = identity(
        0.0, "the gain's lower bound must lie above this (accuracy points/100, or nats)", ge=0.0
    )
    max_loss_to_champion: float = identity(0.02, "refuse when the champion may be better by more than this", ge=0.0)
    max_loss_to_anchor: float | None = identity(
        None, "the same for the line's best version so far, against slow slipping; null: as for the champion", ge=0.0
    )
    min_accuracy: float | None = identity(None, "floor for label accuracy; null: none", ge=0.0, le=1.0)
    floors: dict[Floored, Share] = identity({}, "least mean of other metrics, e.g. {json_validity: 0.99}")
    max_slice_loss: float | None = identity(
        0.1,
        "refuse when a slice (label, length, language) is surely worse, and by more than this; null: no such rule",
        ge=0,
    )
    slice_floor: Share | None = identity(None, "least value of the primary metric in every slice; null: none")
    slice_floors: dict[str, Share] = identity(
        {}, "the same by name, e.g. {label=refund: 0.8}; such a slice with too few rows is insufficient evidence"
    )
    min_slice_rows: int = identity(20, "a slice with fewer rows is only shown", ge=2)
    max_forgetting_nats: float | None = identity(
        None, "refuse when reference text costs this much more loss a token than with the base", gt=0.0
    )
    max_forgetting_accuracy: float | None = identity(
        None, "refuse when the share of right next tokens on reference text falls by more than this", gt=0.0, le=1.0
    )
    max_drift: float | None = identity(
        0.25, "refuse when the data surely drifted further (PSI) from what the champion learned; null: only shown", gt=0
    )
    max_train_eval_gap: float | None = identity(
        None, "refuse when the evaluation loss a token is this much above the training rows'; null: only shown", gt=0.0
    )
    train_rows: int = identity(200, "training rows scored for that gap, chosen by hash; 0: none", ge=0, le=100_000)
    intruder_top: int = identity(
        10,
        "singular vectors a layer looked at for intruder dimensions; 0: none, faster for large models",
        ge=0,
        le=1000,
    )
    intruder_epsilon: float = identity(0.5, "an intruder is less similar than this to all the base has", gt=0.0, lt=1.0)
    text_in_reports: bool = identity(
        False, "show what contestants wrote for the golden rows; the report is published with the version"
    )
    first_release: bool = identity(False, "allow a first version where no champion exists to compare with")
    confidence: float = identity(0.95, "of every interval", gt=0.5, lt=1.0)
    bootstrap_samples: int = identity(2000, "resamples of the rows; higher: steadier intervals", ge=200, le=100_000)
    seed: int = identity(0, "of the resampling", ge=0, le=2**31 - 1)
    device: Device = identity("auto", "as in train")
    precision: Precision = identity("auto", "what is computed in; auto: bfloat16 on cuda, float32 on a CPU")
    batch_tokens: int = identity(4096, "tokens a forward pass; higher: faster until memory ends", ge=256)

    @model_validator(mode="after")
    def _is_measured(self) -> EvaluateConfig:
        for name in ([self.primary] if self.primary else [], self.floors):
            if missing := sorted(set(name) - set(self.metrics)):
                raise ValueError(f"{', '.join(missing)}: not among metrics, so it would not be measured")
        return self

    @property
    def written_metrics(self) -> tuple[str, ...]:
        """Those that need the contestants' own words."""
        return tuple(name for name in self.metrics if name in WRITTEN)

    @property
    def writes(self) -> bool:
        """Whether the contestants write answers to all rows."""
        return bool(self.written_metrics) or self.labels_by == "generation"
