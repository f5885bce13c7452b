"""Columns that say whether an answer is a good one. An answer that is marked as bad must not be learnt unnoticed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from components.validate_data.values import is_empty

VERDICTS = frozenset(
    "label labels kto_tag kto_label desirable accepted is_accepted correct is_correct good is_good preferred approved "
    "thumbs_up is_preferred chosen answer feedback vote verdict".split()
)
_GOOD = "true 1 1.0 yes accept accepted approved good desirable thumbs_up up like chosen"
_BAD = "false 0 0.0 no reject rejected bad undesirable thumbs_down down dislike ignore ignored"
_TRUE = ("true", "1", "1.0", "yes")
_FALSE = ("false", "0", "0.0", "no")
# In a field of such a name, true and no are answers.
_ANSWERS = ("answer", "verdict")
_TRUTHS = dict.fromkeys(_GOOD.split(), "good") | dict.fromkeys(_BAD.split(), "bad")


class Verdicts:
    """Count what the columns that nothing reads say about the answers."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        # How each column writes that an answer is good.
        self._good_words: dict[str, str] = {}

    def add(self, path: str, value: object) -> None:
        """Count the value of a column, if its name says that it holds verdicts."""
        if path not in VERDICTS or is_empty(value) or isinstance(value, list | Mapping):
            return
        word = str(value).strip()
        is_answer = path in _ANSWERS and word.casefold() in (*_TRUE, *_FALSE)
        verdict = "other" if is_answer else _TRUTHS.get(word.casefold(), "other")
        self._counts.setdefault(path, Counter())[verdict] += 1
        if verdict == "good":
            self._good_words.setdefault(path, "true" if word.casefold() in _TRUE else word)

    def explain_refusal(self, source: str) -> str:
        """Return why the answers that are marked as bad refuse the data, with the setting; empty where none is."""
        for path, counts in self._counts.items():
            if counts["bad"] and not counts["other"]:
                keep = f"data.keep: {{{path}: {self._good_words.get(path, 'true')}}}"
                return (
                    f'{source}: "{path}" marks {counts["bad"]:,} answers as bad, and nothing reads it; set {keep}, or '
                    f"data.ignore_fields: [{path}] to learn every answer"
                )
        return ""
