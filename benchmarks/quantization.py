"""What 4 bits cost: NF4, FP4 and Int4 beside 16 bits, in perplexity on held-out text.

    nf4, fp4         bitsandbytes' codes, made by the step `quantize_model`; "+ dq": the scales in 8 bits too
    int4             integers from -7 to 7, times the largest absolute value of the block / 7; rounded to the nearest.
                     Written here: bitsandbytes quantizes to NF4 and FP4 alone

All have blocks of 64 weights with an fp32 scale, and leave embeddings, norms and the output layer in 16 bits. The texts
are the reference text that forgetting is measured on, and those of BANKING77's test.csv without a template: each alone,
and strung together, 20 in a passage. Prints bits a weight, the error of the weights (and of as many normally
distributed numbers, on which NF4's levels are built), perplexity, and the difference to NF4 in nats a token, paired by
text, with its interval.

Command: `python benchmarks/quantization.py --data FOLDER [--base MODEL]`, FOLDER with BANKING77's test.csv. Scores of a
form are kept in `--work`.
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
    "nf4": {"quant_type": "nf4", "double_quant": False},
    "nf4 + dq": {"quant_type": "nf4", "double_quant": True},
    "fp4": {"quant_type": "fp4", "double_quant": False},
    "fp4 + dq": {"quant_type": "fp4", "double_quant": True},
    "int4": {},
}
BLOCK = 64  # weights that share a scale
MOST = 7  # Int4's largest integer; -8 is not used, so that the code is symmetric
INT4_BITS = 4 + 32 / BLOCK
NORMAL_NUMBERS = 4096 * 1024
STRUNG = 20  # texts in a passage


def main() -> None:
    """Score every form on both suites, print the table of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with BANKING77's test.csv")
    parser.add_argument("--base", type=Path, default=PROJECT / ".state" / "base" / "smollm2-135m-instruct")
    parser.add_argument("--reference", type=Path, default=PROJECT / "pipelines" / "demo" / "reference.jsonl")
    parser.add_argument("--first", type=int, default=None, help="so many texts of test.csv; all of them")
    parser.add_argument("--work", type=Path, default=PROJECT / ".state" / "quantization")
    options = parser.parse_args()
    texts = banking77(options)[: options.first]
    strung = ["\n".join(texts[i : i + STRUNG]) for i in range(0, len(texts), STRUNG)]
    suites = {"reference": passages(options), "test.csv, strung together": strung, "test.csv": texts}
    found = {name: scored(options, name, suites) for name in FORMS}
    for suite in suites:
        table(suite, found)


def banking77(options: argparse.Namespace) -> list[str]:
    """The texts of test.csv, each once."""
    with (options.data / "test.csv").open(encoding="utf-8") as file:
        texts = list(dict.fromkeys(line["text"] for line in csv.DictReader(file)))
    random.Random(0).shuffle(texts)  # the file is sorted by label
    return texts


def passages(options: argparse.Namespace) -> list[Any]:
    """The reference text, read as `evaluate` reads it: from a folder of its own."""
    from qlora_retrain.evaluation import reference_text

    folder = options.work / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(options.reference, folder)
    return reference_text.read(folder)


def scored(options: argparse.Namespace, name: str, suites: dict[str, list[Any]]) -> dict[str, Any]:
    """Bits, errors, and of each suite every text's loss and tokens; made once."""
    from qlora_retrain.evaluation import scoring
    from qlora_retrain.lm import chat

    path = options.work / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    left = {suite: texts for suite, texts in suites.items() if len(found.get(suite, [])) != len(texts)}
    if left:
        model, about = load(options, name)
        tokenizer = chat.load_tokenizer(options.base)
        for suite, texts in left.items():
            scores = scoring.score_texts(model, tokenizer, texts, batch_tokens=4096, what=f"{name}, {suite}")
            found |= about | {suite: [(score.loss_nats, score.tokens) for score in scores]}
            path.write_text(json.dumps(found))
    return found


def load(options: argparse.Namespace, name: str) -> tuple[Any, dict[str, Any]]:
    """The model in this form, computing in bf16; its bits a weight and the error of its weights."""
    import torch

    from components.quantize_model.step import run
    from qlora_retrain.config.sections import QuantizeConfig
    from qlora_retrain.lm import loading

    normal = torch.randn(NORMAL_NUMBERS, generator=torch.Generator().manual_seed(0))
    if name in ("16 bits", "int4"):
        model = loading.load_base(options.base, dtype="bfloat16")
        if name == "16 bits":
            return model, {"bits": 16, "error": 0.0, "normal": 0.0}
        return model, {"bits": INT4_BITS, "error": to_int4(model), "normal": error(normal, int4(normal))}
    folder = options.work / name
    folder.mkdir(parents=True, exist_ok=True)
    numbers = run(QuantizeConfig(**FORMS[name]), options.base, folder).numbers
    of_normal = error(normal, by_bitsandbytes(normal, **FORMS[name]))
    about = {"bits": numbers["bits_per_weight"], "error": numbers["relative_error"], "normal": of_normal}
    return loading.load_nf4(folder, dtype="bfloat16"), about


def to_int4(model: Any) -> float:
    """Round the weights that bitsandbytes would quantize, in place; returns their error, |W - W4| / |W|."""
    import torch

    wrong = whole = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            rounded = int4(module.weight.data)
            wrong += float((rounded.float() - module.weight.data.float()).square().sum())
            whole += float(module.weight.data.float().square().sum())
            module.weight.data = rounded
    return math.sqrt(wrong / whole)


def int4(weights: Any) -> Any:
    """A tensor as Int4 holds it, in its own precision; blocks of 64 run over the rows' ends, as bitsandbytes' do."""
    blocks = weights.float().reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True) / MOST  # (blocks, 1)
    codes = (blocks / scales.clamp(min=1e-30)).round()
    return (codes * scales).reshape(weights.shape).to(weights.dtype)


def by_bitsandbytes(numbers: Any, quant_type: str, double_quant: bool) -> Any:
    """Numbers as NF4 or FP4 holds them."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(numbers, blocksize=BLOCK, compress_statistics=double_quant, quant_type=quant_type)
    return dequantize_4bit(packed, state)


def error(numbers: Any, rounded: Any) -> float:
    """|x - x4| / |x|, Euclidean."""
    return float((rounded - numbers).norm() / numbers.norm())


def table(suite: str, found: dict[str, dict[str, Any]]) -> None:
    """A line a form."""
    from qlora_retrain.evaluation import stats

    tokens = [count for _, count in found["nf4"][suite]]
    print(f"\n{suite}: {len(tokens)} texts, {sum(tokens)} tokens")
    print(
        "form       bits a weight   weights' error   of normal numbers   perplexity   loss - nf4's, nats a token (95 %)"
    )
    for name, form in found.items():
        loss = sum(nats for nats, _ in form[suite]) / sum(tokens)
        line = f"{name:9}  {form['bits']:13.3f}  {form['error']:15.2%}  {form['normal']:18.2%}  {math.exp(loss):11.2f}"
        if name != "nf4":
            apart = [a - b for (a, _), (b, _) in zip(form[suite], found["nf4"][suite], strict=True)]
            between = stats.difference_interval(apart, tokens, confidence=0.95, samples=2000, seed=0)
            line += f"   {between.value:+.4f} ({between.low:+.4f} to {between.high:+.4f})"
        print(line)


if __name__ == "__main__":
    main()
