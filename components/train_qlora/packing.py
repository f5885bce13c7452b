"""Pack the rows of a micro-batch into one sequence, without padding and with their shared prefix only once.

This is part 2 of the hot path; `fused_lora` is part 1, `memory_efficient` part 3.

    [prefix that all rows share] [suffix of row 1] [suffix of row 2] ...        (1, T)

Every layer but attention treats tokens one by one, so no padding is computed there. The prefix that a chat template
gives to all rows (the system turn) is computed once. Tokens after the last supervised one of a row are left out. In
attention (`attention`) each row sees the prefix and itself, at the positions that it would have alone. Loss and
gradients equal those of the padded batch; nothing is approximated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface

from components.train_qlora import varlen
from components.train_qlora.attention import BACKENDS, Backend
from components.train_qlora.data import IGNORE_INDEX, Batch
from qlora_retrain.lm import learnt_prefix

PACKED = "packed_"  # before a backend's name: its name among the attention implementations of transformers
# Config fields of attention that no backend computes.
UNSUPPORTED_OPTIONS = ("attn_logit_softcapping", "attention_chunk_size")
# oneDNN builds and keeps a kernel for every matrix size (20 MB for the products of one layer). Rounding up the number
# of packed tokens, and the length of rows in attention, keeps the number of sizes small.
TOKENS_MULTIPLE, ROW_LENGTH_MULTIPLE = 16, 8
IS_PACKABLE = WeakKeyDictionary[torch.nn.Module, bool]()  # by output layer: what `row_probe` measured


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The rows of a batch as one sequence of T tokens, with the layout from which attention restores the rows.

    Attributes:
        input_ids: (1, T)
        position_ids: (1, T), within each token's own row
        labels: (1, T), the label of the next token; `IGNORE_INDEX` where nothing is learnt
        prefix_len: the number of tokens in the prefix that all rows share
        layout: the layout of the rows, which the backend made
        dtype: the type in which attention computes
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    prefix_len: int
    layout: Any
    dtype: torch.dtype


def backend_name(model: Any) -> str:
    """Return the name of the backend that the model's attention stands for; transformers' own where we have none."""
    name: str = model.config.get_text_config()._attn_implementation.removeprefix(PACKED)
    # Both are torch's fused attention; over packed rows, one needs padding and a mask in memory.
    return "varlen" if name == "sdpa" and varlen.is_available(model.device, model.dtype) else name


def backend(model: Any) -> Backend:
    """Return the backend for the rows of the model; `eager`, which computes nothing then, where none can be packed."""
    return BACKENDS.get(backend_name(model), BACKENDS["eager"])


def obstacle(model: Any) -> str | None:
    """Return why the model's rows cannot be packed, as the predicate of a sentence; None where they can."""
    config, name = model.config.get_text_config(), backend_name(model)
    if learnt_prefix.is_learnt(model):
        return "reads a learnt prefix from a cache, which packed rows have not"
    if name not in BACKENDS:
        return f"computes {name} attention, which takes padded rows"
    if not getattr(model, "_supports_attention_backend", False):
        return "computes attention in code of its own"
    if options := [option for option in UNSUPPORTED_OPTIONS if getattr(config, option, None)]:
        return f"has {' and '.join(options)}, which packed attention has not"

    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if others := layer_types - {"full_attention", "sliding_attention"}:
        return f"has layers of {' and '.join(sorted(others))}, which packed attention has not"
    has_windows = getattr(config, "sliding_window", None) or "sliding_attention" in layer_types
    if has_windows and not BACKENDS[name].has_windows:
        return "has windows, which packed attention has only on a GPU, in 16 bits, with sdpa"
    if not IS_PACKABLE.get(model.get_output_embeddings(), True):
        return "does not compute packed rows like single ones"
    return None


def can_pack(model: Any) -> bool:
    """Return whether a backend computes what the model's attention does, as far as is known."""
    return obstacle(model) is None


