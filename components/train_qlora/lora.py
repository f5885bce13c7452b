"""The adapter: which layers get one, how it starts, how it is written and read back."""

from __future__ import annotations

import difflib
import json
import shutil
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Linear
from transformers import PreTrainedModel

from components.train_qlora.joined import join
from components.train_qlora.lean import slim
from qlora_retrain.config.sections import TrainConfig
from qlora_retrain.core.errors import UsageError

BASE_NAME = "base_nf4"  # in adapter_config.json, in place of a path of this machine
ATTENTION = ("attn", "attention")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def attach_new(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """A fresh adapter over the frozen base; A is random (seed it before), B is zero, both fp32.

    Raises:
        UsageError: If `target_modules` names no layer of this model, or it cannot do what is asked.
    """
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=target_modules(model, config.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    model.config.use_cache = False
    adapted = get_peft_model(model, settings)
    adapted.peft_config["default"].base_model_name_or_path = BASE_NAME
    slim(adapted.eval(), config.kernels)
    join(adapted)
    if config.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UsageError(f"train.gradient_checkpointing: {type(model).__name__} cannot do it; leave it out")
        model.activation_checkpointing_enable(every_n_layers=config.gradient_checkpointing)
    return adapted


def target_modules(model: PreTrainedModel, wanted: str | list[str]) -> list[str]:
    """The names of the linear layers that are meant, sorted; never the output layer, which stays in 16 bits.

    Raises:
        UsageError: If a name is unknown (with the nearest one), or nothing is left.
    """
    head = model.get_output_embeddings()
    paths = [name for name, module in model.named_modules() if isinstance(module, Linear) and module is not head]
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    if wanted == "all-linear":
        found = names
    elif wanted == "attention":
        inside = {p.rsplit(".", 1)[-1] for p in paths if any(word in p.rsplit(".", 2)[-2] for word in ATTENTION)}
        found = sorted(inside)
    else:
        for name in wanted:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UsageError(
                    f"train.target_modules: no layer is called {name!r}, there are {', '.join(names)}{hint}"
                )
        found = sorted(set(wanted))
    if not found:
        raise UsageError(f"train.target_modules: {wanted!r} matches no layer, there are {', '.join(names) or 'none'}")
    return found


def save(model: PeftModel, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`: the same bytes for the same adapter."""
    # The vocabulary is never changed here; "auto" would go and look for the base model by its name.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card template; publishing writes a real one
    path = folder / CONFIG
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    document["target_modules"] = sorted(document["target_modules"])  # PEFT keeps a set, whose order changes
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def save_other(found: dict[str, Tensor], like: Path, folder: Path) -> None:
    """Write weights that the model does not have now, beside the config that `save` wrote to `like`."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(like / CONFIG, folder / CONFIG)
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


def weights(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the adapter's weights, in host memory."""
    return {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def put(model: PeftModel, found: dict[str, Tensor]) -> None:
    """Put weights into the adapter, in its own precision."""
    set_peft_model_state_dict(model, found)


def load(folder: Path) -> dict[str, Tensor]:
    """The weights that `save` wrote."""
    found: dict[str, Tensor] = load_file(folder / WEIGHTS)
    return found


def trainable_by_layer(model: PeftModel) -> list[tuple[str, int, int]]:
    """(layer's name, how many of them, numbers trained in all of them), of the names that have an adapter."""
    found: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(name.split(".lora_")[0].rsplit(".", 1)[-1], []).append(parameter.numel())
    return [(name, len(sizes) // 2, sum(sizes)) for name, sizes in sorted(found.items())]


def trainable_parameters(model: PeftModel) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
