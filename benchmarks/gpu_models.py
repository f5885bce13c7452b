"""Make 4-bit models of real shapes with random weights, and rows of random tokens, for `gpu.py`.

Speed and memory do not depend on what the weights say. A deep model is written from one quantized layer, so that one of
70 billion weights takes a minute and the memory of a layer.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

IGNORE_INDEX = -100
# Llama 3.2 1B, Llama 3.1 8B, Llama 1 33B and Llama 3.1 70B; `tiny` is for a dry run.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 512,
    },
    "1b": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256,
    },
    "33b": {
        "hidden_size": 6656, "num_hidden_layers": 60, "num_attention_heads": 52, "num_key_value_heads": 52,
        "intermediate_size": 17920, "vocab_size": 32000,
    },
    "70b": {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28672, "vocab_size": 128256,
    },
}  # fmt: skip
TIED_SHAPES = ("tiny", "1b")


def layer_weights(shape: str) -> int:
    """Return the weights of all linear layers but the output layer: those that are stored in 4 bits."""
    s = SHAPES[shape]
    kv_width = s["hidden_size"] // s["num_attention_heads"] * s["num_key_value_heads"]
    attention = 2 * s["hidden_size"] * (s["hidden_size"] + kv_width)
    return s["num_hidden_layers"] * (attention + 3 * s["hidden_size"] * s["intermediate_size"])


def weights_gib(shape: str) -> float:
    """Return the size of the model's weights: 4.127 bits each, 16 in the embeddings and the output layer."""
    s = SHAPES[shape]
    embeddings = s["hidden_size"] * s["vocab_size"] * (1 if shape in TIED_SHAPES else 2)
    return (layer_weights(shape) * 4.127 / 8 + 2 * embeddings) / 2**30


def necessary_flop(shape: str, lengths: list[int], supervised: int) -> float:
    """Return the arithmetic over rows that every contestant must do: products and causal attention, nothing twice.

    A frozen weight takes part in two products (forward, and the gradient of its input), of 2 operations each for every
    token. Attention has two products forward and four backward over half of the positions.
    """
    s = SHAPES[shape]
    attention = 6 * s["num_hidden_layers"] * s["hidden_size"] * sum(length * length for length in lengths)
    head = 4 * s["hidden_size"] * s["vocab_size"] * supervised
    return 4 * layer_weights(shape) * sum(lengths) + attention + head


def predicted_gib(job: Mapping[str, Any]) -> float:
    """Return what a plan predicts that torch allocates for our loop at the peak: that of its largest micro-batch."""
    from qlora_retrain.lm.memory_model import MicroBatch, Settings, estimate
    from qlora_retrain.lm.model_shape import ModelShape

    name, size = job["shape"], job["micro_batch_size"]
    shape = ModelShape.from_config(
        {**SHAPES[name], "model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": name in TIED_SHAPES}
    )
    settings = Settings(
        rank=16,
        dropout=0.0,
        optimizer_bits=8 if job["optimizer"].endswith("8bit") else 32,
        device=job["device"],
        attention="sdpa" if job["device"] == "cuda" else "eager",
        kernels="liger" if "liger" in job["name"] else "torch",
        checkpoint_every=int("checkpointing" in job["name"]),
        accumulates=job["accumulation"] > 1,
    )
    rows = new_rows(name, job["rows"], job["steps"] * size * job["accumulation"])
    totals = []
    for start in range(0, len(rows), size):
        lengths = [len(row["input_ids"]) for row in rows[start : start + size]]
        supervised = sum(label != IGNORE_INDEX for row in rows[start : start + size] for label in row["labels"][1:])
        totals.append(estimate(shape, settings, MicroBatch(size, max(lengths), sum(lengths), supervised)).total)
    return max(totals) / 2**30


def new_rows(shape: str, kind: str, count: int) -> list[dict[str, list[int]]]:
    """Return rows of random tokens.

    `chat` stands for about 200 tokens with 57 % supervised, `system` for such rows that begin with the same 60, and a
    number for that many tokens, all supervised.
    """
    rng, vocabulary = random.Random(0), SHAPES[shape]["vocab_size"]
    system_turn = [rng.randrange(3, vocabulary) for _ in range(60)] if kind == "system" else []
    rows = []
    for _ in range(count):
        length = int(kind) if kind.isdigit() else max(60, round(rng.lognormvariate(5.2, 0.35)))
        tokens = (system_turn + [rng.randrange(3, vocabulary) for _ in range(length)])[:length]
        unsupervised = 0 if kind.isdigit() else round(0.43 * length)
        rows.append({"input_ids": tokens, "labels": [IGNORE_INDEX] * unsupervised + tokens[unsupervised:]})
    return rows


def make_model(shape: str, folder: Path, device: str) -> None:
    """Write the 4-bit model to the folder, unless it is there."""
    if (folder / "config.json").is_file():
        return
    one_layer = folder.with_name(f"{folder.name}-one-layer")
    _quantize_one_layer(shape, one_layer, device)
    folder.mkdir(parents=True, exist_ok=True)
    _write_layers(one_layer, folder, SHAPES[shape]["num_hidden_layers"])
    shutil.rmtree(one_layer)

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # TRL wants one, and reads no text with it.
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
    ).save_pretrained(folder)  # fmt: skip


def _quantize_one_layer(shape: str, folder: Path, device: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{**SHAPES[shape], "num_hidden_layers": 1}, max_position_embeddings=8192, rms_norm_eps=1e-5,
        tie_word_embeddings=shape in TIED_SHAPES, bos_token_id=1, eos_token_id=2, pad_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    original = folder.with_name(f"{folder.name}-16-bits")
    model.save_pretrained(original)
    del model

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    quantized = AutoModelForCausalLM.from_pretrained(
        original, quantization_config=settings, dtype=torch.bfloat16, device_map={"": device}
    )
    quantized.config._name_or_path = ""
    quantized.save_pretrained(folder)
    shutil.rmtree(original)


def _write_layers(one_layer: Path, folder: Path, num_layers: int) -> None:
    """Write the tensors of the one layer once for every layer, a file for each, and a config of so many layers."""
    from safetensors.torch import load_file, save_file

    tensors = {name: t for path in one_layer.glob("*.safetensors") for name, t in load_file(path).items()}
    parts: dict[str, dict[str, Any]] = {
        "model-rest.safetensors": {name: t for name, t in tensors.items() if ".layers.0." not in name}
    }
    of_layer = {name: t for name, t in tensors.items() if ".layers.0." in name}
    weight_map = {}
    for number in range(num_layers):
        parts[f"model-{number:05d}.safetensors"] = {
            name.replace(".layers.0.", f".layers.{number}."): t for name, t in of_layer.items()
        }
    for file_name, part in parts.items():
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    config = json.loads((one_layer / "config.json").read_text())
    config["num_hidden_layers"] = num_layers
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][:1] * num_layers
    (folder / "config.json").write_text(json.dumps(config))
