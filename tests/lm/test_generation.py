"""Generated answers compared with greedy decoding one token at a time, and the scores of such answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.evaluation import scoring, verdict
from qlora_retrain.evaluation.rows import UNPARSABLE, Row
from qlora_retrain.evaluation.scoring import ScoringOptions
from qlora_retrain.lm import chat, conversations, generation, loading
from qlora_retrain.lm.chat_format import ChatFormat
from qlora_retrain.lm.generation import Completion

LABELS = ["delivery", "login", "refund"]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return loading.load_base(tiny_model, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return chat.load_tokenizer(tiny_model)


def row(text: str, answer: str, suite: str = "eval") -> Row:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return Row(conversations.row_id(messages), suite, messages)


def greedy_ids(model: Any, stop_ids: list[int], prompt: list[int], max_new_tokens: int) -> list[int]:
    """Decode by definition: one full forward pass per token, one row, no cache."""
    import torch

    ids: list[int] = []
    with torch.inference_mode():
        while len(ids) < max_new_tokens:
            ids.append(int(model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stop_ids:
                break
    return ids


def greedy(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> str:
    ids = greedy_ids(model, [tokenizer.tokenizer.eos_token_id], prompt, max_new_tokens)
    return str(tokenizer.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_batched_answers_with_a_cache_are_those_of_decoding_one_token_at_a_time(
    model: Any, tokenizer: Any, batch_tokens: int
) -> None:
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": "order " * n + str(n)}]) for n in (1, 7, 3, 12)]
    answers = generation.generate_answers(model, tokenizer, prompts, 9, batch_tokens)
    assert texts(answers) == [greedy(model, tokenizer, prompt, 9) for prompt in prompts]


def test_a_models_own_generation_config_does_not_count(tiny_model: Path, tokenizer: Any) -> None:
    model: Any = loading.load_base(tiny_model, dtype="float32")
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "where is order 7"}])
    before = generation.generate_answers(model, tokenizer, [prompt], 9, 1000)

    # generate() would take these from the model where our config leaves them out.
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    model.generation_config.repetition_penalty = 3.0
    assert generation.generate_answers(model, tokenizer, [prompt], 9, 1000) == before


def test_an_answer_stops_at_every_token_of_the_list_and_says_whether_it_did(model: Any, tiny_model: Path) -> None:
    plain = chat.load_tokenizer(tiny_model)
    prompts = [plain.prompt_ids([{"role": "user", "content": f"where is order {i}"}]) for i in (7, 12)]
    cut = generation.generate_answers(model, plain, prompts, 9, 1000)
    assert [(len(answer.ids), answer.ended) for answer in cut] == [(9, False), (9, False)]

    # A plain token in the middle of the first answer becomes a stop of the line, though it is not special.
    end = next(token for token in cut[0].ids[1:] if token != cut[0].ids[0])
    name = plain.tokenizer.convert_ids_to_tokens(end)
    stopping = chat.load_tokenizer(tiny_model, ChatFormat(stop_tokens=(name,)))
    assert stopping.stop_ids == [plain.tokenizer.eos_token_id, end]
    answers = generation.generate_answers(model, stopping, prompts, 9, 1000)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = greedy_ids(model, stopping.stop_ids, prompt, 9)
        assert list(answer.ids) == expected
        assert answer.ended is (expected[-1] == end)
        without_end = expected[:-1] if answer.ended else expected
        assert answer.text == plain.tokenizer.decode(without_end, skip_special_tokens=True).strip()
    assert answers[0].ended
    assert len(answers[0].ids) < 9


def test_an_answer_whose_end_is_the_last_token_that_is_allowed_ended_by_itself(tokenizer: Any) -> None:
    end = tokenizer.stop_ids[0]
    for ids, ended, length in (([87, 88, end], True, 3), ([87, 88, 89], False, 3), ([87, end, 0, 0], True, 2)):
        completion = Completion.from_ids(ids, tokenizer)
        assert (completion.ended, len(completion.ids)) == (ended, length)


def test_padding_with_a_stop_does_not_end_an_answer_twice(tiny_model: Path, model: Any, tokenizer: Any) -> None:
    """A tokenizer without a padding token pads with its first stop."""
    unpadded = chat.load_tokenizer(tiny_model)
    unpadded.tokenizer.pad_token = None
    assert unpadded.pad_token_id == unpadded.stop_ids[0]
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": "order " * n}]) for n in (1, 9)]
    assert generation.generate_answers(model, unpadded, prompts, 6, 1000) == generation.generate_answers(
        model, tokenizer, prompts, 6, 1000
    )


def test_a_text_that_asks_nothing_begins_after_an_end(model: Any, tokenizer: Any) -> None:
    answers = generation.generate_answers(model, tokenizer, [[], tokenizer.stop_ids[:1]], 5, 1000)
    assert answers[0] == answers[1]


def test_metrics_of_generated_answers_are_in_scores_rules_and_numbers(model: Any, tokenizer: Any) -> None:
    settings = EvaluateConfig(
        metrics=("loss", "exact_match", "rouge_l", "chrf"),
        primary_metric="exact_match",
        max_new_tokens=6,
        allow_first_release=True,
        min_prompts=3,
        floors={"rouge_l": 0.5},
        max_slice_regression=None,
    )
    prompts = [f"where is order {i}" for i in range(4)]
    outputs = [greedy(model, tokenizer, tokenizer.prompt_ids([{"role": "user", "content": p}]), 6) for p in prompts]

    # The right answer of every row but the first is what the model generates.
    rows = [row(p, o if i else "something else") for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))]
    scores, generated = scoring.score_and_generate(settings, model, tokenizer, rows, None, description="scoring")
    assert [generated[r.id] for r in rows] == outputs
    assert [s.values["exact_match"] for s in scores] == [0.0, 1.0, 1.0, 1.0]
    assert verdict.compute_metrics(scores, settings, {})["exact_match"] == pytest.approx(0.75)

    # A base that answers alike: the gain over it is 0, and the floor does not depend on it.
    rival, _ = scoring.score_and_generate(settings, model, tokenizer, rows, None, description="scoring")
    decided = verdict.apply_rules({"base": rival, "challenger": scores}, settings)
    passed = {r.name: (r.value, r.passed) for r in decided.rules}
    assert passed["gain_over_base"] == (0.0, False)
    assert passed["rouge_l_floor"][1] is True


def test_labels_can_be_generated_and_text_that_is_no_label_is_never_shown(model: Any, tokenizer: Any) -> None:
    completion = greedy(model, tokenizer, tokenizer.prompt_ids([{"role": "user", "content": "order 1"}]), 6)
    settings = EvaluateConfig(label_scoring="generation", max_new_tokens=6)
    rows = [row("order 1", completion), row("order 2", "refund")]
    scores, _ = scoring.score_and_generate(
        settings, model, tokenizer, rows, [*LABELS, completion], description="scoring"
    )
    assert (scores[0].predicted, scores[0].correct) == (completion, True)
    assert (scores[1].predicted, scores[1].correct) == (UNPARSABLE, False)

    # Loss and slices do not depend on how the label was chosen.
    plain = scoring.score_rows(
        model, tokenizer, rows, labels=[*LABELS, completion], batch_tokens=512, description="scoring"
    )
    assert [s.loss_nats for s in scores] == pytest.approx([s.loss_nats for s in plain], rel=1e-4)
    assert [s.slices for s in scores] == [s.slices for s in plain]


def test_only_golden_rows_are_generated_where_only_the_report_shows_them(model: Any, tokenizer: Any) -> None:
    rows = [row("order 1", "refund"), row("order 2", "refund", "golden")]
    scores, generated = scoring.score_and_generate(
        EvaluateConfig(), model, tokenizer, rows, LABELS, ScoringOptions(generate_golden=True), description="scoring"
    )
    assert list(generated) == [rows[1].id]
    assert all(not s.values for s in scores)
    assert scoring.score_and_generate(EvaluateConfig(), model, tokenizer, rows, LABELS, description="scoring")[1] == {}


@pytest.mark.parametrize("settings", [{"primary_metric": "chrf"}, {"floors": {"json_validity": 0.9}}])
def test_a_metric_that_is_not_measured_cannot_be_a_rule(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not among metrics"):
        EvaluateConfig(**settings)


def test_reference_chats_are_scored_on_the_assistants_tokens(model: Any, tokenizer: Any) -> None:
    import torch

    messages = [{"role": "user", "content": "where is it"}, {"role": "assistant", "content": "on its way"}]
    (score,) = scoring.score_passages(model, tokenizer, [messages], batch_tokens=512, description="scoring")
    (encoded,) = tokenizer.encode(messages)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([encoded.input_ids])).logits[0]
    targets = [i for i, s in enumerate(encoded.supervised) if s]

    # The logits that predict a token are one position before it.
    hits = sum(int(logits[i - 1].argmax()) == encoded.input_ids[i] for i in targets)
    loss = -sum(float(logits[i - 1].log_softmax(-1)[encoded.input_ids[i]]) for i in targets)
    assert (score.tokens, score.hits) == (len(targets), hits)
    assert score.loss_nats == pytest.approx(loss, rel=1e-4)


def test_an_unknown_metric_is_a_fault_of_the_config(tmp_path: Path) -> None:
    from qlora_retrain.config.line import load

    with pytest.raises(UsageError, match=r"evaluate\.metrics"):
        load("line: x1\nsources: {raw_data: file:///a, base_model: file:///b}\nevaluate: {metrics: [bleu]}\n")