def pack(batch: Batch, dtype: torch.dtype, backend: Backend = BACKENDS["eager"]) -> PackedBatch:
    """Pack a batch whose rows are padded on the right, for a backend that computes attention in a type."""
    input_ids, labels = batch["input_ids"], batch["labels"]  # (B, seq)
    next_labels = pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, seq): what each position must predict
    mask = batch["attention_mask"].bool() & mask_until_last_label(next_labels != IGNORE_INDEX)
    prefix_len = shared_prefix_len(input_ids, mask, next_labels) if backend.shares_prefix else 0
    suffix_mask = lengthen_to_multiple(mask[:, prefix_len:], prefix_len)
    num_rows, suffix_len = suffix_mask.shape

    # Rounding up may reach beyond the padded batch, which is then lengthened. Positions stay below its length, since
    # the model may have no larger ones.
    last_position = input_ids.shape[1] - 1
    input_ids, next_labels = (
        pad(x, (0, max(0, prefix_len + suffix_len - last_position - 1)), value=IGNORE_INDEX)
        for x in (input_ids, next_labels)
    )
    positions = (
        torch.arange(prefix_len + suffix_len, device=input_ids.device).clamp(max=last_position).expand(num_rows, -1)
    )

    def flatten_rows(x: Tensor) -> Tensor:  # (B, seq) to (1, T)
        return torch.cat([x[0, :prefix_len], x[:, prefix_len : prefix_len + suffix_len][suffix_mask]]).unsqueeze(0)

    return PackedBatch(
        flatten_rows(input_ids).clamp(min=0),  # the fill value -100 is no valid token
        flatten_rows(positions),
        flatten_rows(next_labels),
        prefix_len,
        backend.new_layout(suffix_mask, prefix_len, dtype),
        dtype,
    )


