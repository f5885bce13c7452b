"""Find rows in another language than the data's, by what the user says.

The language of each text is guessed by py3langid (97 languages, naive Bayes over parts of words). The data's languages
are those that at least one row in a hundred has. Data of very many languages has no language of its own, and nothing is
said about it. A guess takes 0.1 ms, so where the check only warns, no more than `MAX_ROWS` rows are judged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from functools import lru_cache
from heapq import nsmallest
from typing import Any

from components.validate_data.checks import Row
from components.validate_data.similar_rows import Texts
from qlora_retrain.config.data import DataConfig

CHECKS = ("other_languages",)
MAX_ROWS = 20_000
_NO_WORDS = re.compile(r"\S*[/\\_=(){}\[\]<>@#`*|]\S*|\S+[.:]\w\S*|\b[A-Z0-9]+\b")
# The data's languages are known from texts of this length and certainty; others are judged beside these alone.
MIN_LETTERS, MIN_PROBABILITY = 20, 0.5
MIN_JUDGED_LETTERS = 8
MIN_LETTER_FRACTION = 0.7
MAX_CHARACTERS = 1000  # are read of a text
# A text is in another language where the data's languages together are less probable than this. Of 13,083 English
# questions one was, and of 59 short ones in 21 other languages ("Ich brauche Hilfe") 57.
MAX_USUAL_PROBABILITY = 0.02
MIN_FRACTION = 0.01  # of the rows, for a language of the data
MIN_COVERED_FRACTION = 0.9  # of the rows, by the data's languages


def check_languages(rows: Sequence[Row], config: DataConfig) -> dict[str, int]:
    """Note the rows in another language than the data's, and return the number of judged rows of each language.

    Args:
        rows: Rows with their sides of the split. Evaluation rows are never dropped.
        config: What the check does.
    """
    severity = config.checks["other_languages"]
    if severity == "off":
        return {}
    rows = [row for row in rows if row.split in ("train", "eval")]
    if severity == "warn" and len(rows) > MAX_ROWS:
        # Those with the smallest hashes of their prompts, which are the same rows in any order of the files.
        rows = nsmallest(MAX_ROWS, rows, key=lambda row: row.prompt_key)
    texts = Texts(rows)
    guesses = [_guess(text) for text in texts]
    counts = Counter(language for language, is_certain in guesses if language and is_certain)
    total = counts.total()
    usual = {language for language, count in counts.items() if count >= MIN_FRACTION * total}
    if not usual or sum(counts[language] for language in usual) < MIN_COVERED_FRACTION * total:
        return dict(counts)

    for i, (row, (language, _)) in enumerate(zip(rows, guesses, strict=True)):
        if language and language not in usual and _is_foreign(texts[i], usual):
            row.hits += ("other_languages",)
            if severity == "refuse" or (severity == "drop" and row.split == "train"):
                row.reason, row.detail, row.split = "other_languages", f"by its words: {language}", None
    return dict(counts)


def guess_language(text: str) -> str | None:
    """Return the code of the text's language (ISO 639-1); None for a text that is too short, or may be of several."""
    language, is_certain = _guess(text)
    return language if is_certain else None


def _guess(text: str) -> tuple[str | None, bool]:
    """Return the most probable language, None for hardly any letters, and whether the text is long and clear enough."""
    text = text[:MAX_CHARACTERS]
    num_letters = sum(map(str.isalpha, text))
    # Code and formulas are mostly signs.
    num_signs = sum(map(len, text.split())) - sum(map(str.isalnum, text))
    if num_letters < MIN_LETTER_FRACTION * (num_letters + num_signs):
        return None, False
    # A character of Chinese, Japanese or Korean says as much as some letters.
    if not text.isascii():
        num_letters += 2 * sum(character >= "\u2e80" for character in text)
    if num_letters < MIN_JUDGED_LETTERS:
        return None, False
    language, probability = _identifier().classify(text)
    return str(language), num_letters >= MIN_LETTERS and probability >= MIN_PROBABILITY


def _is_foreign(text: str, usual: Collection[str]) -> bool:
    """Return whether the words of a text are of none of these languages; addresses and names of code are no words."""
    text = text[:MAX_CHARACTERS]
    words = _NO_WORDS.sub(" ", text)
    # What is left of code is too little to judge.
    if sum(map(str.isalpha, words)) < MIN_LETTER_FRACTION * sum(map(str.isalpha, text)):
        return False
    return all(_probability(part, usual) < MAX_USUAL_PROBABILITY for part in {text, words})


def _probability(text: str, languages: Collection[str]) -> float:
    probabilities = dict(_identifier().rank(text))
    return float(sum(probabilities[language] for language in languages))


@lru_cache(1)
def _identifier() -> Any:
    # Not at the top: it reads a model of 5 MB.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
