"""Before training, two short rows show whether a model computes each row alone, and whether rows may be packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from components.train_qlora import adapter, loss, packing, row_probe
from components.train_qlora.data import IGNORE_INDEX, PaddingCollator
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import loading

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _silent_transformers() -> None:
    """Silence what the loaders silence, since these models are built without them."""
    loading.silence_transformers()


CONFIG = TrainConfig(rank=2, device="cpu", precision="float32")
ROWS = [{"input_ids": [1, 7, *range(10, 10 + n)], "labels": [IGNORE_INDEX] * 4 + [*range(12, 10 + n)]} for n in (9, 5)]


def new_model(family: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_rows_are_padded_where_a_family_does_not_pass_on_what_packing_needs(capsys):
    model = new_model("Nemotron")
    assert packing.can_pack(model)  # as far as its settings tell
    attached = adapter.attach_new(model, CONFIG)
    assert not packing.can_pack(attached)
    assert "NemotronForCausalLM does not compute packed rows like single ones" in capsys.readouterr().out

    expected = 0.0
    for row in ROWS:
        logits = attached(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        expected += cross_entropy(
            logits, torch.tensor(row["labels"][1:]), ignore_index=IGNORE_INDEX, reduction="sum"
        ).item()
    assert loss.summed_loss(attached, PaddingCollator(0)(ROWS)).item() == pytest.approx(expected, rel=1e-5)


def test_rows_are_padded_where_packed_logits_differ(monkeypatch):
    # As if a family ignored the positions of packed rows.
    original = packing.pack

    def pack(*arguments):
        packed = original(*arguments)
        packed.position_ids.copy_(torch.arange(packed.position_ids.shape[1]))
        return packed

    monkeypatch.setattr(packing, "pack", pack)
    assert not packing.can_pack(adapter.attach_new(new_model("Llama"), CONFIG))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_model_stays_packed_and_no_random_number_is_drawn(dtype):
    model = new_model("Llama").to(dtype)
    torch.manual_seed(5)
    attached = adapter.attach_new(model, CONFIG)
    state = torch.get_rng_state()
    adapter.probe_rows(attached)
    assert torch.equal(state, torch.get_rng_state())
    assert packing.can_pack(attached)


def test_a_model_that_sees_later_tokens_is_refused():
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    model = transformers.BertLMHeadModel(transformers.BertConfig(**sizes)).eval()
    with pytest.raises(UsageError, match="BertLMHeadModel lets a token see later ones"):
        adapter.attach_new(model, CONFIG)


def test_a_model_whose_rows_change_with_their_padding_is_refused(monkeypatch):
    class PaddedLlama(transformers.LlamaForCausalLM):
        def forward(self, attention_mask=None, **inputs):
            outputs = super().forward(attention_mask=attention_mask, **inputs)
            if attention_mask is not None:
                outputs.logits[..., 0] += 100.0 * (attention_mask.shape[1] - attention_mask.sum(1, keepdim=True))
            return outputs

    model = PaddedLlama(transformers.LlamaConfig(**SIZES)).eval()
    with pytest.raises(UsageError, match="the logits of PaddedLlama change when a shorter row is padded"):
        adapter.attach_new(model, CONFIG)


def test_a_model_that_amplifies_rounding_may_differ_by_more_and_by_less_than_a_fault() -> None:
    """As Qwen2.5 1.5B does in bf16, which was padded for that; rounding in fp32 excuses nothing."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "hidden_size": 64, "num_hidden_layers": 4}, initializer_range=0.5)
    model = transformers.LlamaForCausalLM(config).eval()
    row = row_probe._rows(SIZES["vocab_size"])[0]
    ids, shifted = torch.tensor([row]), torch.tensor([[0, 1, 2, *range(4, len(row) + 1)]])
    with torch.no_grad():
        for dtype, least, most in ((torch.float32, 1e-3, 1e-3), (torch.bfloat16, 0.11, 0.5)):
            logits = model.to(dtype)(input_ids=ids).logits[0]
            limit = row_probe._max_distance(model, row, logits)
            assert least <= limit <= most
            assert row_probe._is_close(logits, logits, limit)
            assert not row_probe._is_close(model(input_ids=ids, position_ids=shifted).logits[0], logits, limit)
