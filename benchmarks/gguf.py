"""Compare llama.cpp on the exported GGUF files with the merged model in transformers, on the same rows.

llama.cpp's server loads every file below MODEL/exports and returns the probabilities of every supervised token. Prints
the loss per token, how often the likeliest token is that of the 16-bit model in transformers, and an answer to the
first row's question.

Command: `python benchmarks/gguf.py --model MODEL --rows eval.jsonl [--first N]`
MODEL is a pulled version's `model/`, or the artifact; `make gguf-setup` installs llama.cpp.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]
sys.path.append(str(PROJECT / ".state" / "llama-cpp"))


def main() -> None:
    """Score the rows with the 16-bit model, then with every file, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="a data set's eval.jsonl")
    parser.add_argument("--first", type=int, default=None, help="the number of rows; default: all")
    options = parser.parse_args()

    import torch

    from qlora_retrain.evaluation import scoring
    from qlora_retrain.lm import chat, conversations, loading

    tokenizer, model = chat.load_tokenizer(options.model), loading.load_base(options.model, dtype="float32")
    rows = scoring.read_rows(options.rows, "eval")[: options.first]
    encoded = [example for row in rows for example in tokenizer.encode(row.messages, row.tools)]
    # Nothing comes before the first token, so no logits predict it.
    target_positions = [[i for i, is_target in enumerate(row.supervised) if is_target and i] for row in encoded]

    # The 16-bit model's loss, and its likeliest token at every position.
    expected_tokens, loss, tokens = [], 0.0, sum(map(len, target_positions))
    with torch.inference_mode():
        for row, positions in zip(encoded, target_positions, strict=True):
            logits = model(torch.tensor([row.input_ids])).logits[0]  # (T, vocab)
            expected_tokens.append(logits.argmax(-1))
            before, targets = [i - 1 for i in positions], torch.tensor([row.input_ids[i] for i in positions])
            loss += float(torch.nn.functional.cross_entropy(logits[before], targets, reduction="sum"))

    prompt = conversations.prompt_of(rows[0].messages)
    print(f"{len(rows)} rows, {tokens} supervised tokens; question: {prompt[-1]['content']!r}")
    print("form                                loss   chosen as in 16 bits   answer")
    print(f"{'16 bits in transformers':32}  {loss / tokens:6.4f}")
    for path in sorted((options.model / "exports").rglob("*.gguf")):
        gguf_loss, agreement, answer = evaluate_gguf(
            path,
            encoded,
            target_positions,
            expected_tokens,
            prompt,
            model.config.vocab_size,
            tokenizer.tokenizer.convert_tokens_to_ids("a"),
        )
        name = path.relative_to(options.model).as_posix()
        print(f"{name:32}  {gguf_loss:6.4f}  {agreement:21.2%}   {answer!r}", flush=True)


def evaluate_gguf(
    path: Path,
    encoded: list[Any],
    target_positions: list[list[int]],
    expected_tokens: list[Any],
    prompt: list[Any],
    vocabulary: int,
    any_token: int,
) -> tuple[float, float, str]:
    """Return the loss per token, the fraction of tokens chosen as by transformers, and the answer to the prompt."""
    from llama_server import LlamaServer

    # 64 tokens more than the longest row, as space for the answer to the prompt.
    longest = max(len(row.input_ids) for row in encoded)
    llama = LlamaServer(path, context_tokens=longest + 64, threads=os.cpu_count() or 1)
    loss = num_agreed = tokens = 0.0
    for row, positions, row_tokens in zip(encoded, target_positions, expected_tokens, strict=True):
        # One request per token: the server returns probabilities only of tokens that it generates.
        for i in positions:
            logprobs = llama.log_probabilities(row.input_ids[:i], vocabulary=vocabulary, any_token=any_token)
            loss -= logprobs[row.input_ids[i]]
            # The logits that predict a token are one position before it.
            num_agreed += max(range(vocabulary), key=logprobs.__getitem__) == int(row_tokens[i - 1])
        tokens += len(positions)
    return loss / tokens, num_agreed / tokens, llama.answer(prompt, max_tokens=32)


if __name__ == "__main__":
    main()
