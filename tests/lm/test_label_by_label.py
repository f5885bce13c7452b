"""Labels are ranked as by whole sequences also where attention has a window, or measures distances by place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import log_softmax

from qlora_retrain.evaluation import label_scores
from qlora_retrain.lm import label_by_label, label_ranking
from qlora_retrain.lm.trie import Trie

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = 8
MPT: dict[str, Any] = {"vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 4}
FAMILIES: dict[str, tuple[dict[str, Any], float]] = {
    "Llama": (SIZES, math.inf),
    "Mistral": ({**SIZES, "sliding_window": WINDOW}, WINDOW),
    "Gemma2": ({**SIZES, "sliding_window": WINDOW}, WINDOW),
    "Qwen2": ({**SIZES, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}, WINDOW),
    "Exaone4": ({**SIZES, "layer_types": ["full_attention"] * 2, "sliding_window": WINDOW}, math.inf),
    "Mpt": (MPT, 0),
    "Bloom": ({"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}, 0),
}
LABELS = [[20, 21, 2], [20, 22, 23, 2], [24, 2], [25, 26, 27, 28, 2]]
# The first prompt with a label is within the window, the others are not.
PROMPTS = [[5, 6], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [7, 8, 9, 17, 18, 19, 5, 6, 7]]


def new_model(family: str) -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family][0])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def log_likelihood(model: Any, prompt: list[int], label: list[int]) -> float:
    logprobs = log_softmax(model(input_ids=torch.tensor([prompt + label]), use_cache=False).logits[0].float(), -1)
    return sum(float(logprobs[len(prompt) + i - 1, token]) for i, token in enumerate(label))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranking_is_that_of_whole_sequences(family: str) -> None:
    model = new_model(family)
    assert label_by_label.max_tree_tokens(model) == FAMILIES[family][1]
    group = label_scores._Group(LABELS, list(range(len(PROMPTS))), PROMPTS)
    progress: list[int] = []
    results = label_scores._rank_group(model, group, Trie.from_sequences(LABELS), [0, None, 3], 64, progress.append)
    assert sum(progress) == len(PROMPTS)

    for prompt, target, (best, value) in zip(PROMPTS, [0, None, 3], results, strict=True):
        expected = [log_likelihood(model, prompt, label) for label in LABELS]
        assert best == max(range(len(LABELS)), key=lambda i: expected[i])
        assert value == (None if target is None else pytest.approx(expected[target], abs=1e-3))


@pytest.mark.parametrize("family", ["Mistral", "Mpt"])
def test_reading_all_labels_at_once_would_give_others_there(family: str) -> None:
    model, prompt = new_model(family), PROMPTS[1]
    ((_, value),) = label_ranking.rank_labels(model, Trie.from_sequences(LABELS), [prompt], [3], 64, lambda _: None)
    assert value != pytest.approx(log_likelihood(model, prompt, LABELS[3]), abs=1e-2)


def test_a_label_that_scores_nan_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([[math.nan, 2.0, 1.0, 3.0], [math.nan] * 4])

    def score_sequences(*_: Any) -> list[Any]:
        return [type("Score", (), {"loss_nats": value}) for value in next(scores)]

    monkeypatch.setattr(label_by_label, "score_sequences", score_sequences)
    first, second = label_by_label.rank_labels(None, LABELS, PROMPTS[:2], [1, 0], 64, lambda _: None)  # type: ignore[arg-type]
    assert first == (2, -2.0)
    assert math.isnan(second[1] or 0.0)
