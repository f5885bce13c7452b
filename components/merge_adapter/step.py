"""Merge the adapter into a 16-bit model, and apply the rules of the evaluation to this form, the one that ships.

Chooses by measurement which base the adapter is merged into, with which rank and at which strength; with `merge.soup`
also whether its mean with earlier versions' adapters is better.
Reads `dataset/{eval,golden}.jsonl`, `base_model`, `base_nf4`, `adapter`, the scores of `evaluation`, and where the line
has them `reference_data` and `earlier_adapters`. Makes `model/`: a plain transformers folder in bf16, with
`certificate.json`, `report.html` and, where the config asks for more forms, `exports/`. An adapter that ships alone is
certified over the base that it will be served on, and `model/` says which one that is.
Refuses (11) a merged form that a rule fails, or that costs more than `merge.max_loss_increase_nats` against the
unmerged model.

Command: `python -m components.merge_adapter --plan URI`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from components.merge_adapter import certificate, choice, exports, served_adapter, serving_warnings, unmerged
from components.merge_adapter.candidates import BASES, Workshop
from components.merge_adapter.certificate import Certificate
from components.merge_adapter.choice import Chooser
from components.merge_adapter.evaluation_inputs import EvaluationInputs
from components.merge_adapter.exports import Export
from components.merge_adapter.form_scores import FormScorer, FormScores
from components.merge_adapter.halves import Parts
from components.merge_adapter.merge import MergeStats
from components.merge_adapter.trials import Choice
from qlora_retrain.config.merge import MergeConfig
from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core import progress
from qlora_retrain.core.outcome import Number, StepResult
from qlora_retrain.evaluation import answer_endings, scoring, verdict
from qlora_retrain.evaluation.metrics import completion_metrics
from qlora_retrain.evaluation.rows import count_prompts
from qlora_retrain.evaluation.rules import suite_rules
from qlora_retrain.evaluation.scoring import RowScore
from qlora_retrain.lm import base_formats, chat, loading
from qlora_retrain.lm.chat_format import ChatFormat
from qlora_retrain.lm.generation import Completion

# The order of the scores in evaluation/scores.jsonl.
_SUITES = ("eval", "golden", "reference")


def run(
    config: MergeConfig,
    dataset: Path,
    base_model: Path,
    base_nf4: Path,
    adapter: Path,
    evaluation: Path,
    reference_data: Path | None,
    model: Path,
    earlier_adapters: Path | None = None,
) -> StepResult:
    """Merge, select the base, score the form that ships on the evaluated rows, and certify or refuse it."""
    # Checks that need no merge come first, so that a refusal does not come after gigabytes were written.
    exports.refuse_unsupported(config, base_model)
    inputs = EvaluationInputs.from_folders(dataset, evaluation, reference_data)
    config = choice.whole_adapter_where_needed(config, base_nf4, adapter)
    config, base_reason = choice.resolve_base(
        config,
        inputs.rows["eval"],
        is_packed=base_formats.from_folder(base_nf4).is_packed,
        is_adapter=not loading.has_all_weights(adapter),
    )
    # Folders are named by versions, which begin with their time.
    earlier = (
        tuple(path / "adapter" for path in sorted(earlier_adapters.iterdir(), reverse=True)) if earlier_adapters else ()
    )
    parts = Parts.from_inputs(config, inputs, has_soup=bool(earlier))
    tokenizer = chat.load_tokenizer(base_nf4, ChatFormat.from_folder(dataset))
    workshop = Workshop(config, inputs.settings, base_model, base_nf4, adapter, tokenizer, model, earlier)
    bases = workshop.build_bases()

    # Score the unmerged model first, then the candidates on the rows of both halves; one half chooses.
    # Beside the model folder, and without a name: it is never a part of the artifact, and goes with the process.
    with TemporaryFile(dir=model.parent) as logits_file:
        inputs, scorer = unmerged.measure(config, inputs, parts, base_nf4, adapter, tokenizer, logits_file)
        selected = Chooser(config, base_reason, workshop, scorer, inputs, parts).choose(bases)
        merged_adapter = workshop.keep(selected.winner.candidate)

        # Certify the winner, and every further form, on the other half, the golden rows and the reference text.
        suite_scores, answers = _score_other_suites(scorer, inputs, workshop, merged_adapter)
        merged = selected.winner.scores.with_endings(answers)
        with workshop.merged_model(selected.winner.candidate, merged_adapter) as merged_model:
            built_exports = exports.build_exports(
                config, scorer, base_model, base_nf4, merged_adapter, model, merged_model
            )
        served = served_adapter.measure(config, scorer, selected, base_model, base_nf4, merged_adapter, model)
    contestants = _with_shipped_form(inputs, merged, suite_scores, parts)
    merge_certificate = _certify(
        config,
        inputs,
        parts,
        selected,
        merged,
        contestants,
        workshop.stats[selected.winner.candidate],
        suite_scores,
        built_exports,
        served,
        scorer.unmerged_logits.positions,
        serving_warnings.read_warnings(merged_adapter),
        is_alone=workshop.is_alone,
    )

    # JSON has no NaN, and a certificate that other programs cannot read must not be written.
    text = json.dumps(merge_certificate.as_json(), indent=2, allow_nan=False)
    (model / "certificate.json").write_text(text + "\n", encoding="utf-8")
    (model / "report.html").write_text(merge_certificate.page(), encoding="utf-8")
    progress.say(merge_certificate.outcome.sentence)

    numbers = _numbers(merge_certificate, inputs.settings)
    if merge_certificate.outcome.decision == "pass":
        # Decided by the form that ships, and not by the unmerged model, since later versions are compared with it.
        numbers["best"] = suite_rules.best_contestant(contestants, inputs.settings)
    return merge_certificate.outcome.to_step_result(numbers)


def _with_shipped_form(
    inputs: EvaluationInputs, merged: FormScores, suite_scores: Mapping[str, list[RowScore]], parts: Parts
) -> dict[str, list[RowScore]]:
    """Return every contestant's scores, with the form that ships as the challenger.

    Of the passages only those that certify are left, since the others chose the form.
    """
    suites = {"eval": merged.scores, **suite_scores}
    scores = {**inputs.scores, "challenger": [score for suite in _SUITES for score in suites[suite]]}
    return {
        name: [s for s in rows if s.suite != "reference" or s.id in parts.passages.certification]
        for name, rows in scores.items()
    }


def _score_other_suites(
    scorer: FormScorer, inputs: EvaluationInputs, workshop: Workshop, adapter: Path
) -> tuple[dict[str, list[RowScore]], dict[str, Completion]]:
    """Measure of the form that ships what took no part in the selection.

    Returns:
        The scores on golden rows and reference text, and by id of evaluation rows the answers that show whether
        they end; the latter is empty where the scores of the rows state it already.
    """
    golden, passages = inputs.rows["golden"], inputs.passages
    suite_scores: dict[str, list[RowScore]] = {"golden": [], "reference": []}
    answers: dict[str, Completion] = {}
    measures_endings = inputs.settings.stop_rows > 0 and not completion_metrics.needs_completions(inputs.settings)
    if golden or passages or measures_endings:
        loaded = workshop.load(workshop.model, adapter, scorer.load_options)
        tokenizer = chat.load_tokenizer(workshop.model)
        description, total = "scoring the form that ships", len(golden) + len(passages)
        suite_scores["golden"], _ = scoring.score_and_generate(
            inputs.settings, loaded, tokenizer, golden, inputs.labels, description=description, total=total
        )
        suite_scores["reference"] = scoring.score_passages(
            loaded,
            tokenizer,
            passages,
            batch_tokens=inputs.settings.batch_tokens,
            description=description,
            max_tokens=inputs.max_tokens,
            done=len(golden),
            total=total,
        )
        if measures_endings:
            answers = answer_endings.measure(
                inputs.settings, loaded, tokenizer, inputs.rows["eval"], inputs.labels, completions={}
            )
        del loaded  # an export is loaded next

    return suite_scores, answers


def _certify(
    config: MergeConfig,
    inputs: EvaluationInputs,
    parts: Parts,
    selected: Choice,
    merged: FormScores,
    contestants: Mapping[str, Sequence[RowScore]],
    stats: MergeStats,
    suite_scores: Mapping[str, list[RowScore]],
    built_exports: Mapping[str, Export],
    served: Mapping[str, FormScores],
    compared_positions: dict[str, int],
    warnings: list[str],
    *,
    is_alone: bool,
) -> Certificate:
    """Apply the rules of the evaluation to the form that ships, and the merge's own rules to the cost of merging."""
    settings, answers = inputs.settings, inputs.answers

    # The winner was chosen on the selecting rows, so it looks too good there. The own rules use only the other half.
    halves = parts.rows.as_dict()
    rows = {half: [row for row in inputs.rows["eval"] if row.id in ids] for half, ids in halves.items()}
    prompt_counts = {half: count_prompts(half_rows) for half, half_rows in rows.items()}
    live_scores = [score for score in inputs.unmerged_scores("eval") if score.id in parts.rows.certification]
    certified = merged.subset(parts.rows.certification)
    own_rules = certificate.merge_rules(config, settings, live_scores, certified)
    if is_alone:
        own_rules = [replace(r, text=r.text.replace("lost by merging", "lost over this base")) for r in own_rules]
    rules = [*certificate.min_prompts_rules(config, parts, prompt_counts), *own_rules, *selected.rules]

    # The form itself is listed with the exports, but its only own rule is merge_cost.
    name, path = (certificate.ALONE, "../adapter") if is_alone else ("bf16", ".")
    shipped = {name: Export(path, stats.weights_bytes, certified), **built_exports}
    listed: dict[str, dict[str, Any]] = {}
    for name, export in shipped.items():
        numbers, limits = certificate.certify_export(config, settings, live_scores, name, export.scores, answers)
        listed[name] = {"path": export.path, "size_bytes": export.size_bytes, **numbers, "notes": list(export.notes)}
        rules += limits if name in built_exports else []

    # "live" is the unmerged model's name in published certificates.
    forms = {"live": FormScores(inputs.unmerged_scores("eval"), [])}
    forms |= {trial.candidate.name: trial.scores for trial in selected.trials}
    forms[selected.winner.candidate.name] = merged
    return Certificate(
        choice=selected,
        outcome=verdict.apply_rules(contestants, settings, rules),
        merge_cost=own_rules[0],
        row_counts={half: len(half_rows) for half, half_rows in rows.items()},
        prompt_counts=prompt_counts,
        forms={
            half: {name: certificate.form_numbers(form.subset(ids), settings, answers) for name, form in forms.items()}
            for half, ids in halves.items()
        },
        suites={
            suite: verdict.compute_suite_metrics(
                {"live": inputs.unmerged_scores(suite), "merged": suite_scores[suite]}, suite, settings, answers
            )
            for suite in ("golden", "reference")
        },
        compared_positions=compared_positions,
        stats=stats,
        exports=listed,
        served_adapter={
            base: certificate.form_numbers(scores.subset(parts.rows.certification), settings, answers)
            for base, scores in served.items()
        },
        serving_warnings=warnings,
    )


