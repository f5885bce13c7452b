"""Notice labels that are written in two ways, that hardly occur, or that are somebody's name or address."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from components.validate_data.redaction import redact
from components.validate_data.values import near_match

# More different labels are answers, and are not compared.
MAX_LABELS = 5000
MAX_LABEL_CHARACTERS = 200
# A label with another letter is a misspelling only of one that is this many times as frequent.
RARITY_FACTOR = 5
MIN_LETTERS = 5  # of a label that may be misspelt: shorter ones are often two different words
MIN_WORD_LETTERS = 3  # of the word in it

_INITIALS = re.compile(r"(?:[A-Z]\.[ -]?){1,3}[A-Z][^\W\d_]+(?:[ '-][A-Z][^\W\d_]+)?")
_TITLED_NAME = re.compile(r"(mr|mrs|ms|miss|dr|prof|herr|frau|mme|monsieur|madame)\.? [^\W\d_]{2,}.*", re.IGNORECASE)
# Common given names of several languages, without those that are also words, months, places or products.
_GIVEN_NAMES = frozenset(
    "aaron abdul adam ahmed aisha alan albert alejandro alex alexander alexandra ali alice amanda amina ana "
    "andrea andreas andrew andrzej angela anita anna anne anthony antoine antonio arthur barbara benjamin bernard "
    "bjorn boris brian carlos carmen caroline catherine charles christina christine christoph christopher claudia "
    "daniel daniela david deborah deepak dennis diego dmitri donald dorothy edward elena elizabeth emily emma "
    "eric erik ernesto esther eva fatima felix fernando francesco francois franz fritz gabriel gabriela gary "
    "george gerhard giovanni giulia giuseppe greta guillaume gustav hannah hans harald hassan heather heinrich "
    "helen helena henri henry hiroshi hugo ibrahim igor ingrid isabella ivan jacob jacqueline james jan jane "
    "janet javier jennifer jessica joan joao johan johann john jonathan jose joseph joshua juan juergen julia "
    "julie karen karl katarzyna katharina katherine kathleen kenji kenneth kevin khalid kimberly klaus kumar lars "
    "laura lauren leila linda lisa louis lucas lucia ludwig luis lukas magdalena manuel marco margaret maria "
    "marie mario martin mary matthew matthias mehmet melissa michael michelle miguel mohamed mohammed monika "
    "muhammad mustafa nancy natalia nicholas nicole nikolai olga olivia omar pablo pamela patricia patrick paul "
    "paula pedro peter philip philippe pierre piotr priya rachel rajesh ralph rebecca ricardo richard robert "
    "roberto roger ronald rosa ruth ryan sabine samantha samuel sandra sanjay sara sarah sean sebastian sergei "
    "sharon simon sofia sophie stefan stephanie stephen steven sunita susan susanne tatiana teresa theresa thomas "
    "timothy ulrich ursula valentina vanessa vera veronica vincent vladimir walter wei werner wilhelm william "
    "wolfgang xavier yasmin yuki yusuf zoe".split()
)


@dataclass(frozen=True, slots=True)
class SimilarLabel:
    """A label that is probably another one, written differently.

    Attributes:
        label: The rarer one.
        count: The rows that have it.
        target: The more frequent one.
        target_count: The rows that have that.
    """

    label: str
    count: int
    target: str
    target_count: int


def find_misspelt_labels(counts: Mapping[str, int]) -> list[SimilarLabel]:
    """Return the labels that differ from a more frequent one in letter case, punctuation or one letter of one word.

    Args:
        counts: The rows of each label. More than `MAX_LABELS` labels are answers, and none is returned.
    """
    if len(counts) > MAX_LABELS:
        return []
    ranking = sorted((label for label in counts if len(label) <= MAX_LABEL_CHARACTERS), key=lambda x: (-counts[x], x))
    by_form: dict[str, str] = {}  # the most frequent label of each form
    by_signature: dict[str, list[str]] = defaultdict(list)  # forms, the most frequent first
    misspelt = []
    for label in ranking:
        form = _form(label)
        target = by_form.get(form) or _nearest(form, counts[label], by_form, by_signature, counts)
        if target:
            misspelt.append(SimilarLabel(label, counts[label], target, counts[target]))
        if form not in by_form:
            by_form[form] = label
            for signature in _signatures(form):
                by_signature[signature].append(form)
    return misspelt


def find_single_labels(counts: Mapping[str, int]) -> list[str]:
    """Return the labels that occur once: nothing can be learnt and measured from one row."""
    return sorted(label for label, count in counts.items() if count == 1)


def find_untrained_labels(train_labels: Iterable[str], eval_labels: Iterable[str]) -> list[str]:
    """Return the labels that are evaluated and that no training row has."""
    return sorted(set(eval_labels) - set(train_labels))


def find_unknown_labels(golden_labels: Iterable[str], data_labels: Iterable[str]) -> dict[str, str | None]:
    """Return the golden labels that are nowhere in the data, each with the most similar one that is."""
    known_labels = sorted(set(data_labels))
    return {label: near_match(label, known_labels) for label in sorted(set(golden_labels) - set(known_labels))}


def find_personal_labels(labels: Iterable[str]) -> list[str]:
    """Return the labels that hold personal data or a secret, or look like a person's name.

    A name is one to three words of which the first, or the one behind a comma, is a common given name, or any word
    behind a title. Names that are also words (Mark, Grace, May) are not recognised, so that labels are not taken for
    names.
    """
    return sorted(label for label in set(labels) if _is_personal(label[:MAX_LABEL_CHARACTERS].strip()))


def _is_personal(label: str) -> bool:
    if redact(label) != label or _TITLED_NAME.fullmatch(label) or _INITIALS.fullmatch(label):
        return True
    surname_first = re.fullmatch(r"[^,]+, *([^,]+)", label)
    words = re.split(r"[\s._-]+", surname_first[1] if surname_first else label)
    # Accents fold away: José is jose.
    folded = unicodedata.normalize("NFKD", words[0]).encode("ascii", "ignore").decode().lower()
    return len(words) <= 3 and all(word.isalpha() for word in words) and folded in _GIVEN_NAMES


def _form(label: str) -> str:
    """Return what labels have in common that differ in letter case and punctuation alone."""
    text = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
    words = " ".join(re.split(r"[\W_]+", text)).strip()
    # Of "C++" and "+1" the punctuation is the meaning.
    return words if sum(map(str.isalpha, words)) >= MIN_LETTERS else text


def _signatures(form: str) -> Iterator[str]:
    """Yield the form, and the form without each letter of a word: forms with one changed letter share one."""
    yield form
    for word in re.finditer(r"\w+", form):
        if len(word[0]) >= MIN_WORD_LETTERS:
            yield from (form[:i] + form[i + 1 :] for i in range(*word.span()))
    # A missing or additional space is a changed letter too.
    yield from (form[: space.start()] + form[space.end() :] for space in re.finditer(" ", form))


def _nearest(
    form: str, count: int, by_form: Mapping[str, str], by_signature: Mapping[str, list[str]], counts: Mapping[str, int]
) -> str | None:
    """Return the most frequent label of which a label with this form is a rare misspelling."""
    forms = {candidate for signature in _signatures(form) for candidate in by_signature.get(signature, ())}
    targets = [by_form[candidate] for candidate in forms if _is_misspelling(form, candidate)]
    frequent = [target for target in targets if counts[target] >= count * RARITY_FACTOR]
    return min(frequent, key=lambda target: (-counts[target], target), default=None)


def _is_misspelling(form: str, target: str) -> bool:
    """Return whether the forms differ by a space, or in one word by a letter that is wrong, missing, new or swapped."""
    if form.replace(" ", "") == target.replace(" ", ""):
        # "1 5" and "15" are two numbers.
        return not any(map(str.isdigit, form))
    words, target_words = form.split(), target.split()
    if max(len(form), len(target)) < MIN_LETTERS or len(words) != len(target_words):
        return False
    pairs = [pair for pair in zip(words, target_words, strict=True) if pair[0] != pair[1]]
    return len(pairs) == 1 and _is_one_edit(*pairs[0])


def _is_one_edit(word: str, target: str) -> bool:
    if max(len(word), len(target)) < MIN_WORD_LETTERS or any(map(str.isdigit, word + target)):
        return False
    # With "a" in front a word means its opposite: typical, atypical.
    if "a" + word == target or word == "a" + target:
        return False
    start = 0
    while start < min(len(word), len(target)) and word[start] == target[start]:
        start += 1
    end, target_end = word[start:], target[start:]
    is_swapped = end[:2] == target_end[:2][::-1] and end[2:] == target_end[2:]
    return is_swapped or end[1:] == target_end[1:] or end[1:] == target_end or end == target_end[1:]
