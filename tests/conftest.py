"""Fixtures that every test may use: a tiny random model with a real tokenizer, small data files, no network."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer

from qlora_retrain.config.fields import Section
from qlora_retrain.core import signals
from qlora_retrain.core.outcome import StepResult
from qlora_retrain.pipeline import execute, make_plan
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store
from qlora_retrain.storage.store import Store
from tests import schedule
from tests.zygote import Zygote

# Where the tests run in the background, a shell has them ignore SIGINT, and so would every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# One thread a process: matrices this small are slower on more, and two test processes share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# An AIRFLOW_HOME of the tests' own, set before anything imports Airflow.
os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="airflow-home-")
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
# The keys of the tests' stores, and what is remembered of S3's files.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="config-home-")
os.environ.setdefault("XDG_STATE_HOME", os.environ["XDG_CONFIG_HOME"])
os.environ.pop("QLORA_RETRAIN_KEYS", None)
# The store of tests that name none. Without it Airflow's tasks write their endings where `make run` has its store.
os.environ["QLORA_RETRAIN_ROOT"] = Path(os.environ["XDG_CONFIG_HOME"], "store").as_uri()

INTENTS = ("refund", "delivery", "login")
PHRASES = {
    "refund": ("I want my money back for order", "please refund the shirt from order", "return and repay order"),
    "delivery": ("where is the parcel of order", "the courier never came with order", "when will I receive order"),
    "login": (
        "I cannot sign in to see order",
        "my password fails when I open order",
        "the account locks me out of order",
    ),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Every character that some function takes for a line break; all of them pass through every run of the pipeline.
LINE_BREAKS = "\u2028\u2029\x0b\x0c\r"


def ticket_rows(count: int) -> list[dict[str, object]]:
    """`count` different one-turn chats over three intents; some hold a line-break character."""
    rows: list[dict[str, object]] = []
    for i in range(count):
        intent = INTENTS[i % len(INTENTS)]
        # Two numbers of their own, so that no row nearly equals another.
        text = f"{PHRASES[intent][i // 3 % 3]} number {1000 + i} {i * 7919 % 10007}"
        if i % 10 == 0:
            text += f"{LINE_BREAKS[i // 10 % len(LINE_BREAKS)]}please"
        rows.append({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": intent}]})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    # As people's files have it: other characters than ASCII are written as they are.
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8", newline="\n")
    return path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> schedule.Scheduler:
    """Where several processes share the tests, say which stay together."""
    return schedule.Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests, begin with those that take longest."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=lambda item: schedule.start_order(item.nodeid))


def write_tiny_tokenizer(folder: Path) -> None:
    """Write the files of a byte-level BPE tokenizer of 512 tokens with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    texts = [t["content"] for row in ticket_rows(200) for t in row["messages"]]  # type: ignore[attr-defined]
    # The merges are those of plain rows, for which tests have reference values.
    texts = [re.sub(r"(number \d+) .*", r"\1", re.split(f"[{LINE_BREAKS}]", text)[0]) for text in texts]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts, trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random Llama with a byte-level BPE tokenizer and a ChatML template, as a safetensors folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-model")
    write_tiny_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,  # with the default the logits are too small for a frozen head to be sure of anything
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    """A JSONL file of 300 good one-turn chats over three intents."""
    return write_jsonl(tmp_path / "tickets.jsonl", ticket_rows(300))


@pytest.fixture(scope="session")
def write_tickets() -> Callable[[Path, int], Path]:
    """Write so many good tickets to a JSONL file."""
    return lambda path, count: write_jsonl(path, ticket_rows(count))


@pytest.fixture(autouse=True)
def node_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node cache of this test alone; no test touches the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QLORA_RETRAIN_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """A server that has imported torch and transformers, and forks programs; see `tests/zygote.py`."""
    server = Zygote(tmp_path_factory.mktemp("zygote"))
    yield server
    server.close()


@pytest.fixture
def line(tmp_path: Path) -> Path:
    """A line's YAML with sources that can be pinned: enough for a plan, too little to load as a model."""
    folder = tmp_path / "line"
    (folder / "base").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / "base" / name).write_text("{}")
    write_jsonl(folder / "tickets.jsonl", ticket_rows(30))
    path = folder / "intents.yaml"
    path.write_text("line: intents\nsources:\n  raw_data: tickets.jsonl\n  base_model: base\n")
    return path


@pytest.fixture
def root_uri(tmp_path: Path) -> str:
    """The URI of an empty store in a folder."""
    return (tmp_path / "store").as_uri()


