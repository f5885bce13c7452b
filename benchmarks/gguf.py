"""What llama.cpp makes of our GGUF files, beside the merged model in transformers, on the same rows.

Every file below MODEL/exports is loaded by llama-cpp-python and read row by row with its logits kept: the loss a
supervised token, how often the likeliest token is that of the 16-bit model in transformers, and an answer to the first
row's question.

Command: `python benchmarks/gguf.py --model MODEL --rows eval.jsonl [--first N]`
MODEL is a pulled version's `model/`, or the artifact; `make gguf-setup` compiles llama.cpp.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
sys.path.append(str(PROJECT / ".state" / "llama-cpp"))


def main() -> None:
    """Read the rows with the 16-bit model, then with every file, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="a data set's eval.jsonl")
    parser.add_argument("--first", type=int, default=None, help="so many rows; all of them")
    options = parser.parse_args()

    import torch

    from qlora_retrain.evaluation import scoring
    from qlora_retrain.lm import chat, loading

    tokenizer, model = chat.load_tokenizer(options.model), loading.load_base(options.model, dtype="float32")
    rows = scoring.read_rows(options.rows, "eval")[: options.first]
    encoded = [chat.encode(tokenizer, row.messages) for row in rows]
    places = [[i for i, judged in enumerate(row.supervised) if judged and i] for row in encoded]
    wanted, loss, tokens = [], 0.0, sum(map(len, places))
    with torch.inference_mode():
        for row, at in zip(encoded, places, strict=True):
            logits = model(torch.tensor([row.input_ids])).logits[0]
            wanted.append(logits.argmax(-1))
            before, targets = [i - 1 for i in at], torch.tensor([row.input_ids[i] for i in at])
            loss += float(torch.nn.functional.cross_entropy(logits[before], targets, reduction="sum"))
    asked = chat.prompt_of(rows[0].messages)
    print(f"{len(rows)} rows, {tokens} supervised tokens; asked: {asked[-1]['content']!r}")
    print("form                                loss   chosen as in 16 bits   answer")
    print(f"{'16 bits in transformers':32}  {loss / tokens:6.4f}")
    for path in sorted((options.model / "exports").rglob("*.gguf")):
        found, alike, answer = by_llama_cpp(path, encoded, places, wanted, asked)
        name = path.relative_to(options.model).as_posix()
        print(f"{name:32}  {found:6.4f}  {alike:21.2%}   {answer!r}", flush=True)


def by_llama_cpp(
    path: Path, encoded: list[Any], places: list[list[int]], wanted: list[Any], asked: list[Any]
) -> tuple[float, float, str]:
    """Loss a token, share of tokens chosen alike, and the answer."""
    import llama_cpp
    import torch

    longest = max(len(row.input_ids) for row in encoded)
    llama = llama_cpp.Llama(str(path), n_ctx=longest + 64, logits_all=True, verbose=False)
    loss = alike = tokens = 0.0
    for row, at, best in zip(encoded, places, wanted, strict=True):
        llama.reset()
        llama.eval(row.input_ids)
        before = [i - 1 for i in at]  # the logits that a token is chosen by stand one place before it
        logits = torch.tensor(llama.scores[before])
        targets = torch.tensor([row.input_ids[i] for i in at])
        loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        alike += int((logits.argmax(-1) == best[before]).sum())
        tokens += len(at)
    llama.reset()
    answer = llama.create_chat_completion(asked, temperature=0.0, max_tokens=32)["choices"][0]["message"]["content"]
    llama.close()
    return loss / tokens, alike / tokens, answer


if __name__ == "__main__":
    main()
