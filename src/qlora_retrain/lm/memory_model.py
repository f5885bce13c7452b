"""Estimate the memory of a training step from the sizes of the model and the settings alone, part by part.

Pure arithmetic, without torch, of what the training step allocates: `fused_lora` keeps the input of a group of layers
once, `memory_efficient` recomputes the outputs of norms and gates, `loss` has a chunk of logits at a time, and packed
rows have no padding. Where training leaves a module to autograd, what autograd keeps is counted.

    estimate(ModelShape.from_config(config), Settings(...), MicroBatch(rows=8, longest=512)).total     bytes
    largest_micro_batch(shape, settings, memory_bytes, longest=512, ...)                               rows
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_retrain.lm import small_adapters
from qlora_retrain.lm.adapter_scale import FULL, initial_rank
from qlora_retrain.lm.base_formats import BaseFormat, FourBits, from_settings
from qlora_retrain.lm.base_formats.int4 import GROUP_SIZE
from qlora_retrain.lm.model_shape import LinearLayer, ModelShape
from qlora_retrain.lm.step_memory import StepMemory

# bitsandbytes keeps the states of smaller tensors in 32 bits, and a scale of 32 bits for 256 states of 8 bits.
_MIN_8_BIT_STATE, _BLOCK_8_BIT = 4096, 256
_DEFAULT_FORMAT = FourBits("nf4", double_quant=True, compute_dtype="bfloat16")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a line that decide about memory.

    Attributes:
        method: The method of the adapter.
        rank: The adapter's, with which training begins.
        target_modules: `all-linear`, `attention`, `mlp`, names of layers, or a pattern, which is taken for all of them.
        dropout: On the adapter's input.
        optimizer_bits: 32 or 8.
        is_paged: Whether the optimizer's states may move to the host's memory.
        device: `cpu` or `cuda`.
        precision: `bfloat16` or `float32`; with the latter the base is dequantized once.
        attention: `eager` keeps scores of every pair of positions; any other name stands for a fused kernel.
        kernels: `torch` or `liger`.
        checkpoint_every: Recompute every n-th layer in the backward pass; 0: none.
        offloads: Whether the inputs of recomputed layers wait in the host's memory.
        base_format: How the frozen base's linear layers are stored.
        accumulates: Whether an optimizer step has several micro-batches.
        num_processes: The processes that share an optimizer step.
        is_sharded: Whether each of them has only a part of the base.
        virtual_tokens: The tokens that learn before each row.
        whole_modules: How many of the embeddings and the output layer learn whole beside the adapter.
    """

    method: str = "lora"
    rank: int = 16
    target_modules: str | Sequence[str] = "all-linear"
    dropout: float = 0.05
    optimizer_bits: int = 32
    is_paged: bool = True
    device: str = "cuda"
    precision: str = "bfloat16"
    attention: str = "sdpa"
    kernels: str = "torch"
    checkpoint_every: int = 0
    offloads: bool = False
    base_format: BaseFormat = _DEFAULT_FORMAT
    accumulates: bool = False
    num_processes: int = 1
    is_sharded: bool = False
    virtual_tokens: int = 0
    whole_modules: int = 0

    @classmethod
    def from_sections(cls, train: Mapping[str, Any], quantize: Mapping[str, Any]) -> Settings:
        """Take them from the values of the sections `train` and `quantize`, none of which is `auto`."""
        return cls.from_train(train, from_settings(quantize))

    @classmethod
    def from_train(cls, train: Mapping[str, Any], base_format: BaseFormat) -> Settings:
        """Take them from the values of the section `train`, none of which is `auto`, and the base's format."""
        rows_of_process = -(-train["global_batch_size"] // train["num_processes"])
        micro_batch_size, recomputed = train["micro_batch_size"], train["gradient_checkpointing"]
        is_fixed = isinstance(micro_batch_size, int)
        return cls(
            method=train["method"],
            # Patterns are of paths, which are not known here: the largest rank is an upper bound.
            rank=max([initial_rank(train["rank"], train["method"]), *train["rank_pattern"].values()]),
            target_modules=train["target_modules"],
            dropout=train["dropout"],
            optimizer_bits=8 if train["optimizer"].endswith("8bit") else 32,
            is_paged=train["optimizer"].startswith("paged_") and train["device"] == "cuda",
            device=train["device"],
            precision=train["precision"],
            attention=train["attention"],
            kernels=train["kernels"],
            checkpoint_every=1 if recomputed == "offload" else recomputed or 0,
            offloads=recomputed == "offload",
            base_format=base_format,
            accumulates=not is_fixed or rows_of_process > micro_batch_size,
            num_processes=train["num_processes"],
            is_sharded=train["parallel"] == "fsdp",
            virtual_tokens=small_adapters.num_virtual_tokens(train),
            whole_modules=len(train.get("modules_to_save") or ()),
        )

    @property
    def bytes_per_number(self) -> int:
        """The bytes of a number in the precision of the arithmetic."""
        return 4 if self.precision == "float32" else 2


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows that go through the model at once.

    Attributes:
        rows: Their number.
        longest: The tokens of the longest row.
        tokens: The tokens of all rows without padding, the shared prefix once; None: as many as `rows` longest rows.
        supervised: Those with a loss; None: all.
    """

    rows: int
    longest: int
    tokens: int | None = None
    supervised: int | None = None

    def after(self, virtual_tokens: int) -> MicroBatch:
        """Return the rows with so many tokens before each, which packed rows share; nothing is learnt at them."""
        if not virtual_tokens:
            return self
        supervised = self.rows * self.longest if self.supervised is None else self.supervised
        tokens = None if self.tokens is None else self.tokens + virtual_tokens
        return MicroBatch(self.rows, self.longest + virtual_tokens, tokens, supervised)


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a training process at the peak of an optimizer step, in bytes.

    Attributes:
        weights: The base: linear layers in its format, scales included, embeddings and norms.
        adapter: Its matrices in fp32, and what the method keeps beside them; where all weights train, their masters.
        gradients: Of what trains.
        optimizer: Two moments of every number that trains.
        activations: What the forward pass keeps for the backward pass.
        logits: A chunk of logits, where the peak is there, else 0.
        workspace: What the backward pass of a layer needs beside that, where the peak is there.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.static + self.activations + self.logits + self.workspace

    @property
    def static(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.adapter + self.gradients + self.optimizer

    def parts(self) -> dict[str, int]:
        """Return the parts by name, in bytes."""
        return {name: getattr(self, name) for name in self.__slots__}


def estimate(shape: ModelShape, settings: Settings, batch: MicroBatch) -> Memory:
    """Estimate the memory of a training process at the peak of an optimizer step."""
    tensors = small_adapters.trained_tensors(shape, settings.method, settings.rank, settings.virtual_tokens)
    adapted = adapted_layers(shape, settings.target_modules) if tensors is None else []
    step = StepMemory(shape, settings, batch.after(settings.virtual_tokens), adapted)
    layer, layer_input = step.activations_of_layer(), step.numbers(shape.width)

    # Of n layers the first is recomputed: it keeps its input alone, and all again when its turn comes.
    every = settings.checkpoint_every
    recomputed = math.ceil(shape.layers / every) if every else 0
    is_last_recomputed = bool(every) and (shape.layers - 1) % every == 0
    num_inputs = min(recomputed, 2) if settings.offloads else recomputed  # on the device; two are on their way
    activations = step.of_all_layers() + num_inputs * layer_input + (shape.layers - recomputed) * layer
    backward = step.backward_of_layer() + (layer - layer_input if is_last_recomputed else 0)
    # The peak is either where the loss is computed, or where the backward pass begins: nothing was freed before.
    logits = step.logits()
    is_at_logits = logits >= backward

    if settings.method == FULL:
        parts = _full_parts(shape, settings)
        # Or the peak is where the backward pass ends, with three gradients of the embeddings: the part of a shared
        # output layer, that of the tokens, and their sum.
        ending = (3 if shape.is_tied else 1) * settings.bytes_per_number * shape.width * shape.vocabulary
        backward = max(backward, ending - activations)
        is_at_logits = logits >= backward
        return Memory(*parts, activations, logits if is_at_logits else 0, 0 if is_at_logits else backward)

    # Gradients exist at the peak only where an earlier micro-batch made them, or DDP has buffers for them.
    adapter_weights = shape.layers * sum(settings.rank * (layer.in_width + layer.out_width) for layer in adapted)
    if tensors is None:
        tensors = [size for layer in adapted for size in _trained_tensors(settings, layer)] * shape.layers
    trained = sum(tensors)
    frozen = adapter_weights if settings.method == "lora-xs" else 0
    whole = settings.whole_modules * shape.width * shape.vocabulary
    return Memory(
        weights=weight_bytes(shape, settings),
        # AdaLoRA has two moving averages of the score of every number.
        # What learns whole is there beside the base's own; of 16-bit weights the optimizer has fp32 masters.
        adapter=4 * ((3 * trained if settings.method == "adalora" else trained) + frozen)
        + whole * (4 if settings.precision == "float32" else 6),
        gradients=4 * trained * (settings.accumulates + (settings.num_processes > 1))
        + 4 * whole * (2 if settings.num_processes > 1 else 1),
        optimizer=sum(_state_bytes(size, settings) for size in tensors)
        + settings.whole_modules * _state_bytes(shape.width * shape.vocabulary, settings),
        activations=activations,
        logits=logits if is_at_logits else 0,
        workspace=0 if is_at_logits else backward,
    )


def largest_micro_batch(
    shape: ModelShape, settings: Settings, memory_bytes: int, longest: int, tokens_per_row: float | None, limit: int
) -> int:
    """Return the largest number of rows, at most `limit`, whose step fits into a memory; 0 where not one row does.

    Args:
        shape: The model's.
        settings: The line's.
        memory_bytes: What a training process may allocate.
        longest: The tokens of the longest row.
        tokens_per_row: The mean of a micro-batch's tokens per row; None: as many as the longest row.
        limit: The largest number that is asked for: the rows of an optimizer step in a process.
    """
    fitting, failing = 0, limit + 1
    while failing - fitting > 1:
        rows = (fitting + failing) // 2
        tokens = None if tokens_per_row is None else math.ceil(rows * tokens_per_row)
        fits = estimate(shape, settings, MicroBatch(rows, longest, tokens)).total <= memory_bytes
        fitting, failing = (rows, failing) if fits else (fitting, rows)
    return fitting


def adapted_layers(shape: ModelShape, target_modules: str | Sequence[str]) -> list[LinearLayer]:
    """Return the linear layers of a decoder layer that get an adapter; all of them where no name is one of them."""
    if target_modules == "all-linear":
        return list(shape.linear_layers)
    if target_modules == "attention":
        return [layer for layer in shape.linear_layers if layer.group in ("qkv", "o")]
    if target_modules == "mlp":
        return [layer for layer in shape.linear_layers if layer.group not in ("qkv", "o")]
    return [layer for layer in shape.linear_layers if layer.name in target_modules] or list(shape.linear_layers)


def weight_bytes(shape: ModelShape, settings: Settings) -> int:
    """Return the bytes of the frozen base in a training process."""
    if settings.precision == "float32":
        return 4 * shape.weights
    codes = shape.layer_weights * settings.base_format.code_bits_per_weight / 8
    scales = shape.layer_weights * settings.base_format.bits_per_weight / 8 - codes
    if settings.is_sharded:
        codes = codes / settings.num_processes + codes / shape.layers  # and the layer that is gathered
    return round(codes + scales) + 2 * (shape.embedding_weights + shape.norm_weights)


def _trained_tensors(settings: Settings, layer: LinearLayer) -> list[int]:
    """Return the numbers in each tensor that trains in a layer's adapter."""
    inputs = layer.in_width // GROUP_SIZE if settings.method == "qa-lora" else layer.in_width
    matrices = [settings.rank * inputs, settings.rank * layer.out_width]
    if settings.method == "dora":
        return [*matrices, layer.out_width]
    if settings.method == "ir-qlora":
        return [*matrices, 2]  # the factors of both averages
    return [settings.rank**2] if settings.method == "lora-xs" else matrices


def _full_parts(shape: ModelShape, settings: Settings) -> tuple[int, int, int, int]:
    """Return weights, masters, gradients and states where all weights train.

    With 16-bit weights the masters and the gradients are in fp32. All gradients are counted: they are whole at the end
    of a backward pass, and from the first micro-batch on where there are several.
    """
    is_float32 = settings.precision == "float32"
    layer_tensors = [layer.weights for layer in shape.linear_layers] * shape.layers
    embeddings = [shape.embedding_weights] if shape.is_tied else [shape.embedding_weights // 2] * 2
    states = sum(_state_bytes(size, settings) for size in (*layer_tensors, *embeddings)) + 8 * shape.norm_weights
    gradients = 4 * shape.weights * (2 if settings.num_processes > 1 else 1)  # and DDP's buffers
    return (4 if is_float32 else 2) * shape.weights, 0 if is_float32 else 4 * shape.weights, gradients, states


def _state_bytes(size: int, settings: Settings) -> int:
    """Return the bytes of the two moments of a tensor with so many numbers."""
    is_packed = settings.optimizer_bits == 8 and size >= _MIN_8_BIT_STATE
    return 2 * (size + 4 * -(-size // _BLOCK_8_BIT)) if is_packed else 8 * size