@pytest.fixture
def small_steps() -> dict[str, Callable[..., StepResult]]:
    """A `run` for every step that reads what it is given and writes a file or two; no models."""

    def digest(*folders: Path | None) -> str:
        files = [p for f in folders if f for p in sorted(f.rglob("*")) if p.is_file()]
        return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()

    def write_documents(folder: Path, documents: dict[str, object]) -> None:
        for name, content in documents.items():
            (folder / name).write_text(json.dumps(content) + "\n")

    def validate_data(
        config: Section,
        raw_data: Path,
        base_model: Path,
        golden_data: Path | None,
        reference_profile: Path | None,
        eval_data: Path | None,
        evaluation_history: Path | None,
        replay_data: Path | None,
        reference_data: Path | None,
        dataset: Path,
    ) -> StepResult:
        document = {"from": digest(raw_data, base_model, golden_data)}
        write_documents(dataset, {"dataset.json": document, "profile.json": {"rows": 30}, "report.html": "data"})
        (dataset / "evaluated_prompts.txt").write_text(f"chat {digest(raw_data)[:16]}\n")
        num_rows = sum(path.read_bytes().count(b"\n") for path in raw_data.rglob("*") if path.is_file())
        return StepResult({"rows_read": num_rows, "rows_train": 27})

    def quantize_model(config: Section, base_model: Path, base_nf4: Path) -> StepResult:
        write_documents(base_nf4, {"quantization.json": digest(base_model)})
        return StepResult({"bits": 4.127})

    def train_qlora(
        config: Section, dataset: Path, base_nf4: Path, champion_adapter: Path | None, adapter: Path, *, scratch: Path
    ) -> StepResult:
        document = {"from": digest(dataset, base_nf4, champion_adapter), "rate": config.model_dump()["learning_rate"]}
        write_documents(
            adapter,
            {
                "adapter_config.json": {},
                "adapter_model.safetensors": document,
                "training.json": {"steps": 3},
                "report.html": "training",
            },
        )
        return StepResult({"steps": 3})

    def evaluate(
        config: Section,
        dataset: Path,
        base_model: Path,
        base_nf4: Path,
        adapter: Path,
        champion: Path | None,
        anchor: Path | None,
        golden_data: Path | None,
        reference_data: Path | None,
        evaluation: Path,
    ) -> StepResult:
        rule = {"name": "gain over base", "value": 0.3, "low": 0.2, "high": 0.4, "limit": 0.0, "passed": True}
        contestants = {"base": {"loss": 2.0, "rows": 3}, "challenger": {"loss": 1.0, "accuracy": 0.9, "rows": 3}}
        sentence = f"The challenger may ship ({digest(adapter, champion)[:6]})."
        document = {"verdict": "pass", "sentence": sentence, "rules": [rule], "contestants": contestants}
        write_documents(evaluation, {"evaluation.json": document, "report.html": "evaluation"})
        return StepResult({"verdict": "pass"})

    def merge_adapter(
        config: Section,
        dataset: Path,
        base_model: Path,
        base_nf4: Path,
        adapter: Path,
        evaluation: Path,
        reference_data: Path | None,
        earlier_adapters: Path | None,
        model: Path,
    ) -> StepResult:
        weights = digest(base_model, adapter, earlier_adapters)
        write_documents(
            model, {"model.safetensors": weights, "config.json": {}, "certificate.json": {}, "report.html": "merge"}
        )
        return StepResult({"loss_nats": 0.001})

    from components.publish.step import run as publish

    steps = (validate_data, quantize_model, train_qlora, evaluate, merge_adapter)
    return {**{step.__name__: step for step in steps}, "publish": publish}


@pytest.fixture
def run_all(small_steps: dict[str, Callable[..., StepResult]]) -> Callable[[Plan], dict[str, int]]:
    """Run every step of a plan through the real runner; the exit code of each, as far as the first that is not 0."""

    def run(plan: Plan) -> dict[str, int]:
        codes: dict[str, int] = {}
        for name, step in small_steps.items():
            codes[name] = execute.run_step(plan, name, lambda step=step: step).code
            if codes[name]:
                break
        return codes

    return run


@pytest.fixture(autouse=True, scope="module")
def small_collections() -> None:
    """Leave what lives before a file's tests out of later collections; every load of a model makes one.

    A process that has imported torch, Great Expectations and Airflow has millions of objects, and a collection that
    looks at all of them takes a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_signal_stays_ignored() -> Iterator[None]:
    """A test that lets a step write its ending in this process leaves SIGINT ignored, for all processes after it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def own_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a step does to this process's signals is undone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(signals, "_requested", False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def made_plan(line: Path, root_uri: str) -> Plan:
    """A plan of `line` in a fresh store."""
    return make_plan.make_plan(line, root_uri)


@pytest.fixture
def store(root_uri: str) -> Store:
    """The store that the plan is in."""
    return open_store(root_uri)
