"""Compare the base formats of a few bits with 16 bits, in perplexity on held-out text.

    nf4, fp4         bitsandbytes' codes, made by the step `quantize_model`; "+ dq": the scales in 8 bits too
    int4             integers from -7 to 7, times the largest absolute value of the block / 7; rounded to the nearest.
                     Written here: bitsandbytes quantizes to NF4 and FP4 alone
    nf4-shifted      NF4 of what the constant of greatest entropy leaves of a block
    mixed            NF4 or 8 bits by layer, for so many bits on average
    int4, groups     the format `int4`, over which QA-LoRA trains: 16 levels with an offset, in groups of 32

All have blocks of 64 weights with an fp32 scale, the last three with smaller scales, and leave embeddings, norms and
the output layer in 16 bits. The texts are the reference text that forgetting is measured on, and those of BANKING77's
test.csv without a template: each alone, and joined, 20 in a passage. Prints bits per weight, the error of the weights,
and that of normally distributed numbers, on which NF4's levels are built. Then perplexity, and the difference to NF4 in
nats per token, paired by text, with its interval.

Command: `python benchmarks/quantization.py --data FOLDER [--base MODEL]`, FOLDER with BANKING77's test.csv. The scores
of a form stay in `--work`, so a second run continues where the first ended.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import shutil
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]

FORMS = {
    "16 bits": {},
    "nf4": {"format": "nf4", "double_quant": False},
    "nf4 + dq": {"format": "nf4", "double_quant": True},
    "fp4": {"format": "fp4", "double_quant": False},
    "fp4 + dq": {"format": "fp4", "double_quant": True},
    "int4": {},
    "nf4-shifted": {"format": "nf4-shifted"},
    "mixed 5": {"format": "mixed", "bits_per_weight": 5.0},
    "mixed 6": {"format": "mixed", "bits_per_weight": 6.0},
    "int4, groups": {"format": "int4"},
}
BLOCK = 64  # weights that share a scale
MAX_INT4 = 7  # -8 is not used, so that the code is symmetric
INT4_BITS = 4 + 32 / BLOCK
NORMAL_NUMBERS = 4096 * 1024
TEXTS_PER_PASSAGE = 20


def main() -> None:
    """Score every form on both suites, print the table of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with BANKING77's test.csv")
    parser.add_argument("--base", type=Path, default=PROJECT / ".state" / "base" / "smollm2-135m-instruct")
    parser.add_argument("--reference", type=Path, default=PROJECT / "pipelines" / "demo" / "reference.jsonl")
    parser.add_argument("--first", type=int, default=None, help="the number of texts of test.csv; default: all")
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / "quantization")
    options = parser.parse_args()
    texts = banking77(options)[: options.first]

    # Joined too: in a text of a dozen words most tokens have little context before them.
    joined = ["\n".join(texts[i : i + TEXTS_PER_PASSAGE]) for i in range(0, len(texts), TEXTS_PER_PASSAGE)]
    suites = {"reference": reference_passages(options), "test.csv, strung together": joined, "test.csv": texts}
    results = {name: score_form(options, name, suites) for name in FORMS}
    for suite in suites:
        print_table(suite, results)


def banking77(options: argparse.Namespace) -> list[str]:
    """Return the texts of test.csv, each once."""
    with (options.data / "test.csv").open(encoding="utf-8") as file:
        texts = list(dict.fromkeys(line["text"] for line in csv.DictReader(file)))
    random.Random(0).shuffle(texts)  # the file is sorted by label
    return texts


def reference_passages(options: argparse.Namespace) -> list[Any]:
    """Read the reference text as `evaluate` does, from a folder of its own."""
    from qlora_retrain.evaluation import reference_text

    # A folder with this one file, since every file of a folder would be read.
    folder = options.work / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(options.reference, folder)
    return reference_text.read_passages(folder)


def score_form(options: argparse.Namespace, name: str, suites: dict[str, list[Any]]) -> dict[str, Any]:
    """Return a form's bits and errors, and for each suite every text's loss and tokens; computed once."""
    from qlora_retrain.evaluation import scoring
    from qlora_retrain.lm import chat

    path = options.work / f"{name}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    # A suite of another number of texts (`--first`) is scored again.
    missing = {suite: texts for suite, texts in suites.items() if len(results.get(suite, [])) != len(texts)}
    if missing:
        model, statistics = load_form(options, name)
        tokenizer = chat.load_tokenizer(options.base)
        for suite, texts in missing.items():
            scores = scoring.score_passages(model, tokenizer, texts, batch_tokens=4096, description=f"{name}, {suite}")
            results |= statistics | {suite: [(score.loss_nats, score.tokens) for score in scores]}
            path.write_text(json.dumps(results))
    return results


