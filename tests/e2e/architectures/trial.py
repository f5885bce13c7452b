"""Put a tiny model through the steps by the real code, and compare each result with one computed a second way."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch.nn.functional import log_softmax

from components.merge_adapter import gguf_file
from components.merge_adapter.merge import merge
from components.quantize_model.step import run as quantize
from components.train_qlora import adapter as adapters
from components.train_qlora import packing
from components.train_qlora.train import train
from qlora_retrain.config import sections
from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.evaluation import label_scores
from qlora_retrain.evaluation.rows import Row
from qlora_retrain.lm import generation, loading
from qlora_retrain.lm.chat import ChatTokenizer, load_tokenizer
from qlora_retrain.pipeline import base_model
from qlora_retrain.pipeline.model_folder import ModelFolder
from tests.e2e.architectures.building import write_model
from tests.e2e.architectures.catalogue import BY_CODE, BY_WINDOW, NO_FAMILY, Architecture

COLUMNS = ("plan", "packs", "quantizes", "trains", "evaluates", "merges", "gguf")
LABELS = ("refund", "delivery", "login")
TRAINING: dict[str, Any] = {
    "rank": 4, "alpha": 8, "learning_rate": 5e-3, "micro_batch_size": 4, "global_batch_size": 8, "max_steps": 2,
    "device": "cpu", "precision": "float32",
}  # fmt: skip
SETTINGS = {
    "data": sections.DataConfig,
    "quantize": sections.QuantizeConfig,
    "train": sections.TrainConfig,
    "evaluate": sections.EvaluateConfig,
    "merge": sections.MergeConfig,
}
NEW_TOKENS = 4


class Trial:
    """One architecture in a folder of its own.

    Attributes:
        item: The architecture.
        attention: The implementation to train and evaluate with.
    """

    def __init__(self, item: Architecture, folder: Path, attention: str = "eager") -> None:
        self.item, self.folder, self.attention = item, folder, attention
        self.base, self.nf4, self.adapter = (folder / name for name in ("base", "nf4", "adapter"))

    def cells(self, tokenizer: Path | None = None) -> dict[str, str]:
        """Return a cell for each column: `yes`, the reason of a refusal, or a fault; as far as the steps got.

        Args:
            tokenizer: As in `write_model`.
        """
        self.base.mkdir(parents=True)
        write_model(self.item, self.base, tokenizer)
        tries: dict[str, Callable[[], str]] = {
            "plan": self.check_plan, "quantizes": self.check_quantized, "packs": self.check_packing,
            "trains": self.check_trained, "evaluates": self.check_scores, "merges": self.check_merged,
            "gguf": self.check_gguf,
        }  # fmt: skip
        cells: dict[str, str] = {}
        for column, check in tries.items():
            cells[column] = _outcome(check)
            if cells[column] != "yes" and column != "packs":
                break
        return {column: cells[column] for column in COLUMNS if column in cells}

    def check_plan(self) -> str:
        """Ask as the plan does, from the files' names, the config and the header of the weights."""
        demands = base_model.Demands.from_sections(
            **{name: section().model_dump(mode="json") for name, section in SETTINGS.items()}
        )
        base_model.refuse_unfit(ModelFolder.from_path(self.base, has_weights=self.item.has_weights), demands)
        return "yes"

    def check_quantized(self) -> str:
        """Quantize; every matrix in the base's file but embeddings and head must be packed."""
        self.nf4.mkdir()
        quantize(sections.QuantizeConfig(), self.base, self.nf4)

        stored = load_file(self.nf4 / "model.safetensors")
        model = loading.load_base(self.base)
        aside = {"lm_head.weight", *(f"{n}.weight" for n, m in model.named_modules() if _is_embedding(model, m))}
        matrices = {name for name, tensor in model.named_parameters() if tensor.ndim == 2} - aside
        unpacked = sorted(name for name in matrices if stored[name].dtype != torch.uint8)
        assert not unpacked, f"not quantized: {unpacked}"
        return "yes"

    def check_packing(self) -> str:
        """Tell whether rows are packed, and else why not."""
        model = adapters.attach_new(self.load_nf4(self.attention), self.train_config)
        if packing.can_pack(model):
            return "yes"
        config = model.config.get_text_config()
        has_window = bool(getattr(config, "sliding_window", None))
        return BY_WINDOW if has_window and getattr(model, "_supports_attention_backend", False) else BY_CODE

    def check_trained(self) -> str:
        """Train; every 4-bit layer must have learnt, and the evaluation loss be that of plain PEFT, row by row."""
        dataset, scratch = self.folder / "dataset", self.folder / "scratch"
        for folder in (dataset, scratch, self.adapter):
            folder.mkdir()
        for part, rows in (("train", example_rows(16)), ("eval", self.eval_rows)):
            lines = [json.dumps({"id": row.id, "messages": row.messages}) + "\n" for row in rows]
            (dataset / f"{part}.jsonl").write_text("".join(lines))
        result = train(self.train_config, dataset, self.nf4, self.adapter, scratch)

        quantized = loading.load_nf4(self.nf4, dtype="bfloat16")
        layers = {name for name, module in quantized.named_modules() if isinstance(module, Linear4bit)}
        weights = load_file(self.adapter / "adapter_model.safetensors")
        assert self.adapted_modules == layers, f"adapters on {len(self.adapted_modules)} of {len(layers)} layers"
        idle = [name for name, tensor in weights.items() if ".lora_B." in name and not tensor.any()]
        assert not idle, f"learnt nothing: {idle}"

        model = peft.PeftModel.from_pretrained(self.load_nf4(), str(self.adapter)).eval()
        losses = [loss for row in self.eval_rows for loss in token_losses(model, self.tokenizer, row.messages)]
        expected = sum(losses) / len(losses)
        assert _is_near(result.eval_loss, expected), f"evaluation loss {result.eval_loss}, by plain PEFT {expected}"
        return "yes"

    def check_scores(self) -> str:
        """Rank labels and generate; the losses and tokens must be those of whole sequences without a cache."""
        model = loading.attach_adapter(self.load_nf4(self.attention), self.adapter)
        scores = label_scores.rank_labels(model, self.tokenizer, self.eval_rows, LABELS, 4096, lambda _: None)
        for row, score in zip(self.eval_rows, scores, strict=True):
            expected = {
                label: sum(token_losses(model, self.tokenizer, [row.messages[0], answer(label)])) for label in LABELS
            }
            loss = expected[row.messages[1]["content"]]
            assert _is_near(score.loss_nats, loss), f"loss of a label {score.loss_nats}, without cache {loss}"
            assert score.predicted == min(expected, key=lambda label: expected[label]), "another label is likelier"

        prompts = [self.tokenizer.prompt_ids(row.messages[:1]) for row in self.eval_rows]
        for prompt, completion in zip(
            prompts, generation.generate_batch(model, self.tokenizer, prompts, NEW_TOKENS), strict=True
        ):
            greedy = list(greedy_tokens(model, self.tokenizer, prompt))
            assert list(completion.ids) == greedy, f"generated {completion.ids}, without cache {greedy}"
        return "yes"

    def check_merged(self) -> str:
        """Merge into both bases; plain transformers must load each and compute what PEFT's own merge does."""
        ids = torch.tensor([self.tokenizer.encode(self.eval_rows[0].messages)[0].input_ids])
        for is_dequantized in (False, True):
            folder = self.folder / f"merged-{is_dequantized}"
            folder.mkdir()
            merge(self.base, self.nf4, self.adapter, folder, dequantized=is_dequantized, max_shard_gib=5)
            loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
            unread = {*report["missing_keys"], *report["unexpected_keys"]}
            assert not unread, f"names do not match: {sorted(unread)}"

            base = self.load_nf4() if is_dequantized else loading.load_base(self.base, dtype="float32")
            plain = logits(base, ids)
            model = peft.PeftModel.from_pretrained(base, str(self.adapter)).eval()
            unmerged = logits(model, ids)
            merged = model.merge_and_unload()
            for name in self.adapted_modules:  # stored in bf16
                weight = merged.get_submodule(name).weight
                weight.data = weight.data.bfloat16().float()
            expected, actual = logits(merged, ids), logits(loaded.eval(), ids)
            effect = distance(plain, unmerged)
            assert effect > 1e-3, "the adapter changes nothing"
            assert distance(actual, expected) < 1e-3, f"another model than by PEFT: {distance(actual, expected)}"
            assert distance(actual, unmerged) < effect / 3, f"{distance(actual, unmerged)}, the adapter: {effect}"
        return "yes"

    def check_gguf(self) -> str:
        """Export, and load the file again; the logits must be those of the merged model."""
        try:
            gguf_file.refuse_unsupported(self.base, ["gguf-f16"])
        except UsageError as error:
            return NO_FAMILY if "GGUF is written for Llama" in str(error) else str(error)
        path, merged = self.folder / "gguf" / "model.gguf", self.folder / "merged-False"
        path.parent.mkdir()
        gguf_file.write_gguf(merged, path, "gguf-f16")

        ids = torch.tensor([self.tokenizer.encode(self.eval_rows[0].messages)[0].input_ids])
        actual = logits(gguf_file.load_gguf(merged, path, dtype="float32"), ids)
        expected = logits(loading.load_base(merged, dtype="float32"), ids)
        assert distance(actual, expected) < 0.01, f"another model than the merged one: {distance(actual, expected)}"
        return "yes"

    def load_nf4(self, attention: str = "eager") -> Any:
        """Load the 4-bit model, dequantized once."""
        return loading.load_nf4(self.nf4, dtype="float32", attn_implementation=attention)

    @property
    def train_config(self) -> sections.TrainConfig:
        return sections.TrainConfig(**TRAINING, attention=self.attention)

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        return load_tokenizer(self.nf4)

    @cached_property
    def eval_rows(self) -> list[Row]:
        return example_rows(3, start=100)

    @cached_property
    def adapted_modules(self) -> set[str]:
        names = load_file(self.adapter / "adapter_model.safetensors")
        return {name.removeprefix("base_model.model.").split(".lora_")[0] for name in names}