def num_micro_batches(
    batch: Batch, micro_batch_size: int, *, is_packed: bool, backend: Backend = BACKENDS["eager"]
) -> int:
    """Return the smallest number of micro-batches that fits the memory of `micro_batch_size` padded rows.

    No micro-batch may compute more tokens than those padded rows, and attention must stay in the memory of as many: the
    eager backend pads to the longest row of a micro-batch, so one with many short rows beside a long one is split.
    """
    input_ids, num_rows = batch["input_ids"], len(batch["input_ids"])
    if not is_packed:
        return -(-num_rows // micro_batch_size)
    next_labels = pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    mask = batch["attention_mask"].bool() & mask_until_last_label(next_labels != IGNORE_INDEX)
    prefix_len = shared_prefix_len(input_ids, mask, next_labels) if backend.shares_prefix else 0
    row_tokens = mask.sum(1)
    suffix_lens, max_tokens = (row_tokens - prefix_len).tolist(), micro_batch_size * int(row_tokens.max())

    def split(count: int) -> list[list[int]]:
        return [suffix_lens[i * num_rows // count : (i + 1) * num_rows // count] for i in range(count)]

    # All suffix tokens together need at least this many micro-batches, so the search begins there.
    min_parts = max(1, sum(suffix_lens) // max(max_tokens - prefix_len, 1))
    return next(
        count
        for count in range(min_parts, num_rows + 1)
        if all(
            sum(lens) <= max_tokens - prefix_len and backend.fits(lens, prefix_len, max_tokens) for lens in split(count)
        )
    )


def split_batch(batch: Batch, count: int) -> list[Batch]:
    """Split the batch into `count` micro-batches; where rows run out, a micro-batch gets one row without labels."""
    num_rows = len(batch["input_ids"])
    parts = [
        {k: v[i * num_rows // count : (i + 1) * num_rows // count] for k, v in batch.items()} for i in range(count)
    ]
    unlabelled = {k: v[:1] for k, v in batch.items()} | {"labels": torch.full_like(batch["labels"][:1], IGNORE_INDEX)}
    return [part if len(part["input_ids"]) else unlabelled for part in parts]


def mask_until_last_label(is_labelled: Tensor) -> Tensor:
    """Return (B, seq) bool, true up to each row's last labelled position; later positions do not affect the loss."""
    is_needed = is_labelled.flip(1).cumsum(1).flip(1) > 0
    is_needed[:, 0] = True  # a row is never empty
    return is_needed


def shared_prefix_len(input_ids: Tensor, mask: Tensor, next_labels: Tensor) -> int:
    """Return the number of unlabelled tokens that all rows begin with; it is less than any row's length."""
    if len(input_ids) == 1:
        return 0
    is_shared = ((input_ids == input_ids[0]) & mask & (next_labels == IGNORE_INDEX)).all(dim=0)
    # A row needs a token of its own: `attention` gives every row at least one query.
    return min(int(is_shared.int().cumprod(0).sum()), int(mask.sum(1).min()) - 1)


def lengthen_to_multiple(suffix_mask: Tensor, prefix_len: int) -> Tensor:
    """Lengthen the shortest rows of the mask (B, width), so that T is a multiple of `TOKENS_MULTIPLE`.

    An added token comes after all tokens of its row that affect the loss, so none of these sees it.
    """
    num_rows, num_tokens = len(suffix_mask), int(suffix_mask.sum())
    num_added = -(prefix_len + num_tokens) % TOKENS_MULTIPLE
    width = max(int(suffix_mask.any(0).sum()), -(-(num_tokens + num_added) // num_rows))
    width = -(-width // ROW_LENGTH_MULTIPLE) * ROW_LENGTH_MULTIPLE

    # In column-major order the first free places are those of the shortest rows, so no row gets a gap.
    by_column = pad(suffix_mask, (0, max(0, width - suffix_mask.shape[1])))[:, :width].T.contiguous()
    by_column.view(-1)[(~by_column).view(-1).nonzero()[:num_added, 0]] = True
    return by_column.T


@contextlib.contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Switch the model to packed attention inside the context, where it supports that; may be nested."""
    config = model.config.get_text_config()
    original_implementation = config._attn_implementation
    if can_pack(model):
        config._attn_implementation = PACKED + backend_name(model)
    try:
        yield
    finally:
        config._attn_implementation = original_implementation


def packed_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    *,
    scaling: float,
    packed_batch: PackedBatch,
    attend: Callable[..., Tensor],
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each row; (1, H, T, D) in, (1, T, H, DV) out.

    Raises:
        ValueError: If a family asks for more than that; `row_probe` finds it out before training.
    """
    if softcap or s_aux is not None or sliding_window != layer_window(module):
        raise ValueError("packed attention has no cap, no sink, and only the windows that the model's config gives")
    # Where weights are wider than the compute type, rotary embeddings leave queries and keys wider than values.
    # (1, H, T, D), (1, K, T, D), (1, K, T, DV) to (T, H, D), (T, K, D), (T, K, DV)
    # `squeeze`, since the gradient of an index is a copy.
    qkv = (x.squeeze(0).transpose(0, 1).to(packed_batch.dtype) for x in (query, key, value))
    return attend(*qkv, packed_batch.layout, scaling, sliding_window).unsqueeze(0), None


def layer_window(module: Any) -> int | None:
    """Return the window that a layer has by the model's config, in tokens; None: it sees all tokens before."""
    config = module.config
    layer_types = getattr(config, "layer_types", None)
    has_window = layer_types is None or layer_types[module.layer_idx] == "sliding_attention"
    window: int | None = (getattr(config, "sliding_window", None) or None) if has_window else None
    return window


# transformers makes no mask for a name that is not in its `AttentionMaskInterface`: the layout is the mask. For a name
# that is there, it would ask the GPU whether several rows are packed, and wait for the answer.
for _name, _backend in BACKENDS.items():
    AttentionInterface.register(PACKED + _name, partial(packed_attention_forward, attend=_backend.attend))
