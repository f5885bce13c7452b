"""Completions compared with the right answer as the template writes it: reasoning, marks of calls, empty blocks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.core.errors import IntegrityError
from qlora_retrain.evaluation import scoring
from qlora_retrain.evaluation.completions import RightAnswer
from qlora_retrain.evaluation.rows import UNPARSABLE, Row
from qlora_retrain.lm import chat, generation
from qlora_retrain.lm.chat_format import ChatFormat
from qlora_retrain.lm.generation import Completion

TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# An empty block before the last answer, as Qwen3 writes it.
EMPTY_BLOCK = (
    TURNS + "{% if m['role'] == 'assistant' and loop.last %}<think>\n{{ m['reasoning_content'] or '' }}\n</think>\n\n"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}" + PROMPT
)
# The generation prompt opens the block, as in QwQ.
OPEN_BLOCK = EMPTY_BLOCK.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
CALLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + TURNS + "{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}" + PROMPT
)
QUESTION = {"role": "user", "content": "where is order 7"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"order": 7, "all": True}}}
METRICS = ("exact_match", "json_validity", "tool_call_match")


@pytest.fixture(scope="module")
def special_marks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's tokenizer, with the marks of reasoning and calls as special tokens."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("marks") / "model"))
    tokenizer = chat.load_tokenizer(folder).tokenizer
    marks = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["plain text", "special tokens"])
def folder(request: pytest.FixtureRequest, tiny_model: Path, special_marks: Path) -> Path:
    return tiny_model if request.param == "plain text" else special_marks


def make_row(answer: dict[str, Any], tools: list[dict[str, Any]] | None = None) -> Row:
    return Row("a", "eval", [QUESTION, {"role": "assistant", "content": "", **answer}], tools=tools)


def complete(tokenizer: chat.ChatTokenizer, text: str) -> Completion:
    """Return a completion of that text with its end."""
    ids = tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Completion.from_ids([*ids, tokenizer.stop_ids[0]], tokenizer)


def metrics(folder: Path, template: str, row: Row, text: str) -> dict[str, float]:
    tokenizer = chat.load_tokenizer(folder, ChatFormat(template=template))
    return RightAnswer.from_row(tokenizer, row).metrics(METRICS, complete(tokenizer, text), tokenizer)


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("<think>\n\n</think>\n\n[7]", 1.0),
        ("<think>\nIt is seven.\n</think>\n\n[7]", 1.0),
        ("[7]", 1.0),
        ("<think>\n\n</think>\n\n[8]", 0.0),
        # Reasoning that never ends answers nothing, even if it names the answer.
        ("<think>\n[7]", 0.0),
    ],
)
def test_a_block_of_reasoning_is_no_part_of_the_answer(folder: Path, text: str, exact: float) -> None:
    values = metrics(folder, EMPTY_BLOCK, make_row({"content": "[7]"}), text)
    assert values["exact_match"] == exact
    assert values["json_validity"] == float(text != "<think>\n[7]")


def test_reasoning_of_the_right_answer_is_not_compared(folder: Path) -> None:
    row = make_row({"content": "[7]", "reasoning_content": "The order is 7."})
    assert metrics(folder, EMPTY_BLOCK, row, "<think>\nHm.\n</think>\n\n[7]")["exact_match"] == 1.0
    assert metrics(folder, EMPTY_BLOCK, row, "<think>\nThe order is 7.\n</think>\n\n[8]")["exact_match"] == 0.0


def test_a_block_that_the_prompt_opens_ends_in_the_completion(folder: Path) -> None:
    row = make_row({"content": "[7]", "reasoning_content": "The order is 7."})
    for text, exact in (("Hm.\n</think>\n\n[7]", 1.0), ("Hm.\n</think>\n\n[8]", 0.0), ("[7]", 0.0)):
        assert metrics(folder, OPEN_BLOCK, row, text)["exact_match"] == exact


def test_a_generated_label_is_recognised_behind_what_the_template_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat.load_tokenizer(folder, ChatFormat(template=EMPTY_BLOCK))
    texts = {"a": "<think>\n\n</think>\n\nrefund", "b": "refund please", "c": "<think>\nRefund?\n</think>\n\nlogin"}
    rows = [Row(i, "eval", [QUESTION, {"role": "assistant", "content": "refund"}]) for i in texts]
    answers = [complete(tokenizer, text) for text in texts.values()]
    monkeypatch.setattr(
        generation, "generate_answers", lambda model, tokenizer, prompts, *_, **__: answers[: len(prompts)]
    )
    plain_scores = [scoring.RowScore(i, "eval", 1.0, 1) for i in texts]
    monkeypatch.setattr(scoring, "score_rows", lambda *_, **__: plain_scores)

    settings = EvaluateConfig(label_scoring="generation")
    model: Any = None
    scores, _ = scoring.score_and_generate(settings, model, tokenizer, rows, ["login", "refund"], description="x")
    assert [(s.predicted, s.correct) for s in scores] == [("refund", True), (UNPARSABLE, False), ("login", False)]
    assert [s.values["answers_ended"] for s in scores] == [1.0] * 3


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('<tool_call>\n{"name": "look", "arguments": {"order": 7, "all": true}}\n</tool_call>', 1.0),
        ('<tool_call>{"arguments": {"all":true, "order":7}, "name": "look"}</tool_call>', 1.0),
        ('<tool_call>\n{"name": "look", "arguments": {"order": 8, "all": true}}\n</tool_call>', 0.0),
        ('<tool_call>\n{"name": "look", "arguments": {"order": 7, "all": 1}}\n</tool_call>', 0.0),
        ('{"name": "look", "arguments": {"order": 7, "all": true}}', 0.0),
        ("order 7", 0.0),
    ],
)
def test_calls_are_compared_with_their_marks(folder: Path, text: str, match: float) -> None:
    values = metrics(folder, CALLS, make_row({"tool_calls": [CALL]}, TOOLS), text)
    assert (values["exact_match"], values["tool_call_match"]) == (match, match)


def test_words_beside_a_call_count_for_the_exact_match_alone(folder: Path) -> None:
    row = make_row({"content": "Let me look.", "tool_calls": [CALL]}, TOOLS)
    text = 'One moment.<tool_call>\n{"name": "look", "arguments": {"order": 7, "all": true}}\n</tool_call>'
    values = metrics(folder, CALLS, row, text)
    assert (values["exact_match"], values["tool_call_match"]) == (0.0, 1.0)
    assert metrics(folder, CALLS, row, text.replace("One moment.", "Let me look."))["exact_match"] == 1.0


def test_a_plain_answer_among_rows_with_tools_has_no_calls_to_match(folder: Path) -> None:
    row = make_row({"content": "on its way"}, TOOLS)
    assert metrics(folder, CALLS, row, "on its way") == {"exact_match": 1.0}
    call = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    assert metrics(folder, CALLS, row, call) == {"exact_match": 0.0}


def test_rows_with_tools_are_scored_on_their_rendering_with_tools(tiny_model: Path) -> None:
    from qlora_retrain.lm import loading

    model = loading.load_base(tiny_model, dtype="float32")
    tokenizer = chat.load_tokenizer(tiny_model, ChatFormat(template=CALLS))
    row = make_row({"tool_calls": [CALL]}, TOOLS)
    (score,) = scoring.score_rows(model, tokenizer, [row], labels=None, batch_tokens=512, description="x")
    text = tokenizer.tokenizer.apply_chat_template(row.messages, tools=TOOLS, tokenize=False)
    prompt, answer = text.removesuffix("\n").rsplit("assistant\n", 1)
    ids = [
        tokenizer.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt + "assistant\n", answer)
    ]
    assert score.tokens == len(ids[1])

    import torch

    with torch.inference_mode():
        logprobs = model(torch.tensor([ids[0] + ids[1]])).logits[0].log_softmax(-1)
    loss = -sum(float(logprobs[len(ids[0]) - 1 + i, token]) for i, token in enumerate(ids[1]))
    assert score.loss_nats == pytest.approx(loss, rel=1e-4)


def test_a_row_whose_template_rewrites_history_sums_the_loss_of_all_its_answers(tiny_model: Path) -> None:
    from qlora_retrain.lm import loading

    model = loading.load_base(tiny_model, dtype="float32")
    tokenizer = chat.load_tokenizer(tiny_model, ChatFormat(template=EMPTY_BLOCK))
    answers = [{"role": "assistant", "content": "seven"}, {"role": "assistant", "content": "on its way"}]
    talk = [QUESTION, answers[0], QUESTION, answers[1]]
    options: dict[str, Any] = {"labels": None, "batch_tokens": 512, "description": "x"}
    (whole,) = scoring.score_rows(model, tokenizer, [Row("a", "eval", talk)], **options)
    # The second answer's own loss is that of the row without the first answer's weight.
    unweighted = [QUESTION, {**answers[0], "weight": 0}, QUESTION, answers[1]]
    parts = [
        scoring.score_rows(model, tokenizer, [Row("a", "eval", turns)], **options)[0]
        for turns in (talk[:2], unweighted)
    ]
    assert whole.tokens == sum(part.tokens for part in parts)
    assert whole.loss_nats == pytest.approx(sum(part.loss_nats for part in parts), rel=1e-5)


def test_a_row_that_the_template_refuses_is_named(tiny_model: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_model, ChatFormat(template="{{ raise_exception('not this') }}" + EMPTY_BLOCK))
    with pytest.raises(IntegrityError, match=r"eval\.jsonl: the row a was let in .* not this"):
        RightAnswer.from_row(tokenizer, make_row({"content": "yes"}))
