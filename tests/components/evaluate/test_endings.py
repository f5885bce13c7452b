"""Answers that do not end by themselves are refused, whatever their likelihood says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.evaluate.step import run
from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core.errors import Exit, IntegrityError
from qlora_retrain.evaluation.scoring import read_scores
from qlora_retrain.lm.chat_format import ChatFormat

CONFIG = EvaluateConfig(allow_first_release=True, bootstrap_samples=200, device="cpu", batch_tokens=2048)
RAISING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def evaluate(
    tiny_model: Path, tiny_nf4: Path, write_dataset: Callable[..., Path], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Run the step on a data set of 36 rows, and return `evaluation.json` and the ending."""

    def evaluate(adapter: Path, config: EvaluateConfig = CONFIG, **options: Any) -> dict[str, Any]:
        champion = options.pop("champion", None)
        edit = options.pop("edit", lambda dataset: None)
        dataset, evaluation = write_dataset(tmp_path / "dataset", **options), tmp_path / "evaluation"
        edit(dataset)
        evaluation.mkdir()
        report = run(config, dataset, tiny_model, tiny_nf4, adapter, champion=champion, anchor=None, golden_data=None,
                     reference_data=None, evaluation=evaluation)  # fmt: skip
        document: dict[str, Any] = json.loads((evaluation / "evaluation.json").read_text())
        scores, page = read_scores(evaluation / "scores.jsonl"), (evaluation / "report.html").read_text()
        return {**document, "refused": report.refused, "scores": scores, "page": page, "numbers": report.numbers}

    return evaluate


def rule(document: dict[str, Any], name: str = "answers_end") -> dict[str, Any]:
    return next(dict(r) for r in document["rules"] if r["name"] == name)


