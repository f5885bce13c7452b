"""IA3, prompts, prefixes and bottlenecks learn as PEFT's or plain torch's do, resume bit for bit, and load again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, PromptTuningConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, relu

from components.quantize_model.step import run as quantize
from components.train_qlora import adapter, loss, packing
from components.train_qlora.data import IGNORE_INDEX, PaddingCollator
from components.train_qlora.methods import METHODS, WithoutMatrices, method_of
from components.train_qlora.optimizer import AdapterOptimizer
from qlora_retrain.config.sections import QuantizeConfig, TrainConfig
from qlora_retrain.core import signals
from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.lm import bottleneck, generation, label_by_label, label_ranking, loading, memory_model, own_adapter
from qlora_retrain.lm.attach_own import detach
from qlora_retrain.lm.forward import TargetSequence, score_sequences
from qlora_retrain.lm.model_shape import ModelShape
from qlora_retrain.lm.target_layers import ia3_layers
from qlora_retrain.lm.trie import Trie
from tests.components.train_qlora.adapted import SETTINGS

NAMES = [name for name, method in METHODS.items() if issubclass(method, WithoutMatrices)]
VIRTUAL = {"num_virtual_tokens": 3}


def settings_of(method: str, **settings: Any) -> TrainConfig:
    """Return small settings of a method."""
    virtual = VIRTUAL if method in ("prompt", "prefix") else {}
    return TrainConfig(**(SETTINGS | virtual | settings | {"method": method}))


def attached(base: Any, method: str, **settings: Any) -> Any:
    """Attach an adapter with numbers that change what the model computes."""
    config = settings_of(method, **settings)
    torch.manual_seed(0)
    model = adapter.attach_new(base, config, method_of(config))
    with torch.no_grad():
        for _, parameter in trained(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def trained(model: Any) -> list[tuple[str, Tensor]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Rows of several lengths, which begin alike."""
    rows = [[1, 5, 9, *range(40 + i, 43 + 2 * i)] for i in range(4)]
    examples = [{"input_ids": ids, "labels": [IGNORE_INDEX] * 3 + ids[3:]} for ids in rows]
    return PaddingCollator(0)(examples)


