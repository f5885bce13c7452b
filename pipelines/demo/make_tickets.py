"""Make the demo's tickets: support mails of a made-up electronics shop, each with the intent it should be routed to.

Reads phrases.toml beside this file (all of it written for this project); makes one JSONL file, the same bytes each
time; a few lines are bad on purpose, each in its own way, so that the data gate has something to find.

Command: `python pipelines/demo/make_tickets.py pipelines/demo/tickets.jsonl`
         `python pipelines/demo/make_tickets.py --check` prints the statistics of the shipped files; 1: a promise broke
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tomllib
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEED = 2  # the first under which every intent gets its evaluation rows
ROWS_AN_INTENT = 64
MAX_WORDS = 70
SALT, EVAL_FRACTION, MIN_EVAL_ROWS = "support-intents", 0.15, 8
NEAR = 0.7  # two tickets are near-duplicates when their word 3-shingles, digits masked, have at least this Jaccard
TOO_ALIKE = 0.55  # the script draws again from here on, well before that

Row = dict[str, Any]
Book = dict[str, Any]

# How people write: the share of the tickets, and how likely each part is beside the core phrasing.
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
BAD_KINDS = (
    "no assistant turn", "content empty", "unknown role", "messages not a list", "duplicate", "conflicting answer",
    "over 256 words", "content not a string",
)  # fmt: skip
BAD_ROWS = Counter({kind: 2 if kind == "duplicate" else 1 for kind in BAD_KINDS})


def fill(phrase: str, rng: random.Random, slots: dict[str, str]) -> str:
    """Choose one of each [a|b], then put the slots in."""
    while "[" in phrase:
        phrase = re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), phrase)
    return phrase.format_map(slots)


def draw_slots(book: Book, rng: random.Random) -> dict[str, str]:
    """One value a slot, so that a ticket speaks of one product, one order, one sum."""
    slots = {
        "number": str(rng.randrange(10_000, 99_999)),
        "house": str(rng.randrange(1, 140)),
        "whole": str(rng.randrange(15, 480)),
        "cents": f"{rng.randrange(12, 320)}.{rng.choice(('50', '90', '95', '99', '49'))}",
    }
    for name, values in book["slots"].items():
        slots[name] = rng.choice(values).format_map(slots)
    slots["item"] = slots["maker"] + slots["product"]
    slots["an_item"] = ("an " if slots["item"][0] in "aeioAEIO" else "a ") + slots["item"]
    return slots


def mistype(text: str, rng: random.Random) -> str:
    """Swap or drop a letter inside one or two of the longer plain words."""
    words = text.split(" ")
    long_words = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    for i in rng.sample(long_words, min(len(long_words), rng.choice((1, 1, 2)))):
        word, at = words[i], rng.randrange(1, len(words[i]) - 2)
        swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        words[i] = rng.choice((swapped, word[:at] + word[at + 1 :]))
    return " ".join(words)


def hurry(text: str, rng: random.Random) -> str:
    """As typed on a phone: lower case, shorthand, typos, no full stop."""
    words = [SHORTHAND.get(word, word) if rng.random() < 0.5 else word for word in text.lower().split(" ")]
    text = " ".join(words).rstrip(".,").replace("'", "" if rng.random() < 0.5 else "'")
    return mistype(text, rng) if rng.random() < 0.7 else text


def sentence(part: str) -> str:
    """With capitals, and an end mark where there is none."""
    part = re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), part)
    return part + ("" if part[-1] in ".,!?:" else ".")


def compose(book: Book, intent: str, core: str, rng: random.Random) -> str:
    """One ticket: a core phrasing in some voice, with what people write around it."""
    slots = draw_slots(book, rng)
    voice = rng.choices(list(VOICES), [share for share, _ in VOICES.values()])[0]
    chances: dict[str, float] = {"core": 1.0, **VOICES[voice][1]}
    asides = [phrase for other, phrases in book["aside"].items() if other != intent for phrase in phrases]
    pools = {**book["frame"], "core": [core], "detail": book[intent]["detail"], "aside": asides}
    parts = {p: fill(rng.choice(pools[p]), rng, slots) for p in PARTS if rng.random() < chances.get(p, 0.0)}
    if voice == "hurried":
        return hurry(" ".join(parts.values()), rng)
    if voice == "terse" and rng.random() < 0.5:
        return parts["core"].rstrip(".")
    name = parts.pop("name", "")
    text = " ".join(sentence(part) for part in parts.values())
    if voice == "angry" and rng.random() < 0.4:
        text = text.replace(" not ", " NOT ", 1).replace(". ", "! ", 1)
    if voice == "plain" and rng.random() < 0.15:
        text = mistype(text, rng)
    return f"{text}\n{name}" if name else text.rstrip(",")


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """The word 3-shingles by which two tickets are compared: lower case, each run of digits as one 0."""
    words = re.findall(r"[a-z0-9']+", re.sub(r"\d+", "0", text.lower()))
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset([tuple(words)])


def likeness(one: frozenset[Any], other: frozenset[Any]) -> float:
    """Jaccard: what is shared, of all there is."""
    shared = 0 if one.isdisjoint(other) else len(one & other)
    return shared / (len(one) + len(other) - shared)


def row(text: Any, answer: str) -> Row:
    """A line of the file."""
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


def intents(book: Book) -> list[str]:
    """Every table of the book that has core phrasings."""
    return [name for name, part in book.items() if "core" in part]


def good_rows(book: Book) -> list[Row]:
    """The same number an intent, shuffled; a ticket too like an earlier one is drawn again."""
    rng = random.Random(SEED)  # noqa: S311 - repeatable on purpose
    rows: list[Row] = []
    seen: list[frozenset[Any]] = []
    for intent in intents(book):
        cores = rng.sample(book[intent]["core"], len(book[intent]["core"]))
        for i in range(ROWS_AN_INTENT):
            while True:
                text = compose(book, intent, cores[i % len(cores)], rng)
                marks = shingles(text)
                if len(text.split()) <= MAX_WORDS and all(likeness(marks, other) < TOO_ALIKE for other in seen):
                    break
            seen.append(marks)
            rows.append(row(text, intent))
    rng.shuffle(rows)
    return rows


def with_bad_rows(rows: list[Row]) -> list[Row]:
    """Nine bad rows, each at its place: what the data gate must find, and never train on."""
    repeated, contradicted = rows[40], rows[100]
    other = next(r["messages"][-1] for r in rows if r["messages"][-1] != contradicted["messages"][-1])
    pasted = "".join(f"\n[09:{i:02}] hub-{i % 7} level=warn retry={i} code=0x{i * 7919:05x}" for i in range(60))
    bad = {
        61: {"messages": [{"role": "user", "content": "The doorbell app logs me out whenever I open it."}]},
        148: row("", "delivery_status"),
        233: {"messages": [{"role": "customer", "content": "Is it back in stock?"}, rows[2]["messages"][-1]]},
        310: {"messages": "My kettle is late, where is it? => delivery_status"},
        395: repeated,
        471: {"messages": [contradicted["messages"][0], other]},
        556: row("My hub does this all day, warranty?" + pasted, "warranty_claim"),
        640: row(48213, "invoice_copy"),
        702: rows[7],
    }
    mixed = list(rows)
    for line, broken in bad.items():
        mixed.insert(line - 1, broken)
    return mixed


def load(name: str) -> list[Row]:
    """The rows of a shipped file."""
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def prompt_of(candidate: Row) -> str:
    """The text by which the pipeline tells prompts apart and splits them."""
    from qlora_retrain.lm import chat

    return chat.canonical(chat.prompt_of(candidate["messages"]))


def fault(candidate: Row, answers: dict[str, str]) -> str | None:
    """What is wrong with a row, given the answer of each earlier prompt; None: it is good, and remembered."""
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
    prompt = prompt_of(candidate)
    if prompt in answers:
        return "duplicate" if answers[prompt] == contents[-1] else "conflicting answer"
    answers[prompt] = contents[-1]
    return None


def held_out(prompt: str) -> bool:
    """Whether the data gate keeps this prompt for evaluation."""
    return int(sha256(f"{SALT}\n{prompt}".encode()).hexdigest()[:16], 16) / 2**64 < EVAL_FRACTION


def measure(rows: list[Row], golden: list[Row], reference: list[Row]) -> dict[str, Any]:
    """Every number that is promised or printed."""
    answers: dict[str, str] = {}
    found = [fault(r, answers) for r in rows]
    disputed = {prompt_of(r) for r, f in zip(rows, found, strict=True) if f == "conflicting answer"}
    texts = [r["messages"][0]["content"] for r, f in zip(rows, found, strict=True) if f is None]
    words = sorted(len(text.split()) for text in texts)
    marks = [shingles(text) for text in texts]
    near = sum(any(likeness(m, o) >= NEAR for j, o in enumerate(marks) if j != i) for i, m in enumerate(marks))
    return {
        "rows": len(rows),
        "good rows": len(texts),
        "rows an intent": Counter(answers.values()),
        "evaluation rows an intent": Counter(a for p, a in answers.items() if p not in disputed and held_out(p)),
        "near-duplicates": near / len(texts),
        "words, mean": sum(words) / len(words),
        "words, median": words[len(words) // 2],
        "words, longest": words[-1],
        "bad rows": Counter(f for f in found if f),
        "golden rows an intent": Counter(r["messages"][-1]["content"] for r in golden),
        "golden prompts in the tickets": len({prompt_of(r) for r in golden} & answers.keys()),
        "closest golden prompt": max(likeness(shingles(r["messages"][0]["content"]), m) for r in golden for m in marks),
        "reference passages": sum("text" in r for r in reference),
        "reference chats": sum("messages" in r for r in reference),
        "reference words": sorted(len(r["text"].split()) for r in reference if "text" in r),
    }


def promises(n: dict[str, Any], book: Book) -> dict[str, bool]:
    """What README.md says of the files, and whether it is so."""
    names = set(intents(book))
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


def check(book: Book) -> int:
    """Print the numbers and the promises of the shipped files; 1 where one is broken."""
    numbers = measure(load("tickets.jsonl"), load("golden.jsonl"), load("reference.jsonl"))
    for name, value in numbers.items():
        shown = ", ".join(f"{k} {v}" for k, v in sorted(value.items())) if isinstance(value, Counter) else value
        print(f"{name}: {shown:.3f}" if isinstance(shown, float) else f"{name}: {shown}")
    kept = promises(numbers, book)
    for promise, holds in kept.items():
        print(f"{'kept  ' if holds else 'BROKEN'} {promise}")
    return 0 if all(kept.values()) else 1


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
    rows = with_bad_rows(good_rows(book))
    args.out.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    print(f"{args.out}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
