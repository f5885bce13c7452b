"""Make the demo's tickets: support mails of a made-up electronics shop, each with the intent it should be routed to.

Reads phrases.toml beside this file; all of it was written for this project. Makes one JSONL file, the same bytes each
time. A few lines are bad on purpose, each in its own way, so that the data gate has something to find.

Command: `python pipelines/demo/make_tickets.py pipelines/demo/tickets.jsonl`
         `python pipelines/demo/make_tickets.py --check` prints the statistics of the shipped files; exits with 1 where
         they break a promise of README.md
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from ticket_checks import PhraseBook, Row, check, intent_names, jaccard, shingles

from qlora_retrain.core import json_lines

HERE = Path(__file__).resolve().parent
SEED = 8  # the first under which every intent gets its evaluation rows
ROWS_PER_INTENT = 64
MAX_WORDS = 70
REDRAW_JACCARD = 0.55  # the script draws a ticket again from here on, well before that

# How people write. A voice's share of the tickets (the shares add up to 100), and the probability of each part beside
# the core phrasing.
PARTS = ("greeting", "angry_opener", "context", "core", "detail", "aside", "angry_closer", "thanks", "name")
VOICES: dict[str, tuple[int, dict[str, float]]] = {
    "terse": (12, {}),
    "plain": (26, {"greeting": 0.2, "detail": 0.7, "aside": 0.2}),
    "polite": (20, {"greeting": 1.0, "context": 0.1, "detail": 0.6, "thanks": 0.9, "name": 0.7}),
    "angry": (14, {"angry_opener": 0.7, "detail": 0.6, "aside": 0.2, "angry_closer": 0.7}),
    "rambling": (14, {"greeting": 0.4, "context": 1.0, "detail": 0.6, "aside": 0.5, "thanks": 0.4, "name": 0.4}),
    "hurried": (14, {"detail": 0.6, "context": 0.1, "thanks": 0.15}),
}
SHORTHAND = {"please": "pls", "you": "u", "your": "ur", "because": "cos", "and": "&", "for": "4", "tomorrow": "tmrw"}


def expand_phrase(phrase: str, rng: random.Random, slots: dict[str, str]) -> str:
    """Choose one of each [a|b], then fill in the slots."""
    # The innermost choices first, since a choice may contain another.
    while "[" in phrase:
        phrase = re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), phrase)
    return phrase.format_map(slots)


def sample_slots(book: PhraseBook, rng: random.Random) -> dict[str, str]:
    """Sample one value per slot, so that a ticket speaks of one product, one order, one sum."""
    slots = {
        "number": str(rng.randrange(10_000, 99_999)),
        "house": str(rng.randrange(1, 140)),
        "whole": str(rng.randrange(15, 480)),
        "cents": f"{rng.randrange(12, 320)}.{rng.choice(('50', '90', '95', '99', '49'))}",
    }
    for name, values in book["slots"].items():
        slots[name] = rng.choice(values).format_map(slots)

    # No maker or product begins with "u".
    slots["item"] = slots["maker"] + slots["product"]
    slots["an_item"] = ("an " if slots["item"][0] in "aeioAEIO" else "a ") + slots["item"]
    return slots


def add_typos(text: str, rng: random.Random) -> str:
    """Swap or drop a letter inside one or two of the longer plain words."""
    words = text.split(" ")
    long_words = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    # Inside the word only: the first and the last letter stay.
    for i in rng.sample(long_words, min(len(long_words), rng.choice((1, 1, 2)))):
        word, k = words[i], rng.randrange(1, len(words[i]) - 2)
        swapped = word[:k] + word[k + 1] + word[k] + word[k + 2 :]
        words[i] = rng.choice((swapped, word[:k] + word[k + 1 :]))
    return " ".join(words)


def type_in_a_hurry(text: str, rng: random.Random) -> str:
    """Rewrite a text as typed on a phone: lower case, shorthand, typos, no full stop."""
    words = [SHORTHAND.get(word, word) if rng.random() < 0.5 else word for word in text.lower().split(" ")]
    text = " ".join(words).rstrip(".,").replace("'", "" if rng.random() < 0.5 else "'")
    return add_typos(text, rng) if rng.random() < 0.7 else text


def as_sentence(part: str) -> str:
    """Add capitals, and an end mark where there is none."""
    part = re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), part)
    return part + ("" if part[-1] in ".,!?:" else ".")


def compose_ticket(book: PhraseBook, intent: str, core: str, rng: random.Random) -> str:
    """Compose one ticket: a core phrasing in some voice, with what people write around it."""
    slots = sample_slots(book, rng)
    voice = rng.choices(list(VOICES), [share for share, _ in VOICES.values()])[0]
    probabilities: dict[str, float] = {"core": 1.0, **VOICES[voice][1]}

    # An aside names another intent, so that spotting one word is not enough to answer.
    asides = [phrase for aside_intent, phrases in book["aside"].items() if aside_intent != intent for phrase in phrases]
    pools = {**book["frame"], "core": [core], "detail": book[intent]["detail"], "aside": asides}
    parts = {
        p: expand_phrase(rng.choice(pools[p]), rng, slots) for p in PARTS if rng.random() < probabilities.get(p, 0.0)
    }

    # What the voice does to the text as a whole.
    if voice == "hurried":
        return type_in_a_hurry(" ".join(parts.values()), rng)
    if voice == "terse" and rng.random() < 0.5:
        return parts["core"].rstrip(".")
    name = parts.pop("name", "")
    text = " ".join(as_sentence(part) for part in parts.values())
    if voice == "angry" and rng.random() < 0.4:
        text = text.replace(" not ", " NOT ", 1).replace(". ", "! ", 1)
    if voice == "plain" and rng.random() < 0.15:
        text = add_typos(text, rng)
    return f"{text}\n{name}" if name else text.rstrip(",")


def make_row(text: Any, answer: str) -> Row:
    """Return a line of the file."""
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


def generate_good_rows(book: PhraseBook) -> list[Row]:
    """Generate the same number per intent, shuffled; a ticket too similar to an earlier one is drawn again."""
    rng = random.Random(SEED)  # noqa: S311 - repeatable on purpose
    rows: list[Row] = []
    earlier: list[frozenset[Any]] = []
    for intent in intent_names(book):
        # Every core phrasing in turn, so that each is used about as often.
        cores = rng.sample(book[intent]["core"], len(book[intent]["core"]))
        for i in range(ROWS_PER_INTENT):
            while True:
                text = compose_ticket(book, intent, cores[i % len(cores)], rng)
                ticket = shingles(text)
                if len(text.split()) <= MAX_WORDS and all(jaccard(ticket, e) < REDRAW_JACCARD for e in earlier):
                    break
            earlier.append(ticket)
            rows.append(make_row(text, intent))
    rng.shuffle(rows)
    return rows


def insert_bad_rows(rows: list[Row]) -> list[Row]:
    """Insert nine bad rows, each at its line; the data gate must find them and never train on them."""
    repeated, contradicted = rows[40], rows[100]
    conflicting_answer = next(r["messages"][-1] for r in rows if r["messages"][-1] != contradicted["messages"][-1])
    pasted = "".join(f"\n[09:{i:02}] hub-{i % 7} level=warn retry={i} code=0x{i * 7919:05x}" for i in range(60))
    bad = {
        61: {"messages": [{"role": "user", "content": "The doorbell app logs me out whenever I open it."}]},
        148: make_row("", "delivery_status"),
        233: {"messages": [{"role": "customer", "content": "Is it back in stock?"}, rows[2]["messages"][-1]]},
        310: {"messages": "My kettle is late, where is it? => delivery_status"},
        395: repeated,
        471: {"messages": [contradicted["messages"][0], conflicting_answer]},
        556: make_row("My hub does this all day, warranty?" + pasted, "warranty_claim"),
        640: make_row(48213, "invoice_copy"),
        702: rows[7],
    }

    # In the order of their lines, so that none moves another.
    mixed = list(rows)
    for line_number, bad_row in bad.items():
        mixed.insert(line_number - 1, bad_row)
    return mixed


def main() -> int:
    """Write the tickets, or check what is shipped."""
    parser = argparse.ArgumentParser(description="Make or check the demo's tickets.")
    parser.add_argument("out", nargs="?", type=Path, help="the JSONL file to write")
    parser.add_argument("--check", action="store_true", help="measure the shipped files")
    args = parser.parse_args()
    if args.check == (args.out is not None):
        parser.error("give an OUT.jsonl to write, or --check")
    book = tomllib.loads((HERE / "phrases.toml").read_text(encoding="utf-8"))
    if args.check:
        return check(book)
    rows = insert_bad_rows(generate_good_rows(book))
    json_lines.write(args.out, rows)
    print(f"{args.out}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
