"""Models from folders: the 16-bit base, its 4-bit form, an adapter over either, GGUF; offline, without remote code.

Reads folders in the Hugging Face layout with safetensors weights. Refuses (13) a folder that could run code when it is
loaded, weights that are damaged and weights that do not fill the model; refuses (12) what is not a model of that kind.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.core.safety import refuse_unsafe as refuse_unsafe  # also offered from here: it comes before any load

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel


def load_base(
    folder: Path,
    *,
    device: str = "cpu",
    attention: str = "eager",
    dtype: str = "bfloat16",
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The original model in 16 bits (or quantized while it is read), in evaluation mode.

    Raises:
        UsageError: If the folder is no causal language model in safetensors, or is already quantized.
        IntegrityError: If it is unsafe, damaged or lacks weights.
    """
    if "quantization_config" in _config(folder):
        raise UsageError(f"{folder.name}: is already quantized; a base model's own 16-bit weights are wanted here")
    return _load(folder, device=device, attention=attention, dtype=_precision(dtype, device), quantization=quantization)


def load_nf4(folder: Path, *, device: str = "cpu", attention: str = "eager", dtype: str = "float32") -> PreTrainedModel:
    """The 4-bit form that `quantize_model` made, in evaluation mode.

    Args:
        folder: `base_nf4`.
        device: `cpu` or `cuda`.
        attention: `eager`, `sdpa` or `flash_attention_2`.
        dtype: `float32` holds the 4-bit weights' values unpacked: the same values at 8 times the memory, for a CPU
            without bf16 arithmetic, on which unpacking them in every pass (35 M weights/s) would take most of the
            time. Anything else keeps them packed and computes in the precision that they were quantized for.

    Raises:
        UsageError: If the folder is no causal language model quantized to 4 bits by bitsandbytes.
        IntegrityError: If it is unsafe, damaged or lacks weights.
    """
    settings = _config(folder).get("quantization_config")
    if not isinstance(settings, dict) or not settings.get("load_in_4bit"):
        raise UsageError(f"{folder.name}: its config.json says nothing of 4 bits; `quantize_model` makes that form")
    model = _load(folder, device=device, attention=attention, dtype="auto")
    if _precision(dtype, device) == "float32":
        unpacked: PreTrainedModel = model.dequantize().float().eval()
        return unpacked
    return model


def load_gguf(path: Path, *, device: str = "cpu", attention: str = "eager", dtype: str = "float32") -> PreTrainedModel:
    """The weights of a GGUF file, unpacked into a transformers model in evaluation mode.

    Raises:
        UsageError: If it holds no causal language model that transformers reads.
        IntegrityError: If weights are missing.
    """
    from transformers import GgufConfig

    unpack = GgufConfig(dequantize=True)
    how = {"device": device, "attention": attention, "dtype": _precision(dtype, device)}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar heeds no setting
        return _load(path.parent, **how, quantization=unpack, gguf_file=path.name)


def attach(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """The model with a trained adapter over it, in evaluation mode; the model itself is changed.

    Raises:
        UsageError: If the folder is no adapter of this model.
        IntegrityError: If it is unsafe or damaged.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    refuse_unsafe(adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise UsageError(f"{adapter.name}: no {name}; `train_qlora` makes such a folder")
    try:
        # The stored precision is kept: it is the one that the adapter was trained and will be judged in.
        attached = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
    except SafetensorError as error:
        raise IntegrityError(f"{adapter.name}/adapter_model.safetensors: damaged: {error}") from error
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{adapter.name}: does not fit this base model: {error}") from error
    compute_in_input_precision(attached)
    return attached.eval()


def compute_in_input_precision(model: PeftModel) -> None:
    """Have fp32 adapters compute in the precision of what they are given (bf16), as autocast does on a GPU.

    PEFT would cast each input to fp32 instead, which costs far more than casting the small adapter matrices. The
    weights stay fp32, so that small updates are not lost to rounding.
    """
    from torch.nn.functional import linear

    def forward(self: Any, x: Any) -> Any:
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "lora_B"):
            module.cast_input_dtype_enabled = False
            for small in (*module.lora_A.values(), *module.lora_B.values()):
                small.forward = MethodType(forward, small)


def quiet() -> None:
    """No progress bars and no advice from transformers: the log holds what a person needs."""
    from transformers.utils import logging

    # PEFT 0.21 asks for it; goes with a PEFT that knows transformers 5's new name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _precision(dtype: str, device: str) -> str:
    """What `auto` means where no plan has said: a plan always has."""
    return dtype if dtype != "auto" else "bfloat16" if device == "cuda" else "float32"


def _load(
    folder: Path, *, device: str, attention: str, dtype: str, quantization: Any = None, **more: Any
) -> PreTrainedModel:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    quiet()
    refuse_unsafe(folder)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation="eager" if attention == "auto" else attention,
            device_map={"": "cpu" if device == "auto" else device},
            **({"quantization_config": quantization} if quantization else {}),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **more,
        )
    except SafetensorError as error:
        raise IntegrityError(f"{folder.name}: its weights are damaged: {error}") from error
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"{folder.name}: cannot be loaded as a causal language model: {error}") from error
    except RuntimeError as error:  # weights of other shapes than config.json says
        raise IntegrityError(f"{folder.name}: its weights do not fit its config.json: {error}") from error
    # transformers fills what is missing with random numbers and only warns.
    if missing := sorted(found["missing_keys"]):
        raise IntegrityError(f"{folder.name}: {len(missing)} weights are missing, e.g. {missing[0]}")
    for module in model.modules():
        # Without gradients, on some CPUs, bitsandbytes repacks the weights in place with scales rounded to bf16, and
        # training cannot go on from there. Scores must not depend on the CPU, nor on what was run before.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    loaded: PreTrainedModel = model.eval()
    return loaded


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder.name}: no config.json; a model folder in the Hugging Face layout is wanted")
    return _document(path, f"{folder.name}/config.json")


def _document(path: Path, name: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{name}: is not JSON: {error}") from error
    return document if isinstance(document, dict) else {}
