"""What training computes, against the same computed plainly: adapters, dropout, packed rows, the loss in chunks."""

import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, linear
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from components.train_qlora import (
    adapter,
    fused_lora,
    liger,
    loss,
    memory_efficient,
    offload,
    packing,
    padded_rows,
)
from components.train_qlora.data import IGNORE_INDEX, PaddingCollator
from components.train_qlora.methods import Lora
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm import chat, loading

# QLoRA (arXiv 2305.14314), appendix E
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
REFERENCE_LOSSES = [61.20205, 50.62615]  # their origin is in the test that uses them


def new_model(nf4: Path, **settings: Any):
    """The 4-bit tiny model with an adapter whose B is not zero, ready to train, in fp32."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"rank": 4, "alpha": 12, "dropout": 0.0, "device": "cpu"}
    base = loading.load_nf4(
        nf4, dtype=settings.pop("dtype", "float32"), attn_implementation=settings.pop("attention", "eager")
    )
    model = adapter.attach_new(base, TrainConfig(**(defaults | settings))).train()
    # A new adapter has B = 0, and with it no gradient of A.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def take_gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradients by parameter name; the model's own are cleared."""
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


@pytest.fixture
def new_rows(nf4, chats):
    """Make tokenized rows; with `shared`, all begin with a system turn of `times` sentences."""
    tokenizer = chat.load_tokenizer(nf4)

    def make(count: int, *, shared: bool = True, times: int = 1) -> list[dict[str, list[int]]]:
        system = {"role": "system", "content": " ".join(["Name the intent."] * times)}
        encoded = [tokenizer.encode([system, *turns] if shared else turns)[0] for turns in chats(count)]
        return [
            {
                "input_ids": e.input_ids,
                "labels": [t if s else IGNORE_INDEX for t, s in zip(e.input_ids, e.supervised, strict=True)],
            }
            for e in encoded
        ]

    return make


def test_the_forward_is_that_of_w_plus_the_scaled_product_of_b_and_a(nf4):
    model = new_model(nf4, dtype="bfloat16")
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    x = torch.randn(2, 5, 128)
    # In fp64, so that what differs is the layer's own rounding.
    w = dequantize_4bit(layer.base_layer.weight, layer.base_layer.weight.quant_state).double()
    b, a = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
    expected = x.double() @ (w + 12 / 4 * (b @ a)).T
    assert torch.allclose(layer(x).double(), expected, rtol=0.01, atol=0.02)  # W is bf16, x fp32


def test_stored_codes_are_the_published_nf4_values_times_the_scale_of_their_block(nf4):
    layer = loading.load_nf4(nf4, dtype="bfloat16").model.layers[0].mlp.up_proj
    state = layer.weight.quant_state
    # A byte holds two codes, the first in its upper half.
    codes = torch.stack([layer.weight.flatten() >> 4, layer.weight.flatten() & 15], dim=1).flatten().long()
    # Double quantization: the scales are themselves in 8 bits, with a scale for each 256 of them.
    inner = state.state2
    scales = inner.code[state.absmax.long()] * inner.absmax.repeat_interleave(256)[: len(state.absmax)] + state.offset
    expected = torch.tensor(PUBLISHED_NF4)[codes] * scales.repeat_interleave(64)
    assert torch.equal(dequantize_4bit(layer.weight, state).flatten(), expected.to(torch.bfloat16))


