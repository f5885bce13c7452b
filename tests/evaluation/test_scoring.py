"""Compare scores with the plain way: each label alone, through the whole model, with all its logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.evaluation import scoring
from qlora_retrain.evaluation.scoring import Row
from qlora_retrain.lm import chat, conversations, loading

# They include shared prefixes, a label inside another, and labels of one token and of many.
LABELS = ["card", "card lost", "card lost abroad", "cash", "delivery", "login to my account", "refund"]


def make_row(text: str, answer: str, suite: str = "eval") -> Row:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return Row(conversations.row_id(messages), suite, messages)


ROWS = [make_row(f"{'please ' * (i % 5)}help me with order {i}", LABELS[i % len(LABELS)]) for i in range(15)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, because matrices this small are slower on more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plain_log_likelihood(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Compute the log-likelihood of one answer from the model's own full logits."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float()
    logprobs = logits.log_softmax(-1)
    return float(sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return chat.load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return loading.load_base(tiny_model, dtype="float32")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch_tokens", [256, 4096])
def test_every_label_gets_the_score_that_it_has_alone(
    tiny_model: Path, tokenizer: Any, attention: str, batch_tokens: int
) -> None:
    model = loading.load_base(tiny_model, dtype="float32", attn_implementation=attention)
    scores = scoring.score_rows(model, tokenizer, ROWS, labels=LABELS, batch_tokens=batch_tokens, description="scoring")
    for item, score in zip(ROWS, scores, strict=True):
        prompt = tokenizer.prompt_ids(item.messages[:1])
        # Each label in a forward pass of its own, without trie, batch or cache.
        alone = {x: plain_log_likelihood(model, prompt, tokenizer.answer_ids(item.messages[:1], x)) for x in LABELS}
        answer = item.messages[1]["content"]
        assert score.id == item.id
        assert score.loss_nats == pytest.approx(-alone[answer], rel=1e-4)
        assert score.tokens == len(tokenizer.answer_ids(item.messages[:1], answer))
        assert score.predicted == max(alone, key=alone.__getitem__)
        assert score.correct == (score.predicted == answer)


def test_an_answer_that_is_no_label_is_scored_by_its_loss_and_never_right(model: Any, tokenizer: Any) -> None:
    unlabelled = make_row("help me with order 3", "complaint")
    (score,) = scoring.score_rows(
        model, tokenizer, [unlabelled], labels=LABELS, batch_tokens=512, description="scoring"
    )

    prompt = tokenizer.prompt_ids(unlabelled.messages[:1])
    expected = plain_log_likelihood(model, prompt, tokenizer.answer_ids(unlabelled.messages[:1], "complaint"))
    assert score.loss_nats == pytest.approx(-expected, rel=1e-4)
    assert score.predicted in LABELS
    assert score.correct is False


def test_text_answers_are_scored_on_every_assistant_turn(model: Any, tokenizer: Any) -> None:
    import torch

    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "good day"},
        {"role": "user", "content": "where is order 7"},
        {"role": "assistant", "content": "it is on its way to you"},
    ]
    rows = [Row("a", "eval", messages), make_row("a longer question about order 12", "an answer")]
    score, second_score = scoring.score_rows(
        model, tokenizer, rows, labels=None, batch_tokens=4096, description="scoring"
    )

    # The expected loss is the model's own mean over supervised tokens.
    (encoded,) = tokenizer.encode(messages)
    labels = torch.tensor([i if s else -100 for i, s in zip(encoded.input_ids, encoded.supervised, strict=True)])
    with torch.inference_mode():
        mean = model(input_ids=torch.tensor([encoded.input_ids]), labels=labels[None]).loss

    assert score.tokens == encoded.supervised_tokens
    assert score.loss_nats / score.tokens == pytest.approx(float(mean), rel=1e-4)
    assert score.predicted is None
    assert score.correct is None
    assert (second_score.id, second_score.suite) == (rows[1].id, "eval")


def test_reference_text_is_scored_on_all_tokens_but_the_first_of_a_piece(model: Any, tokenizer: Any) -> None:
    texts = ["where is the parcel of order 17 and when will I receive it", "refund"]
    scores = scoring.score_passages(model, tokenizer, texts, batch_tokens=512, description="scoring", max_tokens=8)

    # A piece starts without context, so its first token has no probability.
    ids = tokenizer.tokenizer(texts[0])["input_ids"]
    pieces = [ids[i : i + 8] for i in range(0, len(ids), 8)]
    expected = sum(plain_log_likelihood(model, piece[:1], piece[1:]) for piece in pieces if len(piece) > 1)
    assert scores[0].loss_nats == pytest.approx(-expected, rel=1e-4)
    assert scores[0].tokens == sum(len(piece) - 1 for piece in pieces)
    assert [score.suite for score in scores] == ["reference", "reference"]


def test_the_result_does_not_depend_on_the_batch(model: Any, tokenizer: Any) -> None:
    options = {"labels": LABELS, "description": "scoring"}
    alone = scoring.score_rows(model, tokenizer, ROWS[:1], batch_tokens=256, **options)
    batched = scoring.score_rows(model, tokenizer, ROWS, batch_tokens=4096, **options)
    # A row alone has no padding, in a batch it has.
    assert batched[0].predicted == alone[0].predicted
    assert batched[0].loss_nats == pytest.approx(alone[0].loss_nats, rel=1e-5)


def test_progress_counts_from_the_rows_done_before_to_the_total(
    model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    scoring.score_rows(
        model,
        tokenizer,
        ROWS,
        labels=LABELS,
        batch_tokens=4096,
        description="evaluating",
        done=30,
        total=30 + len(ROWS),
    )
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["what"], last["done"], last["total"]) == ("evaluating", 45, 45)


def test_scores_come_back_from_their_file_as_they_were_written(tmp_path: Path) -> None:
    scores = {
        "base": [scoring.RowScore("a", "eval", 1.25, 3, "refund", False), scoring.RowScore("b", "golden", 2.0, 4)],
        "challenger": [scoring.RowScore("a", "eval", 0.5, 3, "login", True)],
    }
    scoring.write_scores(tmp_path / "scores.jsonl", scores)
    assert scoring.read_scores(tmp_path / "scores.jsonl") == scores
    first = json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[0])
    assert first == {"id": "a", "suite": "eval", "contestant": "base", "loss_nats": 1.25, "tokens": 3,
                     "predicted": "refund", "correct": False}  # fmt: skip


def test_an_error_names_the_line_of_a_damaged_row_or_score(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text('{"id": "a", "messages": []}\n{"id": "b"}\n')
    with pytest.raises(IntegrityError, match=r"eval.jsonl:2"):
        scoring.read_rows(path, "eval")

    path.write_text('{"id": "a"}\n')
    with pytest.raises(IntegrityError, match=r"eval.jsonl:1"):
        scoring.read_scores(path)
