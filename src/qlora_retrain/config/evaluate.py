"""The section `evaluate`: which metrics the contestants get, and the limits that the rules apply to them."""

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
    "tool_call_match",
]
# Metrics in [0, 1]; the floor of accuracy is `min_accuracy`.
FloorMetric = Literal[
    "macro_f1", "exact_match", "rouge_l", "chrf", "json_validity", "field_accuracy", "tool_call_match"
]
# Metrics with a value for each row: the rules compare contestants row by row.
PrimaryMetric = Literal[
    "loss", "accuracy", "exact_match", "rouge_l", "chrf", "json_validity", "field_accuracy", "tool_call_match"
]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class EvaluateConfig(Section):
    """The metrics, and the rules that decide whether the challenger may ship."""

    # What is measured.
    metrics: tuple[Metric, ...] = identity(
        ("loss", "perplexity", "accuracy", "macro_f1"),
        "what the report shows; exact_match, rouge_l, chrf, json_validity, field_accuracy and tool_call_match make "
        "every contestant generate its answers, which takes longer",
    )
    primary_metric: PrimaryMetric | None = identity(
        None, "the metric by which the rules compare contestants; null: accuracy for labels, else loss"
    )
    label_scoring: Literal["likelihood", "generation"] = identity(
        "likelihood", "likelihood: the likeliest label, fast and always a label; generation: the generated text"
    )
    max_new_tokens: int = identity(128, "a generated answer is cut after this many tokens", ge=1, le=32_768)
    stop_rows: int = identity(
        200, "how many rows, at most, are answered to see whether answers end by themselves; 0: none", ge=0, le=100_000
    )
    min_stopped_fraction: Fraction | None = identity(
        None, "refuse when a smaller share of greedy answers ends by itself; null: 0.9 for labels, 0.8 for text"
    )

    # How much evidence the rules need.
    min_prompts: int = identity(
        30, "evaluation rows of fewer different prompts than this are insufficient evidence", ge=1
    )
    min_golden_prompts: int = identity(
        10,
        "golden rows of fewer different prompts, where the line has any, are insufficient evidence",
        ge=1,
        le=1_000_000,
    )

    base_rows: int | None = identity(
        None,
        "on how many evaluation rows, at most, the base is scored without the adapter (chosen by hash); an untrained "
        "model takes long where there are many labels. null: all",
        ge=1,
    )

    # The limits, each against another contestant. Margins are in accuracy points / 100, or in nats per token.
    min_gain_over_base: float = identity(
        0.0, "the gain's lower bound must lie above this (accuracy points/100, or nats)", ge=0.0
    )
    max_loss_to_champion: float = identity(0.02, "refuse when the champion may be better by more than this", ge=0.0)
    max_loss_to_anchor: float | None = identity(
        None, "the same for the line's best version so far, against slow decline; null: as for the champion", ge=0.0
    )
    min_accuracy: float | None = identity(None, "lowest label accuracy that passes; null: none", ge=0.0, le=1.0)
    floors: dict[FloorMetric, Fraction] = identity({}, "lowest means that pass, by metric, e.g. {json_validity: 0.99}")
    max_slice_regression: float | None = identity(
        0.1,
        "refuse when a slice (label, length, language) is certainly worse, and by more than this; null: no such rule",
        ge=0,
    )
    slice_floor: Fraction | None = identity(None, "lowest primary metric of any slice; null: none")
    slice_floors: dict[str, Fraction] = identity(
        {}, "the same for named slices, e.g. {label=refund: 0.8}; too few prompts in one are insufficient evidence"
    )
    min_slice_prompts: int = identity(20, "a slice with fewer different prompts is only shown", ge=2)
    max_forgetting_nats: Literal["auto"] | Annotated[float, Field(gt=0.0)] | None = identity(
        "auto",
        "refuse a form that ships whose loss per token on reference text may be this much above the base's; auto: 1 "
        "where the line has 16 passages or more; null: only reported",
    )
    max_forgetting_accuracy: float | None = identity(
        None,
        "refuse a form that ships whose fraction of right next tokens on reference text may be lower by more than this",
        gt=0.0,
        le=1.0,
    )
    max_drift_psi: float | None = identity(
        0.25, "refuse when the data has certainly drifted further (PSI) from the champion's; null: only shown", gt=0
    )
    max_train_eval_gap_nats: float | None = identity(
        None,
        "refuse when the evaluation loss per token is this much above the training rows'; null: only shown",
        gt=0.0,
    )
    train_rows: int = identity(200, "training rows scored for that gap, chosen by hash; 0: none", ge=0, le=100_000)

    # What the report shows beside the verdict.
    intruder_top_k: int = identity(
        10,
        "singular vectors per layer that are searched for intruder dimensions; 0: none, faster for large models",
        ge=0,
        le=1000,
    )
    intruder_epsilon: float = identity(
        0.5, "a vector less similar than this to every vector of the base is an intruder", gt=0.0, lt=1.0
    )
    text_in_reports: bool = identity(
        False, "show what contestants generated for the golden rows; the report is published with the version"
    )
    allow_first_release: bool = identity(False, "allow a first version where no champion exists to compare with")

    # Statistics, and how the scoring runs.
    confidence: float = identity(0.95, "confidence level of every interval", gt=0.5, lt=1.0)
    bootstrap_samples: int = identity(2000, "resamples of the prompts; higher: steadier intervals", ge=200, le=100_000)
    seed: int = identity(0, "seeds the resampling", ge=0, le=2**31 - 1)
    device: Device = identity("auto", "as in train")
    precision: Precision = identity("auto", "the type of the arithmetic; auto: bfloat16 on cuda, float32 on a CPU")
    batch_tokens: int = identity(4096, "tokens of a forward pass; higher: faster, more memory", ge=256)

    @model_validator(mode="after")
    def _are_measured(self) -> EvaluateConfig:
        """Refuse a rule on a metric that the section does not measure."""
        for names in ([self.primary_metric] if self.primary_metric else [], self.floors):
            if missing := sorted(set(names) - set(self.metrics)):
                raise ValueError(f"{', '.join(missing)}: not among metrics, so it would not be measured; add it there")
        if self.base_rows is not None and self.base_rows < self.min_prompts:
            raise ValueError(
                f"base_rows: {self.base_rows} are fewer than min_prompts: {self.min_prompts}, so no gain over the base "
                "could be shown; set more, or leave base_rows out"
            )
        return self
