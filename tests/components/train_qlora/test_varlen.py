"""Attention by torch's flash kernels over packed rows, on a CPU by what the kernels promise, on a GPU by themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from components.train_qlora import adapter, attention, loss, packing, row_probe, varlen
from components.train_qlora.data import IGNORE_INDEX, LengthGroupedSampler, PaddingCollator, Rows, TokenizedDataset
from components.train_qlora.logits import logits_kind
from components.train_qlora.micro_batches import prepare, to_device
from components.train_qlora.training_run import Lookahead, TrainingRun
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.lm import loading
from tests.components.train_qlora.varlen_reference import reference_varlen_attn

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
# Deepseek's keys have 12 numbers and its values 6: neither is a width that the kernels take.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3": {},
    "Mistral": {"sliding_window": 3},
    "Gemma3Text": {"sliding_window": 4, "layer_types": LAYERS, "query_pre_attn_scalar": 8},
    "DeepseekV3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
        "num_key_value_heads": 4, "first_k_dense_replace": 3, "head_dim": 4,
    },
}  # fmt: skip
WINDOWED = {"Qwen2", "Mistral", "Gemma3Text"}
# All rows begin alike and differ in length; the second half of each is supervised.
ROWS = [
    {
        "input_ids": [1, 7, 8, 9, 3, *range(10, 10 + n)],
        "labels": [IGNORE_INDEX] * (4 + n // 2) + [*range(9 + n // 2, 10 + n)],
    }
    for n in (4, 12, 7)
]


@pytest.fixture(autouse=True)
def _silent_transformers() -> None:
    """Silence what the loaders silence, since these models are built without them."""
    loading.silence_transformers()


@pytest.fixture
def on_cpu(monkeypatch):
    """Take the kernels for available on a CPU, in any type, and compute what they promise."""
    monkeypatch.setattr(varlen, "is_available", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen_attn)


def set_sharing(monkeypatch: pytest.MonkeyPatch, *, is_shared: bool) -> None:
    backend = replace(attention.BACKENDS["varlen"], shares_prefix=is_shared)
    monkeypatch.setitem(attention.BACKENDS, "varlen", backend)


def new_model(family: str, attention: str = "sdpa", **fields: Any) -> Any:
    """A tiny random model whose first layer alone is trained."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES.get(family, {}) | fields))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.get_base_model = lambda: model  # as PEFT's model has it
    model.requires_grad_(False).model.layers[0].requires_grad_(True)
    return model.eval()


def loss_and_gradients(model: Any, compute: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients by parameter name; the model's own are cleared."""
    result = compute()
    result.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result.item(), gradients


def summed_loss_of_rows_alone(model: Any) -> Tensor:
    """The loss by transformers' own attention and logits, row by row, without padding."""
    losses = []
    for row in ROWS:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        labels = torch.tensor(row["labels"][1:], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses.append(cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum"))
    return torch.stack(losses).sum()


def summed_loss(model: Any) -> Tensor:
    """The loss as training computes it, its backward pass included."""
    logits_kind(model)  # by a forward pass of its own
    with packing.packed_attention(model):
        return loss.summed_loss(model, PaddingCollator(0)(ROWS))


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_loss_and_the_gradients_of_each_row_alone(on_cpu, monkeypatch, family, is_shared):
    set_sharing(monkeypatch, is_shared=is_shared)
    model = new_model(family)
    assert packing.obstacle(model) is None
    packed = prepare(model, PaddingCollator(0)(ROWS)).inputs["packed_batch"]
    assert packed.prefix_len == (5 if is_shared else 0)
    assert isinstance(packed.layout, varlen.VarlenLayout)

    expected_loss, expected = loss_and_gradients(model, lambda: summed_loss_of_rows_alone(model))
    actual_loss, actual = loss_and_gradients(model, lambda: summed_loss(model))
    assert actual_loss == pytest.approx(expected_loss, rel=1e-5)
    assert actual.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, rtol=1e-3, atol=1e-5 * largest), name

    # The rows are long enough for the windows to matter.
    if family in WINDOWED:
        monkeypatch.setattr(varlen, "flash", lambda *inputs, plain=varlen.flash: plain(*inputs[:-1], None))
        assert abs(summed_loss(model).item() - expected_loss) > 1e-3 * expected_loss


@pytest.mark.parametrize("prefix_len", [0, 1, 6])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "value_width"), [(4, 4, 8), (4, 1, 8), (6, 2, 5)])
def test_the_kernels_and_the_eager_backend_compute_the_same(on_cpu, prefix_len, num_heads, num_kv_heads, value_width):
    lens = torch.tensor([3, 9, 1, 5])
    suffix_mask = torch.arange(9) < lens[:, None]
    num_tokens = prefix_len + int(lens.sum())
    torch.manual_seed(0)
    query = torch.randn(num_tokens, num_heads, 8, requires_grad=True)
    key = torch.randn(num_tokens, num_kv_heads, 8, requires_grad=True)
    value = torch.randn(num_tokens, num_kv_heads, value_width, requires_grad=True)
    grad_output = torch.randn(num_tokens, num_heads, value_width)

    results = []
    for name in ("eager", "sdpa", "varlen"):
        backend = attention.BACKENDS[name]
        layout = backend.new_layout(suffix_mask, prefix_len, torch.float32)
        output = backend.attend(query, key, value, layout, 0.4, None)
        results.append((output, *torch.autograd.grad(output, (query, key, value), grad_output)))
    for tensors in results[1:]:
        for actual, expected in zip(tensors, results[0], strict=True):
            assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 4, 12, 99])
