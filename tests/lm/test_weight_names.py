"""The names of weights in files that leave out the model's body are those of the model."""

from __future__ import annotations

from qlora_retrain.lm.weight_names import names_in_model

MODEL = {"transformer.h.0.mlp.weight", "transformer.wte.weight", "lm_head.weight"}


def test_a_name_without_the_body_is_that_of_the_model() -> None:
    names = names_in_model(["h.0.mlp.weight", "wte.weight", "lm_head.weight", "extra.weight"], MODEL)
    assert names == {
        "h.0.mlp.weight": "transformer.h.0.mlp.weight",
        "wte.weight": "transformer.wte.weight",
        "lm_head.weight": "lm_head.weight",
        "extra.weight": "extra.weight",
    }


def test_a_name_of_the_model_stays_and_an_ambiguous_one_too() -> None:
    assert names_in_model(sorted(MODEL), MODEL) == {name: name for name in MODEL}
    assert names_in_model(["x.weight"], {"a.x.weight", "b.x.weight"}) == {"x.weight": "x.weight"}
