"""A knob that was renamed is refused with its new name, wherever a person can still write the old one."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_retrain.config import cluster_profile
from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.config.renamed import RENAMED_KNOBS
from qlora_retrain.core.errors import Exit, UsageError
from qlora_retrain.runtimes.airflow import params

LINE = "line: x1\nsources:\n  raw_data: a.jsonl\n  base_model: base\n"
IN_A_LINE = sorted(path for path in RENAMED_KNOBS if "." in path)
IN_A_PROFILE = sorted(set(RENAMED_KNOBS) - set(IN_A_LINE))


@pytest.fixture
def line(tmp_path: Path) -> Path:
    path = tmp_path / "line.yaml"
    path.write_text(LINE)
    return path


@pytest.mark.parametrize("old", IN_A_LINE)
def test_an_old_name_in_the_yaml_is_refused_with_the_new_one_and_its_line(line: Path, old: str) -> None:
    section, name = old.split(".")
    line.write_text(f"{LINE}{section}:\n  {name}: 1\n")
    with pytest.raises(UsageError) as caught:
        load(line)
    assert f"{line}:6: {old}: unknown field; {old} is now {RENAMED_KNOBS[old]}" in str(caught.value)
    assert caught.value.exit_code == Exit.USAGE == 12


@pytest.mark.parametrize("old", IN_A_LINE)
def test_an_old_name_in_an_override_is_refused_with_the_new_one(line: Path, old: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(line, [f"{old}=1"])
    assert f"{old} is now {RENAMED_KNOBS[old]}" in str(caught.value)


@pytest.mark.parametrize("old", IN_A_LINE)
def test_an_old_name_in_the_airflow_form_is_refused_with_the_new_one(line: Path, old: str) -> None:
    with pytest.raises(UsageError) as caught:
        params.overrides(load(line), {old: 1})
    assert f"{old} is now {RENAMED_KNOBS[old]}" in str(caught.value)


@pytest.mark.parametrize("old", IN_A_PROFILE)
def test_an_old_name_in_a_clusters_profile_is_refused_with_the_new_one(tmp_path: Path, old: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"{old}: 1\n")
    with pytest.raises(UsageError) as caught:
        cluster_profile.load(path)
    assert f"{path}:1: {old}: unknown field; {old} is now {RENAMED_KNOBS[old]}" in str(caught.value)


def test_every_new_name_is_a_field_and_no_old_one_is() -> None:
    sections = {name: field.annotation for name, field in LineConfig.model_fields.items()}
    for old, new in RENAMED_KNOBS.items():
        fields = cluster_profile.ClusterProfile.model_fields
        if "." in old:
            assert old.split(".")[0] == new.split(".")[0], "a knob moved to another section"
            fields = sections[old.split(".")[0]].model_fields  # type: ignore[union-attr]
        assert old.rpartition(".")[2] not in fields
        assert new.rpartition(".")[2] in fields


def test_the_two_batch_sizes_say_what_to_do_with_the_old_accumulation(line: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(line, ["train.batch_size=4", "train.gradient_accumulation=2"])
    message = str(caught.value)
    assert "train.batch_size is now train.micro_batch_size; set train.global_batch_size too" in message
    assert "train.gradient_accumulation is now train.global_batch_size; set it to micro_batch_size *" in message