@pytest.mark.parametrize("prefix_len", [0, 6])
def test_a_token_sees_its_window_and_nothing_else(on_cpu, prefix_len, window):
    """What a token sees is read off from the gradient of its output."""
    lens = [3, 9, 1]
    layout = varlen.VarlenLayout.from_mask(torch.arange(9) < torch.tensor(lens)[:, None], prefix_len, torch.float32)
    num_tokens = prefix_len + sum(lens)
    query = torch.randn(num_tokens, 1, 8)
    value = torch.randn(num_tokens, 1, 8, requires_grad=True)
    output = varlen.attend(query, query.clone(), value, layout, 0.3, window)

    starts = [prefix_len + sum(lens[:i]) for i in range(len(lens) + 1)]
    tokens_by_row = [[*range(prefix_len), *range(*ends)] for ends in pairwise(starts)]
    if prefix_len:
        tokens_by_row.append([*range(prefix_len)])
    for row in tokens_by_row:
        for position, token in enumerate(row):
            (grad,) = torch.autograd.grad(output[token].sum(), value, retain_graph=True)
            visible = grad.abs().sum((1, 2)).nonzero().flatten().tolist()
            assert visible == row[max(0, position + 1 - window) : position + 1]


def test_gathered_keys_are_kept_for_no_backward_pass(on_cpu):
    """A long prefix of many rows takes its memory once in every layer."""
    layout = varlen.VarlenLayout.from_mask(torch.ones(20, 2, dtype=torch.bool), 100, torch.float32)
    query, key, value = (torch.randn(140, 1, 8, requires_grad=True) for _ in range(3))
    num_saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal num_saved
        num_saved += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        varlen.attend(query, key, value, layout, 0.3, None)
    assert len(layout.kv_index) == 100 + 20 * 102
    assert num_saved == 3 * 140 * 8


def test_a_micro_batch_of_a_long_prefix_is_bounded_by_the_keys_that_it_gathers(on_cpu):
    rows = [{"input_ids": [*range(100), 200 + n], "labels": [IGNORE_INDEX] * 100 + [200 + n]} for n in range(99)]
    batch, backend = PaddingCollator(0)(rows), attention.BACKENDS["varlen"]
    count = packing.num_micro_batches(batch, 2, is_packed=True, backend=backend)
    # The tokens of 2 rows would hold the prefix and all 99 suffixes, were it not for the keys.
    assert packing.num_micro_batches(batch, 2, is_packed=True) == 1
    packed = [packing.pack(part, torch.float32, backend) for part in packing.split_batch(batch, count)]
    # The prefix's own segment comes on top, and so does what fills up the tokens to a multiple.
    limit = varlen.MAX_KEYS_FACTOR * 2 * 100 + 100 + packing.TOKENS_MULTIPLE
    assert max(len(each.layout.kv_index) for each in packed) <= limit
    assert count == 7

    # Without a shared prefix nothing is gathered, and 2 rows are 2 rows.
    unshared = replace(backend, shares_prefix=False)
    assert packing.num_micro_batches(batch, 2, is_packed=True, backend=unshared) == 50


