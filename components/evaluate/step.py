"""Score base, its 4-bit form, challenger, champion and anchor on the same frozen rows, and decide by the rules.

Reads `dataset/{train,eval,golden}.jsonl`, `base_model`, `base_nf4`, `adapter`, and `champion`, `anchor` and
`reference_data` where they exist. Makes `evaluation/`: `evaluation.json`, `scores.jsonl`, `report.html`.
Refuses (11) a challenger that a rule fails, or that there is not enough evidence for.
Command: `python -m components.evaluate --plan URI`.
"""

from __future__ import annotations

import json
from pathlib import Path

from components.evaluate import contestants, intruders, report
from components.evaluate.contestants import ContestantFolders
from components.evaluate.result import SUITES, EvaluationResult, compute_train_eval_gap
from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core import graph, progress
from qlora_retrain.core.outcome import Number, StepResult
from qlora_retrain.evaluation import answer_endings, drift, reference_text, scoring
from qlora_retrain.evaluation.drift import Drift
from qlora_retrain.evaluation.metrics.suite_metrics import MetricValues
from qlora_retrain.evaluation.rows import Row
from qlora_retrain.evaluation.rules.rule_result import RuleResult
from qlora_retrain.evaluation.scoring import ScoringOptions
from qlora_retrain.evaluation.verdict import apply_rules
from qlora_retrain.lm import chat, conversations
from qlora_retrain.lm.chat_format import ChatFormat


def run(
    config: EvaluateConfig,
    dataset: Path,
    base_model: Path,
    base_nf4: Path,
    adapter: Path,
    champion: Path | None,
    anchor: Path | None,
    golden_data: Path | None,
    reference_data: Path | None,
    evaluation: Path,
) -> StepResult:
    """Run the step; `golden_data` itself is not parsed, because `dataset` holds its checked rows."""
    rows = [row for suite in ("eval", "golden") for row in scoring.read_rows(dataset / f"{suite}.jsonl", suite)]
    answers = {suite: {r.id: conversations.answer_of(r.messages) for r in rows if r.suite == suite} for suite in SUITES}
    result = EvaluationResult(answers)
    folders = ContestantFolders(base_model, base_nf4, adapter, champion, anchor)
    _score_contestants(config, folders, dataset, rows, reference_data, result)
    result.drifts = _compute_drift(config, champion, dataset) if champion else None

    result.training = _read_training(adapter)

    # These are rules of this step only, since they concern the data and the training, not the model.
    step_rules = (_check_drift(config, champion, result), result.check_train_eval_gap(config), result.trained_steps())
    verdict = apply_rules(result.scores, config, [rule for rule in step_rules if rule], is_final=False)
    result.compute_metrics(config)

    scoring.write_scores(evaluation / "scores.jsonl", result.scores)
    # JSON has no NaN, so every number that is not finite must be null by now; anything else is a bug.
    text = json.dumps(result.as_json(config, verdict), indent=2, allow_nan=False)
    (evaluation / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    # The report is published with the version, so it holds a row's text only where the line allows that.
    golden = [row for row in rows if row.suite == "golden"] if config.text_in_reports else []
    page = report.render(verdict, result, config, golden)
    (evaluation / "report.html").write_text(page, encoding="utf-8")

    progress.say(verdict.sentence)
    numbers = {**_headline_numbers(result.metrics["eval"], config), **result.training}
    return verdict.to_step_result(numbers)


def _score_contestants(
    config: EvaluateConfig,
    folders: ContestantFolders,
    dataset: Path,
    rows: list[Row],
    reference_data: Path | None,
    result: EvaluationResult,
) -> None:
    """Fill in every contestant's scores, and the measurements of the challenger alone."""
    data = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    line_format = ChatFormat.from_folder(dataset)
    passages = reference_text.read_passages(reference_data) if reference_data else []
    # One progress bar for all contestants.
    total = len(folders.names) * (len(rows) + len(passages))
    for contestant in contestants.load_contestants(config, folders):
        # A published version renders chats by its own template, which may refuse rows that the line's now carries.
        model, own_format = contestant.model, None if contestant.is_published else line_format
        tokenizer = chat.load_tokenizer(contestant.tokenizer_folder, own_format)
        options = ScoringOptions(
            generate_golden=config.text_in_reports,
            measure_endings=contestant.name == "challenger",
            skip_refused=contestant.is_published,
        )
        done = sum(map(len, result.scores.values()))
        with contestant.scoring_context():
            to_score = rows if contestant.is_trained else select_base_rows(rows, config.base_rows)
            scores, completions = scoring.score_and_generate(
                config, model, tokenizer, to_score, data["labels"], options,
                description="evaluating", done=done, total=total,
            )  # fmt: skip
            scores = scoring.with_places(scores, rows)
            scores += scoring.score_passages(
                model, tokenizer, passages, max_tokens=data["max_length_tokens"], batch_tokens=config.batch_tokens,
                description="evaluating", done=done + len(rows), total=total, skip_refused=contestant.is_published,
            )  # fmt: skip
        result.scores[contestant.name], result.completions[contestant.name] = scores, completions
        not_scored = sum(not score.tokens for score in scores if score.suite != "reference")
        note = f"; its own chat template refuses {not_scored} others" if not_scored else ""
        if not_scored and not contestant.is_trained:
            note = f" of {len(rows)} (evaluate.base_rows)"
        progress.say(f"{contestant.name}: {len(rows) - not_scored} rows scored{note}")

        # These measurements concern only the challenger, so they are made while its model is in memory.
        if contestant.name == "challenger":
            result.intruders = intruders.count_intruders(
                model, top_k=config.intruder_top_k, epsilon=config.intruder_epsilon, base_nf4=folders.base_nf4
            )
            train_rows = _sample_training_rows(dataset, config.train_rows)
            if train_rows:
                train_scores = scoring.score_rows(
                    model, tokenizer, train_rows, labels=None, last_answer_only=data["labels"] is not None,
                    batch_tokens=config.batch_tokens, description="training rows",
                )  # fmt: skip
                eval_scores = [s for s in scores if s.suite == "eval"]
                result.train_eval_gap = compute_train_eval_gap(eval_scores, train_scores, config)

        # Released before the next one is loaded, so that only one model is in memory.
        del contestant, model


def select_base_rows(rows: list[Row], max_rows: int | None) -> list[Row]:
    """Select the evaluation rows with the smallest ids, which are hashes, and all rows of other suites."""
    ids = sorted(row.id for row in rows if row.suite == "eval")[:max_rows]
    selected = set(ids)
    return [row for row in rows if row.suite != "eval" or row.id in selected]


def _sample_training_rows(dataset: Path, max_rows: int) -> list[Row]:
    """Select rows that the challenger was trained on, by id; ids are hashes, so the selection is arbitrary."""
    path = dataset / "train.jsonl"
    return sorted(scoring.read_rows(path, "train"), key=lambda row: row.id)[:max_rows] if max_rows else []


def _read_training(adapter: Path) -> dict[str, int]:
    """Return how many steps the attempt that made the adapter trained, and how many it took from a checkpoint."""
    path = adapter / "training.json"
    # An adapter that no training of ours made has no such file.
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: int(document[name]) for name in ("steps", "resumed_at", "trained_steps") if name in document}


