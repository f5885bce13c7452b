"""Judge how a row was encoded for a family, by the seven rules of a right encoding.

(a) The ids are those of the whole rendering, or of the chat up to one assistant turn. What follows the last answer's
end may be cut, and a token that ends an answer may be appended where the template writes none.
(b) What is supervised is exactly the answers as rendered, each with its end mark.
(c) The last supervised token of an answer is one at which the family's servers stop.
(d) Nothing of another turn is supervised, and no answer twice.
(e) No text is missing without a word.
(f) Nobody's text forges a turn.
(g) The clock changes nothing: `judge` is given what was encoded on several days.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tests.lm.families.alignment import Alignment, align, byte_offset
from tests.lm.families.reading import AnswerRegion
from tests.lm.families.row_reading import Prefix, Reading

# From the best to the worst.
OUTCOMES = ("right", "refused_true", "untrue", "wrong", "crash")


class Encoded(Protocol):
    """One example, as the module under test returns it."""

    input_ids: list[int]
    supervised: list[bool]
    warnings: tuple[str, ...]


class Refusal(Protocol):
    """Why the module under test refused a row."""

    reason: str


@dataclass(frozen=True)
class Verdict:
    """What the judge finds: one of `OUTCOMES`, and why."""

    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Candidate:
    """A text whose tokens an example may have.

    Attributes:
        text: As rendered, perhaps with ends that the template does not write.
        ids: Of the whole text.
        regions: Of every assistant turn in it.
        is_appended: Whether it has an end that the template does not write.
    """

    text: str
    ids: list[int]
    regions: dict[int, AnswerRegion]
    is_appended: bool


def judge(reading: Reading, results: Sequence[Any]) -> Verdict:
    """Judge what was encoded for one row, on each of several days: examples, a refusal or another exception."""
    verdicts = [_judge_once(reading, result) for result in results]
    worst = max(verdicts, key=lambda v: OUTCOMES.index(v.outcome))
    if worst.outcome == "right" and len({_ids(result) for result in results}) > 1:
        return Verdict("wrong", "(g) other tokens on another day")
    return worst


def _judge_once(reading: Reading, result: Any) -> Verdict:
    reasons = ", ".join(sorted(reading.must)) or "none"
    if isinstance(result, Exception):
        reason = getattr(result, "reason", None)
        if not isinstance(reason, str):
            return Verdict("crash", f"{type(result).__name__}: {result}")
        # Nothing asks for an answer that stands first, so any reason to refuse it is as good.
        is_true = reason in reading.must | reading.may or reading.answers[0] == 0
        return Verdict("refused_true", reason) if is_true else Verdict("untrue", f"{reason}, true are: {reasons}")
    if reading.must:
        return Verdict("wrong", f"encoded although {reasons}")
    fault = _first_fault(reading, result)
    return Verdict("wrong", fault) if fault else Verdict("right")


def _first_fault(reading: Reading, examples: Sequence[Encoded]) -> str | None:
    """Return what is wrong with the examples of a row that can be encoded right."""
    supervised: list[int] = []
    is_appended = False
    for example in examples:
        faults = []
        for candidate in _candidates(reading):
            outcome = _match(reading, example, candidate)
            if isinstance(outcome, list):
                supervised += outcome
                is_appended |= candidate.is_appended
                break
            faults.append(outcome)
        else:
            # The fault that is found last in the order of the rules says most.
            return max(faults, default="(a) no rendering of an answer", key=lambda fault: fault[1])

    if len(supervised) != len(set(supervised)):
        return f"(d) supervised twice: turns {supervised}"
    if sorted(supervised) != reading.learnt:
        return f"(b) supervised are turns {sorted(supervised)} of {reading.learnt}"
    warnings = {code for example in examples for code in example.warnings}
    if reading.is_trimmed and not reading.is_ambiguous and "trimmed_ends" not in warnings:
        return f"(e) white space at the ends is gone, and warnings are {warnings}"
    if "trimmed_ends" in warnings and not reading.has_outer_space:
        return f"(e) no text has white space at its ends, and warnings are {warnings}"
    if is_appended and not warnings & {"end_appended", "end_from_next_turn"}:
        return f"(e) an end was appended, and warnings are {warnings}"
    return None


def _candidates(reading: Reading) -> Iterable[Candidate]:
    """Yield the texts that an example may have: the whole chat, or up to one answer, with and without added ends."""
    last = reading.answers[-1]
    prefixes = [reading.whole, *(reading.prefixes[i] for i in reversed(reading.answers))]
    counts = [last, *reversed(reading.answers)]
    for prefix, i in zip(prefixes, counts, strict=True):
        if prefix.text is None or i not in prefix.regions:
            continue
        yield Candidate(prefix.text, reading.ids(prefix.text), prefix.regions, is_appended=False)

        # An end appended to the last answer alone, as text and as a token.
        region = prefix.regions[i]
        if region.mark is None:
            text = prefix.text[: region.content_end]
            for stop in reading.family.stops:
                end = len(text) + len(stop)
                regions = {**prefix.regions, i: _ended(region, 0, len(text), end, stop)}
                yield Candidate(text + stop, reading.ids(text + stop), regions, is_appended=True)
                ids = [*reading.ids(text), reading.tokenizer.convert_tokens_to_ids(stop)]
                yield Candidate(text + stop, ids, regions, is_appended=True)
        if any(r.mark is None for r in prefix.regions.values()):
            yield from _with_every_end(reading, prefix)


def _with_every_end(reading: Reading, prefix: Prefix) -> Iterable[Candidate]:
    """Yield the text with an end after every answer that has none."""
    for stop in reading.family.stops:
        text, shift = prefix.text or "", 0
        regions = {}
        for i, region in sorted(prefix.regions.items()):
            at = region.content_end + shift
            if region.mark is not None:
                regions[i] = _ended(region, shift, at, region.end + shift, region.mark)
                continue
            text = text[:at] + stop + text[at:]
            regions[i] = _ended(region, shift, at, at + len(stop), stop)
            shift += len(stop)
        yield Candidate(text, reading.ids(text), regions, is_appended=True)


def _ended(region: AnswerRegion, shift: int, content_end: int, end: int, mark: str) -> AnswerRegion:
    return AnswerRegion(region.opening + shift, region.content + shift, content_end, end, mark)


def _match(reading: Reading, example: Encoded, candidate: Candidate) -> list[int] | str:
    """Return which turns the example supervises, or the first rule that it breaks with this text."""
    ids, supervised = example.input_ids, example.supervised
    if len(ids) != len(supervised) or not any(supervised):
        return "(b) no mask of this length, or nothing supervised"
    if candidate.ids[: len(ids)] != ids:
        return f"(a) other tokens than those of {candidate.text[-60:]!r}"
    alignment = align(reading.tokenizer, ids, candidate.text)
    if alignment is None:
        return "(a) the tokens do not spell the text"

    turns = []
    for first, end in _runs(supervised):
        turn = _turn_of_run(reading, candidate, alignment, ids, first, end)
        if isinstance(turn, str):
            return turn
        turns.append(turn)
    return turns


def _turn_of_run(
    reading: Reading, candidate: Candidate, alignment: Alignment, ids: list[int], first: int, end: int
) -> int | str:
    """Return the turn that a run of supervised tokens is, from its start through its end mark."""
    spans, text = alignment.spans, candidate.text
    learnt = text.encode()[spans[first][0] : spans[end - 1][1]]
    for i, region in candidate.regions.items():
        if spans[end - 1][1] != byte_offset(text, region.end) or region.mark is None:
            continue
        if reading.tokenizer.convert_ids_to_tokens(ids[end - 1]) not in reading.family.stops:
            return f"(c) the last supervised token of turn {i} is no stop: {learnt!r}"
        if not any(_begins(spans, first, byte_offset(text, start)) for start in _starts(reading, i, region, text)):
            return f"(b) turn {i} is not supervised from its start: {learnt!r}"
        if not _is_in_context(reading, i, region, text, candidate.is_appended):
            return f"(d) turn {i} stands behind another text than at inference"
        return i
    return f"(b) supervised is no answer with its end: {learnt!r}"


def _starts(reading: Reading, i: int, region: AnswerRegion, text: str) -> set[int]:
    """Return the characters at which the supervised part of an answer may begin."""
    prompt, own = reading.prompts[i], reading.prefixes[i]
    if prompt is not None and own.text is not None and own.text.startswith(prompt) and i in own.regions:
        # Where the model goes on, as far behind the assistant's mark as in the chat that ends with this answer.
        return {region.content, region.opening + len(prompt) - own.regions[i].opening}
    return {region.content, region.opening}


def _begins(spans: list[tuple[int, int]], first: int, start: int) -> bool:
    """Say whether the first supervised token is the one that begins at this byte.

    A token that crosses the byte may be supervised or not; a token of no characters in front of it too.
    """
    behind = next((k for k, span in enumerate(spans) if span[1] > start), len(spans))
    allowed = {behind, behind + 1} if spans[behind][0] < start else {behind}
    while behind and spans[behind - 1] == (start, start):
        behind -= 1
        allowed.add(behind)
    return first in allowed


def _is_in_context(reading: Reading, i: int, region: AnswerRegion, text: str, is_appended: bool) -> bool:
    """Say whether the answer stands behind what the model reads at inference, as far as the template lets it."""
    own = reading.prefixes[i]
    if own.text is None or i not in own.regions:
        return False
    expected = own.text[: own.regions[i].content_end]
    # Ends that were added to earlier answers are no part of what the template writes.
    return is_appended or text[: region.content_end] == expected


def _runs(supervised: Sequence[bool]) -> Iterable[tuple[int, int]]:
    start = None
    for k, flag in enumerate([*supervised, False]):
        if flag and start is None:
            start = k
        elif not flag and start is not None:
            yield start, k
            start = None


def _ids(result: Any) -> Any:
    if isinstance(result, Exception):
        return repr(result)
    return tuple((tuple(e.input_ids), tuple(e.supervised)) for e in result)
