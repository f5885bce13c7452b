"""The loss mask is right, generation and training see the same tokens, and some templates are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat

USER = {"role": "user", "content": "where is order 1007?"}
ANSWER = {"role": "assistant", "content": "delivery"}
MULTI = [
    {"role": "system", "content": "Be brief."},
    USER,
    ANSWER,
    {"role": "user", "content": "and  order\n1008"},
    {"role": "assistant", "content": "login, \u00e9t\u00e9 \u4f60\u597d"},
]
# Writes its own system turn where there is none, as SmolLM2's does.
HELPFUL = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Empties every assistant turn but the last, as templates do that drop earlier reasoning.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if m['role'] != 'assistant' or loop.last else '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes no end of sequence: a special token of its own ends a turn.
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUMBERED = "{{ messages|length }} turns\n{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return chat.load_tokenizer(tiny_model)


def mask_by_scanning(tokenizer: Any, ids: list[int]) -> list[bool]:
    """Return the mask of a ChatML chat from the tokens alone: from after `assistant\\n` through the end token."""
    opening = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    mask, inside = [], False
    # The end token itself is supervised: a model that never learns it never stops.
    for i, token in enumerate(ids):
        mask.append(inside)
        if inside and token == tokenizer.eos_token_id:
            inside = False
        elif ids[max(0, i + 1 - len(opening)) : i + 1] == opening:
            inside = True
    return mask


@pytest.mark.parametrize("turns", [[USER, ANSWER], MULTI], ids=["one turn", "two turns"])
@pytest.mark.parametrize("template", [None, HELPFUL], ids=["plain", "adds a system turn"])
def test_the_mask_covers_every_answer_and_its_end_token_and_nothing_else(
    tokenizer: Any, turns: chat.Chat, template: str | None
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    encoded = chat.encode(tokenizer, turns)
    assert encoded.supervised == mask_by_scanning(tokenizer, encoded.input_ids)

    # As text: the supervised tokens decode to the answers and nothing else.
    learned = [t for t, s in zip(encoded.input_ids, encoded.supervised, strict=True) if s]
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert tokenizer.decode(learned) == "".join(f"{text}<|im_end|>" for text in answers)
    assert encoded.supervised_tokens == len(learned)


def test_the_tokens_are_those_of_the_whole_text_up_to_the_last_end_token(tokenizer: Any) -> None:
    whole = tokenizer(chat.render(tokenizer, MULTI), add_special_tokens=False)["input_ids"]
    last = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
    assert chat.encode(tokenizer, MULTI).input_ids == whole[:last]


@pytest.mark.parametrize("turns", [[USER, ANSWER], MULTI], ids=["one turn", "two turns"])
def test_training_sees_the_tokens_that_generation_would_start_from_and_produce(
    tokenizer: Any, turns: chat.Chat
) -> None:
    prompt, answer = chat.prompt_of(turns), chat.answer_of(turns)
    prompt_ids = chat.prompt_ids(tokenizer, prompt)
    encoded = chat.encode(tokenizer, turns)
    assert encoded.input_ids == prompt_ids + chat.answer_ids(tokenizer, prompt, answer)
    assert encoded.supervised[len(prompt_ids) - 1 :] == [False] + [True] * (len(encoded.input_ids) - len(prompt_ids))


def test_many_chats_at_once_are_encoded_as_each_alone(tokenizer: Any) -> None:
    chats = [[USER, ANSWER], MULTI, [USER], MULTI[:3]]
    together = chat.encode_segments(tokenizer, [chat.segments(tokenizer, turns) for turns in chats])
    assert together == [chat.encode(tokenizer, turns) for turns in chats]
    assert together[2] == chat.EncodedChat([], [])


def test_a_template_that_adds_a_system_turn_by_itself_is_part_of_the_prompt(tokenizer: Any) -> None:
    plain = chat.encode(tokenizer, [USER, ANSWER])
    tokenizer.chat_template = HELPFUL
    with_system = chat.encode(tokenizer, [USER, ANSWER])
    assert len(with_system.input_ids) > len(plain.input_ids)
    assert with_system.supervised_tokens == plain.supervised_tokens
    assert with_system == chat.encode(tokenizer, [{"role": "system", "content": "You help."}, USER, ANSWER])


@pytest.mark.parametrize(
    ("template", "turns"), [(FORGETFUL, MULTI), (NUMBERED, [USER, ANSWER])], ids=["drops answers", "counts turns"]
)
def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any, template: str, turns: chat.Chat) -> None:
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match="changes earlier turns"):
        chat.encode(tokenizer, turns)


def test_a_template_that_refuses_a_chat_is_a_usage_error(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    with pytest.raises(UsageError, match="refuses this chat: no system role"):
        chat.encode(tokenizer, MULTI)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer that can be loaded"):
        chat.load_tokenizer(tmp_path)


def test_an_answer_ends_where_its_template_ends_one(tokenizer: Any) -> None:
    assert chat.stop_token_ids(tokenizer) == [tokenizer.eos_token_id]

    # A special token that the template does not write changes nothing.
    tokenizer.add_tokens(["<end_of_turn>"], special_tokens=True)
    assert chat.stop_token_ids(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = TURNS
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert chat.stop_token_ids(tokenizer) == [tokenizer.eos_token_id, end]

    # A template without a special token at the end, and one with a special token at the beginning of an answer.
    for turn in ("{{ m['content'] }}.\n", "<end_of_turn>{{ m['content'] }}"):
        tokenizer.chat_template = TURNS.replace("{{ m['content'] }}<end_of_turn>\n", turn)
        assert chat.stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_chats_count_as_equal_apart_from_case_white_space_width_and_system_turn() -> None:
    # A no-break space, and a full-width o, which NFKC maps to the plain letter.
    wide = [{"role": "system", "content": "x"}, {"role": "user", "content": " WHERE is\u00a0\uff4frder\n1007? "}]
    assert chat.normalized_text(wide) == chat.normalized_text([USER]) == "user: where is order 1007?"
    assert chat.row_id([*wide, ANSWER]) == chat.row_id([USER, {"role": "assistant", "content": "other"}])