def _compute_drift(config: EvaluateConfig, champion: Path, dataset: Path) -> list[Drift] | None:
    """Compute the drift of the data from the champion's; None where either profile has no counts to compare."""
    profile_before, profile_now = champion / graph.PROFILE_PATH, dataset / "profile.json"
    # A champion of an older release has no profile.
    if not profile_before.is_file() or not profile_now.is_file():
        return None
    before, now = drift.read_distributions(profile_before), drift.read_distributions(profile_now)
    if before is None or now is None:
        return None
    prompts = drift.read_prompts(profile_before), drift.read_prompts(profile_now)
    return drift.compute_drift(before, now, config.confidence, prompts)


def _check_drift(config: EvaluateConfig, champion: Path | None, result: EvaluationResult) -> RuleResult | None:
    """Apply the rule on drift, where the line has one and there is a champion."""
    limit = config.max_drift_psi
    if champion is None or limit is None:
        return None
    text, passed = drift.check_limit(result.drifts, limit, "the champion's data")
    if not result.drifts:
        return RuleResult("data_drift", text, limit=limit, passed=passed)
    # PSI is never negative, and only its lower end is tested, so the result has no upper end.
    largest = result.drifts[0]
    return RuleResult("data_drift", text, largest.psi, largest.psi_beyond_chance, None, limit, passed)


def _headline_numbers(metrics: dict[str, MetricValues], config: EvaluateConfig) -> dict[str, Number]:
    """Select the numbers for the manifest and the last line of the log."""
    # Accuracy and loss, the primary metric where it is a third one, and the answers that ended by themselves.
    numbers: dict[str, Number] = {
        name: max((int(values[name] or 0) for values in metrics.values()), default=0) for name in ("rows", "prompts")
    }
    for metric in dict.fromkeys(("accuracy", "loss", config.primary_metric or "loss", answer_endings.METRIC)):
        numbers |= {f"{metric}_{name}": values[metric] for name, values in metrics.items() if metric in values}
    return numbers
