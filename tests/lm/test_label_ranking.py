"""Ranking against reading every answer to its end, on a model that is sure of itself and on one that is not."""

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
    """The tiny random model; a larger last norm makes its choices sharp, as training does."""
    found = loading.load_base(tiny_model, dtype="float32")
    found.get_submodule("model.norm").weight.data.mul_(request.param)
    return found


def drawn(seed: int, count: int, longest: int, tokens: int = 500) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, tokens) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def plain(model: Any, prompt: list[int], answer: list[int]) -> float:
    import torch

    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    return float(sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))


def test_a_trie_shares_beginnings_and_reads_no_last_token() -> None:
    trie = Trie.of([[5, 6, END], [5, 7, END], [5, END], [8, END]])
    assert trie.tokens[1:] == [5, 6, 7, 8]
    assert trie.parents[1:] == [0, 1, 1, 0]
    assert trie.paths == [[0, 1, 2], [0, 1, 3], [0, 1], [0, 4]]
    assert [trie.edges[e] for e in trie.out[1]] == [(1, 6), (1, 7), (1, END)]
    assert trie.uses.sum(axis=1).tolist() == [3, 3, 2, 2]


@pytest.mark.parametrize("batch_tokens", [30, 1000])
def test_the_winner_and_the_wanted_likelihood_are_those_of_reading_everything(model: Any, batch_tokens: int) -> None:
    # Few different tokens, so that answers share beginnings; prompts with and without a common one.
    answers = [[*ids, END] for ids in {tuple(a) for a in drawn(1, 40, 5, tokens=8)}]
    prompts = [[1, 9, 9, *rest] for rest in drawn(2, 6, 12)] + drawn(3, 3, 9)
    wanted = [i % len(answers) if i % 4 else None for i in range(len(prompts))]
    ticks: list[int] = []
    found = label_ranking.rank(model, Trie.of(answers), prompts, wanted, batch_tokens, ticks.append)
    assert sum(ticks) == len(prompts)
    for prompt, want, (best, likelihood) in zip(prompts, wanted, found, strict=True):
        alone = [plain(model, prompt, answer) for answer in answers]
        assert best == max(range(len(answers)), key=alone.__getitem__)
        assert likelihood is None if want is None else likelihood == pytest.approx(alone[want], rel=1e-4)


@pytest.mark.parametrize("all_of_it", [True, False], ids=["every logit", "those of one token"])
def test_what_a_broken_model_says_is_no_likelihood(model: Any, all_of_it: bool) -> None:
    """Weights can be finite and the logits not: nothing that is chosen by them may look like a score."""
    answers = [[*ids, END] for ids in {tuple(a) for a in drawn(1, 12, 4, tokens=8)}]
    weights = model.get_output_embeddings().weight.data
    weights[slice(None) if all_of_it else answers[3][0]] = float("nan")
    found = label_ranking.rank(model, Trie.of(answers), [[1, 9, 5], [1, 9, 9, 7]], [3, 3], 1000, lambda _: None)
    assert all(likelihood != likelihood for _, likelihood in found)


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    import torch

    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_answers_that_cannot_win_are_not_read(tiny_model: Path) -> None:
    model: Any = loading.load_base(tiny_model, dtype="float32")
    model.get_submodule("model.norm").weight.data.mul_(8.0)
    prompts = [[1, 9, 9, *rest] for rest in drawn(5, 8, 4)]
    # As after training: one of the answers is what the model would say.
    answers = [greedy(model, prompt, 4) for prompt in prompts] + [[*ids, END] for ids in drawn(4, 60, 6)]
    trie = Trie.of(answers)
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    found = label_ranking.rank(model, trie, prompts, list(range(8)), 4000, lambda _: None)
    hook.remove()
    for i, (best, likelihood) in enumerate(found):
        assert best == i
        assert likelihood == pytest.approx(plain(model, prompts[i], answers[i]), rel=1e-4)
    everything = sum(map(len, prompts)) + len(prompts) * (len(trie.tokens) - 1)
    assert sum(read) < everything / 10


def test_the_first_of_equal_answers_wins(model: Any) -> None:
    found = label_ranking.rank(model, Trie.of([[7, END], [5, 6, END], [7, END]]), [[1, 4]], [2], 100, lambda _: None)
    assert found[0][0] in (0, 1)


def test_no_pass_makes_more_logits_than_the_budget_has_tokens(model: Any) -> None:
    """Logits are as wide as the vocabulary: 200 short prompts at 8 nodes each would be gigabytes of them."""
    answers = [[*ids, END] for ids in {tuple(a) for a in drawn(6, 60, 6, tokens=8)}]
    prompts = drawn(7, 12, 4)
    made: list[int] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, out: made.append(out.shape[:-1].numel()))
    small = label_ranking.rank(model, Trie.of(answers), prompts, [0] * 12, 30, lambda _: None)
    hook.remove()
    assert 12 < max(made) <= 30
    for (best, likelihood), (expected, alone) in zip(
        small, label_ranking.rank(model, Trie.of(answers), prompts, [0] * 12, 4000, lambda _: None), strict=True
    ):
        assert best == expected
        assert likelihood == pytest.approx(alone, rel=1e-5)
