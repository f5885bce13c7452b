"""Ranking compared with scoring every label in full, on a model with sharp choices and on one without."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.lm import label_ranking, loading
from qlora_retrain.lm.label_ranking import Trie

END = 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on more threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1.0, 8.0], ids=["unsure", "sure"])
def model(request: pytest.FixtureRequest, tiny_model: Path) -> Any:
    """Load the tiny random model; a larger last norm makes its choices sharp, as training does."""
    loaded = loading.load_base(tiny_model, dtype="float32")
    loaded.get_submodule("model.norm").weight.data.mul_(request.param)
    return loaded


def random_sequences(seed: int, count: int, longest: int, tokens: int = 500) -> list[list[int]]:
    # Ids from 3 on: those below are the tokenizer's special tokens.
    rng = random.Random(seed)
    return [[rng.randrange(3, tokens) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def log_likelihood(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Compute an answer's log-likelihood from the full logits of one row, without a cache."""
    import torch

    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    return float(sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))


def test_a_trie_shares_prefixes_and_has_no_node_for_a_last_token() -> None:
    trie = Trie.from_sequences([[5, 6, END], [5, 7, END], [5, END], [8, END]])
    assert trie.tokens[1:] == [5, 6, 7, 8]
    assert trie.parents[1:] == [0, 1, 1, 0]
    assert trie.paths == [[0, 1, 2], [0, 1, 3], [0, 1], [0, 4]]
    assert [trie.edges[e] for e in trie.out_edges[1]] == [(1, 6), (1, 7), (1, END)]
    # Every token of a sequence is an edge, its last one too.
    assert trie.incidence.sum(axis=1).tolist() == [3, 3, 2, 2]


@pytest.mark.parametrize("batch_tokens", [30, 1000])
def test_the_winner_and_the_targets_likelihood_are_those_of_scoring_everything(model: Any, batch_tokens: int) -> None:
    # Few different tokens, so that answers share prefixes; prompts with and without a shared prefix.
    answers = [[*ids, END] for ids in {tuple(a) for a in random_sequences(1, 40, 5, tokens=8)}]
    prompts = [[1, 9, 9, *suffix] for suffix in random_sequences(2, 6, 12)] + random_sequences(3, 3, 9)
    targets = [i % len(answers) if i % 4 else None for i in range(len(prompts))]
    row_counts: list[int] = []
    results = label_ranking.rank_labels(
        model, Trie.from_sequences(answers), prompts, targets, batch_tokens, row_counts.append
    )
    assert sum(row_counts) == len(prompts)

    for prompt, target, (best, likelihood) in zip(prompts, targets, results, strict=True):
        expected = [log_likelihood(model, prompt, answer) for answer in answers]
        assert best == max(range(len(answers)), key=expected.__getitem__)
        assert likelihood is None if target is None else likelihood == pytest.approx(expected[target], rel=1e-4)


@pytest.mark.parametrize("every_logit", [True, False], ids=["every logit", "those of one token"])
def test_logits_that_are_not_finite_give_no_finite_likelihood(model: Any, every_logit: bool) -> None:
    """Weights can be finite and the logits not; a choice by such logits must not look like a score."""
    answers = [[*ids, END] for ids in {tuple(a) for a in random_sequences(1, 12, 4, tokens=8)}]
    weights = model.get_output_embeddings().weight.data
    weights[slice(None) if every_logit else answers[3][0]] = float("nan")
    results = label_ranking.rank_labels(
        model, Trie.from_sequences(answers), [[1, 9, 5], [1, 9, 9, 7]], [3, 3], 1000, lambda _: None
    )
    # Only NaN is unequal to itself.
    assert all(likelihood != likelihood for _, likelihood in results)


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    import torch

    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_labels_that_cannot_win_are_not_read(tiny_model: Path) -> None:
    model: Any = loading.load_base(tiny_model, dtype="float32")
    model.get_submodule("model.norm").weight.data.mul_(8.0)
    prompts = [[1, 9, 9, *suffix] for suffix in random_sequences(5, 8, 4)]

    # As after training: one of the answers is what the model would say.
    answers = [greedy(model, prompt, 4) for prompt in prompts] + [[*ids, END] for ids in random_sequences(4, 60, 6)]
    trie = Trie.from_sequences(answers)
    tokens_read: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: tokens_read.append(args[0].numel()))
    results = label_ranking.rank_labels(model, trie, prompts, list(range(8)), 4000, lambda _: None)
    hook.remove()

    for i, (best, likelihood) in enumerate(results):
        assert best == i
        assert likelihood == pytest.approx(log_likelihood(model, prompts[i], answers[i]), rel=1e-4)
    all_tokens = sum(map(len, prompts)) + len(prompts) * (len(trie.tokens) - 1)
    assert sum(tokens_read) < all_tokens / 10


def test_the_first_of_equal_answers_wins(model: Any) -> None:
    # Labels 0 and 2 are the same tokens, so label 2 can never win.
    results = label_ranking.rank_labels(
        model, Trie.from_sequences([[7, END], [5, 6, END], [7, END]]), [[1, 4]], [2], 100, lambda _: None
    )
    assert results[0][0] in (0, 1)


def test_no_forward_pass_computes_more_logits_than_the_budget_has_tokens(model: Any) -> None:
    """Logits are as wide as the vocabulary: 200 short prompts at 8 nodes each would be gigabytes of them."""
    answers = [[*ids, END] for ids in {tuple(a) for a in random_sequences(6, 60, 6, tokens=8)}]
    prompts = random_sequences(7, 12, 4)
    logit_rows: list[int] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, out: logit_rows.append(out.shape[:-1].numel()))
    small = label_ranking.rank_labels(model, Trie.from_sequences(answers), prompts, [0] * 12, 30, lambda _: None)
    hook.remove()
    assert 12 < max(logit_rows) <= 30

    # A small budget cuts the search into more rounds; the result is the same.
    for (best, likelihood), (expected, alone) in zip(
        small,
        label_ranking.rank_labels(model, Trie.from_sequences(answers), prompts, [0] * 12, 4000, lambda _: None),
        strict=True,
    ):
        assert best == expected
        assert likelihood == pytest.approx(alone, rel=1e-5)