@pytest.mark.parametrize(
    ("family", "attention", "fields", "reason"),
    [
        # Of these, transformers has no sdpa version, so the loader chooses eager.
        ("Gemma2", "eager", {}, "has attn_logit_softcapping, which packed attention has not"),
        ("GptOss", "eager", {"sliding_window": 4, "num_experts_per_tok": 1}, "has windows, which packed attention has"),
        ("Llama4Text", "sdpa", {"attention_chunk_size": 4, "num_local_experts": 2}, "has attention_chunk_size, which"),
    ],
)  # fmt: skip
def test_attention_that_is_not_packed_gets_padded_rows_and_one_line_in_the_log(
    on_cpu, capsys, family, attention, fields, reason
):
    model = new_model(family, attention, **fields)
    row_probe.probe_rows(model)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "padded" in line]
    assert line.startswith(f"train: {type(model).__name__} {reason}")
    assert not packing.can_pack(model)
    expected = summed_loss_of_rows_alone(model).item()
    assert loss.summed_loss(model, PaddingCollator(0)(ROWS)).item() == pytest.approx(expected, rel=1e-4)


def test_a_family_that_does_not_pass_its_windows_on_gets_padded_rows(on_cpu, capsys):
    # As if its mask alone had the window, which the rows of the probe are too short for.
    model = new_model("Qwen2", sliding_window=4096)
    model.model.layers[1].self_attn.sliding_window = None
    row_probe.probe_rows(model)
    assert not packing.can_pack(model)
    assert "Qwen2ForCausalLM does not compute packed rows like single ones" in capsys.readouterr().out


def test_windows_are_packed_by_the_kernels_alone(monkeypatch, capsys):
    model = new_model("Mistral")  # on a CPU
    row_probe.probe_rows(model)
    assert not packing.can_pack(model)
    assert "MistralForCausalLM has windows, which packed attention has only on a GPU" in capsys.readouterr().out
    monkeypatch.setattr(varlen, "is_available", lambda *_: True)
    assert packing.can_pack(model)
    # Eager attention was asked for by name.
    model.config.get_text_config()._attn_implementation = "eager"
    assert not packing.can_pack(model)


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32), ("meta", torch.bfloat16)]
)
def test_the_kernels_need_a_gpu_and_16_bits(device, dtype):
    assert not varlen.is_available(torch.device(device), dtype)


class NoHostSynchronization(TorchDispatchMode):
    """Refuse operations for which a CPU waits for a GPU: their results, or the shapes of these, follow from values."""

    NAMES = (
        "_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
        "repeat_interleave",
    )  # fmt: skip

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        has_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if has_mask or name in self.NAMES:
            raise AssertionError(f"{operation} waits for the device")
        return operation(*args, **(kwargs or {}))


def reference_beside_the_mode(*args: Any, **kwargs: Any) -> Tensor:
    """The kernels wait for nothing, but what stands in for them does."""
    with _disable_current_modes():
        return reference_varlen_attn(*args, **kwargs)


@pytest.mark.parametrize(
    ("family", "backend"),
    [("nf4", "eager"), ("nf4", "varlen"), ("Llama", "eager"), ("Gemma3Text", "varlen"), ("Mistral", "varlen")],
)
@pytest.mark.parametrize("has_values", [True, False])
def test_no_forward_or_backward_pass_asks_the_device_for_a_number(nf4, monkeypatch, family, backend, has_values):
    """With values, a mode sees every operation. Without, tensors are shapes alone, and torch's own operator takes part.

    The layers are computed twice, as with activation checkpointing.
    """
    monkeypatch.setattr(varlen, "is_available", lambda *_: backend == "varlen")
    if has_values:
        monkeypatch.setattr(varlen, "varlen_attn", reference_beside_the_mode)
    if family == "nf4":
        base = loading.load_nf4(nf4, dtype="bfloat16", attn_implementation="eager")
        config = TrainConfig(rank=2, dropout=0.1, device="cpu", gradient_checkpointing=1)
        model = adapter.attach_new(base, config).train()
    else:
        model = new_model(family, "eager").train()
        model.activation_checkpointing_enable()
        logits_kind(model)  # asks once for every model
    model.config.get_text_config()._attn_implementation = "eager" if backend == "eager" else "sdpa"
    micro_batch = prepare(model, PaddingCollator(0)(ROWS))
    assert isinstance(micro_batch.inputs["packed_batch"].layout, varlen.VarlenLayout) == (backend == "varlen")

    mode = NoHostSynchronization() if has_values else FakeTensorMode(allow_non_fake_inputs=True)
    with mode, packing.packed_attention(model):
        total = loss.summed_loss(model, micro_batch)
        total.backward()
        # So a number would have been noticed.
        with pytest.raises(AssertionError if has_values else DataDependentOutputException):
            total.item()


