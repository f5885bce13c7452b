"""The examples that a row gives: one, or one for each answer; with a loss on the answers, or on all tokens."""

from __future__ import annotations

import json

import pytest
import torch

from components.train_qlora.data import IGNORE_INDEX, PaddingCollator, load_tokenized_dataset
from components.train_qlora.loss import summed_loss
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import chat, loading
from qlora_retrain.lm.chat_format import ChatFormat

# As Qwen3 does: an earlier answer loses the block that it was generated with.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RAISING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + REWRITING
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "where is order 7"},
    {"role": "assistant", "content": "on its way"},
]


def write(path, *chats):
    path.write_text("".join(json.dumps({"id": f"row-{i}", "messages": c}) + "\n" for i, c in enumerate(chats)))
    return path


def test_a_template_that_rewrites_earlier_turns_gives_one_example_for_each_answer(nf4, tmp_path, capsys):
    tokenizer = chat.load_tokenizer(nf4, ChatFormat(template=REWRITING))
    dataset = load_tokenized_dataset(write(tmp_path / "train.jsonl", TALK, TALK[:2]), tokenizer)
    assert dataset.row_ids == ["row-0 turn 1", "row-0 turn 2", "row-1"]

    # Each answer is supervised once, with the block that the model generates before it.
    learnt = [
        tokenizer.decode([label for label in example["labels"] if label != IGNORE_INDEX])
        for example in dataset.examples
    ]
    block = "<think>\n\n</think>\n\n"
    assert learnt == [f"{block}good day<|im_end|>", f"{block}on its way<|im_end|>", f"{block}good day<|im_end|>"]
    assert "2 rows give 3 examples" in capsys.readouterr().out


@pytest.mark.parametrize("template", [None, REWRITING])
def test_a_loss_on_all_tokens_labels_every_token_of_the_whole_chat(nf4, tmp_path, template):
    tokenizer = chat.load_tokenizer(nf4, ChatFormat(template=template))
    dataset = load_tokenized_dataset(write(tmp_path / "train.jsonl", TALK, TALK[:2]), tokenizer, "all")
    assert dataset.row_ids == ["row-0", "row-1"]
    for example, turns in zip(dataset.examples, (TALK, TALK[:2]), strict=True):
        assert example["labels"] == example["input_ids"]
        whole = tokenizer.tokenizer(tokenizer.render(turns), add_special_tokens=False)["input_ids"]
        # The line break after the last end is no part of an answer.
        assert whole[: len(example["input_ids"])] == example["input_ids"]

    # Packed, without a prefix that has no loss, the sum is that of the model's own full logits.
    model = loading.load_nf4(nf4, dtype="float32")
    expected, count = 0.0, 0
    with torch.no_grad():
        loss = float(summed_loss(model, PaddingCollator(0)([dataset[i] for i in range(2)])))
        for example in dataset.examples:
            ids = torch.tensor(example["input_ids"])
            logits = model(ids[None]).logits[0, :-1].double()
            expected += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
            count += len(ids) - 1
    assert count == sum(dataset.lengths) - 2, "the first token has nothing before it"
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_run_learns_all_tokens_where_the_line_says_so(step):
    answers, everything = step("answers")(), step("all")(loss="all")
    assert everything["tokens"] == answers["tokens"]
    # Every token but the first of each row.
    rows = 14 * 8 - 4 * 2  # 14 steps of 8 rows; the last step of each of the two epochs has 4
    assert everything["supervised_tokens"] == everything["tokens"] - rows
    assert answers["supervised_tokens"] < everything["supervised_tokens"] / 3


def test_the_data_sets_own_chat_format_is_the_one_that_is_trained(step):
    run = step()
    ChatFormat(template=REWRITING).write(run.dataset)
    with_block, plain = run(), step("plain")()
    assert with_block["supervised_tokens"] > plain["supervised_tokens"]


def test_a_row_that_the_template_refuses_is_named(nf4, tmp_path):
    tokenizer = chat.load_tokenizer(nf4, ChatFormat(template=RAISING))
    path = write(tmp_path / "train.jsonl", TALK, [{"role": "system", "content": "Answer."}, *TALK])
    with pytest.raises(IntegrityError, match=r"train\.jsonl:2: .* the chat template raises: no system turn"):
        load_tokenized_dataset(path, tokenizer)


def test_a_row_whose_answers_have_no_weight_has_nothing_to_learn(nf4, tmp_path):
    path = write(tmp_path / "train.jsonl", [TALK[0], {**TALK[1], "weight": 0}])
    with pytest.raises(UsageError, match=r"train\.jsonl:1: no supervised token"):
        load_tokenized_dataset(path, chat.load_tokenizer(nf4))


def test_a_turn_without_weight_is_not_learnt_where_all_other_tokens_are(nf4, tmp_path):
    tokenizer = chat.load_tokenizer(nf4)
    path = write(tmp_path / "train.jsonl", [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]])
    (example,) = load_tokenized_dataset(path, tokenizer, "all").examples
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    assert tokenizer.decode([i for i, label in pairs if label == IGNORE_INDEX]) == "good day<|im_end|>"