@pytest.fixture(scope="module")
def sixteen_bits(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as it is."""
    folder = tmp_path_factory.mktemp("base_nf4")
    quantize(QuantizeConfig(format="none"), tiny_model, folder)
    return folder


def reference_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Compute the summed loss by definition, with labels where the model's logits end: virtual tokens stand before."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logits = logits[:, -batch["input_ids"].shape[1] :][:, :-1].float()
    return cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def pefts(base: Any, folder: Path) -> Any:
    """Load an adapter that trains by PEFT alone, which refuses to train a prompt that it has loaded."""
    config = PeftConfig.from_pretrained(str(folder))
    if not config.is_prompt_learning:
        return PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    config.inference_mode, config.base_model_name_or_path = False, None
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, adapter.load_weights(folder))
    return model


@pytest.mark.parametrize("is_packed_base", [True, False], ids=["nf4", "bf16"])
@pytest.mark.parametrize("method", ["ia3", "prompt", "prefix"])
def test_loss_and_gradients_are_those_of_peft(
    nf4: Path, sixteen_bits: Path, batch: Any, tmp_path: Path, method: str, is_packed_base: bool
) -> None:
    base = nf4 if is_packed_base else sixteen_bits
    ours = attached(loading.load_nf4(base), method).train()
    adapter.export(ours, tmp_path, settings_of(method))
    theirs = pefts(loading.load_nf4(base), tmp_path).train()

    expected, actual = reference_loss(theirs, batch), loss.summed_loss(ours, batch)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    expected.backward()
    actual.backward()
    gradients = [parameter.grad for _, parameter in trained(ours)]
    for gradient, (name, parameter) in zip(gradients, trained(theirs), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=2e-3, atol=1e-4, msg=name)


def test_a_bottleneck_adds_what_plain_torch_computes(nf4: Path, batch: Any) -> None:
    ours = attached(loading.load_nf4(nf4), "bottleneck").train()
    parameters = [p.detach().clone().requires_grad_() for _, p in trained(ours)]
    plain: Any = loading.load_nf4(nf4)
    plain.requires_grad_(False)
    for i, layer in enumerate(plain.model.layers):
        down, up = parameters[2 * i : 2 * i + 2]

        def add(_: Any, args: Any, output: Tensor, down: Tensor = down, up: Tensor = up) -> Tensor:
            return output + linear(relu(linear(output, down)), up)

        layer.mlp.register_forward_hook(add)
    expected, actual = reference_loss(plain, batch), loss.summed_loss(ours, batch)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    expected.backward()
    actual.backward()
    for (name, parameter), reference in zip(trained(ours), parameters, strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("method", ["ia3", "prompt", "bottleneck"])
def test_layers_that_are_computed_twice_give_the_same_gradients(nf4: Path, batch: Any, method: str) -> None:
    gradients = []
    for setting in (None, 1):
        model = attached(loading.load_nf4(nf4), method, gradient_checkpointing=setting).train()
        with packing.packed_attention(model):  # also around backward, as in training
            loss.summed_loss(model, batch).backward()
        gradients.append([parameter.grad for _, parameter in trained(model)])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))


def test_only_a_prefix_keeps_rows_from_being_packed(nf4: Path) -> None:
    is_packed = {name: packing.can_pack(attached(loading.load_nf4(nf4), name)) for name in NAMES}
    assert is_packed == {"ia3": True, "prompt": True, "prefix": False, "bottleneck": True}


def assert_same_ranks(at_once: Any, one_by_one: Any) -> None:
    assert [best for best, _ in at_once] == [best for best, _ in one_by_one]
    for (_, value), (_, expected) in zip(at_once, one_by_one, strict=True):
        assert value == (None if expected is None else pytest.approx(expected, abs=1e-4))


@pytest.mark.parametrize("method", NAMES)
def test_scores_ranks_and_answers_are_those_of_training(nf4: Path, tmp_path: Path, batch: Any, method: str) -> None:
    model = attached(loading.load_nf4(nf4), method).eval()
    adapter.export(model, tmp_path, settings_of(method))
    loaded: Any = loading.attach_adapter(loading.load_nf4(nf4), tmp_path)
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = [ids[:length] for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]
    sequences = [TargetSequence.from_mask(row, [i > 2 for i in range(len(row))]) for row in rows]

    # The loss of training is the sum of the scores, and a base that shares the model has its own.
    scores = score_sequences(loaded, sequences, 64)
    total = sum(score.loss_nats for score in scores)
    with torch.no_grad():
        assert total == pytest.approx(float(loss.summed_loss(model, batch)), rel=1e-4)
    plain = score_sequences(loading.load_nf4(nf4), sequences, 64)
    with own_adapter.disabled(loaded):
        base_scores = score_sequences(loaded, sequences, 64)
    assert [s.loss_nats for s in base_scores] == pytest.approx([s.loss_nats for s in plain])
    assert abs(total - sum(s.loss_nats for s in plain)) > 0.1

    # Labels are ranked as one after the other would be.
    labels, targets = [[44, 45, 2], [44, 46, 2], [50, 2]], [0, 1, None, 2]
    prompts = [row[:3] + [7] * i for i, row in enumerate(rows)]
    assert label_by_label.max_tree_tokens(loaded) == math.inf

    def rank_both(tokens: int = 128) -> tuple[Any, Any]:
        return (
            label_ranking.rank_labels(loaded, Trie.from_sequences(labels), prompts, targets, tokens, lambda _: None),
            label_by_label.rank_labels(loaded, labels, prompts, targets, 64, lambda _: None),
        )

    # All in a batch, and each alone; then the base that shares the model.
    for tokens in (128, 1):
        assert_same_ranks(*rank_both(tokens))
    trained_ranks = rank_both()[0]
    with own_adapter.disabled(loaded):
        base_ranks = rank_both()
    assert_same_ranks(*base_ranks)
    assert trained_ranks != base_ranks[0]

    # Greedy decoding by definition, from the model as it was trained.
    tokenizer: Any = type("Tokenizer", (), {"stop_ids": [2], "pad_token_id": 0, "decode": lambda *_, **__: ""})()
    answers = generation.generate_batch(loaded, tokenizer, prompts[:2], 5)
    for prompt, answer in zip(prompts[:2], answers, strict=True):
        ids = list(prompt)
        for token in answer.ids:
            sequence = TargetSequence([*ids, token][:-1], [len(ids) - 1], [token])
            assert score_sequences(loaded, [sequence], 64)[0].hits == 1
            ids.append(token)


def test_a_prompt_takes_a_part_of_a_window(nf4: Path, tmp_path: Path) -> None:
    model = attached(loading.load_nf4(nf4), "prompt")
    model.config.sliding_window = 20
    assert label_by_label.max_tree_tokens(model) == 17
    with own_adapter.disabled(model):
        assert label_by_label.max_tree_tokens(model) == 20


@pytest.mark.parametrize("method", ["ia3", "bottleneck"])
def test_a_new_adapter_changes_no_output(nf4: Path, method: str) -> None:
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = loading.load_nf4(nf4)(ids).logits
        model = adapter.attach_new(loading.load_nf4(nf4), settings_of(method))
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "bottleneck"])
def test_an_adapter_that_is_taken_away_leaves_the_base(nf4: Path, tmp_path: Path, method: str) -> None:
    ids = torch.arange(24).view(2, 12)
    adapter.export(attached(loading.load_nf4(nf4), method), tmp_path, settings_of(method))
    base: Any = loading.load_nf4(nf4)
    with torch.no_grad():
        expected = base(ids).logits
        detach(loading.attach_adapter(base, tmp_path))
        assert torch.equal(base(ids).logits, expected)
        # And another one can take its place.
        loading.attach_adapter(base, tmp_path)


@pytest.mark.parametrize(
    "method", ["prompt", *(pytest.param(m, marks=pytest.mark.soak) for m in NAMES if m != "prompt")]
)
def test_a_run_goes_on_bit_for_bit_and_learns(step: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    virtual = {"num_virtual_tokens": 4} if method in ("prompt", "prefix") else {}
    settings = {"method": method, "alpha": None, "max_steps": 6, "learning_rate": 3e-2, "num_evals": 2, **virtual}
    whole, stopped = step("whole"), step("stopped")
    whole(**settings)
    first_loss, last_loss = (value for _, value in whole.document["evaluation_losses"])
    assert last_loss < first_loss
    checks = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(signals, "stop_requested", lambda: next(checks) >= 4)
        with pytest.raises(TryAgain):
            stopped(**settings)
    stopped(**settings)
    assert stopped.weights == whole.weights
    document = json.loads((whole.adapter / adapter.CONFIG_FILE).read_text())
    assert document["base_model_name_or_path"] == "base_nf4"


@pytest.mark.soak
@pytest.mark.parametrize("method", NAMES)
def test_two_processes_end_with_the_weights_of_one(step: Any, method: str) -> None:
    alone, shared = step("alone"), step("shared")
    settings = {"method": method, "alpha": None, "max_steps": 4, "dropout": 0.0, "learning_rate": 1e-2}
    alone(**settings)
    shared(**settings, num_processes=2)
    expected, weights = adapter.load_weights(alone.adapter), adapter.load_weights(shared.adapter)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_prompt_starts_with_words_that_the_seed_draws(nf4: Path) -> None:
    weight = loading.load_nf4(nf4).get_input_embeddings().weight
    prompts = [
        own_adapter.find(adapter.attach_new(loading.load_nf4(nf4), settings_of("prompt", seed=seed))).weights()
        for seed in (0, 0, 1)
    ]
    first, repeated, reseeded = (tensors["prompt_embeddings"] for tensors in prompts)
    assert torch.equal(first, repeated)
    assert not torch.equal(first, reseeded)
    assert all(any(torch.equal(row, word) for word in weight) for row in first)


def test_pefts_own_prompt_loads(sixteen_bits: Path, tmp_path: Path, batch: Any) -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    theirs = get_peft_model(loading.load_nf4(sixteen_bits), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = loading.attach_adapter(loading.load_nf4(sixteen_bits), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loss.summed_loss(ours, batch), reference_loss(theirs, batch))


def test_a_family_without_the_layers_is_refused_with_their_names(nf4: Path) -> None:
    model: Any = loading.load_nf4(nf4)
    for layer in model.model.layers:
        layer.self_attn.c_attn = layer.self_attn.k_proj
        del layer.self_attn.k_proj
        layer.inner = layer.mlp
        del layer.mlp
    with pytest.raises(UsageError, match=r"the linear layers of LlamaForCausalLM these are: c_attn, down_proj"):
        ia3_layers(model)
    with pytest.raises(
        UsageError, match=r"goes behind the MLP of each layer, and model\.layers\.0 of LlamaForCausalLM"
    ):
        bottleneck.attach(model, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ia3", "target_modules": "attention"}, "method: ia3 has no matrices A and B, so target_modules"),
        ({"method": "prompt", "alpha": 4.0}, "method: prompt has no matrices A and B"),
        ({"method": "bottleneck", "rank_pattern": {"down_proj": 2}}, "rank_pattern: with bottleneck"),
        ({"method": "prefix", "gradient_checkpointing": 1}, "a layer reads keys and values that are kept"),
        ({"method": "ia3", "parallel": "fsdp", "num_processes": 2}, "other tensors than these learn"),
        ({"num_virtual_tokens": 4}, "num_virtual_tokens: 4 is for method: prompt, and method is lora"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize("method", NAMES)
def test_the_planner_counts_what_torch_has(nf4: Path, batch: Any, method: str) -> None:
    config = settings_of(method, optimizer="paged_adamw_8bit", kernels="torch")
    model = adapter.attach_new(loading.load_nf4(nf4), config).train()
    optimizer = AdapterOptimizer(config, trained(model))
    loss.summed_loss(model, batch).backward()
    optimizer.step(1e-4)
    states = sum(tensor.nbytes for tensor in optimizer.state().values())

    shape = ModelShape.from_config(model.config.to_dict())
    settings = memory_model.Settings.from_sections(config.model_dump(), QuantizeConfig().model_dump())
    memory = memory_model.estimate(shape, settings, memory_model.MicroBatch(4, 9, 30))
    assert memory.adapter == sum(parameter.nbytes for _, parameter in trained(model))
    assert memory.optimizer == pytest.approx(states, rel=0.01)
    rows = memory_model.MicroBatch(4, 9, 30)
    assert (rows.after(3).tokens, rows.after(3).longest) == (33, 12)
