"""Attach a new LoRA adapter to the base, and save and load what is trained.

With `train.method: full` there is no adapter: then each function does the same for all weights, by `all_weights`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from components.train_qlora import all_weights
from components.train_qlora.fused_lora import fuse_lora_layers
from components.train_qlora.logits import logits_kind
from components.train_qlora.memory_efficient import patch_norms_and_mlps
from components.train_qlora.methods import Lora, Method, WithoutMatrices, method_of
from components.train_qlora.offload import InputOffload, offload_layer_inputs
from components.train_qlora.row_probe import probe_rows
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.lm import own_adapter
from qlora_retrain.lm.own_adapter import OwnAdapter
from qlora_retrain.lm.target_layers import adapted_paths, patterns_by_path, refuse_unfit_modules, target_modules

_LORA = ".lora_"  # between a layer's name and that of its part
# Where the name of any trained parameter goes on after its layer's.
_ADAPTERS_PART = re.compile(r"\.(?:lora_|modules_to_save|ia3_l|bottleneck_|virtual_tokens|default\.embedding)")
BASE_NAME = "base_nf4"  # in adapter_config.json, in place of a path of this machine
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
BESIDE_FILE = "method.safetensors"  # what a method ships beside A and B


def attach_new(
    model: PreTrainedModel,
    config: TrainConfig,
    method: Method | None = None,
    start: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Any:
    """Attach a new adapter to the frozen base; it is random (seed it before), changes no output yet, and is fp32.

    With `train.method: full` the model itself is prepared instead, and returned.

    Args:
        model: The base.
        config: The settings.
        method: The one of the settings, where the caller shares it with an optimizer.
        start: A and B by layer, where they lie beside the base.

    Raises:
        UsageError: If `target_modules` names no layer of this model, or the model does not support
            gradient checkpointing.
    """
    method = method or method_of(config)
    if isinstance(method, Lora):
        trainable = _attach_lora(model, config, method, start or {})
    elif isinstance(method, WithoutMatrices):
        # All of them run a probe through the model, which must be the base's: rows have no virtual tokens yet.
        patch_norms_and_mlps(model.eval(), config.kernels)
        logits_kind(model)
        probe_rows(model)
        trainable = method.attach(model)
    else:
        trainable = all_weights.prepare(model, config)
    if config.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UsageError(
                f"train.gradient_checkpointing: {type(model).__name__} does not support it; leave the setting out"
            )
        is_offloaded = config.gradient_checkpointing == "offload"
        model.activation_checkpointing_enable(every_n_layers=1 if is_offloaded else config.gradient_checkpointing)
        # On a CPU the inputs are in host memory already.
        if is_offloaded and config.device == "cuda":
            offload_layer_inputs(model, InputOffload(torch.cuda.Stream(model.device)))
    return trainable


def _attach_lora(
    model: PreTrainedModel, config: TrainConfig, method: Lora, start: Mapping[str, tuple[Tensor, Tensor]]
) -> PeftModel:
    targets = target_modules(model, config.target_modules)
    layer_names = adapted_paths(model, targets)
    refuse_unfit_modules(model, config.modules_to_save)
    lora_config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.method == "rslora",
        use_dora=method.has_magnitudes,
        target_modules=targets,
        modules_to_save=list(config.modules_to_save) or None,
        **patterns_by_path(config, layer_names),
        bias="none",
        task_type="CAUSAL_LM",
    )
    model.config.use_cache = False
    try:
        peft_model = get_peft_model(model, lora_config)
    except ValueError as error:
        raise UsageError(f"train.target_modules: PEFT cannot adapt {type(model).__name__}: {error}") from error
    peft_model.peft_config["default"].base_model_name_or_path = BASE_NAME
    _refuse_missed_layers(peft_model, layer_names)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            method.extend(layer, (start or {}).get(name))

    # All of them run a probe through the model. So the adapter must be attached, and eval mode turns dropout off.
    patch_norms_and_mlps(peft_model.eval(), config.kernels)
    fuse_lora_layers(peft_model, method)
    logits_kind(peft_model)
    probe_rows(peft_model)
    return peft_model


def _refuse_missed_layers(model: PeftModel, layer_names: set[str]) -> None:
    """Refuse a model on which PEFT put no adapter where it should; it takes dense layers of some families for experts.

    Raises:
        UsageError: With the number of layers and the name of one of them.
    """
    adapted = layer_paths(model)
    if missed := sorted(layer_names - adapted):
        raise UsageError(
            f"train.target_modules: PEFT adapts {len(adapted & layer_names)} of {len(layer_names)} layers of "
            f"{type(model.get_base_model()).__name__}, and not {missed[0]}, for it takes that for a part of experts; "
            "choose another base, or name the other layers"
        )


def has_adapter(model: Any) -> bool:
    """Return whether an adapter trains, and not all weights."""
    return isinstance(model, PeftModel) or own_adapter.find(model) is not None


def layer_paths(model: PeftModel) -> set[str]:
    """Return the paths of the adapted layers in the model."""
    return {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}


def checkpoint_files(model: Any) -> tuple[str, str]:
    """Return the names of the files that `save` writes: the config's and the weights'."""
    if has_adapter(model):
        return CONFIG_FILE, WEIGHTS_FILE
    return all_weights.CONFIG_FILE, all_weights.WEIGHTS_FILE


def save(model: Any, folder: Path) -> None:
    """Write the adapter as it is trained, for a checkpoint: the same bytes for the same adapter."""
    if own := own_adapter.find(model):
        _save_own(own, folder)
        return
    if not isinstance(model, PeftModel):
        all_weights.save(model, folder)
        return
    # Training never changes the vocabulary; the default "auto" would look up the base model on the hub to find out.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card template; publishing writes a real one

    path = folder / CONFIG_FILE
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "feedforward_modules"):
        if isinstance(document.get(name), list):
            document[name] = sorted(document[name])  # PEFT keeps a set, whose order changes
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # safetensors writes files that only their owner can read; whoever serves the adapter may be another user.
    for path in folder.iterdir():
        path.chmod(0o644)


def _save_own(own: OwnAdapter, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in own.weights().items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)
    document = {**own.config, "base_model_name_or_path": BASE_NAME}
    (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export(model: Any, folder: Path, config: TrainConfig) -> None:
    """Write the adapter as plain LoRA with delta W = B A: alpha is the rank, and the scale is in B.

    One without matrices ships as it is trained.

    llama.cpp does not read `use_rslora`, and vLLM no rank or alpha of a single layer; both read this form. So all
    layers have the largest rank, where the method gives them several; the rows of A beyond a layer's own are zero.
    """
    method = method_of(config)
    if isinstance(method, WithoutMatrices):
        save(model, folder)
        return
    if not isinstance(method, Lora):
        all_weights.export(model, folder)
        return
    save(model, folder)
    weights_of_adapter = load_weights(folder)
    # Modules that learnt whole are as large as the base's own, and are merged in its type.
    tensors_to_save = {name: t.to(torch.bfloat16) for name, t in weights_of_adapter.items() if _LORA not in name}
    beside, matrices = dict[str, Tensor](), {}
    for name, tensors in tensors_by_layer(weights_of_adapter).items():
        matrices[name] = method.to_lora(tensors, method.scale(model.get_submodule(name)))
        beside |= {f"{name}.lora_{part}": tensor for part, tensor in method.beside(tensors).items()}
        if method.has_magnitudes:
            tensors_to_save[f"{name}.lora_magnitude_vector"] = tensors["magnitude_vector"]

    rank = max(len(a) for a, _ in matrices.values())
    for name, (a, b) in matrices.items():
        missing_rows = rank - len(a)
        tensors_to_save[f"{name}.lora_A.weight"] = pad(a, (0, 0, 0, missing_rows))
        tensors_to_save[f"{name}.lora_B.weight"] = pad(b, (0, missing_rows)).contiguous()
    for file, file_tensors in ((WEIGHTS_FILE, tensors_to_save), (BESIDE_FILE, beside)):
        if file_tensors:
            save_file(file_tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)

    path = folder / CONFIG_FILE
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    document |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensors_by_layer(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return an adapter's tensors by the layer's name, and by what their own has after `lora_`, e.g. `A`."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        layer, mark, part = name.removesuffix(".weight").rpartition(_LORA)
        if mark:
            by_layer.setdefault(layer, {})[part] = tensor
    return by_layer


def save_weights(model: Any, tensors: dict[str, Tensor], config_folder: Path, folder: Path) -> None:
    """Write weights that the model does not hold now, beside the config that `save` wrote to `config_folder`."""
    config_file, weights_file = checkpoint_files(model)
    folder.mkdir(exist_ok=True)
    shutil.copyfile(config_folder / config_file, folder / config_file)
    save_file(tensors, folder / weights_file, metadata={"format": "pt"})


def weights(model: Any) -> dict[str, Tensor]:
    """Return the trained weights by name: those of the model itself."""
    if own := own_adapter.find(model):
        return own.weights()
    if not isinstance(model, PeftModel):
        return all_weights.weights(model)
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def copy_weights(model: Any) -> dict[str, Tensor]:
    """Copy the trained weights to host memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights(model).items()}


