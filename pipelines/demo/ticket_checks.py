"""Check the demo's files: their statistics, and every promise that README.md makes about them.

Command: `python pipelines/demo/make_tickets.py --check`
"""

from __future__ import annotations

import re
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

from qlora_retrain.core import json_lines

HERE = Path(__file__).resolve().parent
SPLIT_SEED, EVAL_FRACTION, MIN_EVAL_ROWS = "support-intents", 0.15, 8  # as the line support-intents has them
# Two tickets are near-duplicates when their word 3-shingles, digits masked, have at least this Jaccard similarity.
NEAR_DUPLICATE_JACCARD = 0.7

Row = dict[str, Any]
PhraseBook = dict[str, Any]

BAD_KINDS = (
    "no assistant turn", "content empty", "unknown role", "messages not a list", "duplicate", "conflicting answer",
    "over 256 words", "content not a string",
)  # fmt: skip
BAD_ROWS = Counter({kind: 2 if kind == "duplicate" else 1 for kind in BAD_KINDS})


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Return the word 3-shingles by which two tickets are compared: lower case, each run of digits as one 0."""
    words = re.findall(r"[a-z0-9']+", re.sub(r"\d+", "0", text.lower()))
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset([tuple(words)])


def jaccard(first: frozenset[Any], second: frozenset[Any]) -> float:
    """Return the Jaccard similarity: the size of the intersection over that of the union."""
    # isdisjoint stops at the first common element and builds no set: most of the 300,000 pairs have none.
    common = 0 if first.isdisjoint(second) else len(first & second)
    return common / (len(first) + len(second) - common)


def intent_names(book: PhraseBook) -> list[str]:
    """Return every table of the phrase book that has core phrasings."""
    return [name for name, part in book.items() if "core" in part]


def load_rows(name: str) -> list[Row]:
    """Read the rows of a shipped file."""
    return [row for _, row in json_lines.read(HERE / name)]


def normalized_prompt(candidate: Row) -> str:
    """Return the text by which the pipeline tells prompts apart and splits them."""
    from qlora_retrain.lm import conversations

    return conversations.normalized_text(conversations.prompt_of(candidate["messages"]))


def find_fault(candidate: Row, answers: dict[str, str]) -> str | None:
    """Return what is wrong with a row; None for a good one, whose answer is then entered in `answers`.

    Args:
        candidate: The row.
        answers: The answer of each earlier prompt.
    """
    messages = candidate["messages"]
    if not isinstance(messages, list):
        return "messages not a list"
    roles, contents = [turn["role"] for turn in messages], [turn["content"] for turn in messages]
    if set(roles) - {"user", "assistant"}:
        return "unknown role"
    if roles[-1] != "assistant":
        return "no assistant turn"
    if not all(isinstance(content, str) for content in contents):
        return "content not a string"
    if not all(content.strip() for content in contents):
        return "content empty"
    if len(contents[0].split()) > 256:
        return "over 256 words"

    # Only a row that is well formed has a prompt to compare with the earlier ones.
    prompt = normalized_prompt(candidate)
    if prompt in answers:
        return "duplicate" if answers[prompt] == contents[-1] else "conflicting answer"
    answers[prompt] = contents[-1]
    return None


def is_eval_prompt(prompt: str) -> bool:
    """Return whether the data gate keeps this prompt for evaluation."""
    return int(sha256(f"{SPLIT_SEED}\n{prompt}".encode()).hexdigest()[:16], 16) / 2**64 < EVAL_FRACTION


def compute_stats(rows: list[Row], golden: list[Row], reference: list[Row]) -> dict[str, Any]:
    """Return every number that is promised or printed."""
    answers: dict[str, str] = {}
    faults = [find_fault(r, answers) for r in rows]
    # The gate drops both sides of a conflict, so neither counts as an evaluation row.
    disputed = {normalized_prompt(r) for r, f in zip(rows, faults, strict=True) if f == "conflicting answer"}
    texts = [r["messages"][0]["content"] for r, f in zip(rows, faults, strict=True) if f is None]
    words = sorted(len(text.split()) for text in texts)

    tickets = [shingles(text) for text in texts]
    near_duplicates = sum(
        any(jaccard(t, u) >= NEAR_DUPLICATE_JACCARD for j, u in enumerate(tickets) if j != i)
        for i, t in enumerate(tickets)
    )
    return {
        "rows": len(rows),
        "good rows": len(texts),
        "rows an intent": Counter(answers.values()),
        "evaluation rows an intent": Counter(a for p, a in answers.items() if p not in disputed and is_eval_prompt(p)),
        "near-duplicates": near_duplicates / len(texts),
        "words, mean": sum(words) / len(words),
        "words, median": words[len(words) // 2],
        "words, longest": words[-1],
        "bad rows": Counter(f for f in faults if f),
        "golden rows an intent": Counter(r["messages"][-1]["content"] for r in golden),
        "golden prompts in the tickets": len({normalized_prompt(r) for r in golden} & answers.keys()),
        "closest golden prompt": max(
            jaccard(shingles(r["messages"][0]["content"]), t) for r in golden for t in tickets
        ),
        "reference passages": sum("text" in r for r in reference),
        "reference chats": sum("messages" in r for r in reference),
        "reference words": sorted(len(r["text"].split()) for r in reference if "text" in r),
    }


def check_promises(n: dict[str, Any], book: PhraseBook) -> dict[str, bool]:
    """Return every promise that README.md makes about the files, and whether it is kept."""
    names = set(intent_names(book))
    return {
        "12 intents of at least 14 core phrasings": min(len(book[i]["core"]) for i in names) >= 14 and len(names) == 12,
        "55 to 70 good rows an intent": all(55 <= n["rows an intent"][i] <= 70 for i in names),
        f"at least {MIN_EVAL_ROWS} evaluation rows an intent": all(
            n["evaluation rows an intent"][i] >= MIN_EVAL_ROWS for i in names
        ),
        "at most 2 % near-duplicates": n["near-duplicates"] <= 0.02,
        "20 to 28 words in the mean, 70 at most": 20 <= n["words, mean"] <= 28 and n["words, longest"] <= 70,
        "the bad rows are these": n["bad rows"] == BAD_ROWS,
        "fewer than 2 % bad rows": n["bad rows"].total() < 0.02 * n["rows"],
        "3 golden rows an intent": n["golden rows an intent"] == Counter(dict.fromkeys(names, 3)),
        "no golden prompt in the tickets": n["golden prompts in the tickets"] == 0 and n["closest golden prompt"] < 0.2,
        "24 reference passages of 40 to 90 words": n["reference passages"] == 24
        and 40 <= n["reference words"][0] <= n["reference words"][-1] <= 90,
        "12 reference chats": n["reference chats"] == 12,
    }


def check(book: PhraseBook) -> int:
    """Print the numbers and the promises of the shipped files; return 1 where one is broken."""
    stats = compute_stats(load_rows("tickets.jsonl"), load_rows("golden.jsonl"), load_rows("reference.jsonl"))
    for name, value in stats.items():
        text = ", ".join(f"{k} {v}" for k, v in sorted(value.items())) if isinstance(value, Counter) else value
        print(f"{name}: {text:.3f}" if isinstance(text, float) else f"{name}: {text}")

    promises = check_promises(stats, book)
    for promise, is_kept in promises.items():
        print(f"{'kept  ' if is_kept else 'BROKEN'} {promise}")
    return 0 if all(promises.values()) else 1
