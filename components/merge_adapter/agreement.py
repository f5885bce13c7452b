"""Compare every form's next-token distribution with the unmerged model's: KL divergence and greedy agreement.

The unmerged model and a form are never in memory together. The unmerged model's logits go to a file once, and every
form is compared from that file. A row of logits is as wide as the vocabulary, so the file has a limit. Where it is too
small for all supervised tokens, some are chosen by hash.

The file holds logits as the model computed them, from which its log-probabilities follow exactly. Rounding these to 16
bits would save half of the file, but it changes a log-probability by up to 0.004, and a KL is often smaller than that.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core import progress
from qlora_retrain.evaluation import bootstrap, row_tokens
from qlora_retrain.evaluation.bootstrap import BootstrapSettings
from qlora_retrain.evaluation.scoring import Row
from qlora_retrain.evaluation.stats import Interval
from qlora_retrain.lm import forward
from qlora_retrain.lm.chat import ChatTokenizer
from qlora_retrain.lm.virtual_tokens import prefix_ids

MAX_FILE_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two models compared on one row.

    Attributes:
        id: The row's id.
        prompt: The id of its prompt.
        tokens: The number of its supervised tokens at which they were compared.
        kl_nats: KL(unmerged || other) of the next-token distribution, summed over these tokens.
        agreed_tokens: The number of them at which both models find the same token likeliest.
    """

    id: str
    prompt: str
    tokens: int
    kl_nats: float
    agreed_tokens: int


@dataclass(frozen=True, slots=True)
class _Sequence:
    """A token sequence to compare models on.

    Attributes:
        row: The index of the row that it belongs to; a row has several where its template rewrites earlier turns.
        input_ids: The tokens that a model reads.
        positions: Where logits are compared: one position before each chosen supervised token.
    """

    row: int
    input_ids: list[int]
    positions: list[int]


