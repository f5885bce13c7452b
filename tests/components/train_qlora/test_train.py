import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.publish import step as publish
from components.quantize_model.step import run as quantize
from components.train_qlora import trainer as trainer_module
from components.train_qlora.loss import summed_loss
from components.train_qlora.rows import IGNORED, Collate, Order, read
from components.train_qlora.step import run
from qlora_retrain.config.sections import QuantizeConfig, TrainConfig
from qlora_retrain.core.errors import Diverged, IntegrityError, TryAgain, UsageError
from qlora_retrain.lm import chat, checkpoints, loading

PHRASES = {
    "refund": "I want my money back for order",
    "delivery": "where is the parcel of order",
    "login": "I cannot sign in to see order",
}


def rows(count: int) -> list[dict[str, Any]]:
    """Chats of different lengths over three intents."""
    made = []
    for i in range(count):
        intent, phrase = list(PHRASES.items())[i % 3]
        text = f"{phrase} number {1000 + i}" + " and please hurry" * (i % 5)
        made.append({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": intent}]})
    return made


def dataset(folder: Path, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for name, some in (("train", train), ("eval", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.fixture(scope="module")
def nf4(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base_nf4")
    quantize(QuantizeConfig(), tiny_model, folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return dataset(tmp_path / "dataset", rows(44), rows(60)[50:])


def config(**settings: Any) -> TrainConfig:
    """Small, with dropout, over an epoch's end: 44 rows are 6 steps an epoch, the last of them partial."""
    plain: dict[str, Any] = {
        "rank": 4, "alpha": 8, "dropout": 0.1, "learning_rate": 5e-3, "batch_size": 4, "gradient_accumulation": 2,
        "max_steps": 14, "device": "cpu", "attention": "eager",
    }  # fmt: skip
    return TrainConfig(**(plain | settings))


class Training:
    """Run the step in a folder of its own, keeping scratch between runs."""

    def __init__(self, folder: Path, data: Path, nf4: Path) -> None:
        self.folder, self.data, self.nf4 = folder, data, nf4
        self.scratch, self.adapter = folder / "scratch", folder / "adapter"
        self.scratch.mkdir(parents=True)

    def __call__(self, **settings: Any) -> dict[str, Any]:
        shutil.rmtree(self.adapter, ignore_errors=True)
        self.adapter.mkdir()
        return dict(run(config(**settings), self.data, self.nf4, self.adapter, scratch=self.scratch).numbers)

    @property
    def weights(self) -> bytes:
        return (self.adapter / "adapter_model.safetensors").read_bytes()

    @property
    def log(self) -> str:
        return (self.adapter / "loss.jsonl").read_text()


@pytest.fixture
def training(tmp_path: Path, data: Path, nf4: Path):
    return lambda name="run": Training(tmp_path / name, data, nf4)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch):
    """Ask training to stop when that many steps of this process are done; None: do not."""

    def arrange(steps: int | None) -> None:
        asked = iter(range(10_000))  # the first question comes before the first step
        monkeypatch.setattr(trainer_module.preempt, "requested", lambda: steps is not None and next(asked) >= steps)

    return arrange


@pytest.mark.slow
def test_a_few_rows_are_learned_by_heart(tmp_path, nf4):
    few = dataset(tmp_path / "few", rows(24), rows(24))
    train = Training(tmp_path / "run", few, nf4)
    numbers = train(
        rank=16, alpha=32, dropout=0.0, learning_rate=1e-2, batch_size=8, gradient_accumulation=1, max_steps=120
    )
    assert numbers["train_loss"] < 0.01
    assert numbers["eval_loss"] < 0.01


def test_the_loss_is_the_cross_entropy_of_the_full_logits_at_the_answers(data, nf4):
    tokenizer = chat.load_tokenizer(nf4)
    model = loading.load_nf4(nf4)
    some = read(data / "train.jsonl", tokenizer)
    batch = Collate(0)([some[i] for i in range(7)])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        found = float(summed_loss(model, batch))
    expected, counted = 0.0, 0
    for r in range(7):
        encoded = chat.encode(tokenizer, rows(7)[r]["messages"])
        for t in range(1, len(encoded.input_ids)):
            if encoded.supervised[t]:
                distribution = logits[r, t - 1]
                expected += float(distribution.logsumexp(0) - distribution[encoded.input_ids[t]])
                counted += 1
    assert counted == int((batch["labels"][:, 1:] != IGNORED).sum())
    assert found == pytest.approx(expected, rel=1e-5)


def test_padding_changes_no_loss(data, nf4):
    tokenizer = chat.load_tokenizer(nf4)
    model = loading.load_nf4(nf4)
    some = read(data / "train.jsonl", tokenizer)
    with torch.no_grad():
        together = float(summed_loss(model, Collate(0)([some[i] for i in range(5)])))
        alone = sum(float(summed_loss(model, Collate(0)([some[i]]))) for i in range(5))
    assert together == pytest.approx(alone, rel=1e-5)


def test_accumulated_batches_train_as_one_big_batch(training):
    big, small = training("big"), training("small")
    one = big(dropout=0.0, batch_size=8, gradient_accumulation=1)
    other = small(dropout=0.0, batch_size=2, gradient_accumulation=4)
    assert one["tokens"] == other["tokens"]
    for a, b in zip(big.log.splitlines(), small.log.splitlines(), strict=True):
        assert json.loads(a)["loss"] == pytest.approx(json.loads(b)["loss"], rel=1e-3)
        assert json.loads(a)["grad_norm"] == pytest.approx(json.loads(b)["grad_norm"], rel=1e-2)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(training):
    first, second, third = training("a"), training("b"), training("c")
    first(max_steps=3), second(max_steps=3), third(max_steps=3, seed=1)
    assert first.weights == second.weights != third.weights


@pytest.mark.parametrize(
    ("stops", "optimizer"),
    [
        pytest.param((3,), "paged_adamw_32bit", id="in the first epoch"),
        pytest.param((6,), "paged_adamw_32bit", id="at an epoch's end", marks=pytest.mark.slow),
        pytest.param((2, 7), "paged_adamw_32bit", id="twice, then in the second epoch", marks=pytest.mark.slow),
        pytest.param((8,), "paged_adamw_8bit", id="8 bits, in the second epoch", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(training, stop_after, stops, optimizer):
    # Rank 64: tensors large enough for bitsandbytes to hold their state in 8 bits.
    whole, parts = training("whole"), training("parts")
    numbers = whole(optimizer=optimizer, rank=64)
    done = 0
    for steps in stops:
        stop_after(steps)
        with pytest.raises(TryAgain, match=f"step {done + steps} of 14, saved as checkpoint-{done + steps}: asked"):
            parts(optimizer=optimizer, rank=64)
        done += steps
    stop_after(None)
    again = parts(optimizer=optimizer, rank=64)
    assert parts.weights == whole.weights
    assert parts.log == whole.log
    assert {k: again[k] for k in ("steps", "tokens", "eval_loss")} == {
        k: numbers[k] for k in ("steps", "tokens", "eval_loss")
    }


@pytest.mark.slow
def test_a_harmed_checkpoint_is_passed_over_for_the_one_before_it(training, stop_after, capsys):
    whole, parts = training("whole"), training("parts")
    whole()
    stop_after(7)
    with pytest.raises(TryAgain):
        parts(checkpoint_minutes=1e-9)
    assert [f.name for f in checkpoints.found(parts.scratch)] == ["checkpoint-6", "checkpoint-7"]
    optimizer = parts.scratch / "checkpoint-7" / "optimizer.pt"
    spoilt = bytearray(optimizer.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    optimizer.write_bytes(spoilt)
    stop_after(None)
    parts()
    said = capsys.readouterr().out
    assert "passed over checkpoint-7: optimizer.pt has another sha256" in said
    assert "going on from checkpoint-6 of 14 steps" in said
    assert parts.weights == whole.weights


def test_a_crash_after_the_last_step_trains_nothing_again(training, monkeypatch, capsys):
    whole, parts = training("whole"), training("parts")
    whole()

    def crash(*_: Any) -> float:
        raise OSError("the machine goes away")

    with monkeypatch.context() as patch:
        patch.setattr("components.train_qlora.training.mean_loss", crash)
        with pytest.raises(OSError, match="goes away"):
            parts()
    capsys.readouterr()
    numbers = parts()
    assert '"training"' not in capsys.readouterr().out
    assert parts.weights == whole.weights
    assert parts.log == whole.log
    assert numbers["tokens_per_second"] is None


def test_a_used_up_time_budget_is_saved_and_said(training):
    train = training()
    with pytest.raises(
        TryAgain, match=r"step 1 of 14, saved as checkpoint-1: time budget used up; to go on raise train\.max_hours"
    ):
        train(max_hours=1e-9)
    assert checkpoints.newest_valid(train.scratch) == train.scratch / "checkpoint-1"


def test_a_loss_that_is_not_a_number_ends_the_run_and_names_the_last_good_checkpoint(training, monkeypatch):
    train = training()
    calls = iter(range(1000))

    def poisoned(model: Any, batch: Any) -> torch.Tensor:
        return summed_loss(model, batch) * (float("nan") if next(calls) >= 6 else 1.0)

    monkeypatch.setattr(trainer_module, "summed_loss", poisoned)
    what = r"step 4 of 14: the loss is nan; the last good checkpoint is checkpoint-3"
    with pytest.raises(Diverged, match=what + r"; its rows are ([0-9a-f]{16}, ){7}[0-9a-f]{16}\."):
        train(checkpoint_minutes=1e-9)


def test_a_hopeless_loss_ends_the_run(training, monkeypatch):
    calls = iter(range(1000))

    def spoilt(model: Any, batch: Any) -> torch.Tensor:  # from the second step on 1000 nats a token worse
        worse = 1000.0 if next(calls) >= 1 else 0.0
        return summed_loss(model, batch) + worse * (batch["labels"][:, 1:] != IGNORED).sum()

    monkeypatch.setattr(trainer_module, "summed_loss", spoilt)
    with pytest.raises(Diverged, match=r"the mean loss of the last 20 steps is \d+\.\d, worse than guessing"):
        training()(batch_size=2, gradient_accumulation=1, max_steps=30)


def test_the_adapter_attaches_and_scores_as_training_measured(training, nf4, tmp_path):
    train = training()
    numbers = train()
    model = loading.attach(loading.load_nf4(nf4), train.adapter)
    held_out = read(tmp_path / "dataset" / "eval.jsonl", chat.load_tokenizer(nf4))
    batches = [Collate(0)([held_out[i]]) for i in range(len(held_out))]
    tokens = sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in batches)
    with torch.no_grad():
        loss = sum(float(summed_loss(model, b)) for b in batches) / tokens
    assert loss == pytest.approx(numbers["eval_loss"], rel=1e-4)


def test_the_adapter_folder_holds_what_it_promises_and_no_path_of_this_machine(training, tmp_path):
    train = training()
    numbers = train()
    assert sorted(path.name for path in train.adapter.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "events.out.tfevents.0.train", "loss.jsonl", "report.html",
        "training.json",
    ]  # fmt: skip
    # Whatever holds times and speeds is published beside the adapter: the same adapter is then the same version.
    beside = set(publish._APART["adapter"])
    assert {path.name for path in train.adapter.iterdir()} - beside == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for path in train.adapter.iterdir():
        assert str(tmp_path.parent).encode() not in path.read_bytes()
    assert json.loads((train.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "base_nf4"
    steps = [json.loads(line) for line in train.log.splitlines()]
    assert [entry["step"] for entry in steps] == list(range(1, 15))
    assert {"loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens"} <= steps[0].keys()
    assert numbers["train_loss"] == pytest.approx(sum(entry["loss"] for entry in steps[-10:]) / 10)
    tensors = load_file(train.adapter / "adapter_model.safetensors")
    assert numbers["trainable_parameters"] == sum(t.numel() for t in tensors.values())
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert "not paged" in numbers["optimizer"]
    document = json.loads((train.adapter / "training.json").read_text())
    assert document["settings"]["rank"] == 4
    assert document["supervised_tokens"] == numbers["supervised_tokens"] == sum(e["supervised_tokens"] for e in steps)


def test_packed_4_bit_weights_train_to_the_loss_of_unpacked_ones(training):
    unpacked, packed = training("unpacked"), training("packed")
    one = unpacked(dropout=0.0, precision="float32")
    other = packed(dropout=0.0, precision="bfloat16")
    assert other["train_loss"] == pytest.approx(one["train_loss"], rel=0.01)


def test_progress_is_told_now_and_then_and_at_the_last_step(training, capsys):
    training()(log_every_steps=5)
    updates = [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"training"' in line]
    assert [u["done"] for u in updates] == [5, 10, 14]
    assert all(u["total"] == 14 and u["loss"] > 0 and u["tokens_per_second"] > 0 for u in updates)


@pytest.mark.parametrize(
    ("wanted", "layers"),
    [("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}), (["up_proj"], {"up_proj"})],
)
def test_only_the_wanted_layers_get_an_adapter(training, wanted, layers):
    train = training()
    train(target_modules=wanted, max_steps=1)
    names = load_file(train.adapter / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == layers


def test_an_unknown_layer_is_refused_with_the_nearest_name(training):
    with pytest.raises(UsageError, match=r"no layer is called 'up_prj'.*did you mean up_proj\?"):
        training()(target_modules=["up_prj"])


def test_a_dataset_without_rows_is_refused(tmp_path, nf4):
    with pytest.raises(UsageError, match="has no rows"):
        Training(tmp_path / "run", dataset(tmp_path / "none", [], rows(3)), nf4)()


def test_a_row_with_nothing_to_learn_is_refused(tmp_path, nf4):
    mute = {"messages": [{"role": "user", "content": "hello"}]}
    with pytest.raises(UsageError, match=r"train\.jsonl:4: no supervised token"):
        Training(tmp_path / "run", dataset(tmp_path / "mute", [*rows(3), mute], []), nf4)()


def test_a_line_that_is_no_row_is_refused(tmp_path, nf4):
    with pytest.raises(IntegrityError, match=r"train\.jsonl:2: not a row"):
        Training(tmp_path / "run", dataset(tmp_path / "bad", [*rows(1), {"text": "hello"}], []), nf4)()


def test_an_unsafe_base_is_refused(tmp_path, nf4, data):
    base = Path(shutil.copytree(nf4, tmp_path / "base"))
    (base / "modeling_evil.py").write_text("")
    with pytest.raises(IntegrityError, match=r"modeling_evil\.py"):
        Training(tmp_path / "run", data, base)()


def test_an_epoch_sees_every_row_once_in_an_order_of_its_own():
    lengths = [10 + 7 * i % 31 for i in range(1003)]
    order = Order(lengths, rows_per_step=8, seed=3)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    assert sorted(first) == sorted(second) == list(range(1003))
    assert first != second
    order.set_epoch(0)
    assert list(order) == first
    padded = sum(max(lengths[i] for i in first[s : s + 8]) * len(first[s : s + 8]) for s in range(0, 1003, 8))
    assert padded < 1.05 * sum(lengths)
