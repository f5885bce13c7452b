"""Load models offline and without remote code: the original base, `base_nf4`, an adapter over either, or GGUF.

Reads folders in the Hugging Face layout with safetensors weights. Refuses (13) a folder that could run code when it is
loaded, damaged weights, and weights that do not fill the model. Refuses (12) what is not a model of that kind.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, TypedDict

from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.core.safety import read_json, refuse_unsafe
from qlora_retrain.lm import base_formats, dora, memory, model_checks
from qlora_retrain.lm.adapter_kind import BOTTLENECK, CONFIG_FILE, PROMPT, WEIGHTS_FILE, adapter_kind
from qlora_retrain.lm.attach_own import attach_own

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin


class LoadOptions(TypedDict):
    """The options that all loaders share, for callers that load several models alike: `load_base(folder, **options)`.

    Attributes:
        device: `cpu` or `cuda`.
        attn_implementation: `eager`, `sdpa` or `flash_attention_2`.
        dtype: The precision to compute in.
    """

    device: str
    attn_implementation: str
    dtype: str


def load_base(
    folder: Path,
    *,
    device: str = "cpu",
    attn_implementation: str = "eager",
    dtype: str = "bfloat16",
    quantization: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """Load the original model in 16 bits, or quantize it while it is read; return it in evaluation mode.

    Args:
        folder: The model.
        device: `cpu` or `cuda`.
        attn_implementation: `eager`, `sdpa` or `flash_attention_2`.
        dtype: The precision to compute in; `stored`: that of the files, whose pages the weights then stay in.
        quantization: How to quantize it.

    Raises:
        UsageError: If the folder is no causal language model in safetensors, or is already quantized.
        IntegrityError: If it is unsafe, damaged or lacks weights.
    """
    if "quantization_config" in _read_config(folder):
        raise UsageError(f"{folder.name}: is already quantized; this needs the base model's own 16-bit weights")
    return _from_pretrained(
        folder,
        device=device,
        attn_implementation=attn_implementation,
        dtype=resolve_dtype(dtype, device),
        quantization=quantization,
    )


def load_nf4(
    folder: Path, *, device: str = "cpu", attn_implementation: str = "eager", dtype: str = "float32"
) -> PreTrainedModel:
    """Load the base that `quantize_model` made, in whatever format it is, in evaluation mode.

    Args:
        folder: `base_nf4`, or an export of this form.
        device: `cpu` or `cuda`.
        attn_implementation: `eager`, `sdpa` or `flash_attention_2`.
        dtype: `float32` unpacks the weights once: the same values, with 4 bits at 8 times the memory. It is for a CPU
            without bf16 arithmetic, where dequantizing in every forward pass (35 M weights/s) would take most of the
            time. Any other value keeps the weights as they are and computes in the precision for which they were
            stored.

    Raises:
        UsageError: If the folder is no causal language model in a format of `quantize.format`.
        IntegrityError: If it is unsafe, damaged or lacks weights.
    """
    base_format = base_formats.from_model_config(_read_config(folder), folder.name)

    def from_pretrained(dtype: str) -> PreTrainedModel:
        return _from_pretrained(folder, device=device, attn_implementation=attn_implementation, dtype=dtype)

    return base_format.load(from_pretrained, is_float32=resolve_dtype(dtype, device) == "float32")


def attach_adapter(
    model: PreTrainedModel | PeftModel, adapter: Path, name: str = "default"
) -> PeftModel | PreTrainedModel:
    """Put a trained adapter over the model, which is changed in place; return it in evaluation mode.

    Args:
        model: The base; or what an earlier call returned for a LoRA, IA3 or prefix adapter, to add one of that kind.
        adapter: The adapter's folder.
        name: By which PEFT's `set_adapter` switches between several.

    Raises:
        UsageError: If the folder is no adapter of this model.
        IntegrityError: If it is unsafe or damaged.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    refuse_unsafe(adapter)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (adapter / file).is_file():
            raise UsageError(f"{adapter.name}: no {file}; `train_qlora` makes such a folder")
    if adapter_kind(adapter) in (PROMPT, BOTTLENECK):
        return attach_own(model, adapter)

    try:
        # Without autocast the adapter keeps its stored precision, in which it was trained and is evaluated.
        if isinstance(model, PeftModel):
            model.load_adapter(str(adapter), adapter_name=name, autocast_adapter_dtype=False)
            attached = model
        else:
            attached = PeftModel.from_pretrained(model, str(adapter), adapter_name=name, autocast_adapter_dtype=False)
    except SafetensorError as error:
        raise IntegrityError(f"{adapter.name}/adapter_model.safetensors: damaged: {error}") from error
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{adapter.name}: does not fit this base model: {error}") from error

    cast_lora_weights_to_input_dtype(attached)
    for module in attached.modules():
        dora.fix_row_scales(module, name)
    return attached.eval()


