"""The demo's data is what its script makes and what README.md promises, and a broken promise is noticed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.lm import conversations

DEMO = Path(__file__).resolve().parents[2] / "pipelines" / "demo"
TICKETS, GOLDEN = DEMO / "tickets.jsonl", DEMO / "golden.jsonl"
BAD_LINES = {61, 148, 233, 310, 395, 471, 556, 640, 702}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def good_rows() -> list[dict[str, Any]]:
    return [row for line, row in enumerate(rows_of(TICKETS), 1) if line not in BAD_LINES]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "make_tickets.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "demo"))


def test_the_script_makes_the_shipped_bytes(tmp_path: Path) -> None:
    out = tmp_path / "again.jsonl"
    process = run(DEMO, str(out))
    assert process.returncode == 0, process.stderr
    assert out.read_bytes() == TICKETS.read_bytes()


def test_the_shipped_files_keep_every_promise() -> None:
    checked = run(DEMO, "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("kept  ") == 11
    assert "BROKEN" not in checked.stdout

    # README.md states some of the numbers; they must be lines of the output.
    stated = (DEMO / "README.md").read_text(encoding="utf-8").split("```text\n")[1].split("```")[0].splitlines()
    assert set(stated) <= set(checked.stdout.splitlines()), "README.md states other numbers"


def test_without_its_bad_lines_the_file_is_clean() -> None:
    prompts = []
    for row in good_rows():
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert all(isinstance(turn["content"], str) and turn["content"].strip() for turn in row["messages"])
        # Equal up to case and white space counts as a duplicate, as in the data gate.
        prompts.append(conversations.normalized_text(conversations.prompt_of(row["messages"])))
    assert len(prompts) == len(set(prompts)) == 12 * 64


def test_every_bad_line_is_bad_in_the_way_it_says() -> None:
    rows = rows_of(TICKETS)
    chat_at = {line: rows[line - 1]["messages"] for line in BAD_LINES}
    good_chats = [row["messages"] for row in good_rows()]

    assert [turn["role"] for turn in chat_at[61]] == ["user"]
    assert chat_at[148][0]["content"] == ""
    assert chat_at[233][0]["role"] == "customer"
    assert isinstance(chat_at[310], str)
    for line in (395, 702):
        assert chat_at[line] in [row["messages"] for row in rows[: line - 1]]
    assert [m[1] != chat_at[471][1] for m in good_chats if m[0] == chat_at[471][0]] == [True]
    assert len(chat_at[556][0]["content"].split()) > 256  # so over 256 tokens in any tokenizer
    assert isinstance(chat_at[640][0]["content"], int)


def test_near_duplicates_stay_under_two_percent() -> None:
    """Counted another way: shingles as strings, pairs from an inverted index, Jaccard by its definition."""
    shingles: list[set[str]] = []
    for row in good_rows():
        masked = re.sub(r"[0-9]+", "0", row["messages"][0]["content"].lower())
        words = re.sub(r"[^a-z0-9']+", " ", masked).split()
        shingles.append({" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))})

    # Only tickets with a common shingle can be similar.
    tickets_with: dict[str, list[int]] = {}
    for i, ticket in enumerate(shingles):
        for shingle in ticket:
            tickets_with.setdefault(shingle, []).append(i)
    near_duplicates = set()
    for i, ticket in enumerate(shingles):
        for j in {k for shingle in ticket for k in tickets_with[shingle]} - {i}:
            if len(ticket & shingles[j]) >= 0.7 * len(ticket | shingles[j]):
                near_duplicates.add(i)
    assert len(near_duplicates) <= 0.02 * len(shingles)


@pytest.mark.parametrize("fraction", [0.15, 0.2])
def test_the_split_of_the_line_leaves_every_intent_eight_evaluation_rows(fraction: float) -> None:
    disputed = rows_of(TICKETS)[471 - 1]["messages"][0]
    # A prompt's place is the first 64 bits of a hash of the line's seed and the prompt.
    eval_rows: Counter[str] = Counter()
    for row in good_rows():
        question, answer = row["messages"]
        text = "support-intents\n" + conversations.normalized_text([question])
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        eval_rows[answer["content"]] += question != disputed and share < fraction
    assert len(eval_rows) == 12
    assert min(eval_rows.values()) >= 8, eval_rows


def test_intents_differ_in_their_first_word_and_golden_rows_use_the_same_ones() -> None:
    intents = {row["messages"][1]["content"] for row in good_rows()}
    assert len({intent.split("_")[0] for intent in intents}) == len(intents) == 12
    golden = Counter(row["messages"][1]["content"] for row in rows_of(GOLDEN))
    assert golden == dict.fromkeys(intents, 3)


def test_check_notices_tickets_that_repeat_each_other(copy: Path) -> None:
    # The same tickets with another first word are near-duplicates, and no duplicates.
    lines = (copy / "tickets.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    echoes = [line.replace('"content": "', '"content": "Well, ', 1) for line in lines[:15]]
    (copy / "tickets.jsonl").write_text("".join(lines + echoes), encoding="utf-8")
    checked = run(copy, "--check")
    assert checked.returncode == 1
    assert "BROKEN at most 2 % near-duplicates" in checked.stdout


def test_check_notices_a_golden_prompt_among_the_tickets(copy: Path) -> None:
    leaked = (copy / "golden.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    with (copy / "tickets.jsonl").open("a", encoding="utf-8") as file:
        file.write(leaked)
    checked = run(copy, "--check")
    assert checked.returncode == 1
    assert "BROKEN no golden prompt in the tickets" in checked.stdout


def test_the_script_needs_an_output_file_or_check() -> None:
    refused = run(DEMO)
    assert refused.returncode == 2
    assert "OUT.jsonl" in refused.stderr
