"""Two texts are compared by words: how they are typed does not count, and a long text needs no more memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from components.validate_data import text_words
from components.validate_data.text_words import MAX_WORDS, cut_words, similarity, split_words


@pytest.mark.parametrize(
    "variant",
    [
        "DON'T block my card",
        "don’t block my card.",
        "  dont\tblock \n my card!!! ",
        "Don't \u200bblo\u200bck my ca\u00adrd",
        "ｄｏｎ'ｔ block my card",
        "“don't” — block, my; card…",
        "don't block\ufe0f my \U000e0041card",
    ],
)
def test_the_same_words_typed_in_another_way_are_equal(variant: str) -> None:
    assert cut_words(variant) == {b"dont", b"block", b"my", b"card"}


def test_letters_of_other_scripts_are_words() -> None:
    assert cut_words("Где МОЯ карта?") == {word.encode() for word in ("где", "моя", "карта")}
    # Vowel signs are marks, and belong to the word.
    assert cut_words("मेरा कार्ड") == {word.encode() for word in ("मेरा", "कार्ड")}
    assert cut_words("Straße CAFÉ") == cut_words("strasse cafe\u0301")
    assert cut_words("카드가 안 왔어요") == {word.encode() for word in ("카드가", "안", "왔어요")}


def test_writing_without_spaces_is_cut_into_characters_and_pairs() -> None:
    assert split_words("我的 PIN 卡") == [word.encode() for word in ("pin", "我", "的", "我的", "卡")]
    chinese, edited = "我的银行卡还没有寄到请问什么时候可以收到", "我的信用卡还没有寄到请问什么时候可以收到"
    assert similarity(cut_words(chinese), cut_words(edited)) > 0.7
    assert similarity(cut_words(chinese), cut_words("如何更改我的密码和电子邮件地址以及电话号码")) < 0.2
    japanese = "カードがまだ届いていないのですがどうすればいいですか"
    assert similarity(cut_words(japanese), cut_words(japanese.replace("まだ", "も"))) > 0.7
    assert similarity(cut_words(japanese), cut_words("暗証番号を変更したいので手順を教えてください")) < 0.2


def test_a_text_without_a_word_is_compared_by_its_characters() -> None:
    assert cut_words("👍") != cut_words("👎")
    assert cut_words("👍\ufe0f !!") == cut_words("! 👍")
    assert cut_words("?!") == {b"?", b"!"}
    assert cut_words("") == cut_words(" \n\u200b") == set()


def test_the_similarity_is_that_of_the_sets() -> None:
    assert similarity({b"a", b"b", b"c"}, {b"b", b"c", b"d"}) == 0.5
    assert similarity({b"a"}, {b"a"}) == 1
    assert similarity({b"a"}, {b"b"}) == similarity(set(), set()) == 0


def test_of_a_long_text_a_sample_is_compared_that_estimates_the_similarity() -> None:
    generator = random.Random(0)
    words = [f"w{generator.getrandbits(40)}" for _ in range(40_000)]
    first, second = words[:30_000], words[6_000:36_000]
    exact = len(set(first) & set(second)) / len(set(first) | set(second))

    generator.shuffle(second)
    sets = [cut_words(" ".join(text)) for text in (first, second)]

    assert {len(words) for words in sets} == {MAX_WORDS}
    # Four standard deviations of a fraction of 4,096 words.
    assert similarity(*sets) == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("unit", ["word{} ", "слово{} ", "x{}", "漢字{}"])
def test_the_memory_does_not_depend_on_the_longest_row(unit: str) -> None:
    text = "".join(unit.format(i) for i in range(40_000))
    tracemalloc.start()
    cut_words(text)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The words of one part and those that are kept, each an object.
    assert len(text) > 3 * text_words.PART_CHARACTERS
    assert peak_bytes < 15 * 2**20
