"""What training computes, against the same computed plainly: adapters, dropout, rows in one line, the loss in parts."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, linear
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from components.train_qlora import fused, joined, lean, lora, loss, packed
from components.train_qlora.rows import IGNORED, Collate
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm import chat, loading

# QLoRA (arXiv 2305.14314), appendix E
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
REFERENCE = [61.20205, 50.62615]  # see the test


def adapted(nf4: Path, **settings: Any):
    """The 4-bit tiny model with an adapter whose B is not zero, ready to train, in fp32."""
    torch.manual_seed(0)
    plain: dict[str, Any] = {"rank": 4, "alpha": 12, "dropout": 0.0, "device": "cpu"}
    base = loading.load_nf4(nf4, dtype=settings.pop("dtype", "float32"), attention=settings.pop("attention", "eager"))
    model = lora.attach_new(base, TrainConfig(**(plain | settings))).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture
def items(nf4, chats):
    tokenizer = chat.load_tokenizer(nf4)

    def made(count: int, *, shared: bool = True, times: int = 1) -> list[dict[str, list[int]]]:
        system = {"role": "system", "content": " ".join(["Name the intent."] * times)}
        encoded = [chat.encode(tokenizer, [system, *turns] if shared else turns) for turns in chats(count)]
        return [
            {
                "input_ids": e.input_ids,
                "labels": [t if s else IGNORED for t, s in zip(e.input_ids, e.supervised, strict=True)],
            }
            for e in encoded
        ]

    return made


def test_the_forward_is_that_of_w_plus_the_scaled_product_of_b_and_a(nf4):
    model = adapted(nf4, dtype="bfloat16")
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    x = torch.randn(2, 5, 128)
    w = dequantize_4bit(layer.base_layer.weight, layer.base_layer.weight.quant_state).double()
    b, a = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
    expected = x.double() @ (w + 12 / 4 * (b @ a)).T
    assert torch.allclose(layer(x).double(), expected, rtol=0.01, atol=0.02)  # W is bf16, x fp32


def test_stored_codes_are_the_published_nf4_values_times_the_scale_of_their_block(nf4):
    layer = loading.load_nf4(nf4, dtype="bfloat16").model.layers[0].mlp.up_proj
    state = layer.weight.quant_state
    codes = torch.stack([layer.weight.flatten() >> 4, layer.weight.flatten() & 15], dim=1).flatten().long()
    inner = state.state2  # the scales are themselves in 8 bits, a scale for each 256 of them
    scales = inner.code[state.absmax.long()] * inner.absmax.repeat_interleave(256)[: len(state.absmax)] + state.offset
    expected = torch.tensor(PUBLISHED_NF4)[codes] * scales.repeat_interleave(64)
    assert torch.equal(dequantize_4bit(layer.weight, state).flatten(), expected.to(torch.bfloat16))


def test_joined_layers_give_the_loss_and_the_gradients_of_peft(nf4, items):
    model = adapted(nf4)
    plain = get_peft_model(
        loading.load_nf4(nf4), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    plain.load_state_dict(model.state_dict())
    batch = Collate(0)(items(6))
    found = []
    for each in (model, plain):
        output = each(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
        output.loss.backward()
        found.append((output.loss.item(), gradients(each)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[1][1].items():
        assert torch.allclose(found[0][1][name], gradient, rtol=1e-3, atol=1e-6), name


def test_layers_that_are_given_the_same_tensor_are_computed_together(nf4):
    model = adapted(nf4)
    assert joined.join(model) == 2 * 4  # in each of two layers: q k v, o, gate up, down


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("beginning", [0, 1, 9])  # times a sentence: nothing, less and more than a row's own tokens
def test_one_line_of_rows_gives_the_loss_and_the_gradients_of_each_row_alone(nf4, items, attention, beginning):
    model = adapted(nf4, attention=attention)
    rows = items(5, shared=beginning > 0, times=beginning)
    grid = packed.pack(Collate(0)(rows), torch.float32).grid
    assert (grid.shared > grid.ask.shape[1]) == (beginning == 9)
    for row in rows:  # unpadded, full logits, torch's own loss
        labels = torch.tensor(row["labels"][1:])
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").backward()
    expected = gradients(model)
    loss.summed_loss(model, Collate(0)(rows)).backward()
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), name


def test_what_all_rows_begin_with_is_computed_once(items):
    rows = items(5)
    line = packed.pack(Collate(0)(rows), torch.float32)
    beginning = next(i for i in range(99) if len({row["input_ids"][i] for row in rows}) > 1)
    assert line.shared == beginning > 5
    needed = [max(i for i, label in enumerate(row["labels"]) if label != IGNORED) for row in rows]
    assert line.input_ids.shape[1] == packed.TOKENS * math.ceil((sum(needed) - 4 * beginning) / packed.TOKENS)
    assert int((line.labels != IGNORED).sum()) == sum(label != IGNORED for row in rows for label in row["labels"][1:])


def test_a_token_that_is_to_predict_something_is_never_shared():
    rows = [{"input_ids": [7, 8, 9, end], "labels": [IGNORED, IGNORED, 9, end]} for end in (1, 2)]
    line = packed.pack(Collate(0)(rows), torch.float32)
    assert line.shared == 1  # 8 predicts the supervised 9, in each row
    same = [{"input_ids": [7, 8], "labels": [IGNORED, IGNORED]}] * 2
    assert packed.pack(Collate(0)(same), torch.float32).shared == 0  # never a whole row


@pytest.mark.parametrize("rows", [1, 2, 3, 20])
@pytest.mark.parametrize("beginning", [0, 1, 9])
def test_a_pass_has_no_more_tokens_than_its_rows_would_have_with_padding_and_no_fewer_passes_would_do(
    items, rows, beginning
):
    made = items(20, shared=beginning > 0, times=beginning)
    batch = Collate(0)(sorted(made, key=lambda row: -len(row["input_ids"])))
    longest = max(packed.passes(batch, rows, packs=True), 1)

    def most(count: int) -> int:  # tokens of the longest pass, before they are rounded
        lines = [packed.pack(part, torch.float32) for part in packed.cut(batch, count)]
        return max(line.input_ids.shape[1] for line in lines)

    after = batch["labels"][:, 1:] != IGNORED
    limit = rows * max(int(row.nonzero().max()) + 1 for row in after)
    assert most(longest) < limit + packed.TOKENS
    assert longest == 1 or most(longest - 1) > limit
    assert packed.passes(batch, rows, packs=False) == math.ceil(20 / rows) >= longest


def test_many_short_rows_beside_a_long_one_do_not_fill_attention_with_padding():
    """64 short rows and a long one have few tokens; padded to the long one they would be four times sixteen rows."""
    lengths = [1000, *[50] * 63]
    batch = Collate(0)([{"input_ids": [*range(n)], "labels": [*range(n)]} for n in lengths])
    count = packed.passes(batch, 16, packs=True)
    assert count == 2
    assert packed.passes(batch, 64, packs=True) == 1
    places = [packed.pack(part, torch.float32).grid.bias.shape[:2].numel() for part in packed.cut(batch, count)]
    assert max(places) <= 2 * 16 * 1000


def test_a_batch_in_parts_gives_the_gradients_of_the_whole(nf4, items):
    model, batch = adapted(nf4), Collate(0)(items(5))
    loss.summed_loss(model, batch).backward()
    expected = gradients(model)
    for count in (2, 5, 7):  # more parts than rows: from some nothing is learnt
        for part in packed.cut(batch, count):
            loss.summed_loss(model, part).backward()
        for name, gradient in gradients(model).items():
            assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_line_and_a_padded_batch_have_the_same_loss(nf4, items, attention, shared, monkeypatch):
    model = loading.load_nf4(nf4, attention=attention)
    batch = Collate(0)(items(7, shared=shared))
    with torch.no_grad():
        found = float(loss.summed_loss(model, batch))
        monkeypatch.setattr(packed, "can_pack", lambda _: False)
        assert found == pytest.approx(float(loss.summed_loss(model, batch)), rel=1e-5)


def test_a_model_whose_attention_has_a_window_is_given_padded_batches():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    window = MistralForCausalLM(MistralConfig(vocab_size=50, num_key_value_heads=1, sliding_window=4, **sizes))
    window.set_attn_implementation("eager")
    assert not packed.can_pack(window)
    with packed.attention_by_rows(window):
        assert window.config._attn_implementation == "eager"
    window.config.sliding_window = None
    assert packed.can_pack(window)
    with packed.attention_by_rows(window), packed.attention_by_rows(window):
        assert packed.can_pack(window)
    assert window.config._attn_implementation == "eager"
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    plain.set_attn_implementation("eager")
    assert packed.can_pack(plain)


def test_the_loss_in_parts_is_the_loss_and_the_gradient_of_the_whole(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 7)
    torch.manual_seed(0)
    hidden, head = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8)
    labels = torch.randint(0, 50, (30,))
    (3 * cross_entropy(linear(hidden, head), labels, reduction="sum")).backward()
    expected, hidden.grad = hidden.grad, None
    found = loss.ChunkedCrossEntropy.apply(hidden, head, None, labels)
    assert found.item() == pytest.approx(cross_entropy(linear(hidden, head), labels, reduction="sum").item(), rel=1e-5)
    (3 * found).backward()
    assert torch.allclose(hidden.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_dropout_leaves_out_the_share_that_was_asked_for(probability):
    torch.manual_seed(0)
    kept = torch.ones(1000, 1001)
    kept.view(-1)[joined.drawn(kept.numel(), probability, kept.device)] = 0
    assert float(kept.mean()) == pytest.approx(1 - probability, abs=0.002)
    for by in (kept.mean(0), kept.mean(1)):  # no column and no row is favoured
        assert float(by.std()) == pytest.approx((probability * (1 - probability) / 1000) ** 0.5, rel=0.1)


def test_dropout_of_a_handful_of_numbers_has_the_probability_that_was_asked_for():
    torch.manual_seed(0)
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[joined.drawn(5, 0.4, counts.device).unique()] += 1
    assert counts.div(4000).tolist() == pytest.approx([1 - 0.8 ** round(math.log(0.6) / math.log(0.8))] * 5, abs=0.03)


def test_dropout_touches_the_adapter_alone_and_keeps_its_mean(nf4):
    model = adapted(nf4, dropout=0.5)
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        clean = layer.base_layer(x)
        outputs = torch.stack([layer(x) for _ in range(4000)])
        expected = clean + 3 * linear(linear(x, layer.lora_A["default"].weight), layer.lora_B["default"].weight)
        assert torch.allclose(outputs.mean(0), expected, atol=4 * float(outputs.std(0).max()) / 4000**0.5 + 1e-4)
        assert float(outputs.std(0).min()) > 0
        layer.lora_B["default"].weight.zero_()
        assert torch.equal(layer(x), clean)


def test_the_gradient_of_dropped_inputs_is_that_of_the_mask_that_was_drawn():
    torch.manual_seed(0)
    frozen = torch.nn.Linear(6, 5, bias=False).requires_grad_(False)
    x, a, b = torch.randn(4, 6), torch.randn(2, 6), torch.randn(5, 2)
    dropped = torch.tensor([1, 8, 8, 21])
    kept = torch.ones(24).index_fill(0, dropped, 0).view(4, 6)
    mine = [t.clone().requires_grad_() for t in (x, a, b)]
    plain = [t.clone().requires_grad_() for t in (x, a, b)]
    joined.Joined.apply(mine[0], torch.Tensor.detach, [mine[0]], dropped, 2.0, [frozen], *mine[1:])[
        0
    ].square().sum().backward()
    (frozen(plain[0]) + 2.0 * (plain[0] * kept) @ plain[1].T @ plain[2].T).square().sum().backward()
    for one, other in zip(mine, plain, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_the_first_losses_are_those_of_the_reference(nf4, items):
    # Origin: PEFT's own modules and torch's cross entropy over the full logits of padded batches, in fp32.
    model = adapted(nf4)
    rows = items(8)
    found = [loss.summed_loss(model, Collate(0)(rows[i : i + 4])).item() for i in (0, 4)]
    assert found == pytest.approx(REFERENCE, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_norms_and_gates_compute_what_the_modules_do_and_the_same_gradients(dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).to(dtype).requires_grad_(False)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight.copy_(torch.rand(32) + 0.5)
    found = []
    for _ in range(2):  # as they are, then lean
        x = torch.linspace(-3, 3, 5 * 32, dtype=dtype).view(1, 5, 32).requires_grad_()
        y = layer.mlp(layer.input_layernorm(x))
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
        assert lean.slim(model) == 4 or found[1:]  # three norms and an MLP
    assert torch.equal(found[0][0], found[1][0])
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert torch.allclose(found[0][1], found[1][1], rtol=tolerance, atol=tolerance * float(found[0][1].abs().max()))


def kept_and_gradients(model: Any, batch: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """How many bytes a forward pass keeps for the backward pass, and what the latter gives; always the same dropout."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with packed.attention_by_rows(model):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            computed = loss.summed_loss(model, batch)
        computed.backward()
    return sum(kept.values()), gradients(model)