def test_a_model_that_repeats_its_label_without_an_end_is_refused(
    rambling_adapter: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    document = evaluate(rambling_adapter)
    assert document["refused"].exit_code == Exit.QUALITY_REFUSED
    # Everything that looks at likelihoods alone passes: ranked, the right label wins.
    assert [r["name"] for r in document["rules"] if r["passed"] is not True] == ["answers_end"]
    assert document["contestants"]["challenger"]["accuracy"] > 0.7
    assert rule(document)["value"] == document["contestants"]["challenger"]["answers_ended"] == 0.0
    sentence = "of 36 answers 0 ended by themselves (0 %; at least 90 %)"
    assert sentence in document["sentence"]
    assert sentence in document["page"]
    assert document["numbers"]["answers_ended_challenger"] == 0.0


def test_a_model_that_ends_its_answers_passes_and_only_the_challenger_is_asked(
    tiny_adapter: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    document = evaluate(tiny_adapter, golden=12)
    assert document["refused"] is None
    assert rule(document)["passed"] is True
    assert rule(document)["value"] >= 0.9
    measured = {name: sum("answers_ended" in s.values for s in rows) for name, rows in document["scores"].items()}
    assert measured == {"base": 0, "base_nf4": 0, "challenger": 36}, "golden rows are not part of the sample"
    assert "answers that ended by themselves" in document["page"]


def test_what_is_not_measured_is_shown_and_counts_as_no_passed_rule(
    rambling_adapter: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    document = evaluate(rambling_adapter, CONFIG.model_copy(update={"stop_rows": 0}))
    assert document["refused"] is None
    assert (rule(document)["passed"], rule(document)["is_measured"]) == (True, False)
    assert "evaluate.stop_rows is 0" in document["sentence"]
    assert f"passed {len(document['rules']) - 1} rules" in document["sentence"]
    assert "not measured" in document["page"]


def test_answers_that_are_generated_anyway_are_not_generated_twice(
    rambling_adapter: Path, evaluate: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG.model_copy(update={"metrics": ("loss", "exact_match"), "max_new_tokens": 8})
    document = evaluate(rambling_adapter, config, task="text")
    assert rule(document)["passed"] is False
    assert rule(document)["limit"] == 0.8, "the floor of text"
    # Then the other contestants have the metric too.
    assert "answers_ended" in document["contestants"]["base"]
    assert "to see whether they end" not in capsys.readouterr().out


def with_system_turns(dataset: Path, count: int = 6) -> None:
    rows = [json.loads(line) for line in (dataset / "eval.jsonl").read_text().splitlines()]
    for row in rows[:count]:
        row["messages"].insert(0, {"role": "system", "content": "order"})
    (dataset / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def champion(tiny_model: Path, tmp_path: Path) -> Path:
    """A published version whose own chat template raises on a system turn."""
    version = tmp_path / "version"
    shutil.copytree(tiny_model, version / "model")
    (version / "model/chat_template.jinja").write_text(RAISING)
    return version


def test_rows_that_the_champions_own_template_refuses_are_left_out_and_counted(
    tiny_adapter: Path, evaluate: Callable[..., dict[str, Any]], champion: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG.model_copy(update={"max_drift_psi": None})
    document = evaluate(tiny_adapter, config, champion=champion, edit=with_system_turns)
    assert [s.tokens == 0 for s in document["scores"]["champion"]] == [True] * 6 + [False] * 30
    assert all(s.tokens for s in document["scores"]["challenger"])
    text = rule(document, "loss_to_champion")["text"]
    assert "6 rows are left out, since its own chat template refuses them" in text
    log = capsys.readouterr().out
    assert "6 of 36 rows are left out, the first since the chat template raises: no system turn" in log
    assert "champion: 30 rows scored; its own chat template refuses 6 others" in log

    # The gain is that over the 30 rows alone.
    ours, theirs = document["scores"]["challenger"][6:], document["scores"]["champion"][6:]
    lost = sum(bool(b.correct) for b in theirs) - sum(bool(a.correct) for a in ours)
    assert rule(document, "loss_to_champion")["value"] == pytest.approx(lost / 30)


def test_too_few_comparable_rows_are_insufficient_evidence(
    tiny_adapter: Path, evaluate: Callable[..., dict[str, Any]], champion: Path
) -> None:
    config = CONFIG.model_copy(update={"max_drift_psi": None})
    document = evaluate(tiny_adapter, config, champion=champion, edit=lambda dataset: with_system_turns(dataset, 36))
    assert document["verdict"] == "insufficient evidence"
    assert (
        "refuses 36 of the evaluation rows; rows of 0 different prompts can be compared"
        in rule(document, "loss_to_champion")["text"]
    )


def test_a_row_that_the_lines_own_template_refuses_is_named(
    tiny_adapter: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    def edit(dataset: Path) -> None:
        with_system_turns(dataset, 1)
        ChatFormat(template=RAISING).write(dataset)

    with pytest.raises(IntegrityError, match=r"eval\.jsonl: the row [0-9a-f]{16} was let in .* no system turn"):
        evaluate(tiny_adapter, edit=edit)


def test_the_lines_chat_format_renders_for_every_contestant_of_the_line(
    tiny_adapter: Path, evaluate: Callable[..., dict[str, Any]], champion: Path, tiny_model: Path
) -> None:
    from qlora_retrain.lm import chat

    line_format = ChatFormat(template=RAISING.replace("<|im_end|>\n", "!<|im_end|>\n"))
    document = evaluate(
        tiny_adapter, CONFIG.model_copy(update={"max_drift_psi": None}), champion=champion, edit=line_format.write
    )
    tokens = {name: [s.tokens for s in rows] for name, rows in document["scores"].items()}
    # The mark before the end is part of an answer of the line, and of none of the published version.
    question = [{"role": "user", "content": "x"}]
    expected = {
        label: len(chat.load_tokenizer(tiny_model, line_format).answer_ids(question, label))
        for label in ("delivery", "login", "refund")
    }
    answers = [next(n.removeprefix("label=") for n in s.slices if n[:5] == "label") for s in document["scores"]["base"]]
    assert tokens["base"] == tokens["base_nf4"] == tokens["challenger"] == [expected[answer] for answer in answers]
    assert tokens["champion"] == [count - 1 for count in tokens["base"]]
