"""Generated answers compared with greedy decoding one token at a time, and the scores of such answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.evaluation import scoring, verdict
from qlora_retrain.evaluation.rows import UNPARSABLE, Row
from qlora_retrain.lm import chat, generation, loading

LABELS = ["delivery", "login", "refund"]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return loading.load_base(tiny_model, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return chat.load_tokenizer(tiny_model)


def row(text: str, answer: str, suite: str = "eval") -> Row:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return Row(chat.row_id(messages), suite, messages)


def greedy(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> str:
    """Decode by definition: one full forward pass per token, one row, no cache."""
    import torch

    ids: list[int] = []
    with torch.inference_mode():
        while len(ids) < max_new_tokens:
            ids.append(int(model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_batched_answers_with_a_cache_are_those_of_decoding_one_token_at_a_time(
    model: Any, tokenizer: Any, batch_tokens: int
) -> None:
    prompts = [chat.prompt_ids(tokenizer, [{"role": "user", "content": "order " * n + str(n)}]) for n in (1, 7, 3, 12)]
    answers = generation.generate_answers(model, tokenizer, prompts, 9, batch_tokens)
    assert answers == [greedy(model, tokenizer, prompt, 9) for prompt in prompts]


def test_a_models_own_generation_config_does_not_count(tiny_model: Path, tokenizer: Any) -> None:
    model: Any = loading.load_base(tiny_model, dtype="float32")
    prompt = chat.prompt_ids(tokenizer, [{"role": "user", "content": "where is order 7"}])
    before = generation.generate_answers(model, tokenizer, [prompt], 9, 1000)

    # generate() would take these from the model where our config leaves them out.
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    model.generation_config.repetition_penalty = 3.0
    assert generation.generate_answers(model, tokenizer, [prompt], 9, 1000) == before


def test_an_answer_stops_at_the_token_that_the_template_ends_turns_with(model: Any, tiny_model: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model)
    prompt = chat.prompt_ids(tokenizer, [{"role": "user", "content": "where is order 7"}])
    ids = tokenizer(generation.generate_answers(model, tokenizer, [prompt], 9, 1000)[0], add_special_tokens=False)[
        "input_ids"
    ]

    # A token in the middle of the model's own answer becomes the special token that ends a turn.
    end = next(i for i in ids[1:] if i != ids[0])
    tokenizer.add_tokens([AddedToken(tokenizer.convert_ids_to_tokens(end), special=True)])
    turn = "{{ m['content'] }}" + tokenizer.convert_ids_to_tokens(end)
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    assert chat.stop_token_ids(tokenizer) == [tokenizer.eos_token_id, end]

    before = ids[: ids.index(end)]
    assert generation.generate_answers(model, tokenizer, [prompt], 9, 1000) == [tokenizer.decode(before).strip()]


def test_metrics_of_generated_answers_are_in_scores_rules_and_numbers(model: Any, tokenizer: Any) -> None:
    settings = EvaluateConfig(
        metrics=("loss", "exact_match", "rouge_l", "chrf"),
        primary_metric="exact_match",
        max_new_tokens=6,
        allow_first_release=True,
        min_rows=3,
        floors={"rouge_l": 0.5},
        max_slice_regression=None,
    )
    prompts = [f"where is order {i}" for i in range(4)]
    outputs = [
        greedy(model, tokenizer, chat.prompt_ids(tokenizer, [{"role": "user", "content": p}]), 6) for p in prompts
    ]

    # The right answer of every row but the first is what the model generates.
    rows = [row(p, o if i else "something else") for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))]
    scores, texts = scoring.score_and_generate(settings, model, tokenizer, rows, None, description="scoring")
    assert [texts[r.id] for r in rows] == outputs
    assert [s.values["exact_match"] for s in scores] == [0.0, 1.0, 1.0, 1.0]
    assert verdict.compute_metrics(scores, settings, {})["exact_match"] == pytest.approx(0.75)

    # A base that answers alike: the gain over it is 0, and the floor does not depend on it.
    rival, _ = scoring.score_and_generate(settings, model, tokenizer, rows, None, description="scoring")
    decided = verdict.apply_rules({"base": rival, "challenger": scores}, settings)
    passed = {r.name: (r.value, r.passed) for r in decided.rules}
    assert passed["gain_over_base"] == (0.0, False)
    assert passed["rouge_l_floor"][1] is True


def test_labels_can_be_generated_and_text_that_is_no_label_is_never_shown(model: Any, tokenizer: Any) -> None:
    completion = greedy(model, tokenizer, chat.prompt_ids(tokenizer, [{"role": "user", "content": "order 1"}]), 6)
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
    scores, texts = scoring.score_and_generate(
        EvaluateConfig(), model, tokenizer, rows, LABELS, True, description="scoring"
    )
    assert list(texts) == [rows[1].id]
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
    encoded = chat.encode(tokenizer, messages)
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
