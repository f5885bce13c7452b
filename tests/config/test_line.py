"""A line's YAML: read whole, all faults at once, and never a secret in a message."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from qlora_retrain.config import cluster_profile, platform, schedule, sections
from qlora_retrain.config.fields import Section
from qlora_retrain.config.line import LineConfig, document, load
from qlora_retrain.core.errors import UsageError

SOURCES = "sources:\n  raw_data: a.jsonl\n  base_model: base\n"


@pytest.fixture
def write(tmp_path: Path):  # type: ignore[no-untyped-def]
    def to(text: str) -> Path:
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return path

    return to


def refusal(path: Path, overrides: Sequence[str] = ()) -> str:
    with pytest.raises(UsageError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_every_fault_of_the_file_comes_at_once_with_its_line(write) -> None:  # type: ignore[no-untyped-def]
    text = (
        "line: Not A Name\n" + SOURCES + "train:\n  learning_rat: 1\n  rank: 0\n  schedule: cosin\nevaluate:\n"
        "  confidence: high\nschedule: every day\n"
    )
    path = write(text)
    messages = refusal(path).splitlines()

    assert len(messages) == 6
    numbered = {row.split(": ")[1]: row for row in messages}
    assert numbered["line"].startswith(f"{path}:1:")
    assert numbered["train.learning_rat"].startswith(f"{path}:6:")
    assert "did you mean learning_rate?" in numbered["train.learning_rat"]
    assert "greater than or equal to 1" in numbered["train.rank"]
    assert "did you mean cosine?" in numbered["train.schedule"]
    assert "'high'" in numbered["evaluate.confidence"]
    assert "five fields" in numbered["schedule"]


@pytest.mark.parametrize("name", ["support-intents", "a1", "x" * 63, "a--b"])
def test_a_name_that_kubernetes_takes_as_a_label_is_a_line(write, name: str) -> None:  # type: ignore[no-untyped-def]
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 63
    assert load(write(f"line: {name}\n{SOURCES}")).line == name


@pytest.mark.parametrize(
    "name", ["support-", "a-", "-a", "x" * 64, "a", "1a", "Support", "a_b", "a.b", "a b", "größe", "''", '"a\\n"']
)
def test_a_name_that_it_does_not_take_is_refused(write, name: str) -> None:  # type: ignore[no-untyped-def]
    assert ": line: expected 2 to 63 small letters" in refusal(write(f"line: {name}\n{SOURCES}"))


def test_a_character_that_json_writes_as_two_halves_is_one_in_every_form(write) -> None:  # type: ignore[no-untyped-def]
    data = "data: {system: 'Be kind 😀.', template_kwargs: {mood 😀: [😀]}}"
    path = write(f"line: x1\n{SOURCES}description: 'for 😀'\n{data}\n")
    expected = load(path)
    # As pods and the program behind `preview` get it.
    for escapes in (True, False):
        text = json.dumps(document(expected), ensure_ascii=escapes)
        assert ("\\ud83d\\ude00" in text) is escapes
        assert load(text) == expected
    assert load(path, ['data.system="Be kind \\ud83d\\ude00."']) == expected


@pytest.mark.parametrize("text", ['description: "x\\uD83D y"', 'data: {template_kwargs: {"\\uDE00": 1}}'])
def test_half_a_character_is_refused_before_it_is_written_anywhere(write, text: str) -> None:  # type: ignore[no-untyped-def]
    assert "half of a surrogate pair" in refusal(write(f"line: x1\n{SOURCES}{text}\n"))


def test_a_missing_source_is_named(write) -> None:  # type: ignore[no-untyped-def]
    message = refusal(write("line: x1\nsources:\n  raw_data: a\n"))
    assert "sources.base_model: required, but not set" in message


@pytest.mark.parametrize("name", ["learning-rate", "2nd", "a b", "list[str]"])
def test_an_unknown_field_may_have_any_name(write, name: str) -> None:  # type: ignore[no-untyped-def]
    top = refusal(write(f"line: x1\n{SOURCES}{name!r}: 1\n"))
    assert f"{name}: unknown field" in top
    nested = refusal(write(f"line: x1\n{SOURCES}train:\n  {name!r}: 1\n"))
    assert f"train.{name}: unknown field" in nested


def test_1e_minus_4_is_a_number_though_yaml_says_text(write) -> None:  # type: ignore[no-untyped-def]
    assert yaml.safe_load("1e-4") == "1e-4"
    path = write(f"line: x1\n{SOURCES}train:\n  learning_rate: 1e-4\n")
    assert load(path).train.learning_rate == 0.0001
    assert load(path, ["train.learning_rate=3e-5"]).train.learning_rate == 3e-5
    assert load(write(f"line: x1\n{SOURCES}train: {{learning_rate: 0.0001}}\n")).train == load(path).train


def test_a_rank_to_cut_to_is_not_above_the_rank_that_is_trained(write) -> None:  # type: ignore[no-untyped-def]
    path = write(f"line: x1\n{SOURCES}train: {{rank: 16}}\n")
    assert load(path, ["merge.rank=16", "merge.strength=0.7"]).merge.strength == 0.7
    assert load(path, ["merge.rank=smallest", "merge.strength=1"]).merge.strength == 1.0
    assert "merge.rank: 17 is more than train.rank, which is 16" in refusal(path, ["merge.rank=17"])
    assert "merge.strength" in refusal(path, ["merge.strength=1.5"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.start=champion", "train.method=dora"], "train.start: champion goes on from the A and B that ship"),
        (["train.start=champion", "train.method=adalora"], "or train.method: lora, rslora or lora+"),
        (["train.start=champion", "train.method=full", "quantize.format=none"], "train.start: champion goes on"),
        (
            ["merge.soup=2", "train.method=dora"],
            "merge.soup: 2 averages B A of several adapters, and what train.method",
        ),
        (["merge.soup=2", "train.method=loftq"], "train.method: loftq ships is more than B A; leave merge.soup out"),
        (["merge.soup=2", "train.method=full", "quantize.format=none"], "merge.soup: 2 averages"),
        (["merge.soup=1"], "greater than or equal to 2"),
        (["merge.soup=11"], "less than or equal to 10"),
        (["data.replay_fraction=0.2"], "and sources.replay_data is not set; name general examples there"),
        (["train.start=production"], "Input should be 'base' or 'champion'"),
    ],
)
def test_what_cannot_go_on_or_be_averaged_is_refused(write, overrides: list[str], words: str) -> None:  # type: ignore[no-untyped-def]
    assert words in refusal(write(f"line: x1\n{SOURCES}"), overrides)


def test_not_a_number_is_no_learning_rate(write) -> None:  # type: ignore[no-untyped-def]
    assert "train.learning_rate" in refusal(write(f"line: x1\n{SOURCES}train: {{learning_rate: .nan}}\n"))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAUSER:hunter2@bucket/x",
        "s3://AKIAUSER:hun/hunter2@bucket/x",
        "s3://AKIAUSER:hunter2/x",
        "https://bucket/x?X-Amz-Signature=hunter2",
        "s3://bucket/x#hunter2",
        "hf://AKIAUSER:hunter2@huggingface.co/a/b@0123",
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        "sources:\n  raw_data: {uri}\n  base_model: base\n",
        "sources:\n  raw_data: {{uri: '{uri}', filez: 1}}\n  base_model: base\n",
        "sources:\n  raw_data: ['{uri}']\n  base_model: base\n",
        "sources:\n  raw_data: {{'{uri}': 1}}\n  base_model: base\n",
        "sources: '{uri}'\n",
        "sources:\n  raw_data: a\n  base_model: base\ntrain: {{rank: '{uri}'}}\n",
        "sources:\n  raw_data: a\n  base_model: base\ntrain: '{uri}'\n",
        "sources:\n  raw_data: {uri}: x: [\n",
    ],
)
def test_no_message_repeats_a_secret(write, uri: str, text: str) -> None:  # type: ignore[no-untyped-def]
    message = refusal(write("line: x1\n" + text.format(uri=uri)))
    assert "hunter2" not in message
    assert "AKIAUSER" not in message


@pytest.mark.parametrize(
    "override",
    [
        "sources.raw_data=s3://AKIAUSER:hunter2@bucket/x",
        "s3://AKIAUSER:hunter2@bucket/x",
        "sources.raw_data.uri=s3://AKIAUSER:hunter2@bucket/x",
        "train.rank=[s3://AKIAUSER:hunter2@bucket/x",
    ],
)
def test_no_message_about_an_override_repeats_a_secret(write, override: str) -> None:  # type: ignore[no-untyped-def]
    message = refusal(write("line: x1\n" + SOURCES), [override])
    assert "hunter2" not in message
    assert "AKIAUSER" not in message


def test_no_model_of_the_config_has_a_field_for_a_secret() -> None:
    models = [LineConfig, *(v for v in vars(sections).values() if isinstance(v, type) and issubclass(v, Section))]
    names = {name for model in models for name in model.model_fields}
    assert not {n for n in names if any(word in n for word in ("password", "secret", "credential", "access_key"))}


def test_sources_are_taken_from_the_folder_of_the_yaml(write) -> None:  # type: ignore[no-untyped-def]
    path = write("line: x1\nsources:\n  raw_data: ../da ta/a?.jsonl\n  base_model: {uri: base, files: ['*.json']}\n")
    config = load(path)
    assert config.sources.raw_data.uri == (path.parent.parent / "da ta" / "a?.jsonl").as_uri()
    assert config.sources.base_model.uri == (path.parent / "base").as_uri()
    assert config.sources.base_model.files == ("*.json",)


def test_the_files_of_a_source_can_be_set_where_it_is_its_uri_alone(write) -> None:  # type: ignore[no-untyped-def]
    path = write(f"line: x1\n{SOURCES}")
    source = load(path, ["sources.base_model.files=['**', '!original/*']"]).sources.base_model
    assert source.files == ("**", "!original/*")
    assert source.uri == (path.parent / "base").as_uri()


def test_overrides_come_after_the_file_and_are_checked_as_it_is(write) -> None:  # type: ignore[no-untyped-def]
    path = write(f"line: x1\n{SOURCES}train:\n  rank: 8\n")
    assert load(path, ["train.rank=4", "data.system=null", "publish.promote_to=staging"]).train.rank == 4
    assert "train.rank" in refusal(path, ["train.rank=0"])
    assert "expected section.field=value" in refusal(path, ["train.rank"])
    assert "it has no fields" in refusal(path, ["line.x=1"])


@pytest.mark.parametrize("text", ["- a\n", "", "line: [\n", "just text\n"])
def test_what_is_no_mapping_is_refused(write, text: str) -> None:  # type: ignore[no-untyped-def]
    assert "x.yaml" in refusal(write(text))


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(tmp_path / "x.yaml")


def test_every_field_says_what_it_does() -> None:
    everything = {**vars(sections), **vars(cluster_profile), **vars(platform), **vars(schedule)}.values()
    models = [v for v in everything if isinstance(v, type) and issubclass(v, Section) and v is not Section]
    assert len(models) == 8 + 6 + 7 + 1
    assert all(field.description for model in models for field in model.model_fields.values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {max_steps: 9007199254740992}", "a number of too many digits"),
        ("train: {max_steps: '9007199254740992'}", "expected a whole number of at most 9007199254740991"),
        (f"train: {{rank: 0x{'f' * 9_000}}}", "a number of too many digits"),
        (f"train: {{rank: {'1:' * 9_000}1}}", "a number of too many digits"),
        ("data: {template_kwargs: {a: !!set {x, y}}}", "could not determine a constructor"),
        ("data: {template_kwargs: {a: !!binary /w==}}", "could not determine a constructor"),
        (f"publish: {{licence: '{'MIT AND (' * 100}'}}", "at most 200 characters"),
        ('data: {template: "a\\0.jinja"}', "null byte"),
    ],
)
def test_a_value_that_some_reader_cannot_take_is_refused(write, text: str, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=words):
        load(write(f"line: tickets\n{SOURCES}{text}"))


def test_a_glob_stands_for_few_others(write) -> None:  # type: ignore[no-untyped-def]
    def files(glob: str) -> list[str]:
        return [f"sources.raw_data.files=['{glob}']"]

    path = write(f"line: tickets\n{SOURCES}")
    assert load(path, files("{train,dev}/*.{jsonl,csv}")).sources.raw_data.files == ("{train,dev}/*.{jsonl,csv}",)
    for glob in ("{a,b}" * 40, "{a," * 40 + "b" + "}" * 40, f"{{{','.join('x' * 101)}}}"):
        with pytest.raises(UsageError, match="choices in braces, expected 100 at most"):
            load(path, files(glob))


def test_of_very_many_faults_the_first_are_shown_and_the_others_are_counted(write) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError) as refused:
        load(write(f"line: tickets\n{SOURCES}" + "train: {" + "".join(f"x{i}: 1, " for i in range(250)) + "}"))
    *faults, last = str(refused.value).splitlines()
    assert len(faults) == 30
    assert ["allowed: loss, " in fault for fault in faults] == [True] + [False] * 29
    assert last.endswith("and 220 more faults")


def test_an_override_of_very_many_sections_is_refused(write) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match="expected at most 32 sections"):
        load(write(f"line: tickets\n{SOURCES}"), ["a." * 5_000 + "b=1"])


def test_operational_fields_stay_out_of_the_identity() -> None:
    train = sections.TrainConfig()
    operational = {"max_hours", "checkpoint_minutes", "log_every_steps", "report_to"}
    assert sections.TrainConfig.operational_fields() == operational
    assert set(train.identity()) == set(sections.TrainConfig.model_fields) - sections.TrainConfig.operational_fields()


def test_a_field_that_is_written_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_text("line: a-line\ntrain:\n  rank: 8\n  rank: 16\n")
    with pytest.raises(UsageError, match=r"train\.rank is written twice"):
        load(path)


def test_what_two_sections_say_together_is_named_by_the_field_that_the_message_begins_with(tmp_path: Path) -> None:
    path = tmp_path / "line.yaml"
    path.write_text(
        "line: tiny\nsources: {raw_data: a, base_model: b}\nquantize:\n  format: none\ntrain:\n  method: qdylora\n"
    )
    assert refusal(path).endswith(
        "line.yaml:6: train.method: qdylora trains over nf4, fp4, int4 or nf4-shifted, and quantize.format is none; "
        "set quantize.format: nf4, or train.method: dylora"
    )


def test_a_version_is_not_locked_for_longer_than_it_is_kept(write) -> None:  # type: ignore[no-untyped-def]
    text = f"line: intents\n{SOURCES}publish:\n  keep: {{days: 10}}\n"
    assert "keep.days is 10 and retention_days is 14" in refusal(write(text))
    keep = load(write(f"{text}  retention_days: 10\n"), ["publish.keep.versions=3"]).publish.keep
    assert (keep.days, keep.versions) == (10, 3)
    assert "publish.keep.version" in refusal(write(text), ["publish.keep.version=3"])
