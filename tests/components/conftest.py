"""What the steps after training read: the tiny model in 4 bits, an adapter that learned the tickets, their data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.lm import chat, conversations, loading

JSON = '["{}",1]'
LABELS = ["delivery", "login", "refund"]
PHRASES = {"refund": "my money back", "delivery": "where is the parcel", "login": "I cannot sign in"}


_PASSAGES = (  # as many as judge forgetting
    "The sun rises in the east.",
    "Birds can fly.",
    "Water is wet.",
    "Ice is cold.",
    "Grass is green.",
    "Stones sink.",
    *(f"There are {n} apples in the basket." for n in range(2, 12)),
)


def example(label: str, number: int, form: str = "{}") -> dict[str, Any]:
    """A row of a data set: one turn of each side, the label in the form of the answer."""
    text = f"{PHRASES[label]} of order number {1000 + number}"
    answer = form.replace("{}", label)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"id": conversations.row_id(messages), "messages": messages}


@pytest.fixture(scope="session")
def write_reference() -> Callable[[Path], None]:
    """Write reference data: a file of general text."""

    def write(folder: Path) -> None:
        (folder / "general.txt").write_text("\n\n".join(_PASSAGES))

    return write


@pytest.fixture(scope="session")
def tiny_nf4(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in NF4 with double quantization, by transformers alone, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("tiny-nf4")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    chat.load_tokenizer(tiny_model).tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_adapter(tiny_nf4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank-8 adapter over the tiny 4-bit model, trained by a loop of this file until it knows the tickets."""
    return train(tiny_nf4, tmp_path_factory.mktemp("tiny-adapter"), "{}")


@pytest.fixture(scope="session")
def json_adapter(tiny_nf4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but it answers in JSON."""
    return train(tiny_nf4, tmp_path_factory.mktemp("json-adapter"), JSON)


@pytest.fixture(scope="session")
def rambling_adapter(tiny_nf4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but no end was learnt: it knows the right label, and repeats it."""
    return train(tiny_nf4, tmp_path_factory.mktemp("rambling-adapter"), " ".join(["{}"] * 12), has_end=False)


def train(nf4: Path, folder: Path, form: str, *, has_end: bool = True) -> Path:
    """Train an adapter to answer tickets in a form; without `has_end` the token that ends an answer has no loss."""
    import torch
    from peft import LoraConfig, get_peft_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are slower on more
    torch.manual_seed(0)
    base = loading.load_nf4(nf4, dtype="float32")
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokenizer = chat.load_tokenizer(nf4)
    chats = [example(label, i, form)["messages"] for i in range(500, 510) for label in LABELS]
    rows = [row for messages in chats for row in tokenizer.encode(messages)]
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    judged = torch.tensor([row.supervised + [False] * (width - len(row.supervised)) for row in rows])
    if not has_end:
        judged &= ids != tokenizer.stop_ids[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(120):
        model(input_ids=ids, labels=ids.masked_fill(~judged, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., Path]:
    """Write a data set: so many evaluation rows, and golden ones, of a task."""

    def write(folder: Path, rows: int = 36, golden: int = 0, task: str = "labels", form: str = "{}") -> Path:
        folder.mkdir()
        examples = [example(LABELS[i % 3], i, form) for i in range(rows + golden)]
        for name, part in {"train": [], "eval": examples[:rows], "golden": examples[rows:]}.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        document = {
            "task": task,
            "labels": LABELS if task == "labels" else None,
            "system": None,
            "max_length_tokens": 64,
            "rows": {"train": 0, "eval": rows, "golden": golden},
        }
        (folder / "dataset.json").write_text(json.dumps(document))
        return folder

    return write
