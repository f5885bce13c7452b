"""The form's schemas are the config's own, and only what was turned becomes an override."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError

from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.core.errors import UsageError
from qlora_retrain.runtimes.airflow import params

YAML = """
line: tickets
sources: {raw_data: tickets.jsonl, base_model: model}
train: {learning_rate: 3e-4}
"""
TRIED = (None, True, 0, 1, -1, 2.5, 0.5, 10**7, "", "production", "a b", "-x", 1e-4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "line.yaml"
    found.write_text(YAML)
    return found


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
    schema = params.schema(name)
    accepted = [v for v in TRIED if accepts(schema, v)]
    assert accepted, "the form would refuse everything"
    assert len(accepted) < len(TRIED), "the form would refuse nothing"
    for value in accepted:
        type(config.section(section)).model_validate({field: value})


@pytest.mark.parametrize("name", params.KNOBS)
def test_what_the_config_refuses_the_form_refuses(path: Path, name: str) -> None:
    config = load(path)
    section, field = name.split(".")
    for value in TRIED:
        try:
            type(config.section(section)).model_validate({field: value})
        except ValidationError:
            assert not accepts(params.schema(name), value), value


def test_every_field_says_what_it_does_and_starts_at_the_lines_value(path: Path) -> None:
    config = load(path)
    for name, (value, schema) in params.fields(config).items():
        assert schema["description"]
        assert schema["title"] == name
        assert accepts(schema, value)
    assert params.fields(config)["train.learning_rate"][0] == 3e-4


def test_only_what_was_turned_becomes_an_override_and_survives_the_yaml(path: Path) -> None:
    config = load(path)
    filled: dict[str, object] = {name: value for name, (value, _) in params.fields(config).items()}
    assert params.overrides(config, filled) == []
    turned = {"train.learning_rate": 1e-5, "train.max_steps": 4, "publish.promote_to": None}
    changed = load(path, params.overrides(config, {**filled, **turned}))
    assert (changed.train.learning_rate, changed.train.max_steps, changed.publish.promote_to) == (1e-5, 4, None)
    assert changed.model_dump(exclude={"train", "publish"}) == config.model_dump(exclude={"train", "publish"})
    assert isinstance(changed, LineConfig)


def test_a_name_that_the_form_has_not_is_refused_and_not_passed_over(path: Path) -> None:
    config = load(path)
    with pytest.raises(
        UsageError, match=r"^train\.max_step: not in the form, which has .*train\.max_steps.*plan_uri; all"
    ):
        params.overrides(config, {"train.max_step": 4})