@dataclass(frozen=True, slots=True)
class UnmergedLogits:
    """The unmerged model's logits at the positions where forms are compared with it.

    Attributes:
        row_ids: The ids of the rows.
        prompts: The ids of their prompts.
        batches: The sequences in the order of the file, batch by batch.
        compared_positions: The number of positions in the file.
        all_positions: The number of supervised tokens of all rows.
        file: The logits (compared_positions, vocab_size), without a header.
        vocab_size: The width of a row of logits.
        dtype: The type of the logits.
    """

    row_ids: list[str]
    prompts: list[str]
    batches: list[list[_Sequence]]
    compared_positions: int
    all_positions: int
    file: BinaryIO
    vocab_size: int
    dtype: torch.dtype

    @classmethod
    def from_model(
        cls,
        unmerged: PreTrainedModel,
        tokenizer: ChatTokenizer,
        rows: Sequence[Row],
        batch_tokens: int,
        file: BinaryIO,
        max_bytes: int = MAX_FILE_BYTES,
    ) -> UnmergedLogits:
        """Write the logits of the unmerged model.

        Args:
            unmerged: In evaluation mode.
            tokenizer: The tokenizer of all forms.
            rows: Chats.
            batch_tokens: The tokens of a forward pass, padding included.
            file: An empty file, open for reading and writing. It must stay open as long as forms are compared.
            max_bytes: The limit on its size.
        """
        # One token shows the width and the type of the logits; some families compute them in fp32 from 16 bits.
        with torch.inference_mode():
            (probe,) = forward.logit_chunks(unmerged, {"input_ids": torch.tensor([[0]]), "use_cache": False}, [(0, 0)])
        sequences = _supervised_sequences(tokenizer, rows)
        all_positions = sum(len(sequence.positions) for sequence in sequences)
        sequences = _choose_positions(sequences, rows, max_bytes // (probe.shape[1] * probe.dtype.itemsize))

        lengths = [len(sequence.input_ids) for sequence in sequences]
        batches = [[sequences[i] for i in batch] for batch in forward.length_grouped_batches(lengths, batch_tokens)]
        done = 0
        for batch in batches:
            with torch.inference_mode():
                for logits in _batch_logits(unmerged, batch):
                    file.write(logits.cpu().contiguous().view(torch.uint8).numpy().data)
            progress.update("the unmerged model's logits", done := done + len(batch), len(sequences))

        row_ids, prompts = [row.id for row in rows], [row.prompt for row in rows]
        compared = sum(len(sequence.positions) for sequence in sequences)
        return cls(row_ids, prompts, batches, compared, all_positions, file, probe.shape[1], probe.dtype)

    @property
    def positions(self) -> dict[str, int]:
        """Return at how many of how many supervised tokens forms are compared; `certificate.json` has these names."""
        return {"compared": self.compared_positions, "of": self.all_positions}

    @property
    def sentence(self) -> str:
        """Return a sentence on how many tokens KL and agreement rest."""
        return positions_sentence(self.positions)

    def compare(self, form: PreTrainedModel, description: str) -> list[Agreement]:
        """Compare a form with the unmerged model, in the order of the rows.

        Args:
            form: In evaluation mode, with the same vocabulary.
            description: The name of the work in the progress line.
        """
        tokens, agreed_tokens = [0] * len(self.row_ids), [0] * len(self.row_ids)
        kl_nats = [0.0] * len(self.row_ids)
        self.file.seek(0)
        done, total = 0, sum(map(len, self.batches))
        for batch in self.batches:
            kl, is_same = self._compare_batch(form, batch)
            # Sums in fp64: the KL of a row is thousands of tiny numbers.
            start = 0
            for sequence in batch:
                part = slice(start, start := start + len(sequence.positions))
                tokens[sequence.row] += len(sequence.positions)
                kl_nats[sequence.row] += float(kl[part].double().sum())
                agreed_tokens[sequence.row] += int(is_same[part].sum())
            progress.update(description, done := done + len(batch), total)
        columns = (self.row_ids, self.prompts, tokens, kl_nats, agreed_tokens)
        return [Agreement(*values) for values in zip(*columns, strict=True)]

    def _compare_batch(self, form: PreTrainedModel, batch: Sequence[_Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return KL(unmerged || form) and whether both choose the same token, each (positions of the batch,)."""
        kl, is_same = [], []
        with torch.inference_mode():
            for q_logits in _batch_logits(form, batch):
                p_logits = self._read(len(q_logits)).to(q_logits.device)
                is_same.append((p_logits.argmax(-1) == q_logits.argmax(-1)).cpu())
                p, q = log_softmax(p_logits.float(), -1), log_softmax(q_logits.float(), -1)
                # Rounding can bring the KL of two nearly equal distributions slightly below 0.
                kl.append((p.exp() * (p - q)).sum(-1).clamp(min=0.0).cpu())
        return torch.cat(kl), torch.cat(is_same)

    def _read(self, count: int) -> torch.Tensor:
        """Read the next rows of logits, (count, vocab)."""
        # Into memory of our own: pages of a memory map would count as the process's as long as the system keeps them.
        buffer = torch.empty(count, self.vocab_size, dtype=self.dtype)
        if self.file.readinto(buffer.view(torch.uint8).numpy().data) != buffer.nbytes:  # type: ignore[attr-defined]
            raise OSError("the file of the unmerged model's logits is shorter than what was written to it")
        return buffer


def positions_sentence(positions: Mapping[str, int]) -> str:
    """Return a sentence on how many tokens KL and agreement rest."""
    compared, total = positions["compared"], positions["of"]
    choice = "all" if compared == total else "chosen by hash, as many as the file of logits may hold"
    return f"KL and agreement rest on {compared:,} of {total:,} supervised tokens ({choice})"


def mean_kl(agreements: Sequence[Agreement], settings: EvaluateConfig) -> Interval | None:
    """Return the mean KL divergence in nats per token, with its interval over prompts.

    Returns:
        None where the KL is not finite, or where there is no token.
    """
    return _mean_interval(agreements, [row.kl_nats for row in agreements], settings)


def greedy_agreement(agreements: Sequence[Agreement], settings: EvaluateConfig) -> Interval | None:
    """Return the fraction of tokens at which both models choose alike, with its interval over prompts.

    Returns:
        None where there is no token.
    """
    return _mean_interval(agreements, [row.agreed_tokens for row in agreements], settings)


def _mean_interval(rows: Sequence[Agreement], sums: Sequence[float], settings: EvaluateConfig) -> Interval | None:
    """Return the mean per token of rows, of which each has a sum over its tokens."""
    # No token of a row is chosen where few are.
    sums = [total for row, total in zip(rows, sums, strict=True) if row.tokens]
    rows = [row for row in rows if row.tokens]
    if not rows or not math.isfinite(sum(sums)):
        return None

    # A few rows make most of a KL divergence, so the interval must be right for skewed differences.
    tokens, prompts = [row.tokens for row in rows], [row.prompt for row in rows]
    return bootstrap.difference_interval(sums, tokens, BootstrapSettings.from_config(settings), prompts=prompts)


def _supervised_sequences(tokenizer: ChatTokenizer, rows: Sequence[Row]) -> list[_Sequence]:
    """Return the sequences of all rows, with a position for every supervised token."""
    # The logits that predict a token are one position before it; nothing predicts the first token.
    return [
        _Sequence(i, example.input_ids, [k - 1 for k, is_target in enumerate(example.supervised) if is_target and k])
        for i, examples in enumerate(row_tokens.examples(tokenizer, rows))
        for example in examples
    ]


def _choose_positions(sequences: Sequence[_Sequence], rows: Sequence[Row], max_positions: int) -> list[_Sequence]:
    """Return the sequences with at most `max_positions` positions in all; those that have none are left out.

    The positions with the smallest hashes are chosen. So every token has the same chance, whichever row it is in, and
    means per token stay right; the choice does not depend on the order of the rows.
    """
    compared: list[list[int]] = [sequence.positions for sequence in sequences]
    if sum(map(len, compared)) > max_positions:
        # Two sequences of one row begin alike, so the number of a sequence within its row enters the hash.
        numbers: dict[int, int] = {}
        hashes: list[tuple[bytes, int, int]] = []
        for i, sequence in enumerate(sequences):
            number = numbers[sequence.row] = numbers.get(sequence.row, -1) + 1
            name = f"agreement:{rows[sequence.row].id}:{number}"
            hashes += [(hashlib.sha256(f"{name}:{k}".encode()).digest()[:8], i, k) for k in sequence.positions]
        compared = [[] for _ in sequences]
        for _, i, k in sorted(sorted(hashes)[:max_positions], key=lambda item: item[1:]):
            compared[i].append(k)
    # Nothing after a sequence's last position is read.
    return [_Sequence(s.row, s.input_ids[: k[-1] + 1], k) for s, k in zip(sequences, compared, strict=True) if k]


def _batch_logits(model: PreTrainedModel, batch: Sequence[_Sequence]) -> Iterator[torch.Tensor]:
    """Yield the logits at the positions of a batch, sequence by sequence, in chunks (chunk, vocab)."""
    # Padding is on the right, where a causal model's supervised tokens cannot see it: no attention mask is needed.
    prefix = prefix_ids(model)
    ids = torch.zeros(len(batch), len(prefix) + len(batch[0].input_ids), dtype=torch.long)  # (B, T)
    for row, sequence in enumerate(batch):
        ids[row, : len(prefix) + len(sequence.input_ids)] = torch.tensor([*prefix, *sequence.input_ids])
    positions = [(row, len(prefix) + k) for row, sequence in enumerate(batch) for k in sequence.positions]
    return forward.logit_chunks(model, {"input_ids": ids, "use_cache": False}, positions)