def test_fused_layers_have_the_loss_and_the_gradients_of_peft(nf4, new_rows):
    fused_model = new_model(nf4)
    peft_model = get_peft_model(
        loading.load_nf4(nf4), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    # The weights stay in PEFT's modules, so both models have the same names for them.
    peft_model.load_state_dict(fused_model.state_dict())
    batch = PaddingCollator(0)(new_rows(6))

    results = []
    for model in (fused_model, peft_model):
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
        output.loss.backward()
        results.append((output.loss.item(), take_gradients(model)))

    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[1][1].items():
        assert torch.allclose(results[0][1][name], gradient, rtol=1e-3, atol=1e-6), name


def test_layers_that_share_an_input_are_one_group(nf4):
    model = new_model(nf4)
    # In each of two layers: q k v, o, gate up, down.
    assert fused_lora.fuse_lora_layers(model, Lora(TrainConfig(rank=4))) == 2 * 4


@pytest.mark.parametrize(("attention", "block_length"), [("eager", 128), ("eager", 16), ("sdpa", 128)])
@pytest.mark.parametrize("sentences", [0, 1, 9])  # in the prefix: none, fewer and more tokens than a row's own
def test_padded_rows_have_the_loss_and_the_gradients_of_each_row_alone(
    nf4, new_rows, attention, block_length, sentences, monkeypatch
):
    monkeypatch.setattr(padded_rows, "BLOCK_LENGTH", block_length)  # rows in one block, or in several
    model = new_model(nf4, attention=attention)
    rows = new_rows(5, shared=sentences > 0, times=sentences)
    layout = packing.pack(PaddingCollator(0)(rows), torch.float32).layout
    assert (layout.prefix_len > layout.query_tokens.shape[1]) == (sentences == 9)
    assert 16 < layout.query_tokens.shape[1] < 128

    for row in rows:  # unpadded, full logits, torch's own loss
        labels = torch.tensor(row["labels"][1:])
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum").backward()
    expected = take_gradients(model)

    loss.summed_loss(model, PaddingCollator(0)(rows)).backward()
    for name, gradient in take_gradients(model).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), name


def test_the_shared_prefix_is_computed_once(new_rows):
    rows = new_rows(5)
    packed = packing.pack(PaddingCollator(0)(rows), torch.float32)
    prefix_len = next(i for i in range(99) if len({row["input_ids"][i] for row in rows}) > 1)
    assert packed.prefix_len == prefix_len > 5
    # The last label's own position predicts nothing, so a row needs as many tokens as that position's number.
    needed = [max(i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX) for row in rows]
    assert packed.input_ids.shape[1] == packing.TOKENS_MULTIPLE * math.ceil(
        (sum(needed) - 4 * prefix_len) / packing.TOKENS_MULTIPLE
    )
    assert int((packed.labels != IGNORE_INDEX).sum()) == sum(
        label != IGNORE_INDEX for row in rows for label in row["labels"][1:]
    )


def test_a_token_that_predicts_a_label_is_never_in_the_shared_prefix():
    rows = [{"input_ids": [7, 8, 9, end], "labels": [IGNORE_INDEX, IGNORE_INDEX, 9, end]} for end in (1, 2)]
    packed = packing.pack(PaddingCollator(0)(rows), torch.float32)
    assert packed.prefix_len == 1  # 8 predicts the supervised 9, in each row
    equal_rows = [{"input_ids": [7, 8], "labels": [IGNORE_INDEX, IGNORE_INDEX]}] * 2
    assert packing.pack(PaddingCollator(0)(equal_rows), torch.float32).prefix_len == 0  # never a whole row


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 20])
@pytest.mark.parametrize("sentences", [0, 1, 9])
def test_a_micro_batch_has_at_most_the_tokens_of_its_padded_rows_and_fewer_micro_batches_would_not_do(
    new_rows, micro_batch_size, sentences
):
    rows = new_rows(20, shared=sentences > 0, times=sentences)
    batch = PaddingCollator(0)(sorted(rows, key=lambda row: -len(row["input_ids"])))
    count = max(packing.num_micro_batches(batch, micro_batch_size, is_packed=True), 1)

    def max_tokens(count: int) -> int:  # of the longest micro-batch
        packed = [packing.pack(part, torch.float32) for part in packing.split_batch(batch, count)]
        return max(each.input_ids.shape[1] for each in packed)

    is_labelled = batch["labels"][:, 1:] != IGNORE_INDEX
    limit = micro_batch_size * max(int(row.nonzero().max()) + 1 for row in is_labelled)
    assert max_tokens(count) < limit + packing.TOKENS_MULTIPLE  # the limit holds before tokens are rounded up
    assert count == 1 or max_tokens(count - 1) > limit
    assert (
        packing.num_micro_batches(batch, micro_batch_size, is_packed=False) == math.ceil(20 / micro_batch_size) >= count
    )


