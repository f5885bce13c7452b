"""Train the tiny model: the loss, resuming bit for bit, the ways a run ends, and what the adapter folder holds."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.publish import contents
from components.quantize_model.step import run as quantize
from components.train_qlora import train as train_module
from components.train_qlora.data import IGNORE_INDEX, LengthGroupedSampler, PaddingCollator, load_tokenized_dataset
from components.train_qlora.loss import summed_loss
from components.train_qlora.step import run
from qlora_retrain.config.sections import QuantizeConfig, TrainConfig
from qlora_retrain.core import signals
from qlora_retrain.core.errors import Diverged, IntegrityError, TryAgain, UsageError
from qlora_retrain.lm import chat, checkpoints, loading
from qlora_retrain.pipeline.code_identity import project_root

PHRASES = {
    "refund": "I want my money back for order",
    "delivery": "where is the parcel of order",
    "login": "I cannot sign in to see order",
}


def make_rows(count: int) -> list[dict[str, Any]]:
    """Make chats of different lengths over three intents."""
    rows = []
    for i in range(count):
        intent, phrase = list(PHRASES.items())[i % 3]
        text = f"{phrase} number {1000 + i}" + " and please hurry" * (i % 5)
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": intent}]
        rows.append({"id": f"{i:016x}", "messages": messages})
    return rows


def write_dataset(folder: Path, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for name, rows in (("train", train), ("eval", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def nf4(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base_nf4")
    quantize(QuantizeConfig(), tiny_model, folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "dataset", make_rows(44), make_rows(60)[50:])


def config(**settings: Any) -> TrainConfig:
    """Make a small run with dropout, beyond an epoch: 44 rows are 6 steps per epoch, the last of them partial."""
    defaults: dict[str, Any] = {
        "rank": 4, "alpha": 8, "dropout": 0.1, "learning_rate": 5e-3, "micro_batch_size": 4, "global_batch_size": 8,
        "max_steps": 14, "device": "cpu", "attention": "eager",
    }  # fmt: skip
    return TrainConfig(**(defaults | settings))


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
    """Ask training to stop once this many steps of this process are done; never, with None."""

    def arrange(steps: int | None) -> None:
        checks = iter(range(10_000))  # the first check is before the first step
        monkeypatch.setattr(signals, "stop_requested", lambda: steps is not None and next(checks) >= steps)

    return arrange


@pytest.mark.slow
def test_a_few_rows_are_learned_by_heart(tmp_path, nf4):
    small = write_dataset(tmp_path / "few", make_rows(24), make_rows(24))
    train = Training(tmp_path / "run", small, nf4)
    # The evaluation rows are the training rows, so both losses fall to almost nothing.
    numbers = train(
        rank=16, alpha=32, dropout=0.0, learning_rate=1e-2, micro_batch_size=8, global_batch_size=8, max_steps=120
    )
    assert numbers["train_loss"] < 0.01
    assert numbers["eval_loss"] < 0.01


def test_the_loss_is_the_cross_entropy_of_the_full_logits_at_the_answers(data, nf4):
    tokenizer = chat.load_tokenizer(nf4)
    model = loading.load_nf4(nf4)
    dataset = load_tokenized_dataset(data / "train.jsonl", tokenizer)
    batch = PaddingCollator(0)([dataset[i] for i in range(7)])
    with torch.no_grad():
        # (B, T, V), in double precision for the reference
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        loss = float(summed_loss(model, batch))

    # The same by hand: token t is predicted from position t - 1.
    expected, num_supervised = 0.0, 0
    for row in range(7):
        (encoded,) = tokenizer.encode(make_rows(7)[row]["messages"])
        for t in range(1, len(encoded.input_ids)):
            if encoded.supervised[t]:
                distribution = logits[row, t - 1]
                expected += float(distribution.logsumexp(0) - distribution[encoded.input_ids[t]])
                num_supervised += 1
    assert num_supervised == int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    assert loss == pytest.approx(expected, rel=1e-5)


def test_padding_changes_no_loss(data, nf4):
    tokenizer = chat.load_tokenizer(nf4)
    model = loading.load_nf4(nf4)
    dataset = load_tokenized_dataset(data / "train.jsonl", tokenizer)
    with torch.no_grad():
        padded = float(summed_loss(model, PaddingCollator(0)([dataset[i] for i in range(5)])))
        unpadded = sum(float(summed_loss(model, PaddingCollator(0)([dataset[i]]))) for i in range(5))
    assert padded == pytest.approx(unpadded, rel=1e-5)


def test_accumulated_micro_batches_train_as_one_large_batch(training):
    large, small = training("large"), training("small")
    expected = large(dropout=0.0, micro_batch_size=8, global_batch_size=8)
    numbers = small(dropout=0.0, micro_batch_size=2, global_batch_size=8)
    assert expected["tokens"] == numbers["tokens"]
    for a, b in zip(large.log.splitlines(), small.log.splitlines(), strict=True):
        assert json.loads(a)["loss"] == pytest.approx(json.loads(b)["loss"], rel=1e-3)
        assert json.loads(a)["grad_norm"] == pytest.approx(json.loads(b)["grad_norm"], rel=1e-2)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(training):
    # Dropout, the order of rows and the adapter's start all follow from the seed.
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
    # With rank 64 the tensors are large enough for bitsandbytes to keep their state in 8 bits.
    whole, parts = training("whole"), training("parts")
    expected = whole(optimizer=optimizer, rank=64)
    # Each attempt counts only its own steps.
    done = 0
    for steps in stops:
        stop_after(steps)
        with pytest.raises(TryAgain, match=f"step {done + steps} of 14, saved as checkpoint-{done + steps}: asked"):
            parts(optimizer=optimizer, rank=64)
        done += steps

    stop_after(None)
    numbers = parts(optimizer=optimizer, rank=64)
    assert parts.weights == whole.weights
    assert parts.log == whole.log
    assert {k: numbers[k] for k in ("steps", "tokens", "eval_loss")} == {
        k: expected[k] for k in ("steps", "tokens", "eval_loss")
    }


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(training, stop_after, capsys):
    whole, parts = training("whole"), training("parts")
    whole()
    # A checkpoint after every step, of which the last two are kept.
    stop_after(7)
    with pytest.raises(TryAgain):
        parts(checkpoint_minutes=1e-9)
    assert [f.name for f in checkpoints.sorted_checkpoints(parts.scratch)] == ["checkpoint-6", "checkpoint-7"]

    # One bit is enough.
    optimizer = parts.scratch / "checkpoint-7" / "optimizer.safetensors"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    stop_after(None)
    parts()
    output = capsys.readouterr().out
    assert "skipped checkpoint-7: optimizer.safetensors has another sha256" in output
    assert "resuming from checkpoint-6 of 14 steps" in output
    assert parts.weights == whole.weights


def test_a_crash_after_the_last_step_trains_nothing_again(training, monkeypatch, capsys):
    whole, parts = training("whole"), training("parts")
    whole()

    def crash(*_: Any) -> float:
        raise OSError("the machine goes away")

    # The last evaluation comes after the adapter was saved.
    with monkeypatch.context() as patch:
        patch.setattr("components.train_qlora.train.mean_loss", crash)
        with pytest.raises(OSError, match="goes away"):
            parts()

    capsys.readouterr()
    numbers = parts()
    assert '"training"' not in capsys.readouterr().out
    assert parts.weights == whole.weights
    assert parts.log == whole.log
    assert numbers["tokens_per_second"] is None


def test_a_run_whose_time_budget_is_used_up_is_saved_and_says_so(training):
    train = training()
    with pytest.raises(
        UsageError,
        match=r"step 1 of 14, saved as checkpoint-1: time budget used up; raise train\.max_hours to continue",
    ):
        train(max_hours=1e-9)
    assert checkpoints.newest_valid(train.scratch) == train.scratch / "checkpoint-1"


def test_a_loss_that_is_not_a_number_ends_the_run_and_names_the_last_good_checkpoint(training, monkeypatch):
    train = training()
    calls = iter(range(1000))

    def loss_with_nan(model: Any, batch: Any) -> torch.Tensor:
        return summed_loss(model, batch) * (float("nan") if next(calls) >= 6 else 1.0)

    # Two micro-batches per step: the seventh loss is in the fourth step.
    monkeypatch.setattr(train_module, "summed_loss", loss_with_nan)
    reason = r"step 4 of 14: the loss is nan; the last good checkpoint is checkpoint-3"
    with pytest.raises(Diverged, match=reason + r"; its rows are ([0-9a-f]{16}, ){7}[0-9a-f]{16}\."):
        train(checkpoint_minutes=1e-9)


def test_a_hopeless_loss_ends_the_run(training, monkeypatch):
    calls = iter(range(1000))

    def hopeless_loss(model: Any, batch: Any) -> torch.Tensor:
        """Add 1000 nats per token from the second step on."""
        extra_nats = 1000.0 if next(calls) >= 1 else 0.0
        return summed_loss(model, batch) + extra_nats * len(batch.labels)

    monkeypatch.setattr(train_module, "summed_loss", hopeless_loss)
    with pytest.raises(
        Diverged, match=r"the mean loss of the last 20 steps is \d+\.\d nats per token, worse than guessing"
    ):
        training()(micro_batch_size=2, global_batch_size=2, max_steps=30)


def test_the_saved_adapter_has_the_evaluation_loss_that_training_reported(training, nf4, tmp_path):
    train = training()
    numbers = train()
    model = loading.attach_adapter(loading.load_nf4(nf4), train.adapter)
    dataset = load_tokenized_dataset(tmp_path / "dataset" / "eval.jsonl", chat.load_tokenizer(nf4))
    # One row at a time, and the mean over all tokens at the end.
    batches = [PaddingCollator(0)([dataset[i]]) for i in range(len(dataset))]
    tokens = sum(int((b["labels"][:, 1:] != IGNORE_INDEX).sum()) for b in batches)
    with torch.no_grad():
        loss = sum(float(summed_loss(model, b)) for b in batches) / tokens
    assert loss == pytest.approx(numbers["eval_loss"], rel=1e-4)


def test_the_adapter_folder_has_its_documented_files_and_no_path_of_this_machine(training, tmp_path):
    train = training()
    numbers = train()
    assert sorted(path.name for path in train.adapter.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "events.out.tfevents.0.train", "loss.jsonl", "report.html",
        "training.json",
    ]  # fmt: skip

    # Files with times and speeds are published beside the adapter, so that the same adapter is the same version.
    published_beside = set(contents._RENAMED_FILES["adapter"])
    assert {path.name for path in train.adapter.iterdir()} - published_beside == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for path in train.adapter.iterdir():
        assert str(tmp_path.parent).encode() not in path.read_bytes()
    assert json.loads((train.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "base_nf4"

    # Steps, parameters and tokens are counted a second way here.
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
    # float32 unpacks the 4-bit weights once; bfloat16 computes with them as they are stored.
    unpacked, packed = training("unpacked"), training("packed")
    expected = unpacked(dropout=0.0, precision="float32")
    numbers = packed(dropout=0.0, precision="bfloat16")
    assert numbers["train_loss"] == pytest.approx(expected["train_loss"], rel=0.01)


def test_progress_is_reported_every_few_steps_and_after_the_last_one(training, capsys):
    training()(log_every_steps=5)
    # 14 is no multiple of 5, but the last step is always reported.
    updates = [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"training"' in line]
    assert [u["done"] for u in updates] == [5, 10, 14]
    assert all(u["total"] == 14 and u["loss"] > 0 and u["tokens_per_second"] > 0 for u in updates)


@pytest.mark.parametrize(
    ("target_modules", "layers"),
    [("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}), (["up_proj"], {"up_proj"})],
)
def test_only_the_target_modules_get_an_adapter(training, target_modules, layers):
    train = training()
    train(target_modules=target_modules, max_steps=1)
    # "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    names = load_file(train.adapter / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == layers


def test_an_unknown_target_module_is_refused_with_the_nearest_name(training):
    with pytest.raises(UsageError, match=r"no layer is called 'up_prj'.*did you mean up_proj\?"):
        training()(target_modules=["up_prj"])


def test_a_dataset_without_rows_is_refused(tmp_path, nf4):
    with pytest.raises(UsageError, match="has no rows"):
        Training(tmp_path / "run", write_dataset(tmp_path / "none", [], make_rows(3)), nf4)()


def test_a_row_with_nothing_to_learn_is_refused(tmp_path, nf4):
    unanswered = {"id": "3", "messages": [{"role": "user", "content": "hello"}]}
    with pytest.raises(IntegrityError, match=r"train\.jsonl:4: .* there is no assistant turn"):
        Training(tmp_path / "run", write_dataset(tmp_path / "unanswered", [*make_rows(3), unanswered], []), nf4)()


def test_a_line_that_is_not_a_row_is_refused(tmp_path, nf4):
    with pytest.raises(IntegrityError, match=r"train\.jsonl:2: not a row"):
        Training(tmp_path / "run", write_dataset(tmp_path / "bad", [*make_rows(1), {"text": "hello"}], []), nf4)()


def test_an_unsafe_base_is_refused(tmp_path, nf4, data):
    # Code beside the weights would run with `trust_remote_code`.
    base = Path(shutil.copytree(nf4, tmp_path / "base"))
    (base / "modeling_evil.py").write_text("")
    with pytest.raises(IntegrityError, match=r"modeling_evil\.py"):
        Training(tmp_path / "run", data, base)()


def test_an_epoch_sees_every_row_once_in_an_order_of_its_own():
    lengths = [10 + 7 * i % 31 for i in range(1003)]
    # 1003 rows are 125 whole steps and a partial one.
    sampler = LengthGroupedSampler(lengths, global_batch_size=8, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(1003))
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first

    # Rows of like length share a step, so padding each step to its longest row would add less than 5 %.
    padded = sum(max(lengths[i] for i in first[s : s + 8]) * len(first[s : s + 8]) for s in range(0, 1003, 8))
    assert padded < 1.05 * sum(lengths)


def test_few_calls_lie_between_the_start_of_training_and_its_arithmetic(training, monkeypatch):
    """The longest chain of calls within this project, in a training process and without torch's and transformers'."""
    project, longest, train_step = project_root(), [], train_module._train_step
    folders = tuple(f"{project / name}/" for name in ("src", "components"))

    def note(frame: Any, event: str, _: Any) -> None:
        nonlocal longest
        if event == "call" and frame.f_code.co_filename.startswith(folders):
            chain, caller = [], frame
            while caller is not None:
                if caller.f_code.co_filename.startswith(folders):
                    chain.append(f"{Path(caller.f_code.co_filename).stem}.{caller.f_code.co_name}")
                caller = caller.f_back
            longest = max(longest, chain, key=len)

    def watched(*arguments: Any) -> Any:
        sys.setprofile(note)
        try:
            return train_step(*arguments)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(train_module, "_train_step", watched)
    training()(max_steps=1)
    # The test calls the step, which has two calls more; a training process begins with `worker.main`.
    chain = ["worker.main", *reversed(longest[: longest.index("train.train") + 1])]
    assert len(chain) <= 10, chain
