"""Count what a forward and backward pass over a micro-batch keeps and needs: the changing part of `memory_model`.

The letters in comments: T tokens of the micro-batch, D width of the hidden states, F width of an MLP, e bytes of a
number in the precision of the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_retrain.lm import small_adapters
from qlora_retrain.lm.adapter_scale import FULL
from qlora_retrain.lm.model_shape import LinearLayer, ModelShape

if TYPE_CHECKING:
    from qlora_retrain.lm.memory_model import MicroBatch, Settings

# As `loss.CHUNK_BYTES` of the training step, which a test compares: logits in memory at a time, in fp32.
LOSS_CHUNK_BYTES = {"cpu": 96 * 2**20, "cuda": 256 * 2**20}
# As `loss.BLOCK_BYTES`: of a chunk, what the softmax takes at a time.
LOSS_BLOCK_BYTES = {"cpu": 2**20, "cuda": 256 * 2**20}
# Attention over packed rows pads queries to 8 and keys to 32 positions, and takes so many queries at a time.
_QUERY_MULTIPLE, _KEY_MULTIPLE, ATTENTION_BLOCK = 8, 32, 128


@dataclass(frozen=True)
class StepMemory:
    """A forward and backward pass over a micro-batch; sizes are in bytes.

    Attributes:
        shape: The model's.
        settings: The line's.
        batch: The rows.
        adapted: The linear layers of a decoder layer that have an adapter.
    """

    shape: ModelShape
    settings: Settings
    batch: MicroBatch
    adapted: Sequence[LinearLayer]

    @property
    def tokens(self) -> int:
        """The tokens of a forward pass. Padding is computed where rows cannot be packed."""
        padded = self.batch.rows * self.batch.longest
        return padded if self.is_padded or self.batch.tokens is None else min(self.batch.tokens, padded)

    @property
    def supervised(self) -> int:
        """The tokens with a loss."""
        return self.tokens if self.batch.supervised is None else min(self.batch.supervised, self.tokens)

    def numbers(self, width: int) -> int:
        """Return the bytes of (T, width) in the precision of the arithmetic."""
        return self.tokens * width * self.settings.bytes_per_number

    # What is kept until the backward pass.

    def activations_of_layer(self) -> int:
        """Return what the forward pass of a decoder layer keeps for its backward pass."""
        return self._attention() + self._norms() + self._mlp() + self._adapters()

    def _attention(self) -> int:
        """Count queries, keys and values, and the output where its projection has an adapter."""
        q_width, kv_width = self.shape.q_width, self.shape.kv_width
        total = self.numbers(q_width + 2 * kv_width + (q_width if self._is_adapted("o") else 0))
        if not self._has_scores:
            return total + 4 * self.tokens * self.shape.heads  # the kernel's log-sums, in fp32
        if self.is_padded:
            # transformers' attention by autograd: probabilities in fp32 and in 16 bits, keys and values once a head.
            total += self.numbers(2 * (q_width - kv_width)) + self._pairs * (4 + self.settings.bytes_per_number % 4)
        return total

    def _norms(self) -> int:
        shape = self.shape
        inputs = shape.norms_per_layer * shape.width
        inputs += shape.q_width + shape.kv_width if shape.has_query_key_norm else 0
        if shape.norm == "rms":
            # Adapted layers recompute the outputs, from the inputs and one fp32 number for each token.
            outputs = 2 * shape.width if self._is_full else 0
            return self.numbers(inputs + outputs) + 4 * self.tokens * shape.norms_per_layer
        # Autograd keeps the input, in fp32 for RMSNorm, and the adapted layers behind a norm keep its output.
        outputs = self.numbers(shape.width * sum(self._is_adapted(group) for group in ("qkv", "up")))
        return outputs + (self.numbers(inputs) if shape.norm == "layer_norm" else 4 * self.tokens * inputs)

    def _mlp(self) -> int:
        if self.shape.has_fused_mlp:
            count = 2 + self._is_full  # gate and up, and their product where the projection down is torch's own
        elif self.shape.is_gated:
            count = 3 + self._is_adapted("down")  # gate, its activation, up, and their product
        else:
            count = 1 + self._is_adapted("down")
        return self.numbers(count * self.shape.mlp_width)

    def _adapters(self) -> int:
        """Count for each adapter its product with A, the places of dropout, and A and B in the compute precision."""
        if self._is_full:
            return 0
        rank, e = self.settings.rank, self.settings.bytes_per_number
        total = self.tokens * small_adapters.kept_bytes(self.shape, self.settings.method, rank, e)
        for layer in self.adapted:
            total += self.numbers(rank) + rank * e * layer.in_width + (rank * e * layer.out_width if e == 2 else 0)
            if self.settings.method == "dora":
                total += self.numbers(layer.out_width)  # the output before its rows are scaled
        # One 64-bit index for each place that is dropped, once for the layers with the same input.
        drawn_fraction = -math.log1p(-self.settings.dropout)
        inputs = {layer.group: layer.in_width for layer in self.adapted}
        return total + round(drawn_fraction * 8 * self.tokens * sum(inputs.values()))

    def of_all_layers(self) -> int:
        """Return what all layers share: the last hidden states, and the layout of packed rows."""
        total = self.numbers(self.shape.width)
        if self._is_in_rows:
            rows, length, kv_length = self._row_sizes()
            # The bias for all heads together, for each head where a query may see a key, and 64-bit indices.
            for_each_head = sum(self._blocks(length))
            total += rows * (length * kv_length + self.shape.heads * for_each_head) * self.settings.bytes_per_number
            total += 8 * rows * (self.shape.heads * length + self.shape.kv_heads * kv_length)
        return total

    # What is needed for a moment.

    def logits(self) -> int:
        """Return a chunk of logits in the output layer's precision, a block in fp32, and the gradient of its input."""
        vocabulary, e = self.shape.vocabulary, self.settings.bytes_per_number
        # Where the model scales or caps its logits, autograd keeps some, and a chunk has as many fewer positions.
        is_plain = self.shape.has_plain_logits
        chunk_size = LOSS_CHUNK_BYTES[self.settings.device] // ((4 if is_plain else 12) * vocabulary)
        positions = min(self.supervised, max(1, chunk_size))
        bytes_per_logit = e if is_plain else 12 + e
        block = min(4 * positions * vocabulary, max(LOSS_BLOCK_BYTES[self.settings.device], 4 * vocabulary))
        block_copy = block if e == 2 else 0
        # Where the output layer trains, its gradient adds up over the chunks in fp32. In 16 bits a chunk's part is made
        # first, from copies of the logits in the order in which they are multiplied.
        parts = 2 * vocabulary * self.shape.width + 2 * positions * vocabulary * e if e == 2 else 0
        trains_head = self._is_full or self.settings.whole_modules > 0
        grad_weight = 4 * vocabulary * self.shape.width + parts if trains_head else 0
        return (
            positions * vocabulary * bytes_per_logit
            + block_copy
            + 3 * self.supervised * self.shape.width * e
            + grad_weight
        )

    def backward_of_layer(self) -> int:
        """Return the most that the backward pass of a layer needs beside what was kept."""
        # When attention is computed, what the MLP behind it had kept is free.
        freed = self._mlp() + self.numbers(self.shape.width)
        # The gradient of a shared output layer waits for that of the embeddings, the last of the pass.
        waits = self._is_full and self.shape.is_tied
        waiting = self.shape.vocabulary * self.shape.width * self.settings.bytes_per_number if waits else 0
        return waiting + max(self._backward_of_mlp(), self._backward_of_attention() - freed)

    def _backward_of_mlp(self) -> int:
        shape, hidden, inner = self.shape, self.numbers(self.shape.width), self.numbers(self.shape.mlp_width)
        # The weight of the projection down, unpacked; in fp32 that was done once, when the base was loaded.
        scratch_bytes = self.settings.base_format.scratch_bytes_per_weight
        weight = shape.width * shape.mlp_width * scratch_bytes if self.settings.precision != "float32" else 0
        if not shape.has_fused_mlp:
            return hidden + max(3 * inner, inner + weight)
        if self.settings.kernels == "liger":
            return hidden + 2 * inner + weight  # its kernel overwrites gate and up with their gradients
        return hidden + max(4 * inner, 3 * inner + weight)

    def _backward_of_attention(self) -> int:
        shape, e, hidden = self.shape, self.settings.bytes_per_number, self.numbers(self.shape.width)
        gradients = self.numbers(2 * shape.q_width + 2 * shape.kv_width)
        if self._is_in_rows:
            rows, length, kv_length = self._row_sizes()
            scores = 3 * rows * shape.heads * max(self._blocks(length))
            copies = 3 * rows * length * shape.q_width + 4 * rows * kv_length * shape.kv_width
            return hidden + (scores + copies) * e
        if self._has_scores:
            return hidden + gradients + 3 * 4 * self._pairs
        return hidden + gradients + 4 * self.tokens * shape.q_width  # a fused kernel adds up one of them in fp32

    @property
    def _is_full(self) -> bool:
        return self.settings.method == FULL

    # The kind of attention.

    @property
    def is_padded(self) -> bool:
        """Whether rows are padded; only fused kernels of a GPU compute windows over packed rows, none a prefix."""
        return self.settings.method == "prefix" or (
            self.shape.has_window and (self._has_scores or self.settings.device == "cpu")
        )

    @property
    def _has_scores(self) -> bool:
        return self.settings.attention == "eager"

    @property
    def _is_in_rows(self) -> bool:
        return self._has_scores and not self.is_padded

    @property
    def _pairs(self) -> int:
        return self.batch.rows * self.shape.heads * self.batch.longest**2

    def _row_sizes(self) -> tuple[int, int, int]:
        """Return rows, query positions and key positions of packed attention."""
        length = -(-self.batch.longest // _QUERY_MULTIPLE) * _QUERY_MULTIPLE
        return self.batch.rows, length, -(-length // _KEY_MULTIPLE) * _KEY_MULTIPLE

    def _blocks(self, length: int) -> list[int]:
        """Return the scores of each block of queries: it has the keys up to its last query."""
        blocks = [(start, min(start + ATTENTION_BLOCK, length)) for start in range(0, length, ATTENTION_BLOCK)]
        return [(end - start) * -(-end // _KEY_MULTIPLE) * _KEY_MULTIPLE for start, end in blocks]

    def _is_adapted(self, group: str) -> bool:
        return any(layer.group == group for layer in self.adapted)
