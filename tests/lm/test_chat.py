"""The loss mask is right, generation and training see the same tokens, and a template's faults are a row's reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qlora_retrain.core import signals
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import chat, rendering
from qlora_retrain.lm.chat import ChatTokenizer, RowRefused
from qlora_retrain.lm.chat_format import ChatFormat
from qlora_retrain.lm.conversations import answer_of, prompt_of
from qlora_retrain.lm.named_templates import NAMES

USER = {"role": "user", "content": "where is order 1007?"}
ANSWER = {"role": "assistant", "content": "delivery"}
SYSTEM = {"role": "system", "content": "Be brief."}
MULTI = [
    SYSTEM,
    USER,
    ANSWER,
    {"role": "user", "content": "and  order\n1008"},
    {"role": "assistant", "content": "login, \u00e9t\u00e9 \u4f60\u597d"},
]
# Every turn in the same marks, as ChatML; `{body}` is what a test writes for a turn.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{body}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{prompt}{% endif %}"
)
PLAIN_BODY = "{{ m['content'] }}<|im_end|>\n"


def template(body: str = PLAIN_BODY, prompt: str = "") -> str:
    return CHATML.replace("{body}", body).replace("{prompt}", prompt)


@pytest.fixture
def load(tiny_model: Path) -> Any:
    """Load the tiny model's tokenizer with a template and settings."""

    def load_with(text: str | None = None, **settings: Any) -> ChatTokenizer:
        return chat.load_tokenizer(tiny_model, ChatFormat(template=text, **settings))

    return load_with


@pytest.fixture
def tokenizer(load: Any) -> ChatTokenizer:
    loaded: ChatTokenizer = load()
    return loaded


def learnt(tokenizer: ChatTokenizer, encoded: chat.EncodedChat) -> str:
    """Return the supervised tokens as text."""
    return tokenizer.decode([t for t, s in zip(encoded.input_ids, encoded.supervised, strict=True) if s])


def mask_by_scanning(tokenizer: ChatTokenizer, ids: list[int]) -> list[bool]:
    """Return the mask of a ChatML chat from the tokens alone: from after `assistant\\n` through the end token."""
    opening = tokenizer.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    mask, inside = [], False
    # The end token itself is supervised: a model that never learns it never stops.
    for i, token in enumerate(ids):
        mask.append(inside)
        if inside and token == tokenizer.tokenizer.eos_token_id:
            inside = False
        elif ids[max(0, i + 1 - len(opening)) : i + 1] == opening:
            inside = True
    return mask


@pytest.mark.parametrize("turns", [[USER, ANSWER], MULTI], ids=["one turn", "two turns"])
@pytest.mark.parametrize("adds_system", [False, True], ids=["plain", "adds a system turn"])
def test_the_mask_covers_every_answer_and_its_end_token_and_nothing_else(
    load: Any, turns: chat.Chat, adds_system: bool
) -> None:
    system = "{% if loop.first and m['role'] != 'system' %}system\nYou help.<|im_end|>\n<|im_start|>{% endif %}"
    text = template().replace("<|im_start|>{{", f"<|im_start|>{system}{{{{", 1) if adds_system else None
    tokenizer = load(text)
    (encoded,) = tokenizer.encode(turns)
    assert encoded.supervised == mask_by_scanning(tokenizer, encoded.input_ids)

    # As text: the supervised tokens decode to the answers and nothing else.
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert learnt(tokenizer, encoded) == "".join(f"{text}<|im_end|>" for text in answers)
    assert encoded.supervised_tokens == sum(encoded.supervised)


def test_the_tokens_are_those_of_the_whole_text_up_to_the_last_end_token(tokenizer: ChatTokenizer) -> None:
    whole = tokenizer.tokenizer.apply_chat_template(MULTI, return_dict=False)
    last = len(whole) - whole[::-1].index(tokenizer.tokenizer.eos_token_id)
    assert tokenizer.encode(MULTI)[0].input_ids == whole[:last]


@pytest.mark.parametrize("turns", [[USER, ANSWER], MULTI], ids=["one turn", "two turns"])
def test_training_sees_the_tokens_that_generation_would_start_from_and_produce(
    tokenizer: ChatTokenizer, turns: chat.Chat
) -> None:
    prompt, answer = prompt_of(turns), answer_of(turns)
    prompt_ids = tokenizer.prompt_ids(prompt)
    (encoded,) = tokenizer.encode(turns)
    assert prompt_ids == tokenizer.prompt_ids(prompt, answer=answer)
    assert encoded.input_ids == prompt_ids + tokenizer.answer_ids(prompt, answer)
    assert encoded.supervised[len(prompt_ids) - 1 :] == [False] + [True] * (len(encoded.input_ids) - len(prompt_ids))


