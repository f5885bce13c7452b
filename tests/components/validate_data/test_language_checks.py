"""Rows in another language than the data's."""

from __future__ import annotations

import pytest

from components.validate_data import language_checks
from components.validate_data.checks import Row, Split
from components.validate_data.language_checks import check_languages, guess_language
from qlora_retrain.config.data import DataConfig

TEXTS = {
    "en": "Why was I charged twice for the same purchase at the store yesterday?",
    "de": "Warum wurde mir der gleiche Einkauf im Laden gestern zweimal berechnet?",
    "fr": "Pourquoi ai-je été débité deux fois pour le même achat au magasin hier ?",
    "es": "¿Por qué me cobraron ayer dos veces la misma compra en la tienda?",
    "ru": "Почему вчера с меня дважды списали деньги за одну и ту же покупку?",
    "ja": "昨日お店で同じ買い物に対して二重に請求されたのはなぜですか？教えてください。",
    "tr": "Dün mağazada aynı alışveriş için neden benden iki kez para alındı?",
}


def rows_of(language: str, count: int, split: Split = "train") -> list[Row]:
    return [
        Row("a.jsonl", i, [{"role": "user", "content": f"{TEXTS[language]} {i}"}], "0", split=split)
        for i in range(count)
    ]


@pytest.mark.parametrize("language", TEXTS)
def test_the_language_of_a_sentence_is_guessed(language: str) -> None:
    assert guess_language(TEXTS[language]) == language


def test_short_texts_have_no_language() -> None:
    assert guess_language("refund?") is None
    assert guess_language("1234 5678 9012 3456 7890 1234") is None


def test_rows_of_a_rare_language_are_noted() -> None:
    english, german = rows_of("en", 300), rows_of("de", 2)
    counts = check_languages(english + german, DataConfig())
    assert counts == {"en": 300, "de": 2}
    assert all(row.hits == () for row in english)
    assert [(row.hits, row.reason, row.split) for row in german] == [(("other_languages",), None, "train")] * 2


def test_of_many_rows_a_sample_is_judged_unless_rows_are_to_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_checks, "MAX_ROWS", 100)
    rows = rows_of("en", 300) + rows_of("de", 2)
    for i, row in enumerate(rows):
        row.prompt_key = f"{i * 7919 % 1000:016x}"
    judged = check_languages(rows, DataConfig())
    assert sum(judged.values()) == 100
    # The order of the files does not decide which rows are judged.
    assert check_languages(rows[::-1], DataConfig()) == judged
    assert check_languages(rows, DataConfig(checks={"other_languages": "drop"})) == {"en": 300, "de": 2}


def test_only_training_rows_are_dropped() -> None:
    german = rows_of("de", 1) + rows_of("de", 1, "eval")
    check_languages(rows_of("en", 300) + german, DataConfig(checks={"other_languages": "drop"}))
    assert [(row.reason, row.split) for row in german] == [("other_languages", None), (None, "eval")]
    assert german[0].detail == "by its words: de"


def test_data_of_two_languages_has_both_and_data_of_many_has_none() -> None:
    rows = rows_of("en", 100) + rows_of("de", 10)
    check_languages(rows, DataConfig())
    assert all(row.hits == () for row in rows)
    assert check_languages(rows, DataConfig(checks={"other_languages": "off"})) == {}


@pytest.mark.parametrize(
    "text",
    ["Ich brauche Hilfe", "Ma carte a été volée", "Necesito ayuda", "Gdzie jest moja karta?", "请帮忙", "Где деньги"],
)
def test_a_short_text_is_judged_beside_the_languages_of_the_data(text: str) -> None:
    row = Row("b.jsonl", 1, [{"role": "user", "content": text}], "0", split="train")
    check_languages([*rows_of("en", 300), row], DataConfig())
    assert row.hits == ("other_languages",)


@pytest.mark.parametrize(
    "text", ["Help me", "self._client_ip = None", "https://fastapi.example.com/", "12 + 7 = ?", "| a | b |\n| 1 | 2 |"]
)
def test_code_and_addresses_are_of_no_other_language(text: str) -> None:
    row = Row("b.jsonl", 1, [{"role": "user", "content": text}], "0", split="train")
    check_languages([*rows_of("en", 300), row], DataConfig())
    assert row.hits == ()