def test_many_short_rows_beside_a_long_one_do_not_fill_attention_with_padding():
    """64 short rows and a long one have few tokens; padded to the long one they would be four times sixteen rows."""
    lengths = [1000, *[50] * 63]
    batch = PaddingCollator(0)([{"input_ids": [*range(n)], "labels": [*range(n)]} for n in lengths])
    count = packing.num_micro_batches(batch, 16, is_packed=True)
    assert count == 2
    assert packing.num_micro_batches(batch, 64, is_packed=True) == 1
    # Positions of attention, its padding included.
    num_positions = [
        packing.pack(part, torch.float32).layout.attn_bias.shape[:2].numel()
        for part in packing.split_batch(batch, count)
    ]
    assert max(num_positions) <= 2 * 16 * 1000


def test_a_split_batch_has_the_gradients_of_the_whole(nf4, new_rows):
    # Without dropout, which draws other positions for other micro-batches.
    model, batch = new_model(nf4), PaddingCollator(0)(new_rows(5))
    loss.summed_loss(model, batch).backward()
    expected = take_gradients(model)
    for count in (2, 5, 7):  # more parts than rows: from some nothing is learnt
        for part in packing.split_batch(batch, count):
            loss.summed_loss(model, part).backward()
        for name, gradient in take_gradients(model).items():
            assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_packed_and_a_padded_batch_have_the_same_loss(nf4, new_rows, attention, shared, monkeypatch):
    model = loading.load_nf4(nf4, attn_implementation=attention)
    batch = PaddingCollator(0)(new_rows(7, shared=shared))
    with torch.no_grad():
        packed_loss = float(loss.summed_loss(model, batch))
        monkeypatch.setattr(packing, "can_pack", lambda _: False)
        assert packed_loss == pytest.approx(float(loss.summed_loss(model, batch)), rel=1e-5)


def test_a_model_whose_attention_has_a_window_gets_padded_batches():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    mistral = MistralForCausalLM(MistralConfig(vocab_size=50, num_key_value_heads=1, sliding_window=4, **sizes))
    mistral.set_attn_implementation("eager")
    assert not packing.can_pack(mistral)
    with packing.packed_attention(mistral):
        assert mistral.config._attn_implementation == "eager"

    mistral.config.sliding_window = None
    assert packing.can_pack(mistral)
    # Nested, as in a training step: the outer one spans backward too.
    with packing.packed_attention(mistral), packing.packed_attention(mistral):
        assert packing.can_pack(mistral)
    assert mistral.config._attn_implementation == "eager"

    llama = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    llama.set_attn_implementation("eager")
    assert packing.can_pack(llama)


