"""Every key of a real profile is documented in docs/data.md, and every key that is documented is in one."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.validate_data.step import run
from qlora_retrain.config.data import DataConfig

PAGE = Path(__file__).parents[3] / "docs" / "data.md"
# The keys below these come from the data, the base or the settings.
NAMED_BY_DATA = (
    "files data_pins layouts unread_columns chat.template_kwargs reasons row_warnings checks length_histogram "
    "labels.rows languages distributions.length distributions.language distributions.label reference.labels settings "
    "replay.files replay.reasons replay.warnings"
).split()
OPTIONAL = ("too_long", "labels", "replay", "reference", "shape.label_imbalance")


def keys_of(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of all leaves, with `*` for names of the data, `SIDE` for a side and `pQ` for a quantile."""
    if path in OPTIONAL and value is None:
        yield path
    elif path == "settings":
        yield "settings.*"
    elif isinstance(value, dict):
        for key, item in value.items():
            name = "*" if path in NAMED_BY_DATA else re.sub(r"_p\d+$", "_pQ", key)
            name = "SIDE" if key in ("train", "eval", "golden") and path not in NAMED_BY_DATA else name
            yield from keys_of(item, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        # An empty list says nothing about what it would hold.
        inner = {key for item in value for key in keys_of(item, f"{path}[]") if isinstance(item, dict)}
        yield from inner or [f"{path}[]"]
    else:
        yield path


def documented_keys() -> set[str]:
    section = PAGE.read_text(encoding="utf-8").split("**`profile.json`**")[1]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def chat(prompt: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "note": "x"}


def profile_of(folder: Path, rows: list[dict[str, Any]], base: Path, version: Path | None, **settings: Any) -> Any:
    replay = folder / "replay" if version else None
    if replay:
        replay.mkdir(parents=True)
        general = [
            chat("Tell me of the sea", "Write to a@example.org"),
            chat("And of the moon?", "It is far"),
            chat("", ""),
        ]
        (replay / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general))
    for name in ("raw", "golden", "dataset"):
        (folder / name).mkdir(parents=True)
    (folder / "raw" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "golden" / "g.jsonl").write_text(json.dumps(chat("A golden question of the day", "refund")) + "\n")
    config = DataConfig(split_seed="keys", min_eval_prompts=5, **settings)
    run(
        config, raw_data=folder / "raw", base_model=base, golden_data=folder / "golden", reference_profile=version,
        eval_data=None, evaluation_history=None, dataset=folder / "dataset", replay_data=replay,
    )  # fmt: skip
    return json.loads((folder / "dataset" / "profile.json").read_text(encoding="utf-8"))


def test_the_keys_of_a_profile_are_those_that_are_documented(tmp_path: Path, tiny_model: Path) -> None:
    rng = random.Random(2)
    labels, topics = ("refund", "delivery", "login"), ("my money back", "where is the parcel", "I cannot sign in")
    words = "red blue green quick slow late early big small new old lost found broken sent paid open closed".split()
    rows = [
        chat(f"{rng.choice(words)} {rng.choice(words)} {topics[i % 3]} {i} of {rng.choice(words)}", labels[i % 3])
        for i in range(300)
    ]
    plain = profile_of(tmp_path / "plain", rows, tiny_model, None, task="text")
    (tmp_path / "version" / "data").mkdir(parents=True)
    (tmp_path / "version" / "data" / "profile.json").write_text(
        json.dumps(profile_of(tmp_path / "labels", rows, tiny_model, None, task="labels"))
    )

    # One row for each part of the profile that only odd data has.
    rows += [chat("long " * 3000, "refund"), chat("", "refund"), chat("a question with a further turn", "login")]
    rows[-1]["messages"].append({"role": "user", "content": "thanks"})
    for i in rng.sample(range(300), 10):
        rows[i] = chat(rows[i]["messages"][0]["content"], labels[(i + rng.choice((1, 2))) % 3])
    full = profile_of(
        tmp_path / "full", rows, tiny_model, tmp_path / "version", task="labels", max_quarantined_fraction=0.5,
        reference_version="20260131T000000Z-0123456789ab", template_kwargs={"a": 1}, label_error_threshold=0.01,
    )  # fmt: skip

    keys = set(keys_of(plain)) | set(keys_of(full))
    documented = documented_keys()
    assert {key for key in keys if key != "suspect_labels[]"} - documented == set()
    assert documented - keys == set()
