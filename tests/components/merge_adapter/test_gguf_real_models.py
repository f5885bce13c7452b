"""Real models in llama.cpp, in every type: the demo's base, and folders that `GGUF_MODELS` lists (with colons between).

Each file computes what the certificate scores, and cuts text into the tokens of the model's own tokenizer.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from components.merge_adapter import gguf_file, gguf_types
from qlora_retrain.lm import chat, loading
from tests.components.merge_adapter import llama_cpp

PROJECT = Path(__file__).resolve().parents[3]
MODELS = [
    *(path.parent for path in sorted((PROJECT / ".state" / "base").glob("*/config.json"))),
    *(Path(folder) for folder in os.environ.get("GGUF_MODELS", "").split(":") if folder),
]
TEXTS = [
    "Where is the parcel of order number 1003? It isn't here, and I'VE waited 12345 days.",
    "  two spaces, a\ttab,\n\na blank line, 東京, \U0001f600, Größe and naïve; x = {'a': [1, 2.5]}\n",
    "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\n",
]


@pytest.mark.soak
@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: str(folder.name))
@pytest.mark.parametrize("export_type", sorted(gguf_types.MATRIX_TYPES))
def test_llama_cpp_computes_what_the_certificate_scores(folder: Path, export_type: str, tmp_path: Path) -> None:
    llama_cpp.require()
    path = tmp_path / "model.gguf"
    gguf_file.refuse_unsupported(folder, [export_type])
    gguf_file.write_gguf(folder, path, export_type)
    tokenizer, llama = chat.load_tokenizer(folder), llama_cpp.start_server(path, threads=2)

    rendered = tokenizer.render([{"role": "user", "content": TEXTS[0]}], add_generation_prompt=True)
    for text in (rendered, *TEXTS[1:]):
        assert llama.tokenize(text) == tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = tokenizer.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    lengths = range(max(1, len(ids) - 8), len(ids) + 1)
    scored, exact = (_log_probabilities(model, ids, lengths) for model in _models(folder, path))
    any_token = tokenizer.tokenizer.convert_tokens_to_ids("a")
    theirs = llama_cpp.log_probabilities(llama, ids, lengths, scored.shape[-1], any_token=any_token)
    # Per token, in nats of KL: what llama.cpp adds by rounding activations is small beside what the type costs.
    added, cost = _kl(scored, theirs), _kl(exact, scored)
    print(f"{folder.name} {export_type}: cost {cost:.5f}, added by llama.cpp {added:.5f} nats")
    assert added < 0.02 + 0.5 * cost


def _models(folder: Path, path: Path):  # type: ignore[no-untyped-def]
    yield gguf_file.load_gguf(folder, path, dtype="float32")
    yield loading.load_base(folder, dtype="float32")


def _log_probabilities(model: torch.nn.Module, ids: list[int], lengths: range) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0]
    return logits[[length - 1 for length in lengths]].log_softmax(-1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())