def has_all_weights(adapter: Path) -> bool:
    """Return whether training made a whole model (`train.method: full`) and no adapter over the base."""
    return (adapter / "config.json").is_file()


def load_trained(
    base_nf4: Path,
    adapter: Path,
    *,
    device: str = "cpu",
    attn_implementation: str = "eager",
    dtype: str = "float32",
) -> Any:
    """Load what training made, in evaluation mode: the base with the adapter over it, or the model of its own.

    Raises:
        UsageError: If the folders are no model, or do not belong together.
        IntegrityError: If one is unsafe or damaged.
    """
    if has_all_weights(adapter):
        return load_base(adapter, device=device, attn_implementation=attn_implementation, dtype=dtype)
    base = load_nf4(base_nf4, device=device, attn_implementation=attn_implementation, dtype=dtype)
    return attach_adapter(base, adapter)


def cast_lora_weights_to_input_dtype(model: PeftModel) -> None:
    """Make fp32 adapters compute in the precision of their input (bf16), as autocast does on a GPU.

    PEFT would cast each input to fp32 instead, which costs far more than casting the small adapter matrices. The
    stored weights stay fp32, so that small updates are not lost to rounding.
    """
    from torch.nn.functional import linear

    def forward(self: Any, x: Any) -> Any:
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "lora_B"):
            module.cast_input_dtype_enabled = False
            for matrix in (*module.lora_A.values(), *module.lora_B.values()):
                matrix.forward = MethodType(forward, matrix)


def silence_transformers() -> None:
    """Turn off transformers' progress bars and advice, so that the log holds only what a person needs."""
    from transformers.utils import logging

    # PEFT 0.21 calls the deprecated name; delete this line with a PEFT that knows transformers 5's new name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def resolve_dtype(dtype: str, device: str) -> str:
    """Resolve `auto` by the device, and `stored` to transformers' word for it.

    A plan has resolved `auto` already; this is for callers without a plan.
    """
    if dtype == "stored":
        return "auto"
    return dtype if dtype != "auto" else "bfloat16" if device == "cuda" else "float32"


def _from_pretrained(
    folder: Path, *, device: str, attn_implementation: str, dtype: str, quantization: Any = None
) -> PreTrainedModel:
    """Load a causal language model, map every library error to one of ours, and refuse missing weights."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    # One model is in memory at a time, if its caller has dropped the one before.
    memory.release_dropped_models()
    # Checked before any file is opened, since loading could run code of the folder.
    silence_transformers()
    refuse_unsafe(folder)
    attention = "eager" if attn_implementation == "auto" else attn_implementation
    attention = model_checks.refuse_unfit(folder, attention)
    try:
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attention,
            device_map={"": "cpu" if device == "auto" else device},
            **({"quantization_config": quantization} if quantization else {}),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise IntegrityError(f"{folder.name}: its weights are damaged: {error}") from error
    # A KeyError is an index without "metadata", or a config.json without what its family needs.
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UsageError(f"{folder.name}: cannot be loaded as a causal language model: {error}") from error
    except RuntimeError as error:  # the weights have other shapes than config.json says
        raise IntegrityError(f"{folder.name}: its weights do not fit its config.json: {error}") from error

    # transformers fills missing weights with random numbers and only warns.
    if missing := sorted(loading_info["missing_keys"]):
        raise IntegrityError(f"{folder.name}: {len(missing)} weights are missing, e.g. {missing[0]}")

    for name, module in model.named_modules():
        # transformers compares the shapes of all weights but those that it quantizes.
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (declared := (module.out_features, module.in_features)):
            raise IntegrityError(
                f"{folder.name}: its weights do not fit its config.json: {name} is {tuple(state.shape)} in the files, "
                f"and config.json declares {declared}; fetch the model again"
            )
        # On some CPUs, in a forward pass without gradients, bitsandbytes repacks the weights in place with scales
        # rounded to bf16. Training cannot use these, and scores must not depend on the CPU or on earlier forward
        # passes.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.return_dict = True  # or the outputs have no names
    loaded: PreTrainedModel = model.eval()
    return loaded


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder.name}: no config.json; expected a model folder in the Hugging Face layout")
    document = read_json(path, folder.name)
    return document if isinstance(document, dict) else {}
