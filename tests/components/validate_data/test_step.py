"""The whole gate on real files and a real tokenizer: what it writes and refuses, and that it tells no row's text."""

from __future__ import annotations

import json
import os
import random
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.validate_data import expectations
from components.validate_data.step import run
from qlora_retrain.config.data import DataConfig
from qlora_retrain.core import hashing
from qlora_retrain.core.errors import Exit, UsageError
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.lm import chat, conversations
from qlora_retrain.lm.chat_format import ChatFormat

FILES = {
    "train.jsonl", "eval.jsonl", "golden.jsonl", "dataset.json", "chat_format.json", "profile.json", "quarantine.jsonl",
    "evaluated_prompts.txt", "report.html",
}  # fmt: skip
INTENTS = ("refund", "delivery", "login")
Gate = Callable[..., tuple[StepResult, Path]]


def pair(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def good(count: int) -> list[dict[str, Any]]:
    return [pair(f"zebra question number {i}", INTENTS[i % 3]) for i in range(count)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def gate(tmp_path: Path, tiny_model: Path) -> Gate:
    """Runs the step on rows; settings suit 300 rows of labels."""
    runs = iter(range(100))

    def call(
        rows: list[Any],
        golden: list[Any] | None = None,
        version: Path | None = None,
        evaluation: list[Any] | None = None,
        history: Path | None = None,
        **settings: Any,
    ) -> tuple[StepResult, Path]:
        folder = tmp_path / str(next(runs))
        for name, content in (("tickets", rows), ("golden", golden), ("evaluation", evaluation)):
            (folder / name).mkdir(parents=True)
            text = "".join(json.dumps(row) + "\n" for row in content or [])
            (folder / name / f"{name}.jsonl").write_text(text, encoding="utf-8")
        (folder / "dataset").mkdir()
        defaults = {"task": "labels", "split_seed": "line", "eval_fraction": 0.1, "min_eval_prompts": 10}
        report = run(
            DataConfig(**{**defaults, **settings}),
            raw_data=folder / "tickets",
            base_model=tiny_model,
            golden_data=folder / "golden" if golden else None,
            reference_profile=version,
            eval_data=folder / "evaluation" if evaluation else None,
            evaluation_history=history,
            dataset=folder / "dataset",
        )
        return report, folder / "dataset"

    return call


def test_good_rows_become_a_complete_dataset(gate: Gate, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, dataset = gate(good(300), golden=[pair("a golden question", "login")], system="Answer with the intent.")
    assert "different prompts can rule out no loss of accuracy below" in capsys.readouterr().out
    assert report.refused is None
    assert {path.name for path in dataset.iterdir()} == FILES

    train, evaluation, golden = (lines(dataset / f"{side}.jsonl") for side in ("train", "eval", "golden"))
    assert len(train) + len(evaluation) == 300
    assert not {row["id"] for row in train} & {row["id"] for row in evaluation}

    tokenizer = chat.load_tokenizer(tiny_model)
    for row in train + evaluation + golden:
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        assert row["id"] == conversations.row_id(row["messages"])
    supervised, evaluated, kept_apart = (
        [sum(example.supervised_tokens for example in tokenizer.encode(row["messages"])) for row in rows]
        for rows in (train, evaluation, golden)
    )

    assert json.loads((dataset / "dataset.json").read_text()) == {
        "task": "labels",
        "labels": sorted(INTENTS),
        "system": "Answer with the intent.",
        "max_length_tokens": 1024,
        "eval_fraction": 0.1,
        "rows": {"train": len(train), "eval": len(evaluation), "golden": 1},
        "supervised_tokens": {"train": sum(supervised), "eval": sum(evaluated), "golden": sum(kept_apart)},
    }
    assert report.numbers == {
        "rows_read": 300,
        "rows_train": len(train),
        "rows_eval": len(evaluation),
        "rows_golden": 1,
        "rows_quarantined": 0,
        "duplicates": 0,
        "supervised_tokens_train": sum(supervised),
        "labels": 3,
        "eval_fraction": 0.1,
        "shared_openings": "",
        "template_date": None,
    }
    # The chats are written as the steps that follow will write them.
    chat_format = ChatFormat.from_folder(dataset)
    assert (chat_format.system, chat_format.answer_start) == ("Answer with the intent.", "generation_prompt")

    profile = json.loads((dataset / "profile.json").read_text())
    assert sum(profile["length_histogram"].values()) == 300
    assert profile["train"]["supervised_tokens_p50"] == sorted(supervised)[(len(train) + 1) // 2 - 1]

    counts = Counter(row["messages"][-1]["content"] for row in train)
    assert {label: sides["train"] for label, sides in profile["labels"]["rows"].items()} == counts


def test_every_row_read_is_accounted_for_and_a_quarantined_row_can_be_found(gate: Gate) -> None:
    rows = good(300)
    rows[7] = {"messages": [{"role": "user", "content": "no answer"}]}
    rows[11] = rows[10]
    # Row number 12 says refund.
    rows[13] = pair("zebra question number 12", "login")
    rows[17] = pair("golden", "refund")
    rows[19] = pair("long " * 2000, "refund")
    report, dataset = gate(rows, golden=[pair("Golden", "refund")], max_eval_rows=12)
    quarantine = lines(dataset / "quarantine.jsonl")

    assert [(row["file"], row["row"], row["reason"]) for row in quarantine] == [
        ("tickets.jsonl", 8, "no_assistant_turn"),
        ("tickets.jsonl", 12, "exact_duplicate"),
        ("tickets.jsonl", 13, "conflicting_answer"),
        ("tickets.jsonl", 14, "conflicting_answer"),
        ("tickets.jsonl", 18, "in_golden_set"),
        ("tickets.jsonl", 20, "too_long"),
    ]
    assert {len(row["hash"]) for row in quarantine} == {12}
    assert set(quarantine[0]) == {"file", "row", "reason", "hash"}

    row_counts = json.loads((dataset / "profile.json").read_text())["rows"]
    assert row_counts.pop("golden") == 1
    assert row_counts.pop("read") == 300 == sum(row_counts.values())
    assert (row_counts["quarantined"], row_counts["duplicates"], row_counts["in_golden_set"], row_counts["eval"]) == (
        4,
        1,
        1,
        12,
    )
    assert row_counts["eval_beyond_max_eval_rows"] > 0
    assert report.refused is None


def test_the_same_input_makes_the_same_bytes(gate: Gate) -> None:
    first, second = (gate(good(300) + good(3))[1] for _ in range(2))
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_only_the_datasets_own_rows_hold_row_text(gate: Gate, capfd: pytest.CaptureFixture[str]) -> None:
    rows = good(300)
    for i in range(0, 40, 2):
        rows[i] = {"messages": [{"role": "user", "content": f"zebra secret {i}"}]}
    report, dataset = gate(rows, system="Answer with the intent.")
    for name in ("profile.json", "quarantine.jsonl", "report.html"):
        assert "zebra" not in (dataset / name).read_text(encoding="utf-8")

    assert report.refused is not None
    assert "zebra" not in str(report.refused)
    assert "zebra" not in capfd.readouterr().out


def test_free_text_called_labels_is_refused_and_not_listed(gate: Gate) -> None:
    rows = [pair(f"question {i}", f"zebra answer {i if i > 20 else 0}") for i in range(300)]
    report, dataset = gate(rows)
    assert report.refused is not None
    assert "different labels" in str(report.refused)
    for name in ("profile.json", "report.html"):
        assert "zebra" not in (dataset / name).read_text(encoding="utf-8")


def test_too_many_bad_rows_are_refused_with_the_first_of_each_reason(gate: Gate) -> None:
    rows = good(300)
    for i in range(4, 24):
        rows[i] = {"messages": [{"role": "user", "content": f"no answer {i}"}]}
    rows[2] = pair("  ", "refund")
    report, dataset = gate(rows)

    assert report.refused is not None
    assert report.refused.exit_code == Exit.DATA_REFUSED
    assert str(report.refused) == (
        "data refused: share of rows that are bad: 0.07, expected at most 0.05 (max_quarantined_fraction); "
        'tickets.jsonl:5: "messages" has no assistant turn; a conversation needs a user turn and an assistant turn '
        '(its turns are user) (no_assistant_turn: 20 of 300 rows); tickets.jsonl:3: "messages" holds a turn '
        "without text (turn 1, of the user) (empty_content: 1 of 300 rows); mend these rows, or leave them out with "
        "data.max_quarantined_fraction: 0.07"
    )
    assert {path.name for path in dataset.iterdir()} == FILES
    assert "tickets.jsonl:5: &quot;messages&quot; has no assistant turn" in (dataset / "report.html").read_text()


def test_the_limits_are_inclusive(gate: Gate) -> None:
    rows = good(300)
    for i in range(15):
        rows[i] = {"messages": []}
    assert gate(rows, max_quarantined_fraction=0.05)[0].refused is None
    assert gate(rows, max_quarantined_fraction=0.049)[0].refused is not None


def test_data_without_a_good_row_is_refused_whatever_the_limit(gate: Gate) -> None:
    unanswered = {"messages": [{"role": "user", "content": "no answer"}]}
    report, dataset = gate([unanswered] * 200, max_quarantined_fraction=1.0, task="text")
    assert "every row is bad (200 of 200); tickets.jsonl:1: " in str(report.refused)
    assert (dataset / "train.jsonl").read_text() == ""
    assert {path.name for path in dataset.iterdir()} == FILES


def test_too_many_duplicates_are_refused_apart_from_bad_rows(gate: Gate) -> None:
    report, _ = gate(good(200) + good(100), max_quarantined_fraction=0.0)
    assert "share of rows that repeat another: 0.3333, expected at most 0.2 (max_duplicates_fraction)" in str(
        report.refused
    )
    assert "tickets.jsonl:201: an earlier row has the same prompt" in str(report.refused)
    assert "max_quarantined_fraction" not in str(report.refused)
    assert str(report.refused).endswith("or leave them out with data.max_duplicates_fraction: 0.34")


@pytest.mark.parametrize("knob", ["min_train_rows", "min_eval_prompts"])
def test_too_few_rows_are_refused(gate: Gate, knob: str) -> None:
    report, _ = gate(good(300), **{knob: 299})
    assert f"expected at least 299 ({knob})" in str(report.refused)


def test_one_label_is_not_a_choice(gate: Gate) -> None:
    report, _ = gate([pair(f"question {i}", "refund") for i in range(300)])
    assert "different labels" in str(report.refused)
    assert "expected at least 2" in str(report.refused)


@pytest.mark.parametrize(
    ("golden", "message"),
    [
        (
            [pair("a", "refund"), {"messages": [{"role": "user", "content": "b"}]}],
            'golden.jsonl:2: "messages" has no assi',
        ),
        (
            [pair("a", "refund"), pair("a", "login")],
            "golden.jsonl:1: another row has the same prompt with another label",
        ),
        ([pair("a", "refund"), pair("a", "refund")], "golden.jsonl:2: an earlier row has the same prompt"),
    ],
)
def test_a_bad_golden_row_is_an_error(gate: Gate, golden: list[Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        gate(good(300), golden=golden)
    assert str(caught.value).startswith(f"golden_data: {message}")


def test_odd_but_usable_data_is_a_warning(gate: Gate) -> None:
    rows = good(300)
    # What a wrong encoding leaves: lost bytes, and UTF-8 that was read as Windows-1252.
    marks = ("\ufffd", "caf\u00c3\u00a9", "don\u00e2\u20ac\u2122t")
    rows += [pair(f"odd {marks[i % 3]} question {i}", "Refund") for i in range(9)]
    rows += [pair("d\u00c3\u2014ne one of its kind: \u00c2 \u20ac5", "unique")]
    report, dataset = gate(rows, checks={"replacement_characters": "warn", "mojibake": "warn"})

    assert report.refused is None
    expectations_by_name = {e["name"]: e for e in json.loads((dataset / "profile.json").read_text())["expectations"]}
    warned = {name for name, e in expectations_by_name.items() if e["outcome"] == "warn"}

    assert warned >= {"replacement_characters", "mojibake", "misspelt_labels", "labels_once"}
    # Of 100 rows of refund and 9 of Refund the latter.
    assert expectations_by_name["misspelt_labels"]["observed"] == 9
    assert expectations_by_name["replacement_characters"]["observed"] == 3
    assert expectations_by_name["mojibake"]["observed"] == 7
    # A label that occurs once may be any text.
    assert "unique" not in (dataset / "profile.json").read_text()
    assert "warnings:" in (dataset / "report.html").read_text()


def test_a_secret_keeps_its_row_out_and_stands_in_no_output(gate: Gate, capfd: pytest.CaptureFixture[str]) -> None:
    secret, address = "Tr0ub4dor&3x", "canary.person@mail-host.io"
    rows = good(300)
    rows[7] = pair(f"my password is {secret}", "login")
    rows[8] = pair(f"write to {address}", "login")
    report, dataset = gate(rows, checks={"emails": "redact"})

    assert report.refused is None
    profile = json.loads((dataset / "profile.json").read_text())
    for name, severity, places in (
        ("passwords", "drop", ["tickets.jsonl:8"]), ("emails", "redact", ["tickets.jsonl:9"]), ("mojibake", "drop", [])
    ):  # fmt: skip
        expected = {"severity": severity, "threshold": None, "rows": len(places), "first_rows": places}
        assert profile["checks"][name] == expected
    assert profile["rows"]["quarantined"] == 1
    assert lines(dataset / "quarantine.jsonl")[0]["reason"] == "passwords"
    outputs = [path.read_text(encoding="utf-8") for path in dataset.iterdir()] + [*capfd.readouterr(), str(report)]
    assert not any(text in output for output in outputs for text in (secret, address))
    assert "write to [email]" in (dataset / "train.jsonl").read_text() + (dataset / "eval.jsonl").read_text()


def test_a_secret_in_a_label_stands_in_no_report_and_no_log(gate: Gate, capfd: pytest.CaptureFixture[str]) -> None:
    address, number = "canary.person@mail-host.io", "+49 170 1234567"
    rows = [*good(300), *(pair(f"who sits at desk {i}", (address, number)[i % 2]) for i in range(12))]
    report, dataset = gate(rows)
    assert report.refused is None
    outputs = [(dataset / name).read_text(encoding="utf-8") for name in ("profile.json", "report.html")]
    assert not any(text in output for output in (*outputs, *capfd.readouterr()) for text in (address, number))
    assert json.loads(outputs[0])["labels"]["rows"].keys() == {*INTENTS, "[email]", "[phone number]"}

    # Redaction replaces it in the label as well, so that no model learns it.
    _, dataset = gate(rows, checks={"emails": "redact", "phone_numbers": "redact"})
    assert json.loads((dataset / "dataset.json").read_text())["labels"] == sorted(
        [*INTENTS, "[email]", "[phone number]"]
    )


def test_the_report_names_the_data_and_every_run_makes_the_same(gate: Gate) -> None:
    _, dataset = gate(good(300), golden=[pair("a golden question", "login")])
    pins = json.loads((dataset / "profile.json").read_text())["data_pins"]
    folder = dataset.parent
    assert pins == {
        f"{source}/{folder_name}.jsonl": hashing.sha256_file(folder / folder_name / f"{folder_name}.jsonl")
        for source, folder_name in (("golden_data", "golden"), ("raw_data", "tickets"))
    }
    page = (dataset / "report.html").read_text()
    assert all(sha256 in page.replace("<wbr>", "") for sha256 in pins.values())


def test_a_file_without_a_header_shows_no_personal_data(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "raw").mkdir()
    rows = "4111 1111 1111 1111,ann.lee@mail-host.io,my password is Tr0ub4dor&3\n5500005555555559,bo@x.io,hello\n"
    (tmp_path / "raw/a.csv").write_text(rows)
    with pytest.raises(UsageError, match="the first line looks like a row; write a line with the names") as caught:
        run(DataConfig(split_seed="line"), tmp_path / "raw", tiny_model, None, None, None, None, tmp_path)
    message = str(caught.value)
    assert "[card number] (text), [email] (text), my password is [password] (text)" in message
    assert not any(text in message for text in ("4111", "ann.lee", "Tr0ub4dor"))


def test_data_of_one_template_says_what_keeps_its_rows_out(gate: Gate, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [
        pair(f"please say in a few plain words what the small blue item {i} costs today", f"{i} euros")
        for i in range(40)
    ]
    # So few rows show no template, and all of them nearly equal each other.
    report, dataset = gate(rows, task="text", min_eval_prompts=2, min_train_rows=10)
    kept_out = json.loads((dataset / "profile.json").read_text())["rows"]["near_evaluation"]
    assert kept_out > 20
    words = f"{kept_out} rows were kept out of training, since they nearly equal an evaluation or golden row"
    assert words in str(report.refused)
    assert "data.group_field" in str(report.refused)
    assert "data.eval_fraction" not in str(report.refused)  # another split is no help
    assert words in capfd.readouterr().out


def test_the_order_of_the_rows_changes_no_side_and_no_row_that_is_learnt(gate: Gate) -> None:
    rows = [pair(f"how do I {verb} my {thing} number {i}", "refund") for i in range(30) for verb in ("return", "repair")
            for thing in ("kettle which arrived late last week", "lamp")]  # fmt: skip
    settings = {"task": "text", "checks": {"near_duplicates": "drop"}, "near_duplicate_threshold": 0.7}
    settings |= {"min_eval_prompts": 5, "near_evaluation_threshold": 0.9}
    sides = []
    for order in (rows, rows[::-1], random.Random(1).sample(rows, len(rows))):
        _, dataset = gate(order, **settings)
        sides.append([sorted(lines(dataset / f"{side}.jsonl"), key=str) for side in ("train", "eval")])
    assert 0 < len(sides[0][0]) < len(rows) - len(sides[0][1])
    assert sides[0] == sides[1] == sides[2]


def test_a_check_that_refuses_ends_with_the_rows_and_without_their_text(gate: Gate) -> None:
    rows = [*good(300), pair("call +1 415 555 2671", "login")]
    report, dataset = gate(rows, checks={"phone_numbers": "refuse"})
    assert str(report.refused) == (
        "data refused: rows with a phone number: 1, expected at most 0 (phone_numbers); tickets.jsonl:301: "
        '"messages" holds a phone number (turn 1, of the user) (phone_numbers: 1 of 301 rows)'
    )
    assert "555" not in (dataset / "report.html").read_text()


def test_an_expectation_that_cannot_be_computed_is_an_error_and_not_bad_data(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = expectations.features
    monkeypatch.setattr(expectations, "features", lambda rows, config: real(rows, config).drop(columns="tokens"))
    with pytest.raises(UsageError, match="the expectation tokens could not be computed"):
        gate(good(300))


def test_nothing_is_reported_over_the_network(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: addresses.append(address))
    gate(good(300))
    assert addresses == []
    assert os.environ["GX_ANALYTICS_ENABLED"] == "false"


def version_of(dataset: Path, folder: Path) -> Path:
    """A version's folder with the data profile of a data set."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "profile.json").write_bytes((dataset / "profile.json").read_bytes())
    return folder


def test_data_unlike_the_referenced_versions_is_refused_before_training(gate: Gate, tmp_path: Path) -> None:
    _, dataset = gate(good(300))
    version = version_of(dataset, tmp_path / "version")
    settings = {"reference_version": "20260131T000000Z-0123456789ab"}

    assert gate(good(330), version=version, **settings)[0].refused is None
    others = [pair(f"zebra question number {i}", "refund" if i % 10 else "login") for i in range(300)]
    refused = gate(others, version=version, **settings)[0].refused

    assert refused is not None
    assert refused.exit_code == Exit.DATA_REFUSED
    assert "drift from the data of 20260131T000000Z-0123456789ab: label moved most" in str(refused)
    assert gate(others, version=version, max_drift_psi=100.0, **settings)[0].refused is None

    (version / "data" / "profile.json").unlink()
    assert "has no data profile" in str(gate(good(300), version=version, **settings)[0].refused)


def test_the_profile_counts_slices_and_labels(gate: Gate) -> None:
    rows = [*good(300), pair("где посылка", "delivery")]
    _, dataset = gate(rows)
    distributions = json.loads((dataset / "profile.json").read_text())["distributions"]
    assert distributions["label"] == {"delivery": 101, "login": 100, "refund": 100}
    assert distributions["language"] == {"cyrillic": 1, "latin": 300}
    assert distributions["length"] == {"0-31": 301}


def test_a_language_field_travels_with_its_row_where_it_is_a_tag(gate: Gate) -> None:
    tags = ["de", "pt-BR", "a secret of a person", 7, None]
    rows = [{**row, "lang": tags[i % 5]} for i, row in enumerate(good(300))]
    _, dataset = gate(rows, language_field="lang")
    languages = [row.get("language") for side in ("train", "eval") for row in lines(dataset / f"{side}.jsonl")]
    assert Counter(languages) == {"de": 60, "pt-br": 60, None: 180}
    assert json.loads((dataset / "profile.json").read_text())["distributions"]["language"]["latin"] == 180
    assert "secret" not in "".join(p.read_text() for p in dataset.iterdir())


def test_a_language_field_that_a_table_lacks_is_named(gate: Gate, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "a.csv").write_text("text,intent\nhi,refund\n")
    (tmp_path / "made").mkdir()
    config = DataConfig(prompt_field="text", response_field="intent", language_field="lang")
    with pytest.raises(UsageError, match=r"data\.language_field: no row has a value in the field lang"):
        run(config, tmp_path / "csv", tiny_model, None, None, None, None, tmp_path / "made")


def test_an_evaluation_file_is_the_evaluation_and_the_gate_accounts_for_its_rows(gate: Gate) -> None:
    evaluation = [*good(40), pair("zebra question number 7", INTENTS[7 % 3])]
    report, dataset = gate(good(300), evaluation=evaluation)
    assert report.refused is None
    train, evaluated = (lines(dataset / f"{side}.jsonl") for side in ("train", "eval"))
    assert {row["messages"][0]["content"] for row in evaluated} == {f"zebra question number {i}" for i in range(40)}
    assert len(train) == 260
    assert (report.numbers["eval_fraction"], report.numbers["shared_openings"]) == (None, None)

    quarantine = lines(dataset / "quarantine.jsonl")
    assert Counter(row["reason"] for row in quarantine) == {"in_eval_data": 40, "exact_duplicate": 1}
    assert [row["file"] for row in quarantine][-1] == "eval_data/evaluation.jsonl"
    row_counts = json.loads((dataset / "profile.json").read_text())["rows"]
    assert row_counts.pop("golden") == 0
    assert row_counts.pop("read") == 341 == sum(row_counts.values())
    assert row_counts["in_eval_data"] == 40


def test_too_few_rows_are_told_the_setting_that_would_pass_and_it_passes(gate: Gate) -> None:
    settings = {"eval_fraction": 0.05, "min_eval_prompts": 30}
    report, _ = gate(good(200), **settings)
    assert "(min_eval_prompts); data.eval_fraction: auto would give" in str(report.refused)
    assert gate(good(200), **{**settings, "eval_fraction": "auto"})[0].refused is None

    report, _ = gate(good(40), **{**settings, "eval_fraction": "auto"})
    fraction = str(report.refused).partition("data.eval_fraction: ")[2].partition(" ")[0]
    assert gate(good(40), **{**settings, "eval_fraction": float(fraction)})[0].refused is None


def test_too_long_rows_are_told_the_setting_that_keeps_them_in_log_and_report(gate: Gate) -> None:
    rows = good(300)
    for i in range(30):
        rows[i] = pair(f"zebra {i} " + "long " * (100 + i), "refund")
    report, dataset = gate(rows, max_length_tokens=64)
    advice = str(report.refused).partition("data.max_length_tokens: ")[2]
    most, everything = int(advice.split()[0]), int(advice.partition("data.max_length_tokens: ")[2].split()[0])
    assert f"data.max_length_tokens: {most} keeps 95 % of the rows" in (dataset / "report.html").read_text()
    report, _ = gate(rows, max_length_tokens=most)
    assert report.refused is None
    assert report.numbers["rows_quarantined"] == 15
    assert gate(rows, max_length_tokens=everything)[0].numbers["rows_quarantined"] == 0


def test_an_evaluation_file_that_is_too_small_is_named(gate: Gate) -> None:
    report, _ = gate(good(300), evaluation=good(5))
    sentence = str(report.refused)
    assert "different prompts to evaluate on: 5, expected at least 10 (min_eval_prompts); 5 rows were kept" in sentence
    assert "add rows to eval_data, or leave it out" in str(report.refused)