def set_weights(model: Any, tensors: dict[str, Tensor]) -> None:
    """Copy weights into the model, in its own precision."""
    if own := own_adapter.find(model):
        own.set_weights(tensors)
    elif isinstance(model, PeftModel):
        set_peft_model_state_dict(model, tensors)
    else:
        all_weights.set_weights(model, tensors)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights that `save` or `save_weights` wrote."""
    is_adapter = (folder / WEIGHTS_FILE).is_file()
    tensors: dict[str, Tensor] = load_file(folder / (WEIGHTS_FILE if is_adapter else all_weights.WEIGHTS_FILE))
    return tensors


def ranks(model: Any, method: Method) -> dict[str, int]:
    """Return the rank of each layer by its name, where the method chose them; else nothing."""
    return method.ranks(tensors_by_layer(copy_weights(model)).items()) if isinstance(model, PeftModel) else {}


def trainable_by_layer(model: Any) -> list[tuple[str, int, int]]:
    """Return (layer name, number of such layers, trainable parameters in all of them) for layers that train, sorted."""
    sizes_by_name: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path = _ADAPTERS_PART.split(name)[0].removesuffix(".weight").removesuffix(".bias")
            sizes = sizes_by_name.setdefault(path.rsplit(".", 1)[-1], {})
            sizes[path] = sizes.get(path, 0) + parameter.numel()
    return [(name, len(sizes), sum(sizes.values())) for name, sizes in sorted(sizes_by_name.items())]


def trainable_parameters(model: Any) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
