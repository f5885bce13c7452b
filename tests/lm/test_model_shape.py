"""The sizes that are read from a config.json are those of the model that transformers builds from it."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_retrain.lm.model_shape import ModelShape, UnknownShape
from tests.e2e.architectures import catalogue

ARCHITECTURES = [a for a in catalogue.DENSE if a.has_weights and not a.refusal]
NOT_ESTIMATED = ("gemma4_text", "minicpm3")
# Tables that grow with the positions are left out, and in models as tiny as these they are a large part.
HAS_POSITIONS = ("gpt_bigcode", "gpt_neo", "opt")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: str(a.name))
@pytest.mark.filterwarnings("ignore")
def test_the_sizes_are_those_of_the_model(architecture: catalogue.Architecture) -> None:
    config = AutoConfig.for_model(architecture.model_type, **architecture.settings)
    document = json.loads(config.to_json_string())
    if architecture.model_type in NOT_ESTIMATED:
        with pytest.raises(UnknownShape, match="not estimated"):
            ModelShape.from_config(document)
        return
    shape = ModelShape.from_config(document)

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    weights = Counter[str]()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            weights[path.rsplit(".", 1)[-1]] += module.weight.numel()
    counted = Counter[str]()
    for layer in shape.linear_layers:
        counted[layer.name] += layer.weights * shape.layers
    assert counted == weights
    embeddings = {id(weight): weight.numel() for weight in (model.get_input_embeddings().weight, head.weight)}
    assert shape.embedding_weights == sum(embeddings.values())
    if architecture.model_type not in HAS_POSITIONS:
        assert shape.weights == pytest.approx(sum(weight.numel() for weight in model.parameters()), rel=0.02)
    assert shape.has_window == (architecture.packs == catalogue.BY_WINDOW)


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}, 6.74),
        ({"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "vocab_size": 32000}, 13.0),
        ({"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "vocab_size": 32000}, 32.5),
        ({"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "vocab_size": 32000}, 65.3),
    ],
)
def test_the_llamas_have_as_many_weights_as_their_paper_says(config: dict[str, int], billions: float) -> None:
    """Table 2 of arXiv 2302.13971."""
    shape = ModelShape.from_config({"model_type": "llama", "num_attention_heads": 32, "hidden_act": "silu", **config})
    assert shape.weights / 1e9 == pytest.approx(billions, rel=0.005)


def test_a_wrapper_is_read_by_its_language_model_and_a_missing_size_is_named() -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**config, "vocab_size": 100}
    assert ModelShape.from_config({"model_type": "wrapper", "text_config": text}) == ModelShape.from_config(text)
    with pytest.raises(UnknownShape, match="vocab_size"):
        ModelShape.from_config(config)
    # A list, a text or a truth where a number should be is no size.
    for value in ([64], "64", True, 0, -1, 10**400, math.nan):
        with pytest.raises(UnknownShape, match="hidden_size"):
            ModelShape.from_config({**text, "hidden_size": value})
    assert ModelShape.from_config({**text, "layer_types": [{}]}).has_window
