"""The form's schemas are the config's own, and only a changed value becomes an override."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError

from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.core.errors import UsageError
from qlora_retrain.runtimes.airflow import form_fields, params

YAML = """
line: tickets
sources: {raw_data: tickets.jsonl, base_model: model}
train: {learning_rate: 3e-4}
"""
CANDIDATE_VALUES = (None, True, 0, 1, -1, 2.5, 0.5, 10**7, "", "production", "a b", "-x", 1e-4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    line_yaml = tmp_path / "line.yaml"
    line_yaml.write_text(YAML)
    return line_yaml


def accepts(schema: dict[str, object], value: object) -> bool:
    try:
        jsonschema.validate(value, schema)
    except jsonschema.ValidationError:
        return False
    return True


@pytest.mark.parametrize("name", params.KNOBS)
def test_what_the_form_accepts_the_config_accepts(path: Path, name: str) -> None:
    config = load(path)
    section, field = name.split(".")
    schema = params.knob_schema(name)
    accepted = [v for v in CANDIDATE_VALUES if accepts(schema, v)]
    assert accepted, "the form would refuse everything"
    assert len(accepted) < len(CANDIDATE_VALUES), "the form would refuse nothing"
    for value in accepted:
        type(config.section(section)).model_validate({field: value})


@pytest.mark.parametrize("name", params.KNOBS)
def test_what_the_config_refuses_the_form_refuses(path: Path, name: str) -> None:
    config = load(path)
    section, field = name.split(".")
    for value in CANDIDATE_VALUES:
        try:
            type(config.section(section)).model_validate({field: value})
        except ValidationError:
            assert not accepts(params.knob_schema(name), value), value


def test_every_field_says_what_it_does_and_starts_at_the_lines_value(path: Path) -> None:
    config = load(path)
    for name, (value, schema) in params.form_fields(config).items():
        assert schema["description"]
        # Words for a person who does not know the YAML, and the name for one who looks for it there.
        assert schema["title"][0].isupper()
        assert "_" not in schema["title"]
        assert (f"({name})" in schema["description"]) == (name in params.KNOBS)
        assert bool(schema.get("section")) == (name not in ("dry_run", "reason"))
        assert accepts(schema, value)
    assert params.form_fields(config)["train.learning_rate"][0] == 3e-4


def test_only_changed_values_become_overrides_and_they_survive_the_yaml(path: Path) -> None:
    config = load(path)
    # A form sends every field, most of them as they were.
    form_values: dict[str, object] = {name: value for name, (value, _) in params.form_fields(config).items()}
    assert params.overrides(config, form_values) == []
    changes = {"train.learning_rate": 1e-5, "train.max_steps": 4, "publish.promote_to": None}
    changed = load(path, params.overrides(config, {**form_values, **changes}))
    assert (changed.train.learning_rate, changed.train.max_steps, changed.publish.promote_to) == (1e-5, 4, None)
    assert changed.model_dump(exclude={"train", "publish"}) == config.model_dump(exclude={"train", "publish"})
    assert isinstance(changed, LineConfig)


@pytest.mark.parametrize(
    ("name", "line_value", "stricter", "weaker"),
    [
        ("data.max_quarantined_fraction", 0.1, (0.1, 0.05, 0), (0.2, 1)),
        ("evaluate.max_loss_to_champion", 0.1, (0.1, 0.0), (0.11, 1.0)),
        ("evaluate.allow_first_release", False, (False,), (True,)),
        ("evaluate.allow_first_release", True, (True, False), ()),
        ("publish.promote_to", "staging", ("staging", None), ("production", "latest")),
        ("publish.promote_to", None, (None,), ("production",)),
    ],
)
def test_whoever_starts_a_run_can_make_its_gates_stricter_and_never_weaker(
    path: Path, name: str, line_value: object, stricter: tuple[object, ...], weaker: tuple[object, ...]
) -> None:
    config = load(path, [f"{name}={json.dumps(line_value)}"])
    schema = params.form_fields(config)[name][1]
    section, field = name.split(".")
    for value in stricter:
        assert accepts(schema, value)
        changed = load(path, [f"{name}={json.dumps(line_value)}", *params.overrides(config, {name: value})])
        assert getattr(changed.section(section), field) == value
    for value in weaker:
        assert not accepts(schema, value)
        # Also past the form: through REST, or a form that was shown before the line's YAML changed.
        with pytest.raises(UsageError, match="weaker than the line's"):
            params.overrides(config, {name: value})


def test_a_name_that_is_not_in_the_form_is_refused_and_not_ignored(path: Path) -> None:
    config = load(path)
    with pytest.raises(
        UsageError,
        match=r"^train\.max_step: not in the form, which has .*train\.max_steps.*dry_run, reason, resume_run; ",
    ):
        params.overrides(config, {"train.max_step": 4})


def test_the_forms_fields_stand_in_few_groups_of_their_own(path: Path) -> None:
    sections = [schema.get("section", "Run Parameters") for _, schema in params.form_fields(load(path)).values()]
    assert list(dict.fromkeys(sections)) == [
        "Run Parameters", "Training", "Data gate", "Quality gate", "Publishing", "Finish another run"
    ]  # fmt: skip
    # Airflow shows a group where its first field stands, so no group may be split.
    assert len([None for a, b in itertools.pairwise(sections) if a != b]) == len(set(sections)) - 1


def test_dry_run_and_reason_change_nothing_of_the_line(path: Path) -> None:
    assert params.overrides(load(path), {"dry_run": True, "reason": "because"}) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("  new labels\n\nof May ", "new labels of May"),
        ("\x1b[2J\x07red\u202eder\0", "\\x1b[2J\\x07red\\u202eder\\x00"),
        ("see https://user:secret@host/x?token=abc", "see https://***@host/x?***"),
        ("\ud800", "\\ud800"),
        ("x" * 600, "x" * 500),
        (None, ""),
        (["a"], ""),
        (7, ""),
    ],
)
def test_a_reason_is_one_printable_line_without_secrets(value: object, expected: str) -> None:
    assert form_fields.stated_reason({"reason": value}) == expected
    assert expected.isprintable()


@pytest.mark.parametrize("value", [None, "true", 1, "yes", [True]])
def test_only_true_is_a_dry_run(value: object) -> None:
    assert not form_fields.is_dry_run({"dry_run": value})
    assert not accepts(form_fields.DRY_RUN_SCHEMA, value)
    assert form_fields.is_dry_run({"dry_run": True})


def test_the_schema_of_a_line_is_made_once_in_a_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task of a run parses the DAG's file anew, and the schema was most of that work."""
    calls: list[int] = []
    make_schema = LineConfig.model_json_schema
    monkeypatch.setattr(LineConfig, "model_json_schema", lambda: calls.append(1) or make_schema())
    params.knob_schema.cache_clear()
    params._line_schema.cache_clear()
    for _ in range(2):
        assert len(params.form_fields(load(path))) > len(params.KNOBS)
    assert len(calls) == 1
