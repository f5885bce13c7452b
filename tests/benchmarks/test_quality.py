from argparse import Namespace
from pathlib import Path

import pytest
import torch

from qlora_retrain.evaluation.stats import Interval


@pytest.fixture
def benchmark(monkeypatch):
    """Import the benchmark with its own folder on the path, as when it is run."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import quality

    return quality


def test_full_fine_tuning_has_the_loss_and_gradients_of_the_plain_model(benchmark, tiny_model, tmp_path):
    from components.train_qlora import packing
    from components.train_qlora.data import PaddingCollator
    from qlora_retrain.lm import loading

    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (9, 14, 6, 14):
        ids = [5, 6, 7, *torch.randint(8, 500, (length,), generator=generator).tolist()]
        rows.append({"input_ids": ids, "labels": [-100] * (length - 1) + ids[length - 1 :]})
    options = Namespace(
        base=tiny_model,
        work=tmp_path,
        seed=0,
        rank=4,
        dropout=0.0,
        micro_batch_size=4,
        gradient_accumulation=1,
        steps=1,
    )

    trainer = benchmark.contestants.make_trainer(options, "full", rows, 1e-4)
    batch = PaddingCollator(0)(rows)
    count = int((batch["labels"] != -100).sum())
    with packing.packed_attention(trainer.model):
        loss = trainer.summed_loss(trainer.model, {k: v for k, v in batch.items() if k != "row_indices"}) / count
        loss.backward()

    # The plain model, padded, without packing, computes the loss over all positions.
    plain = loading.load_base(tiny_model, dtype="float32")
    with torch.autocast("cpu", torch.bfloat16):
        logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    expected_loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected_loss.backward()
    torch.testing.assert_close(loss.detach(), expected_loss.detach(), rtol=1e-2, atol=0)

    expected = dict(plain.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        difference = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert difference < 0.05, name  # all products are in bf16


@pytest.mark.parametrize(
    ("low", "high", "word"), [(-0.010, 0.02, "yes"), (-0.02, -0.0121, "no"), (-0.02, 0.01, "these rows cannot tell")]
)
def test_the_answer_is_yes_or_no_only_where_the_whole_interval_agrees(benchmark, low, high, word):
    assert benchmark.answer_claim(Interval((low + high) / 2, low, high)).endswith(f": {word}")