def test_what_norms_and_gates_give_is_not_kept_and_the_gradients_are_the_same_bits(nf4, items, monkeypatch):
    model, batch = adapted(nf4, dropout=0.1), Collate(0)(items(6))
    lean_kept, found = kept_and_gradients(model, batch)
    monkeypatch.setattr(joined, "made_again_by", lambda how, of, x: x)
    kept, expected = kept_and_gradients(model, batch)
    tokens = packed.pack(batch, torch.float32).input_ids.shape[1]
    widths = 2 * (64 + 64 + 128)  # in each of two layers: two norms and a gate
    instead = 64 * tokens + 64  # the embeddings and the first norm's weight, which nothing else needs
    assert kept - lean_kept == 4 * (tokens * widths - instead)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_gradient_checkpointing_keeps_less_and_gives_the_same_bits(nf4, items):
    batch = Collate(0)(items(6))
    kept, expected = kept_and_gradients(adapted(nf4, dropout=0.1), batch)
    for every, share in ((1, 4.5), (2, 1.5)):
        less, found = kept_and_gradients(adapted(nf4, dropout=0.1, gradient_checkpointing=every), batch)
        assert less < kept / share
        assert len(found) == len(expected) > 0
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_module_that_computes_something_else_is_left_alone():
    class Shifted(torch.nn.Module):  # a norm whose weight is counted from one, as some models have it
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.rand(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    class Model(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.norm = Shifted()

    model = Model()
    assert lean.slim(model) == 0
    assert "forward" not in vars(model.norm)


class Gate(torch.nn.Module):
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
def test_a_kernel_is_asked_for_silu_alone_and_left_out_where_it_rounds_otherwise(activation, monkeypatch, capsys):
    model = torch.nn.Sequential(Gate(activation))
    model.device, model.dtype = torch.device("cpu"), torch.bfloat16
    gated = activation is torch.nn.functional.silu
    monkeypatch.setattr(lean, "close", lambda *_: True)  # as a probe in bf16 might say
    monkeypatch.setattr(fused, "mlp", lean._mlp)
    assert lean.slim(model, "liger") == gated
    monkeypatch.setattr(lean, "close", lambda *_: False)
    assert lean.slim(model, "liger") == gated
    assert ("liger computes 1 of 1 norms and gates otherwise" in capsys.readouterr().out) == gated
