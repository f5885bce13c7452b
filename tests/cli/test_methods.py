"""`qlora-retrain methods` knows every method that training has, and says which base it needs."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from components.train_qlora.methods import METHODS
from qlora_retrain.cli.main import main
from qlora_retrain.config import methods
from qlora_retrain.config.sections import TrainConfig


def test_the_table_has_every_method_of_the_settings_and_of_training() -> None:
    names = get_args(TrainConfig.model_fields["method"].annotation)
    assert tuple(methods.METHODS) == names
    assert set(METHODS) == set(names)


def test_the_table_is_printed_in_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["methods"])
    assert ended.value.code == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["method", "idea", "over"]
    assert [line.split()[0] for line in lines] == list(methods.METHODS)
    assert len({line.index(methods.METHODS[line.split()[0]].idea) for line in lines}) == 1


def test_the_table_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["methods", "--json"])
    facts = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert facts["dora"]["vllm"] == "no"
    assert facts["lora"]["formats"] == ["none", "nf4", "fp4", "int4", "nf4-shifted", "mixed"]


def test_a_base_that_a_method_cannot_train_over_is_refused_with_the_nearest() -> None:
    assert methods.METHODS["lora"].refusal("none") is None
    assert methods.METHODS["qdylora"].refusal("none") == (
        "train.method: qdylora trains over nf4, fp4, int4 or nf4-shifted, and quantize.format is none; set "
        "quantize.format: nf4, or train.method: dylora"
    )
    assert methods.METHODS["qa-lora"].refusal("nf4") == (
        "train.method: qa-lora trains over int4, and quantize.format is nf4; set quantize.format: int4, or "
        "train.method: lora"
    )