def load_form(options: argparse.Namespace, name: str) -> tuple[Any, dict[str, Any]]:
    """Load the model in this form, computing in bf16; return it with its bits per weight and its errors."""
    import torch

    from components.quantize_model.step import run
    from qlora_retrain.config.sections import QuantizeConfig
    from qlora_retrain.lm import loading

    # Every form rounds the same numbers.
    normal = torch.randn(NORMAL_NUMBERS, generator=torch.Generator().manual_seed(0))
    if name in ("16 bits", "int4"):
        model = loading.load_base(options.base, dtype="bfloat16")
        if name == "16 bits":
            return model, {"bits": 16, "error": 0.0, "normal": 0.0}
        return model, {"bits": INT4_BITS, "error": to_int4(model), "normal": relative_error(normal, int4(normal))}

    # The step itself quantizes, so the table shows the base that a line would train over.
    folder = options.work / name
    folder.mkdir(parents=True, exist_ok=True)
    numbers = run(QuantizeConfig(**FORMS[name]), options.base, folder).numbers
    statistics = {
        "bits": numbers["bits_per_weight"],
        "error": numbers["relative_error"],
        "normal": relative_error(normal, round_numbers(normal, FORMS[name])),
    }
    return loading.load_nf4(folder, dtype="bfloat16"), statistics


def to_int4(model: Any) -> float:
    """Round the weights that bitsandbytes would quantize, in place; return their error, |W - W4| / |W|."""
    import torch

    squared_error = squared_norm = 0.0
    for module in model.modules():
        # The output layer is linear too, but bitsandbytes leaves it in 16 bits.
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            rounded = int4(module.weight.data)
            squared_error += float((rounded.float() - module.weight.data.float()).square().sum())
            squared_norm += float(module.weight.data.float().square().sum())
            module.weight.data = rounded
    return math.sqrt(squared_error / squared_norm)


def int4(weights: Any) -> Any:
    """Round a tensor to Int4, in its own precision; blocks of 64 continue across rows, as those of bitsandbytes do."""
    blocks = weights.float().reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True) / MAX_INT4  # (blocks, 1)
    codes = (blocks / scales.clamp(min=1e-30)).round()  # the clamp is for a block of zeros
    return (codes * scales).reshape(weights.shape).to(weights.dtype)


def round_numbers(numbers: Any, settings: dict[str, Any]) -> Any:
    """Round numbers as a format does; `mixed` has no error of its own, and gives NF4's."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from qlora_retrain.config.quantize import QuantizeConfig
    from qlora_retrain.lm import base_formats
    from qlora_retrain.lm.base_formats.packed_linear import PackedFormat

    base_format = base_formats.from_settings(QuantizeConfig(**settings).model_dump())
    if isinstance(base_format, PackedFormat):
        weights = numbers.view(-1, 4096)
        layout = base_format.layout("", *weights.shape)
        return layout.unpack(layout.pack(weights)).float().view(-1)
    quant_type, double_quant = settings["format"], settings["double_quant"]
    packed, state = quantize_4bit(numbers, blocksize=BLOCK, compress_statistics=double_quant, quant_type=quant_type)
    return dequantize_4bit(packed, state)


def relative_error(numbers: Any, rounded: Any) -> float:
    """Return |x - x4| / |x|, Euclidean."""
    return float((rounded - numbers).norm() / numbers.norm())


def print_table(suite: str, results: dict[str, dict[str, Any]]) -> None:
    """Print one line per form."""
    from qlora_retrain.evaluation import bootstrap
    from qlora_retrain.evaluation.bootstrap import BootstrapSettings

    tokens = [count for _, count in results["nf4"][suite]]
    print(f"\n{suite}: {len(tokens)} texts, {sum(tokens)} tokens")
    print(
        "form          bits a weight  weights' error   of normal numbers   perplexity   loss - nf4's, nats/token (95 %)"
    )
    for name, form in results.items():
        loss = sum(nats for nats, _ in form[suite]) / sum(tokens)
        line = f"{name:12}  {form['bits']:13.3f}  {form['error']:14.2%}  {form['normal']:18.2%}  {math.exp(loss):11.2f}"
        if name != "nf4":
            # Paired by text: what makes a text hard makes it hard for both forms.
            differences = [a - b for (a, _), (b, _) in zip(form[suite], results["nf4"][suite], strict=True)]
            interval = bootstrap.difference_interval(differences, tokens, BootstrapSettings(0.95, samples=2000, seed=0))
            line += f"   {interval.value:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"
        print(line)


if __name__ == "__main__":
    main()