def test_a_step_that_is_prepared_ahead_has_the_rows_that_it_would_have_had(nf4):
    """Over epochs that end with a partial step, from every step to the last one, with no random number drawn."""
    lengths = [9, 5, 7, 12, 6, 8, 11]
    rows = [{"input_ids": [7, *range(n)], "labels": [IGNORE_INDEX, *range(n)]} for n in lengths]
    dataset = TokenizedDataset(rows)
    config = TrainConfig(global_batch_size=3, micro_batch_size=2, max_steps=8, device="cpu")
    model = loading.load_nf4(nf4, dtype="float32")

    def row_indices(first_step: int, look_ahead: Callable[[Lookahead[Any]], None]) -> list[list[int]]:
        sampler = LengthGroupedSampler(dataset.lengths, 3, 0)
        run = TrainingRun(config, model, None, Rows(dataset, dataset, 0), sampler, None, lambda *_: None, first_step)
        steps, indices = run.remaining_steps(), []
        for step in steps:
            indices.append(step.row_indices)
            look_ahead(steps)
            run.step += 1
        return indices

    state = torch.get_rng_state()
    expected = row_indices(0, lambda _: None)
    assert [len(indices) for indices in expected] == [3, 3, 1, 3, 3, 1, 3, 3]
    assert sorted(chain(*expected[:3])) == sorted(chain(*expected[3:6])) == [*range(7)]
    assert expected[:3] != expected[3:6]
    for first_step in range(9):
        assert row_indices(first_step, lambda steps: steps.look_ahead()) == expected[first_step:]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("prefix_len", [0, 40])
@pytest.mark.parametrize(("num_kv_heads", "width"), [(4, 64), (1, 128), (2, 96)])
def test_the_real_kernels_keep_their_promise(window, prefix_len, num_kv_heads, width, monkeypatch):
    lens = torch.tensor([3, 70, 1, 33])
    cpu_layout = varlen.VarlenLayout.from_mask(torch.arange(70) < lens[:, None], prefix_len, torch.bfloat16)
    torch.manual_seed(0)
    shapes = [(prefix_len + 107, heads, width) for heads in (4, num_kv_heads, num_kv_heads, 4)]
    *tensors, grad_output = (torch.randn(shape).bfloat16() for shape in shapes)

    def compute(device: str) -> list[Tensor]:
        query, key, value = (x.to(device).requires_grad_() for x in tensors)
        layout = to_device(cpu_layout, torch.device(device))
        output = varlen.attend(query, key, value, layout, width**-0.5, window)
        return [output, *torch.autograd.grad(output, (query, key, value), grad_output.to(device))]

    actual = compute("cuda")
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen_attn)
    for on_gpu, expected in zip(actual, compute("cpu"), strict=True):
        distance = (on_gpu.cpu().float() - expected.float()).norm() / expected.float().norm()
        assert float(distance) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_computes_the_packed_rows_of_a_family_and_nothing_waits_for_it(monkeypatch, family, is_shared):
    set_sharing(monkeypatch, is_shared=is_shared)
    model = new_model(family).bfloat16().cuda()
    assert packing.backend_name(model) == "varlen"
    expected_loss, expected = loss_and_gradients(model, lambda: summed_loss_of_rows_alone(model))
    logits_kind(model)  # asks once for every model
    micro_batch = prepare(model, PaddingCollator(0)(ROWS))

    torch.cuda.set_sync_debug_mode("error")
    try:
        with packing.packed_attention(model):
            total = loss.summed_loss(model, micro_batch)
            total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert total.item() == pytest.approx(expected_loss, rel=0.02)
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).float().norm()) < 0.1 * float(gradient.float().norm()) + 1e-2, name