def _numbers(merge_certificate: Certificate, settings: EvaluateConfig) -> dict[str, Number]:
    """Return the numbers for the manifest and the last line of the log, on the rows that certify."""
    choice, forms = merge_certificate.choice, merge_certificate.forms["certification"]
    winner, merged = choice.winner.candidate, forms[choice.winner.candidate.name]
    numbers: dict[str, Number] = {
        "base": winner.base,
        "rank": choice.rank,
        "strength": winner.strength,
        "adapters": winner.num_adapters,
        "reduced_intruders": winner.has_reduced_intruders,
        "forms_built": len(choice.trials),
        "rows": merge_certificate.row_counts["certification"],
        "merge_loss_nats": merge_certificate.merge_cost.value,
        "kl_nats": merged.get("kl"),
        "agreement": merged.get("agreement"),
    }

    # The unmerged model and either base by their names, and what ships where that is another form.
    listed_forms = {name: forms[name] for name in ("live", *BASES) if name in forms}
    listed_forms |= {} if winner.has_trained_adapter else {"merged": merged}
    # dict.fromkeys removes repetitions, since the primary metric may be one of the first two.
    for metric in dict.fromkeys(("accuracy", "loss", settings.primary_metric or "loss", answer_endings.METRIC)):
        numbers |= {f"{metric}_{name}": form[metric] for name, form in listed_forms.items() if metric in form}
    numbers |= {
        f"loss_{name}": export.get("loss")
        for name, export in merge_certificate.exports.items()
        if name not in ("bf16", certificate.ALONE)
    }
    return numbers | {
        "modules": merge_certificate.stats.modules,
        "weights_bytes": merge_certificate.stats.weights_bytes,
    }