def run_trial(
    item: Architecture, folder: Path, tokenizer: Path | None = None, attention: str = "eager"
) -> dict[str, str]:
    """Return the cells of one architecture, without the steps' output."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        # Those of transformers about settings of families; each result is checked here.
        warnings.simplefilter("ignore")
        return Trial(item, folder, attention).cells(tokenizer)


def answer(label: str) -> dict[str, Any]:
    """Return an assistant turn."""
    return {"role": "assistant", "content": label}


def example_rows(count: int, start: int = 0) -> list[Row]:
    """Return rows of different lengths."""
    return [
        Row(
            f"row-{i}",
            "eval",
            [{"role": "user", "content": f"order {1000 + i}" + ", please" * (i % 4)}, answer(LABELS[i % len(LABELS)])],
        )
        for i in range(start, start + count)
    ]


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of one row, in fp32."""
    output: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return output


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far logits are from others, relative to their norm."""
    return float((actual - expected).norm() / expected.norm())


def token_losses(model: Any, tokenizer: ChatTokenizer, chat: Sequence[dict[str, Any]]) -> list[float]:
    """Return the loss of each supervised token, by a forward pass over the row alone."""
    (example,) = tokenizer.encode(chat)
    logprobs = log_softmax(logits(model, torch.tensor([example.input_ids])), -1)
    return [-float(logprobs[i - 1, token]) for i, token in enumerate(example.input_ids) if i and example.supervised[i]]


def greedy_tokens(model: Any, tokenizer: ChatTokenizer, prompt: Sequence[int]) -> Iterator[int]:
    """Yield the likeliest tokens after a prompt, each by a forward pass over all before it."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(logits(model, torch.tensor([ids]))[-1].argmax()))
        yield ids[-1]
        if ids[-1] in tokenizer.stop_ids:
            return


def _outcome(check: Callable[[], str]) -> str:
    try:
        return check()
    except Problem as problem:
        return f"refused ({problem.exit_code.value}): {problem}"
    except AssertionError as fault:
        return f"FAULT: {fault}"
    except Exception as error:  # noqa: BLE001 (a crash is a cell of the table)
        return f"CRASH: {type(error).__name__}: {error}"


def _is_embedding(model: Any, module: Any) -> bool:
    return isinstance(module, torch.nn.Embedding) or module is model.get_output_embeddings()


def _is_near(actual: float, expected: float) -> bool:
    return abs(actual - expected) <= 1e-3 * max(1.0, abs(expected))