def test_many_chats_at_once_are_encoded_as_each_alone(tokenizer: ChatTokenizer) -> None:
    chats = [[USER, ANSWER], MULTI, [USER], MULTI[:3]]
    together = tokenizer.encode_many([(turns, None) for turns in chats])
    assert isinstance(together[2], RowRefused)
    assert together[2].reason == "no_assistant_turn"
    assert [together[i] for i in (0, 1, 3)] == [tokenizer.encode(chats[i]) for i in (0, 1, 3)]


# What a template does to a turn -> the row's reason and words of its detail.
DROPS_SYSTEM = "{% if m['role'] == 'system' %}<|im_end|>\n{% else %}" + PLAIN_BODY + "{% endif %}"
FAULTS = {
    "drops the system turn": (DROPS_SYSTEM, "template_drops_text", r"leaves out text of turn 1 \(system\)"),
    "rewrites a turn": (
        PLAIN_BODY.replace("m['content']", "m['content']|upper"),
        "template_rewrites_text",
        r"rewrites the text of turn 1",
    ),
    "raises": ("{{ raise_exception('no such turns') }}", "template_refuses", "raises: no such turns"),
    "fails": ("{{ m['content'] + 1 }}", "template_refuses", "raises: can only concatenate str"),
    "asks in another way": (
        PLAIN_BODY + "{% if loop.last and m['role'] == 'user' %}now {% endif %}",
        "template_rewrites_text",
        "asks for an answer with 'now",
    ),
    "counts the turns": (
        "{{ messages|length }} turns " + PLAIN_BODY,
        "template_rewrites_text",
        "changes earlier turns when an answer is added",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_template_does_to_a_row_is_the_rows_reason(load: Any, fault: str) -> None:
    body, reason, words = FAULTS[fault]
    with pytest.raises(RowRefused, match=words) as refusal:
        load(template(body)).encode([SYSTEM, USER, ANSWER])
    assert refusal.value.reason == reason


def test_a_request_to_stop_is_not_taken_for_what_a_template_says(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a step that is preempted would leave the row out, and go on."""

    def stop(*arguments: object, **options: object) -> str:
        raise signals.StoppedBySignal("stopped by SIGTERM")

    monkeypatch.setattr(rendering.bounded, "render", stop)
    with pytest.raises(signals.StoppedBySignal):
        tokenizer.encode([USER, ANSWER])


def test_trimmed_ends_are_a_warning_and_what_is_learnt_is_the_answer_as_rendered(load: Any) -> None:
    tokenizer = load(template(PLAIN_BODY.replace("m['content']", "m['content']|trim")))
    (encoded,) = tokenizer.encode([USER, {"role": "assistant", "content": "\n  delivery \n"}])
    assert learnt(tokenizer, encoded) == "delivery<|im_end|>"
    assert encoded.warnings == ("trimmed_ends",)


def test_a_short_answer_is_not_taken_for_a_part_of_a_mark(tokenizer: ChatTokenizer) -> None:
    for text in ("a", "user", "assistant", "im_end", "<", "\n"):
        row = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        (encoded,) = tokenizer.encode(row)
        assert learnt(tokenizer, encoded) == f"{text}<|im_end|>"


def test_an_answer_ends_at_the_first_stop_and_nothing_after_it_is_learnt(load: Any) -> None:
    # As Phi-3's: a second mark ends the whole chat, and no earlier turn has it.
    tokenizer = load(template() + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}")
    (encoded,) = tokenizer.encode(MULTI)
    assert learnt(tokenizer, encoded) == "delivery<|im_end|>login, \u00e9t\u00e9 \u4f60\u597d<|im_end|>"


def test_the_end_that_only_a_next_turn_shows_is_learnt(load: Any) -> None:
    # As Qwen 1.5's: the last turn has no end mark. Another turn would come after it.
    body = "{{ m['content'] }}{% if add_generation_prompt or not loop.last %}<|im_end|>\n{% endif %}"
    tokenizer = load(template(body))
    (encoded,) = tokenizer.encode(MULTI)
    assert learnt(tokenizer, encoded).endswith("\u4f60\u597d<|im_end|>")
    assert learnt(tokenizer, encoded).count("<|im_end|>") == 2
    assert "end_from_next_turn" in encoded.warnings

    # As GLM's: the next turn's mark is the stop.
    tokenizer = load(template("{{ m['content'] }}"), stop_tokens=("<|im_start|>",))
    (encoded,) = tokenizer.encode(MULTI)
    assert learnt(tokenizer, encoded) == "delivery<|im_start|>login, \u00e9t\u00e9 \u4f60\u597d<|im_start|>"


def test_a_generation_prompt_that_is_always_written_is_no_end_of_an_answer(load: Any, tiny_model: Path) -> None:
    # As GLM Edge's: every text ends with the mark of the next answer, which is no stop; the next question's mark is.
    text = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>"
    tokenizer = load(text).tokenizer
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    edge = ChatTokenizer(tokenizer, ChatFormat(template=text, stop_tokens=("<|user|>",)), tiny_model)
    (example,) = edge.encode([USER, {**ANSWER, "content": "in Lyon"}])
    assert edge.decode(example.input_ids) == f"<|user|>\n{USER['content']}<|assistant|>\nin Lyon<|user|>"
    assert learnt(edge, example) == "\nin Lyon<|user|>"


def test_what_an_earlier_turn_says_too_is_dropped_and_not_rewritten(load: Any) -> None:
    tokenizer = load(template("{{ m['content'] if m['role'] == 'user' }}<|im_end|>\n"))
    with pytest.raises(RowRefused, match=r"leaves out text of turn 2 \(assistant\)"):
        tokenizer.encode([{"role": "user", "content": "refund please"}, {"role": "assistant", "content": "refund"}])


def test_a_token_in_front_of_an_answer_is_not_learnt_where_the_answer_changes_how_the_prompt_is_cut(
    tmp_path: Path,
) -> None:
    # The prompt alone ends with the token ":\n"; before a line break it is cut into ":" and two line breaks.
    vocabulary = {text: i for i, text in enumerate(["Q", ":", "\n", ":\n", "\n\n", "x", "</s>"])}
    merges = [("\n", "\n"), (":", "\n")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.add_special_tokens(["</s>"])
    text = "{% for m in messages %}{{ m.content if m.role == 'user' else ':\n' + m.content + '</s>' }}{% endfor %}"
    text += "{% if add_generation_prompt %}:\n{% endif %}"
    tokenizer = ChatTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=text), ChatFormat(), tmp_path
    )
    assert tokenizer.decode([3]) == ":\n"

    (example,) = tokenizer.encode([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "\nx"}])
    pieces = [tokenizer.decode([token]) for token in example.input_ids]
    assert list(zip(pieces, example.supervised, strict=True)) == [
        ("Q", False),
        (":", False),
        ("\n\n", True),
        ("x", True),
        ("</s>", True),
    ]


def test_an_end_that_the_template_lacks_is_appended_or_refused(load: Any) -> None:
    body = "{% if m['role'] == 'user' %}Q: {% else %}A: {% endif %}{{ m['content'] }}\n"
    text = "{% for m in messages %}" + body + "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    examples = load(text).encode([USER, ANSWER, USER, ANSWER])

    # In the middle of the text there is no end to learn, so each answer is the last of an example of its own.
    assert [learnt(load(text), example) for example in examples] == [" delivery<|im_end|>"] * 2
    assert all("end_appended" in example.warnings for example in examples)
    with pytest.raises(RowRefused, match=r"no token at which generation stops.*missing_end"):
        load(text, missing_end="refuse").encode([USER, ANSWER])


def test_an_end_mark_that_is_no_stop_is_refused_with_both_tokens_named(load: Any, tiny_model: Path) -> None:
    # As ERNIE's: servers stop at the end-of-sequence token alone, and the template writes another one.
    def load_with_token(**settings: Any) -> ChatTokenizer:
        text = template("{{ m['content'] }}<|end_of_sentence|>\n")
        tokenizer = load(text).tokenizer
        tokenizer.add_tokens(["<|end_of_sentence|>"], special_tokens=True)
        return ChatTokenizer(tokenizer, ChatFormat(template=text, **settings), tiny_model)

    with pytest.raises(RowRefused, match=r"with <\|end_of_sentence\|>, and generation stops at <\|im_end") as refusal:
        load_with_token().encode([USER, ANSWER])
    assert refusal.value.reason == "answer_end_is_no_stop"
    tokenizer = load_with_token(stop_tokens=("<|end_of_sentence|>",))
    assert learnt(tokenizer, tokenizer.encode([USER, ANSWER])[0]) == "delivery<|end_of_sentence|>"


def test_history_that_is_rewritten_gives_an_example_for_each_answer_as_it_was_generated(load: Any) -> None:
    # As Qwen 3's: earlier answers lose their reasoning.
    body = "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n"
    tokenizer = load(template(body))
    first = {"role": "assistant", "content": "<think>hm</think>yes"}
    row = [USER, first, USER, ANSWER]
    examples = tokenizer.encode(row)

    assert [learnt(tokenizer, e) for e in examples] == ["<think>hm</think>yes<|im_end|>", "delivery<|im_end|>"]
    for example, turns in zip(examples, (row[:2], row), strict=True):
        whole = tokenizer.tokenizer.apply_chat_template(turns, return_dict=False)
        assert example.input_ids == whole[: len(example.input_ids)]


def test_where_the_generation_prompt_opens_reasoning_the_answer_starts_as_in_the_history(load: Any) -> None:
    tokenizer = load(template(prompt="<think>\n"))
    (encoded,) = tokenizer.encode([USER, ANSWER])
    assert learnt(tokenizer, encoded) == "delivery<|im_end|>"
    assert "answer_start_from_history" in encoded.warnings

    # An answer that begins with the reasoning begins after the prompt that opens it.
    thoughtful = {"role": "assistant", "content": "<think>\nhm</think>yes"}
    (encoded,) = tokenizer.encode([USER, thoughtful])
    assert learnt(tokenizer, encoded) == "hm</think>yes<|im_end|>"

    # Who asks without knowing the answer asks as the line's rows were.
    prompt = tokenizer.decode(load(template(prompt="<think>\n"), answer_start="history").prompt_ids([USER]))
    assert prompt.endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer.prompt_ids([USER])).endswith("<think>\n")


@pytest.mark.parametrize("name", ["think", "own:think", "think:own"])
def test_an_answer_with_reasoning_starts_in_front_of_it_where_the_prompt_closes_its_block(load: Any, name: str) -> None:
    # As Hunyuan 3's: thinking is off, and the row has reasoning.
    body = f"{{% if m.reasoning_content %}}<{name}>{{{{ m.reasoning_content }}}}</{name}>{{% endif %}}" + PLAIN_BODY
    tokenizer = load(template(body, prompt=f"<{name}></{name}>"))
    (encoded,) = tokenizer.encode([USER, {**ANSWER, "reasoning_content": "hm"}])
    assert learnt(tokenizer, encoded) == f"<{name}>hm</{name}>delivery<|im_end|>"


def test_the_mark_of_an_answers_turn_is_not_learnt_where_the_prompt_opens_reasoning_in_another_place(load: Any) -> None:
    # As Bielik's: the end of a question that stands before an answer is another one than when it is asked.
    ends = "{{ m['content'] }}{% if loop.last or m['role'] != 'user' %}<|im_end|>\n{% endif %}"
    tokenizer = load(template(ends, prompt="<think>\n"))
    with pytest.raises(RowRefused, match=r"asks for an answer with .*no answer in a chat has") as refusal:
        tokenizer.encode([USER, ANSWER])
    assert refusal.value.reason == "template_rewrites_text"


def test_an_answer_inside_of_a_reasoning_block_that_nobody_closes_is_refused(load: Any) -> None:
    body = "{{ '<think>\n' if m['role'] == 'assistant' }}{{ m['content'] }}<|im_end|>\n"
    with pytest.raises(RowRefused, match="enable_thinking") as refusal:
        load(template(body, prompt="<think>\n")).encode([USER, ANSWER])
    assert refusal.value.reason == "answer_inside_reasoning"


def test_reasoning_of_its_own_field_is_rendered_or_a_reason(load: Any) -> None:
    turn = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    body = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}" + PLAIN_BODY
    tokenizer = load(template(body))
    assert learnt(tokenizer, tokenizer.encode([USER, turn])[0]) == "<think>hm</think>yes<|im_end|>"
    with pytest.raises(RowRefused, match=r"turn 2 \(assistant\), its reasoning"):
        load().encode([USER, turn])


def test_a_turn_of_weight_0_is_read_and_not_learnt(tokenizer: ChatTokenizer) -> None:
    row = [USER, {**ANSWER, "weight": 0}, USER, ANSWER]
    (encoded,) = tokenizer.encode(row)
    assert learnt(tokenizer, encoded) == "delivery<|im_end|>"
    assert encoded.input_ids == tokenizer.encode([USER, ANSWER, USER, ANSWER])[0].input_ids
    assert encoded.supervised.index(True) > len(encoded.input_ids) // 2


def test_turns_after_the_last_answer_are_left_out_with_a_warning(tokenizer: ChatTokenizer) -> None:
    (encoded,) = tokenizer.encode([*MULTI, USER])
    assert encoded == tokenizer.encode(MULTI)[0]
    assert "turns_after_the_last_answer" in encoded.warnings


TOOLS = [{"type": "function", "function": {"name": "find_order", "parameters": {"type": "object"}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "find_order", "arguments": {"number": 7, "c": "\u00e9"}}}],
}
RESULT = {"role": "tool", "content": '{"state": "sent"}'}
WRITES_TOOLS = "{% if tools %}{{ tools|tojson }}\n{% endif %}"
WRITES_CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {ARGS}</call>{% endfor %}"


@pytest.mark.parametrize("arguments", ["c.function.arguments|tojson", "c.function.arguments"], ids=["object", "text"])
def test_calls_are_rendered_with_arguments_in_the_form_that_the_template_takes(load: Any, arguments: str) -> None:
    calls = WRITES_CALLS.replace("{ARGS}", "{{ " + arguments + " }}")
    tokenizer = load(WRITES_TOOLS + template(calls + PLAIN_BODY))
    (encoded,) = tokenizer.encode([USER, CALL, RESULT, ANSWER], TOOLS)
    written = json.dumps(CALL["tool_calls"][0]["function"]["arguments"], ensure_ascii=False)
    assert learnt(tokenizer, encoded) == f"<call>find_order {written}</call><|im_end|>delivery<|im_end|>"
    assert '"find_order"' in tokenizer.decode(encoded.input_ids).partition("<|im_start|>")[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [(template(), "the chat template writes no tools"), (WRITES_TOOLS + template(), 'the call of "find_order"')],
    ids=["no tools", "no calls"],
)
def test_a_template_without_tools_or_calls_is_a_reason(load: Any, text: str, words: str) -> None:
    with pytest.raises(RowRefused, match=words) as refusal:
        load(text).encode([USER, CALL, RESULT, ANSWER], TOOLS)
    assert refusal.value.reason == "tools_unsupported"


@pytest.mark.parametrize("content", ["", "I look."])
def test_a_call_behind_the_token_that_ends_the_answer_is_a_reason(load: Any, content: str) -> None:
    # As GigaChat 3's: the call is a turn of its own, and generation has stopped before it.
    calls = "{% for c in m.tool_calls or [] %}<|im_start|>call\n{{ c.function|tojson }}<|im_end|>\n{% endfor %}"
    tokenizer = load(WRITES_TOOLS + template(PLAIN_BODY + calls))
    with pytest.raises(RowRefused, match=r'turn 2 .*call of "find_order" behind <\|im_end\|>') as refusal:
        tokenizer.encode([USER, {**CALL, "content": content}, RESULT, ANSWER], TOOLS)
    assert refusal.value.reason == "tools_unsupported"


def test_a_turn_that_is_written_in_front_of_an_earlier_one_is_a_reason(load: Any) -> None:
    # As Gemma 4's: what an answer says beside its call is written behind the call's result.
    body = (
        "{% if m.tool_calls %}{{ m.tool_calls[0].function|tojson }}{% if loop.last %}{{ m.content }}{% endif %}"
        "{% else %}{{ m.content }}{% if m.role == 'tool' %} {{ messages[loop.index0 - 1].content }}{% endif %}"
        "{% endif %}<|im_end|>\n"
    )
    tokenizer = load(WRITES_TOOLS + template(body))
    with pytest.raises(RowRefused, match=r"turn 3 \(tool\) in front of a turn before it") as refusal:
        tokenizer.encode([USER, {**CALL, "content": "I look."}, RESULT, ANSWER], TOOLS)
    assert refusal.value.reason == "template_rewrites_text"


def test_a_template_that_reads_the_clock_sees_the_lines_day(load: Any) -> None:
    text = "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}\n" + template()
    rendered = load(text, date="2026-02-03").render([USER])
    assert rendered.startswith("03 Feb 2026 2026-02-03\n<|im_start|>user")
    # Without a day of the line it is the same on every day.
    assert load(text).render([USER]).startswith("01 Jan 2025 2025-01-01\n")


def test_variables_of_the_template_are_the_lines(load: Any) -> None:
    text = template(prompt="{{ '<think></think>' if enable_thinking is false }}")
    assert (
        load(text, template_kwargs={"enable_thinking": False})
        .render([USER], add_generation_prompt=True)
        .endswith("assistant\n<think></think>")
    )
    assert load(text).render([USER], add_generation_prompt=True).endswith("assistant\n")


def test_contents_are_given_as_parts_to_a_template_that_reads_nothing_else(load: Any) -> None:
    body = "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n"
    tokenizer = load(template(body))
    assert tokenizer.encode(MULTI) == load().encode(MULTI)


@pytest.mark.parametrize("name", NAMES)
def test_a_named_template_carries_a_chat_and_ends_its_answers(load: Any, name: str) -> None:
    tokenizer = load(name)
    examples = tokenizer.encode(MULTI)
    text = "".join(learnt(tokenizer, example) for example in examples)
    assert [part.strip() for part in text.split("<|im_end|>")] == ["delivery", MULTI[-1]["content"], ""]

    # What generation starts from is what training had before the answer.
    prompt = tokenizer.prompt_ids(MULTI[:4])
    assert examples[-1].input_ids[: len(prompt)] == prompt
    assert examples[-1].supervised[len(prompt) - 1 : len(prompt) + 1] == [False, True]
    for turn in MULTI:
        assert turn["content"] in tokenizer.decode(examples[-1].input_ids)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "gemma",
            "<start_of_turn>user\nBe brief.\n\nwhere is order 1007?<end_of_turn>\n"
            "<start_of_turn>model\ndelivery<|im_end|>\n<start_of_turn>user\nthanks<end_of_turn>\n"
            "<start_of_turn>model\n",
        ),
        (
            "llama-2",
            "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nwhere is order 1007? [/INST] delivery <|im_end|>"
            "[INST] thanks [/INST]",
        ),
    ],
)
def test_a_system_turn_opens_the_users_where_the_family_has_none_of_its_own(
    load: Any, name: str, expected: str
) -> None:
    thanks = {"role": "user", "content": "thanks"}
    tokenizer = load(name)
    assert tokenizer.render([SYSTEM, USER, ANSWER, thanks], add_generation_prompt=True) == expected

    # Of two system turns none is lost.
    both = [SYSTEM, {"role": "system", "content": "Be kind."}, USER, ANSWER]
    (example,) = tokenizer.encode(both)
    text = tokenizer.decode(example.input_ids)
    assert text.index("Be brief.") < text.index("Be kind.") < text.index(USER["content"])


def test_the_line_or_the_tokenizer_must_have_a_template(tiny_model: Path, tmp_path: Path) -> None:
    for path in tiny_model.iterdir():
        if path.is_file() and path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    with pytest.raises(UsageError, match=r"no chat template; name one in data\.template \(chatml, alpaca"):
        chat.load_tokenizer(tmp_path)
    assert chat.load_tokenizer(tmp_path, ChatFormat(template="chatml")).encode(MULTI)
    with pytest.raises(UsageError, match=r"no template 'chatlm'.*chatml"):
        chat.load_tokenizer(tmp_path, ChatFormat(template="chatlm"))


@pytest.mark.parametrize("where", ["generation_config.json", "data.stop_tokens"])
@pytest.mark.parametrize("name", NAMES)
def test_a_base_whose_tokenizer_names_no_end_takes_the_one_that_is_stated_elsewhere(
    tiny_model: Path, tmp_path: Path, name: str, where: str
) -> None:
    for file in tiny_model.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary = chat.load_tokenizer(tiny_model).tokenizer.get_vocab()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}), encoding="utf-8")
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UsageError, match=r"needs an end-of-sequence token.*data\.stop_tokens"):
        chat.load_tokenizer(tmp_path, ChatFormat(template=name))

    end, stop_tokens = "<|endoftext|>", ("<|endoftext|>",) if where == "data.stop_tokens" else ()
    if not stop_tokens:
        (tmp_path / where).write_text(json.dumps({"eos_token_id": vocabulary[end]}), encoding="utf-8")
    tokenizer = chat.load_tokenizer(tmp_path, ChatFormat(template=name, stop_tokens=stop_tokens))
    (encoded,) = tokenizer.encode([USER, ANSWER])
    # ChatML's own end is a token of this vocabulary.
    assert learnt(tokenizer, encoded).split() == (
        ["delivery<|im_end|>"] if name == "chatml" else ["delivery", end] if name == "llama-2" else [f"delivery{end}"]
    )


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer that can be loaded"):
        chat.load_tokenizer(tmp_path)
