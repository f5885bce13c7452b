"""What a base model's files say is asked before any work is done, in the plan or by the first step that has them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft.utils import constants
from safetensors.torch import load_file, save_file

from qlora_retrain.core import graph
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm.tokenizer_files import TOKENIZER_FILES
from qlora_retrain.pipeline import explain, fetch, make_plan
from qlora_retrain.pipeline.layer_names import IA3_FAMILIES
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import globs, open_store, sources
from tests import hub_server
from tests.hub_server import HubServer

Edit = Callable[[Path], None]


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, in a folder that a test may change: 512 embeddings, 2048 positions, bf16."""
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


@pytest.fixture
def planned(base: Path, tickets: Path, root_uri: str, tmp_path: Path) -> Callable[..., Plan]:
    """Plan a line over that base."""

    def plan(*overrides: str, uri: str = "", files: Sequence[str] = ("**",)) -> Plan:
        path = tmp_path / "line.yaml"
        source = {"uri": uri or str(base), "files": list(files)}
        path.write_text(
            yaml.safe_dump({"line": "tickets", "sources": {"raw_data": str(tickets), "base_model": source}})
        )
        return make_plan.make_plan(path, root_uri, overrides=overrides)

    return plan


def refusal(planned: Callable[..., Plan], *overrides: str, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        planned(*overrides, **options)
    return str(caught.value)


def change(folder: Path, file: str, **fields: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    path = folder / file
    document = {**(json.loads(path.read_text()) if path.is_file() else {}), **fields}
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


def config(**fields: Any) -> Edit:
    return lambda folder: change(folder, "config.json", **fields)


def file(name: str, content: str = "{}") -> Edit:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return write


def tensors(**shapes: Sequence[int]) -> Edit:
    """Add tensors to the weights, by name with `__` for a dot."""

    def add(folder: Path) -> None:
        extra = {name.replace("__", "."): torch.zeros(*shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        path = folder / "model.safetensors"
        save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})

    return add


def shards(*, metadata: bool) -> Edit:
    """Store the weights in two files with an index."""

    def split(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        index = {}
        for number in (1, 2):
            part = dict(list(weights.items())[number - 1 :: 2])
            save_file(part, folder / f"model-{number:05d}-of-00002.safetensors", metadata={"format": "pt"})
            index |= dict.fromkeys(part, f"model-{number:05d}-of-00002.safetensors")
        document = {"weight_map": index, **({"metadata": {}} if metadata else {})}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document))

    return split


def rename(names: dict[str, str], **fields: Any) -> Edit:
    """Give the weights other names, and config.json other fields."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        for old, new in names.items():
            weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
        save_file(weights, path, metadata={"format": "pt"})
        change(folder, "config.json", **fields)

    return edit


def added_tokens(*tokens: tuple[str, int]) -> Edit:
    def add(folder: Path) -> None:
        document = json.loads((folder / "tokenizer.json").read_text())
        document["added_tokens"] += [{"id": number, "content": text, "special": True} for text, number in tokens]
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return add


def without_dtype_in_config(folder: Path) -> None:
    change(folder, "config.json", dtype=None, torch_dtype=None)


def test_a_base_that_fits_is_planned(planned: Callable[..., Plan]) -> None:
    planned("data.max_length_tokens=1920", "merge.exports=[bf16, gguf-f16]")


UNFIT: dict[str, tuple[Edit, list[str], list[str]]] = {
    # The weights.
    "two candidates": (file("model.fp16.safetensors"), [], ["more than one model", "'!model.fp16.safetensors'"]),
    "an adapter left over": (file("adapter_config.json"), [], ["an adapter lies beside", "'!adapter_config.json'"]),
    "a folder below": (file("old/model.safetensors"), [], ["more than one model", "'!old/*'"]),
    "an index without metadata": (shards(metadata=False), [], ['has no "metadata"']),
    # The architecture, one of each kind; `test_architectures` has the families.
    "experts": (config(num_local_experts=8), [], ["mixture of experts (num_local_experts: 8)", "choose a dense model"]),
    "experts in a nested config": (config(text_config={"num_experts": 4}), [], ["mixture of experts (num_experts: 4)"]),
    "experts by a tensor": (
        tensors(model__layers__0__mlp__experts__gate_up_proj=(2, 4, 4)),
        [],
        ["mixture of experts (the tensor model.layers.0.mlp.experts.gate_up_proj)"],
    ),
    "images": (config(vision_config={"depth": 2}), [], ["images or sound (vision_config)", "text-only model"]),
    "images by a tensor": (
        tensors(vision_tower__conv__weight=(2, 2)),
        [],
        ["images or sound (the tensor vision_tower."],
    ),
    "a wrapper by its name": (
        config(architectures=["Mistral3ForConditionalGeneration"]),
        [],
        ["images or sound (architectures: Mistral3ForConditionalGeneration)"],
    ),
    "Conv1D": (config(architectures=["GPT2LMHeadModel"], model_type="gpt2"), [], ["Conv1D layers, transposed"]),
    "an encoder with a decoder": (config(is_encoder_decoder=True), [], ["is an encoder with a decoder"]),
    "an encoder": (config(architectures=["BertForMaskedLM"]), [], ["BertForMaskedLM is an encoder"]),
    "a classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        [],
        ["LlamaForSequenceClassification has another head"],
    ),
    "a model without a head": (config(architectures=["LlamaModel"]), [], ["LlamaModel has another head"]),
    "a reward model by its tensor": (tensors(score__weight=(1, 64)), [], ["score.weight, the head of a reward model"]),
    "state-space layers": (config(layer_types=["mamba", "attention"]), [], ["recurrent layers (mamba)"]),
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), [], ["already quantized (gptq)"]),
    "fp8": (config(quantization_config={"quant_method": "fp8"}), [], ["already quantized (fp8)"]),
    "AWQ by a file": (file("quant_config.json"), [], ["already quantized (by quant_config.json)"]),
    "packed weights by a tensor": (
        tensors(model__layers__0__mlp__up_proj__qweight=(2, 2)),
        [],
        ["already quantized (by its tensor model.layers.0.mlp.up_proj.qweight)"],
    ),
    "LoRA in the weights": (tensors(q_proj__lora_A__default__weight=(2, 2)), [], ["merge them first"]),
    # The tokenizer's ids.
    "an added token": (
        added_tokens(("<|new|>", 512)),
        [],
        ["1 tokens beyond the embedding", "'<|new|>' with the id 512"],
    ),
    "an embedding of fewer rows": (config(vocab_size=500), [], ["12 tokens beyond the embedding", "500 rows"]),
    "a padding token of the settings alone": (
        lambda folder: change(folder, "tokenizer_config.json", pad_token="<pad>"),
        [],
        ["'<pad>' with the id 512"],
    ),
    # The limits.
    "longer rows": (
        config(),
        ["data.max_length_tokens=4096"],
        ["4096 tokens, and the base takes 2048", "2048 or less"],
    ),
    "longer answers": (
        config(),
        ["data.max_length_tokens=2000"],
        ["evaluate.max_new_tokens adds 128", "set data.max_length_tokens to 1920 or less"],
    ),
    "no room for an answer": (
        config(max_position_embeddings=64),
        ["data.max_length_tokens=64"],
        ["more than the 64 that the base takes (max_position_embeddings); lower evaluate.max_new_tokens"],
    ),
    "virtual tokens that leave no room": (
        config(),
        ["data.max_length_tokens=1910", "train.method=prompt"],
        ["20 tokens before each row leave 2028 of the 2048", "evaluate.max_new_tokens adds 128"],
    ),
    # The layers that `train` names; the tiny model is tied, and its smallest side is 32.
    "no such layer": (
        config(),
        ["train.target_modules=[qproj, down_proj]"],
        ["no layer is called 'qproj', there are down_proj, gate_proj, k_proj,", "did you mean q_proj?"],
    ),
    "no such path": (
        config(),
        [r"train.target_modules=.*\.9\.mlp\..*"],
        ["matches no layer", "such as model.layers.0.mlp.down_proj"],
    ),
    "norms by a pattern": (config(), ["train.target_modules=.*(norm|embed_tokens)"], ["matches no layer"]),
    "no regular expression": (config(), ["train.target_modules=(.*"], ["'(.*' is no regular expression"]),
    "a rank of no layer": (config(), ["train.rank_pattern={qproj: 4}"], ["'qproj' matches no adapted layer"]),
    "an alpha of a layer without adapter": (
        config(),
        ["train.target_modules=[q_proj]", "train.alpha_pattern={down_proj: 4}"],
        ["train.alpha_pattern: 'down_proj' matches no adapted layer", "model.layers.0.self_attn.q_proj"],
    ),
    "a tied output layer": (config(), ["train.modules_to_save=[lm_head]"], ["share one weight (tie_word_embeddings)"]),
    "a norm that should learn whole": (
        config(tie_word_embeddings=False),
        ["train.modules_to_save=[norm]"],
        ["norm is none of embed_tokens, the embeddings"],
    ),
    "more ranks than singular vectors": (
        config(),
        ["train.method=loftq", "train.rank=33"],
        ["train.rank: 33", "k_proj has 32; set train.rank to 32 or less"],
    ),
    "layers that do not fill a format's blocks": (
        tensors(model__layers__1__mlp__down_proj__weight=(64, 72)),
        ["train.method=lq-lora", "quantize.format=mixed", "train.rank=8"],
        ["quantize.format: mixed packs, in blocks of 64 inputs, and model.layers.1.mlp.down_proj has 72"],
    ),
    "IA3 without its layers": (
        rename({"gate_proj": "gate_up_proj", "q_proj": "qkv_proj", "k_proj": "k_map"}, model_type="phi3"),
        ["train.method=ia3"],
        ["base (phi3) these are"],
    ),
    "a bottleneck without an MLP": (
        rename({".mlp.": ".net."}),
        ["train.method=bottleneck"],
        ["goes behind the MLP of each layer"],
    ),
    # The precision.
    "float16 over bfloat16": (
        config(),
        ["quantize.compute_dtype=float16", "train.precision=float32"],
        ["stored in bfloat16", "set quantize.compute_dtype: bfloat16"],
    ),
    "float16 over bfloat16 by the header": (
        without_dtype_in_config,
        ["quantize.compute_dtype=float16", "train.precision=float32"],
        ["stored in bfloat16"],
    ),
    # An export.
    "GGUF of another family": (
        config(architectures=["GPTNeoXForCausalLM"]),
        ["merge.exports=[bf16, gguf-f16]"],
        ["merge.exports: GGUF is written for"],
    ),
}


@pytest.mark.parametrize(("edit", "overrides", "words"), UNFIT.values(), ids=UNFIT)
def test_a_base_that_does_not_fit_is_refused_by_the_plan(
    planned: Callable[..., Plan], base: Path, edit: Edit, overrides: list[str], words: list[str]
) -> None:
    edit(base)
    message = refusal(planned, *overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("edit", "overrides"),
    [
        (shards(metadata=True), []),
        # Rotary embeddings that are scaled reach further, and a window is no limit.
        (
            config(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
            ["data.max_length_tokens=8000"],
        ),
        (config(rope_scaling={"type": "linear", "factor": 2.0}), ["data.max_length_tokens=3900"]),
        (config(sliding_window=16), ["data.max_length_tokens=1900"]),
        # Nothing is generated, so nothing comes on top.
        (config(), ["data.max_length_tokens=2048", "evaluate.stop_rows=0"]),
        # An embedding may have spare rows; a stand-in for images that nothing writes is in many text models.
        (config(vocab_size=640), []),
        (added_tokens(("<image_soft_token>", 512)), []),
        # Numbers of experts without experts.
        (config(num_local_experts=0), []),
        (config(n_routed_experts=None, num_experts=1), []),
        (config(n_routed_experts=64, first_k_dense_replace=2), []),
        (config(quantization_config=None), []),
        (config(layer_types=["full_attention", "sliding_attention"]), []),
        # Layers by name, kind and pattern, also of a file that leaves out the name of the model's body.
        (config(), ["train.target_modules=[q_proj, up_proj]", "train.rank_pattern={'1\\..*\\.q_proj': 4}"]),
        (rename({"model.": ""}), [r"train.target_modules=model\.layers\.0\.mlp\..*"]),
        (shards(metadata=True), ["train.target_modules=[down_proj]", "train.alpha_pattern={down_proj: 4}"]),
        (config(), ["train.method=loftq", "train.rank=33", "train.target_modules=[q_proj]"]),
        (
            tensors(lm_head__weight=(512, 64)),
            ["train.modules_to_save=[lm_head]", "train.target_modules=attention"],
        ),
        (config(), ["train.method=bottleneck"]),
        (config(tie_word_embeddings=False), ["train.modules_to_save=[lm_head]"]),  # some files call it embed_out
        # Where the file's names are not those of the model, only the model can tell.
        (rename({"_proj": "_map"}), ["train.target_modules=[q_proj]"]),
        # Stored in float16, computed in float16, trained in float32.
        (config(dtype="float16"), ["data.max_length_tokens=100"]),
    ],
)
def test_what_only_looks_unfit_is_planned(
    planned: Callable[..., Plan], base: Path, edit: Edit, overrides: list[str]
) -> None:
    edit(base)
    planned(*overrides)


def test_float16_is_planned_over_float16_where_training_computes_in_float32(
    planned: Callable[..., Plan], base: Path
) -> None:
    path = base / "model.safetensors"
    save_file({name: t.half() for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    planned("quantize.compute_dtype=float16", "train.precision=float32")
    message = refusal(planned, "quantize.compute_dtype=float16", "train.precision=bfloat16")
    assert "train.precision is bfloat16: training would compute in float16" in message


def test_all_reasons_come_at_once(planned: Callable[..., Plan], base: Path) -> None:
    change(base, "config.json", num_local_experts=8, max_position_embeddings=512, vocab_size=500)
    reasons = refusal(planned, "quantize.compute_dtype=float16").splitlines()
    assert [reason.split(":")[0] for reason in reasons] == [
        "sources.base_model", "sources.base_model", "data.max_length_tokens", "quantize.compute_dtype",
    ]  # fmt: skip


def test_other_files_beside_the_weights_are_named_by_the_plan_and_stay_where_they_are(
    planned: Callable[..., Plan], base: Path
) -> None:
    before = planned()
    others = ["README.md", "model.onnx", "modeling_tiny.py", "old/consolidated.00.pth", "pytorch_model.bin", "x\x1b[2J"]
    for name in others:
        file(name)(base)
    plan = planned()
    assert [step.key for step in plan.steps] == [step.key for step in before.steps]
    assert (
        "left out of base_model: README.md, model.onnx, modeling_tiny.py, old/consolidated.00.pth, pytorch_model.bin, x"
    ) in explain.as_text(plan)
    assert "\x1b" not in explain.as_text(plan)
    assert {p.name for p in fetch_base(plan, "quantize_model").iterdir()} == {p.name for p in base.iterdir()} - {
        *others, "old",
    }  # fmt: skip

    for number in range(20):
        file(f"images/{number}.png")(base)
    assert "... (26 in all)" in explain.as_text(planned())


@pytest.mark.parametrize(
    ("form", "words"),
    [("model.gguf", "has only GGUF weights"), ("model.onnx", r"has no weights; expected model\.safetensors")],
)
def test_a_base_in_another_form_alone_is_refused_by_its_form(
    planned: Callable[..., Plan], base: Path, form: str, words: str
) -> None:
    (base / "model.safetensors").rename(base / form)
    with pytest.raises(UsageError, match=words):
        planned()


@pytest.fixture
def hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that has the base at one commit."""
    with hub_server.serve(base, tmp_path / "state", monkeypatch) as server:
        yield server


def fetch_base(plan: Plan, step: str) -> Path:
    """Fetch the base model as that step does."""
    item = next(item for item in graph.step(step).reads if item.name == "base_model")
    folder = fetch.fetch_input(plan, plan.step(step), open_store(plan.root), item, {})
    assert folder is not None
    return folder


# What the tokenizer's files show is refused by `validate_data`, which fetches no weights; the rest by `quantize_model`.
BY_WEIGHTS = {
    "an index without metadata",
    "two candidates", "an adapter left over", "a folder below", "experts by a tensor", "images by a tensor",
    "a reward model by its tensor", "no such layer", "no such path", "norms by a pattern", "no regular expression",
    "a rank of no layer", "an alpha of a layer without adapter", "a tied output layer",
    "a norm that should learn whole", "more ranks than singular vectors", "IA3 without its layers",
    "layers that do not fill a format's blocks", "a bottleneck without an MLP", "AWQ by a file",
    "packed weights by a tensor", "LoRA in the weights",
    "float16 over bfloat16 by the header",
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_a_commit_is_refused_by_the_first_step_that_has_its_files_in_the_plans_words(
    planned: Callable[..., Plan], base: Path, hub: HubServer, name: str
) -> None:
    edit, overrides, _ = UNFIT[name]
    edit(base)
    by_plan = refusal(planned, *overrides)

    plan = planned(*overrides, uri=hub_server.URI)
    steps = ["quantize_model"] if name in BY_WEIGHTS else ["validate_data", "quantize_model"]
    for step in steps:
        with pytest.raises(UsageError) as by_step:
            fetch_base(plan, step)
        assert str(by_step.value) == by_plan


def test_a_part_of_a_commit_has_only_what_the_line_names(
    planned: Callable[..., Plan], base: Path, hub: HubServer
) -> None:
    for extra in ("added_tokens.json", "modeling.py", "model.fp16.safetensors", "original/params.json"):
        file(extra)(base)
    plan = planned(uri=hub_server.URI, files=["**", "!model.fp16.*", "!added_tokens.json", "!original/*"])
    names = {path.name for path in base.iterdir()} - {
        "added_tokens.json", "modeling.py", "model.fp16.safetensors", "original",
    }  # fmt: skip
    assert {p.name for p in fetch_base(plan, "quantize_model").iterdir()} == names
    tokenizer_names = {name for name in names if globs.matches_name(name, TOKENIZER_FILES)}
    assert {p.name for p in fetch_base(plan, "validate_data").iterdir()} == tokenizer_names

    # The key is of the part and of the exclusions.
    pins = [sources.pin("base_model", hub_server.URI, files) for files in (["**"], ["**", "!x"])]
    keys = {pin.subset(only).key() for pin in pins for only in ((), ("config.json",), ("tokenizer*",))}
    assert len(keys) == 6


def test_a_commit_without_any_file_of_those_names_is_refused(planned: Callable[..., Plan], hub: HubServer) -> None:
    with pytest.raises(UsageError, match=r"has no files that match sub/\*\.safetensors"):
        planned(uri=hub_server.URI, files=["sub/*.safetensors"])


def test_a_commit_that_the_planner_cannot_list_is_listed_by_the_step_and_the_plan_says_so(
    planned: Callable[..., Plan], base: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    file("README.md")(base)
    with monkeypatch.context() as offline:
        hub_server.go_offline(offline)
        plan = planned(uri=hub_server.URI)
    assert "base_model: the Hub does not list its files here" in explain.as_text(plan)
    folder = fetch_base(plan, "quantize_model")
    assert {p.name for p in folder.iterdir()} == {p.name for p in base.iterdir()} - {"README.md"}

    # What lies in the cache is compared with what the Hub says, whatever lies beside it.
    weights = folder / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(bytes(weights.stat().st_size))
    fetched = fetch_base(plan, "quantize_model") / "model.safetensors"
    assert fetched.read_bytes() == (base / "model.safetensors").read_bytes()
    assert "left out of base_model: README.md" in explain.as_text(planned(uri=hub_server.URI))


def test_a_base_that_asks_for_code_after_it_was_planned_is_refused_before_it_is_loaded(
    planned: Callable[..., Plan], base: Path
) -> None:
    plan = planned()
    folder = fetch_base(plan, "quantize_model")
    change(base, "config.json", text_config={"auto_map": {"AutoConfig": "x.Y"}})
    # As if that file had been planned: exchanged while the plan was made.
    data = (base / "config.json").read_bytes()
    source = plan.sources["base_model"]
    assert source is not None
    pin = f"sha256:{hashlib.sha256(data).hexdigest()}"
    files = tuple(f.model_copy(update={"pin": pin}) if f.path == "config.json" else f for f in source.files)
    exchanged = plan.model_copy(
        update={"sources": {**plan.sources, "base_model": source.model_copy(update={"files": files})}}
    )
    assert folder.is_dir()
    with pytest.raises(IntegrityError, match="auto_map"):
        fetch_base(exchanged, "quantize_model")


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("tokenizer.json", {"added_tokens": [1]}),
        ("tokenizer.json", {"model": 1}),
        ("config.json", {"rope_parameters": 2}),
    ],
)
def test_a_file_of_another_form_is_damage_and_not_our_bug(
    planned: Callable[..., Plan], base: Path, file: str, fields: dict[str, Any]
) -> None:
    change(base, file, **fields)
    with pytest.raises(IntegrityError, match=f"{file}.* has another form than transformers writes"):
        planned("merge.exports=[bf16, gguf-f16]")


def test_the_families_of_ia3_are_those_that_peft_knows() -> None:
    assert set(IA3_FAMILIES) == set(constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING)