def test_the_loss_in_chunks_has_the_value_and_the_gradient_of_the_whole(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": 7 * 4 * 50})
    torch.manual_seed(0)
    hidden, head = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8)
    labels = torch.randint(0, 50, (30,))
    # The factor shows that the gradient is scaled by that of the loss, which 1 would not.
    (3 * cross_entropy(linear(hidden, head), labels, reduction="sum")).backward()
    expected, hidden.grad = hidden.grad, None

    chunked = loss.ChunkedCrossEntropy.apply(hidden, head, None, labels, None)
    assert chunked.item() == pytest.approx(
        cross_entropy(linear(hidden, head), labels, reduction="sum").item(), rel=1e-5
    )
    (3 * chunked).backward()
    assert torch.allclose(hidden.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_dropout_leaves_out_the_share_that_was_asked_for(probability):
    torch.manual_seed(0)
    mask = torch.ones(1000, 1001)
    mask.view(-1)[fused_lora.sample_dropout_indices(mask.numel(), probability, mask.device)] = 0
    assert float(mask.mean()) == pytest.approx(1 - probability, abs=0.002)
    for means in (mask.mean(0), mask.mean(1)):  # no column and no row is favoured
        assert float(means.std()) == pytest.approx((probability * (1 - probability) / 1000) ** 0.5, rel=0.1)


def test_dropout_of_a_handful_of_numbers_has_the_probability_that_was_asked_for():
    torch.manual_seed(0)
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[fused_lora.sample_dropout_indices(5, 0.4, counts.device).unique()] += 1
    # A whole number of draws cannot give 0.4 exactly; with the nearest number of draws it is this.
    assert counts.div(4000).tolist() == pytest.approx([1 - 0.8 ** round(math.log(0.6) / math.log(0.8))] * 5, abs=0.03)


def test_dropout_touches_the_adapter_alone_and_keeps_its_mean(nf4):
    model = new_model(nf4, dropout=0.5)
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        base_output = layer.base_layer(x)
        outputs = torch.stack([layer(x) for _ in range(4000)])
        expected = base_output + 3 * linear(linear(x, layer.lora_A["default"].weight), layer.lora_B["default"].weight)
        # Four standard errors of the mean of 4000 draws.
        assert torch.allclose(outputs.mean(0), expected, atol=4 * float(outputs.std(0).max()) / 4000**0.5 + 1e-4)
        assert float(outputs.std(0).min()) > 0
        layer.lora_B["default"].weight.zero_()
        assert torch.equal(layer(x), base_output)


def test_the_gradient_with_dropout_is_that_of_the_mask_that_was_sampled():
    torch.manual_seed(0)
    base_layer = torch.nn.Linear(6, 5, bias=False).requires_grad_(False)
    x, a, b = torch.randn(4, 6), torch.randn(2, 6), torch.randn(5, 2)
    # Positions are drawn with replacement, so one may come twice.
    dropout_index = torch.tensor([1, 8, 8, 21])
    mask = torch.ones(24).index_fill(0, dropout_index, 0).view(4, 6)

    fused = [t.clone().requires_grad_() for t in (x, a, b)]
    plain = [t.clone().requires_grad_() for t in (x, a, b)]
    frozen = [(base_layer, lambda layer: layer.weight)]
    fused_lora.FusedLoRAFunction.apply(
        fused[0], torch.Tensor.detach, [fused[0]], dropout_index, 2.0, frozen, *fused[1:]
    )[0].square().sum().backward()
    (base_layer(plain[0]) + 2.0 * (plain[0] * mask) @ plain[1].T @ plain[2].T).square().sum().backward()
    for actual, expected in zip(fused, plain, strict=True):
        assert torch.allclose(actual.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_the_first_losses_are_those_of_the_reference(nf4, new_rows):
    # Origin: PEFT's own modules and torch's cross entropy over the full logits of padded batches, in fp32.
    model = new_model(nf4)
    rows = new_rows(8)
    losses = [loss.summed_loss(model, PaddingCollator(0)(rows[i : i + 4])).item() for i in (0, 4)]
    assert losses == pytest.approx(REFERENCE_LOSSES, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patched_norms_and_mlps_compute_what_the_modules_do_and_the_same_gradients(dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).to(dtype).requires_grad_(False)
    layer = model.model.layers[0]
    # A new norm's weight is 1, which would hide a wrong use of it.
    with torch.no_grad():
        layer.input_layernorm.weight.copy_(torch.rand(32) + 0.5)

    results = []
    for _ in range(2):  # as they are, then patched
        x = torch.linspace(-3, 3, 5 * 32, dtype=dtype).view(1, 5, 32).requires_grad_()
        y = layer.mlp(layer.input_layernorm(x))
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
        assert memory_efficient.patch_norms_and_mlps(model) == 4 or results[1:]  # three norms and an MLP

    assert torch.equal(results[0][0], results[1][0])
    # The backward pass rounds elsewhere than autograd's: fp32 in between, where autograd has bf16.
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert torch.allclose(
        results[0][1], results[1][1], rtol=tolerance, atol=tolerance * float(results[0][1].abs().max())
    )


def saved_bytes_and_gradients(model: Any, batch: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """The bytes that a forward pass saves for the backward pass, and the gradients; always with the same dropout."""
    saved_bytes: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        # By storage, since views of one tensor take its memory once.
        saved_bytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with packing.packed_attention(model):  # backward recomputes checkpointed layers, so it is inside too
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            total_loss = loss.summed_loss(model, batch)
        total_loss.backward()
    return sum(saved_bytes.values()), take_gradients(model)


def test_outputs_of_norms_and_mlps_are_not_saved_and_the_gradients_are_bit_equal(nf4, new_rows, monkeypatch):
    model, batch = new_model(nf4, dropout=0.1), PaddingCollator(0)(new_rows(6))
    patched_bytes, gradients = saved_bytes_and_gradients(model, batch)
    # Without the mark on its input, a fused layer saves the input itself.
    monkeypatch.setattr(fused_lora, "recompute_from", lambda recompute, sources, x: x)
    saved_bytes, expected = saved_bytes_and_gradients(model, batch)

    tokens = packing.pack(batch, torch.float32).input_ids.shape[1]
    widths = 2 * (64 + 64 + 128)  # in each of two layers: two norms and a gate
    # The embeddings, and the weight and the factors of the first norm, which nothing else needs.
    instead = 64 * tokens + 64 + tokens
    # 4 bytes per number in fp32.
    assert saved_bytes - patched_bytes == 4 * (tokens * widths - instead)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_gradient_checkpointing_saves_fewer_bytes_and_the_gradients_are_bit_equal(nf4, new_rows):
    batch = PaddingCollator(0)(new_rows(6))
    saved_bytes, expected = saved_bytes_and_gradients(new_model(nf4, dropout=0.1), batch)
    for every_n_layers, factor in ((1, 4.5), (2, 1.5)):
        fewer_bytes, gradients = saved_bytes_and_gradients(
            new_model(nf4, dropout=0.1, gradient_checkpointing=every_n_layers), batch
        )
        assert fewer_bytes < saved_bytes / factor
        assert len(gradients) == len(expected) > 0
        assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize(("setting", "every_n_layers"), [(True, 1), (1, 1), (2, 2), ("offload", 1)])
def test_each_way_to_recompute_layers_gives_the_same_gradients(nf4, new_rows, setting, every_n_layers):
    batch = PaddingCollator(0)(new_rows(6))
    _, expected = saved_bytes_and_gradients(new_model(nf4, dropout=0.1), batch)
    model = new_model(nf4, dropout=0.1, gradient_checkpointing=setting)
    is_recomputed = [layer.gradient_checkpointing for layer in model.base_model.model.model.layers]
    assert is_recomputed == [i % every_n_layers == 0 for i in range(len(is_recomputed))]
    _, gradients = saved_bytes_and_gradients(model, batch)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_what_layers_get_can_wait_in_host_memory_and_comes_back_in_time(nf4, new_rows, monkeypatch):
    batch = PaddingCollator(0)(new_rows(6))
    _, expected = saved_bytes_and_gradients(new_model(nf4, dropout=0.1), batch)

    fetches, copies = list[int](), list[Any]()
    make_copy, take = offload.HostCopy.__init__, offload.HostCopy.take

    def make_and_list(self: Any, *arguments: Any) -> None:
        make_copy(self, *arguments)
        copies.append(weakref.ref(self))

    def take_and_count(self: Any) -> torch.Tensor:
        tensor = take(self)
        # What is there once a layer has its input: the one that the backward pass needs next, and no other.
        fetches.append(sum(copy is not None and copy.fetched is not None for copy in (ref() for ref in copies)))
        return tensor

    monkeypatch.setattr(offload.HostCopy, "__init__", make_and_list)
    monkeypatch.setattr(offload.HostCopy, "take", take_and_count)
    # The inputs are copied on a CPU too, where nobody would do it but this test.
    model = new_model(nf4, dropout=0.1, gradient_checkpointing="offload")
    host = offload.InputOffload(stream=None, min_bytes=1)
    num_layers = len(model.base_model.model.model.layers)
    assert offload.offload_layer_inputs(model.get_base_model(), host) >= num_layers
    torch.manual_seed(1)  # the same dropout
    with packing.packed_attention(model):
        loss.summed_loss(model, batch).backward()

    assert host.num_copies == len(copies) == num_layers
    assert fetches == [1] * (num_layers - 1) + [0]
    assert not any(copy() for copy in copies), "freed with the graph"
    gradients = take_gradients(model)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


@pytest.mark.gpu
def test_offloaded_layers_take_less_memory_of_a_gpu_and_give_the_same_gradients():
    peaks, gradients = dict[Any, int](), dict[Any, dict[str, torch.Tensor]]()
    for setting in (1, "offload"):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512, hidden_size=1024, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8,
            attn_implementation="sdpa",
        )  # fmt: skip
        settings = TrainConfig(
            rank=4, dropout=0.0, device="cuda", kernels="torch", attention="sdpa", gradient_checkpointing=setting
        )
        model = adapter.attach_new(LlamaForCausalLM(config).bfloat16().cuda(), settings).train()
        # 8 rows of 2,048 tokens: 32 MiB for the input of each layer.
        tokens = (torch.arange(8 * 2048, device="cuda") % 500).view(8, 2048)
        batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
        for _ in range(2):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            with packing.packed_attention(model):
                loss.summed_loss(model, batch).backward()
        peaks[setting], gradients[setting] = torch.cuda.max_memory_allocated(), take_gradients(model)
        del model
    assert peaks[1] - peaks["offload"] > 18 * 8 * 2048 * 1024 * 2
    assert all(torch.equal(gradients["offload"][name], gradient) for name, gradient in gradients[1].items())


def test_a_module_that_computes_something_else_is_not_patched():
    class OffsetNorm(torch.nn.Module):  # a norm whose weight is counted from one, as some models have it
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.rand(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    class Model(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.norm = OffsetNorm()

    model = Model()
    assert memory_efficient.patch_norms_and_mlps(model) == 0
    assert "forward" not in vars(model.norm)


class GatedMLP(torch.nn.Module):
    """An MLP as decoders have it, in bf16."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.activation = activation
        for name in ("gate", "up", "down"):
            setattr(self, f"{name}_proj", torch.nn.Linear(8, 8, bias=False).bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("activation", [torch.nn.functional.silu, torch.nn.functional.gelu])
def test_liger_is_tried_for_silu_alone_and_not_used_where_its_results_differ(activation, monkeypatch, capsys):
    model = torch.nn.Sequential(GatedMLP(activation))
    model.device, model.dtype = torch.device("cpu"), torch.bfloat16
    is_silu = activation is torch.nn.functional.silu
    # As a probe in bf16 might say. With it, only the bit-for-bit check can refuse gelu.
    monkeypatch.setattr(memory_efficient, "is_close", lambda *_: True)
    monkeypatch.setattr(liger, "mlp_forward", memory_efficient.mlp_forward)
    assert memory_efficient.patch_norms_and_mlps(model, "liger") == is_silu
    monkeypatch.setattr(memory_efficient, "is_close", lambda *_: False)
    assert memory_efficient.patch_norms_and_mlps(model, "liger") == is_silu
    assert ("liger's results differ too much for 1 of 1 norms and MLPs" in capsys.readouterr().out) == is_silu
