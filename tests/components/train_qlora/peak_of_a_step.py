"""Train one step of a model with 262,144 tokens in its vocabulary, and print what that took beside the model, in MiB.

Command: `peak_of_a_step.py packed|padded|scaled`; scaled: a family that scales its logits
"""

from __future__ import annotations

import resource
import sys
import warnings
from functools import partial
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig

from components.train_qlora import adapter, loss, packing
from components.train_qlora.data import PaddingCollator
from qlora_retrain.config.sections import TrainConfig

VOCABULARY, WIDTH, NUM_ROWS = 262_144, 64, 16


def main(kind: str) -> None:
    """Print the peak."""
    warnings.filterwarnings("ignore")
    if kind == "padded":
        packing.can_pack = lambda _: False
    torch.manual_seed(0)
    # One layer, so that the embeddings are most of it.
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    make_config = partial(GraniteConfig, logits_scaling=8.0) if kind == "scaled" else LlamaConfig
    config = make_config(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").bfloat16()
    model = adapter.attach_new(base, TrainConfig(device="cpu", rank=4, dropout=0.0)).train()
    tokens = [list(range(9 + i, 49 + 2 * i)) for i in range(NUM_ROWS)]
    batch = PaddingCollator(0)([{"input_ids": row, "labels": row} for row in tokens])

    size_before = psutil.Process().memory_info().rss
    # Linux forgets the peak so far.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    loss.summed_loss(model, batch).backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - size_before / 2**20)


if __name__ == "__main__":
    main(sys.argv[1])
