"""Find rows in another language than the data's, by what the user says.

The language of each text is guessed by py3langid (97 languages, naive Bayes over parts of words). The data's languages
are those that at least one row in a hundred has. Data of very many languages has no language of its own, and nothing is
said about it. A guess takes 0.1 ms, so where the check only warns, no more than `MAX_ROWS` rows are judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from heapq import nsmallest
from typing import Any

from components.validate_data.checks import Row
from components.validate_data.similar_rows import Texts
from qlora_retrain.config.data import DataConfig

CHECKS = ("other_languages",)
MAX_ROWS = 20_000
MIN_LETTERS = 20  # a shorter text may be of any language
MAX_CHARACTERS = 1000  # are read of a text
MIN_PROBABILITY = 0.5
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
    languages = [guess_language(text) for text in Texts(rows)]
    counts = Counter(language for language in languages if language)
    total = counts.total()
    usual = {language for language, count in counts.items() if count >= MIN_FRACTION * total}
    if sum(counts[language] for language in usual) < MIN_COVERED_FRACTION * total:
        return dict(counts)

    for row, language in zip(rows, languages, strict=True):
        if language and language not in usual:
            row.hits += ("other_languages",)
            if severity == "refuse" or (severity == "drop" and row.split == "train"):
                row.reason, row.detail, row.split = "other_languages", f"by its words: {language}", None
    return dict(counts)


def guess_language(text: str) -> str | None:
    """Return the code of the text's language (ISO 639-1); None for a text that is too short, or may be of several."""
    text = text[:MAX_CHARACTERS]
    if sum(map(str.isalpha, text)) < MIN_LETTERS:
        return None
    language, probability = _identifier().classify(text)
    return str(language) if probability >= MIN_PROBABILITY else None


@lru_cache(1)
def _identifier() -> Any:
    # Not at the top: it reads a model of 5 MB.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
