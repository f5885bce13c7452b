"""Attach a new LoRA adapter to the base, and save and load what is trained.

With `train.method: full` there is no adapter: then each function does the same for all weights, by `all_weights`.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import pad
from transformers import PreTrainedModel

from components.train_qlora import all_weights
from components.train_qlora.fused_lora import fuse_lora_layers
from components.train_qlora.logits import logits_kind
from components.train_qlora.memory_efficient import patch_norms_and_mlps
from components.train_qlora.methods import Lora, Method, method_of
from components.train_qlora.offload import InputOffload, offload_layer_inputs
from components.train_qlora.row_probe import probe_rows
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import UsageError

BASE_NAME = "base_nf4"  # in adapter_config.json, in place of a path of this machine
ATTENTION_MODULE_NAMES = ("attn", "attention")  # parts of the names that model families give to the block
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def attach_new(model: PreTrainedModel, config: TrainConfig, method: Method | None = None) -> Any:
    """Attach a new adapter to the frozen base; it is random (seed it before), changes no output yet, and is fp32.

    With `train.method: full` the model itself is prepared instead, and returned.

    Args:
        model: The base.
        config: The settings.
        method: The one of the settings, where the caller shares it with an optimizer.

    Raises:
        UsageError: If `target_modules` names no layer of this model, or the model does not support
            gradient checkpointing.
    """
    method = method or method_of(config)
    trainable = _attach_lora(model, config, method) if isinstance(method, Lora) else all_weights.prepare(model, config)
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


def _attach_lora(model: PreTrainedModel, config: TrainConfig, method: Lora) -> PeftModel:
    lora_config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.method == "rslora",
        use_dora=method.has_magnitudes,
        target_modules=target_modules(model, config.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    model.config.use_cache = False
    layer_names = _layer_names(model, lora_config.target_modules)
    try:
        peft_model = get_peft_model(model, lora_config)
    except ValueError as error:
        raise UsageError(f"train.target_modules: PEFT cannot adapt {type(model).__name__}: {error}") from error
    peft_model.peft_config["default"].base_model_name_or_path = BASE_NAME
    _refuse_missed_layers(peft_model, layer_names)
    for layer in peft_model.modules():
        if hasattr(layer, "lora_A"):
            method.extend(layer)

    # All of them run a probe through the model. So the adapter must be attached, and eval mode turns dropout off.
    patch_norms_and_mlps(peft_model.eval(), config.kernels)
    fuse_lora_layers(peft_model, method)
    logits_kind(peft_model)
    probe_rows(peft_model)
    return peft_model


def target_modules(model: PreTrainedModel, requested_modules: str | list[str]) -> list[str]:
    """Return the sorted names of the requested linear layers; never the output layer, which stays in 16 bits.

    Raises:
        UsageError: If a name is unknown (the message names the nearest one), or no layer matches.
    """
    lm_head = model.get_output_embeddings()
    paths = [name for name, module in model.named_modules() if isinstance(module, Linear) and module is not lm_head]
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})

    if requested_modules == "all-linear":
        selected = names
    elif requested_modules == "attention":
        # "model.layers.0.self_attn.q_proj": the block's name is the last but one.
        in_attention = {
            p.rsplit(".", 1)[-1] for p in paths if any(word in p.rsplit(".", 2)[-2] for word in ATTENTION_MODULE_NAMES)
        }
        selected = sorted(in_attention)
    else:
        for name in requested_modules:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, 1)
                hint = f"; did you mean {nearest[0]}?" if nearest else ""
                raise UsageError(
                    f"train.target_modules: no layer is called {name!r}, there are {', '.join(names)}{hint}"
                )
        selected = sorted(set(requested_modules))

    if not selected:
        raise UsageError(
            f"train.target_modules: {requested_modules!r} matches no layer, there are {', '.join(names) or 'none'}"
        )

    # PEFT adapts every module of a name. Where others have it too, as the numbers in lists do, whole paths are needed.
    taken_names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name not in paths}
    return sorted(
        target
        for name in selected
        for target in ([p for p in paths if p.rsplit(".", 1)[-1] == name] if name in taken_names else [name])
    )


def _layer_names(model: PreTrainedModel, targets: Collection[str]) -> set[str]:
    """Return the names of the layers that the targets of `target_modules` stand for."""
    return {
        name for name, _ in model.named_modules() if name in targets or any(name.endswith(f".{t}") for t in targets)
    }


def _refuse_missed_layers(model: PeftModel, layer_names: set[str]) -> None:
    """Refuse a model on which PEFT put no adapter where it should; it takes dense layers of some families for experts.

    Raises:
        UsageError: With the number of layers and the name of one of them.
    """
    adapted = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    if missed := sorted(layer_names - adapted):
        raise UsageError(
            f"train.target_modules: PEFT adapts {len(adapted & layer_names)} of {len(layer_names)} layers of "
            f"{type(model.get_base_model()).__name__}, and not {missed[0]}, for it takes that for a part of experts; "
            "choose another base, or name the other layers"
        )


def checkpoint_files(model: Any) -> tuple[str, str]:
    """Return the names of the files that `save` writes: the config's and the weights'."""
    if isinstance(model, PeftModel):
        return CONFIG_FILE, WEIGHTS_FILE
    return all_weights.CONFIG_FILE, all_weights.WEIGHTS_FILE


def save(model: Any, folder: Path) -> None:
    """Write the adapter as it is trained, for a checkpoint: the same bytes for the same adapter."""
    if not isinstance(model, PeftModel):
        all_weights.save(model, folder)
        return
    # Training never changes the vocabulary; the default "auto" would look up the base model on the hub to find out.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card template; publishing writes a real one

    path = folder / CONFIG_FILE
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    document["target_modules"] = sorted(document["target_modules"])  # PEFT keeps a set, whose order changes
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # safetensors writes files that only their owner can read; whoever serves the adapter may be another user.
    for path in folder.iterdir():
        path.chmod(0o644)


def export(model: Any, folder: Path, config: TrainConfig) -> None:
    """Write the adapter as plain LoRA with delta W = B A: alpha is the rank, and the scale is in B.

    llama.cpp does not read `use_rslora`, and vLLM no rank or alpha of a single layer; both read this form. So all
    layers have the largest rank, where the method gives them several; the rows of A beyond a layer's own are zero.
    """
    method = method_of(config)
    if not isinstance(method, Lora):
        all_weights.export(model, folder)
        return
    save(model, folder)
    tensors_to_save, matrices = dict[str, Tensor](), {}
    for name, tensors in tensors_by_layer(load_weights(folder)).items():
        matrices[name] = method.to_lora(tensors)
        if method.has_magnitudes:
            tensors_to_save[f"{name}.lora_magnitude_vector"] = tensors["magnitude_vector"]

    rank = max(len(a) for a, _ in matrices.values())
    for name, (a, b) in matrices.items():
        missing_rows = rank - len(a)
        tensors_to_save[f"{name}.lora_A.weight"] = pad(a, (0, 0, 0, missing_rows))
        tensors_to_save[f"{name}.lora_B.weight"] = pad(b, (0, missing_rows)).contiguous()
    save_file(tensors_to_save, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)

    path = folder / CONFIG_FILE
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    document |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensors_by_layer(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return an adapter's tensors by the layer's name, and by what their own has after `lora_`, e.g. `A`."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".lora_")
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
    if not isinstance(model, PeftModel):
        return all_weights.weights(model)
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def copy_weights(model: Any) -> dict[str, Tensor]:
    """Copy the trained weights to host memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights(model).items()}


def set_weights(model: Any, tensors: dict[str, Tensor]) -> None:
    """Copy weights into the model, in its own precision."""
    if isinstance(model, PeftModel):
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
            path = name.split(".lora_")[0].removesuffix(".weight").removesuffix(".bias")
            sizes = sizes_by_name.setdefault(path.rsplit(".", 1)[-1], {})
            sizes[path] = sizes.get(path, 0) + parameter.numel()
    return [(name, len(sizes), sum(sizes.values())) for name, sizes in sorted(sizes_by_name.items())]


def trainable_parameters(model: Any) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
