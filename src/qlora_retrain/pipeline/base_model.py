"""Ask a base model's files, before any work is done, whether this line can use it: weights, architecture, limits.

The plan asks where it can read the files. It downloads no weights of a commit (`hf://`); there each step that fetches
them asks, by the same function and so in the same words. Of the weights only the header of one file is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_retrain.config.fields import Section
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.lm import bounded, gguf_names, model_files
from qlora_retrain.lm.context_length import language_config, max_context_tokens
from qlora_retrain.lm.small_adapters import num_virtual_tokens
from qlora_retrain.pipeline import architectures, layer_names, token_ids
from qlora_retrain.pipeline.model_folder import LABEL, ModelFolder
from qlora_retrain.storage.sources import PinnedSource

# Metrics that are computed from the model's probabilities; all others need generated answers.
_LIKELIHOOD_METRICS = ("loss", "perplexity", "accuracy", "macro_f1")


@dataclass(frozen=True)
class Demands:
    """What a line's sections, none of whose values is `auto`, ask of a base model.

    Attributes:
        max_row_tokens: The longest row.
        max_new_tokens: The tokens that may be generated after a prompt; 0 where nothing is generated.
        compute_dtype: The type to which the 4-bit weights are dequantized.
        train_precision: The type in which training computes.
        has_gguf: Whether an export is GGUF.
        train: The values of the section `train`, which names layers.
        base_format: The form in which the base is stored.
    """

    max_row_tokens: int
    max_new_tokens: int
    compute_dtype: str
    train_precision: str
    has_gguf: bool
    train: Mapping[str, Any]
    base_format: str

    @classmethod
    def from_sections(
        cls,
        *,
        data: Mapping[str, Any],
        quantize: Mapping[str, Any],
        train: Mapping[str, Any],
        evaluate: Mapping[str, Any],
        merge: Mapping[str, Any],
        **_: Mapping[str, Any],
    ) -> Demands:
        """Take them from the values of the sections."""
        is_generating = (
            evaluate["stop_rows"] > 0
            or evaluate["label_scoring"] == "generation"
            or any(metric not in _LIKELIHOOD_METRICS for metric in evaluate["metrics"])
        )
        return cls(
            max_row_tokens=data["max_length_tokens"],
            max_new_tokens=evaluate["max_new_tokens"] if is_generating else 0,
            compute_dtype=quantize["compute_dtype"],
            train_precision=train["precision"],
            has_gguf=any(form.startswith("gguf") for form in merge["exports"]),
            train=train,
            base_format=quantize["format"],
        )


def refuse_unfit_source(settings: Mapping[str, Section], base: PinnedSource | None) -> None:
    """Refuse a base that the line cannot use, before hours of training and not after them."""
    # The files of a commit are not here yet: the steps that fetch them ask the same.
    if base is not None and not base.is_commit:
        values = {name: section.model_dump(mode="json") for name, section in settings.items()}
        refuse_unfit(ModelFolder.from_source(base), Demands.from_sections(**values))


def refuse_unfit(folder: ModelFolder, demands: Demands) -> None:
    """Refuse a base model that the line's settings cannot be carried out with.

    Args:
        folder: The model's files.
        demands: What the line asks of it.

    Raises:
        UsageError: With every reason that the files show.
        IntegrityError: For a file that is not what its name says.
    """
    weights: tuple[str, ...] = ()
    if folder.has_weights:
        # With the files that are left out, since they tell in which other form the weights are.
        weights = model_files.weight_files(folder.names | folder.left_out, folder.read_json, LABEL)
        if "config.json" not in folder.names:
            raise UsageError(f"{LABEL}: has no config.json; expected a model folder in the Hugging Face layout")
    documents = folder.read_objects("config.json", *token_ids.FILES)
    # The export has requirements of its own, which `merge_adapter` would report in the same words, hours later.
    if demands.has_gguf:
        _refuse_unsupported_export({k: v for k, v in documents.items() if k in gguf_names.METADATA_FILES})

    config = documents.get("config.json") or {}
    tensors = folder.header(weights[0]) if weights else {}
    index = folder.read_json(model_files.INDEX) if weights and weights != (model_files.SINGLE_FILE,) else None
    tensor_names = {*tensors, *(index["weight_map"] if index else ())}
    reasons = [f"{LABEL}: {fault}" for fault in architectures.faults(config, tensor_names, folder.names)]
    if not reasons:  # else the names may be those of parts that the line cannot use
        reasons += layer_names.faults(demands.train, demands.base_format, config, tensors, tensor_names)
    if index and not isinstance(index.get("metadata"), Mapping):
        reasons.append(
            f'{LABEL}: {model_files.INDEX} has no "metadata", without which transformers does not read it; add '
            '"metadata": {}'
        )
    reasons += _missing_embeddings(config, documents, folder)
    reasons += _context_faults(config, demands)
    reasons += _precision_faults(_stored_dtype(config, tensors), demands)
    if reasons:
        raise UsageError("\n".join(reasons))


def _refuse_unsupported_export(documents: Mapping[str, Any]) -> None:
    try:
        gguf_names.refuse_unsupported(documents)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{LABEL}: one of {', '.join(documents)} has another form than transformers writes "
            f"({type(error).__name__}: {error}); fetch the model again"
        ) from error


def _missing_embeddings(config: Mapping[str, Any], documents: Mapping[str, Any], folder: ModelFolder) -> list[str]:
    template = "".join(
        folder.read(path).decode("utf-8", errors="replace") for path in token_ids.TEMPLATE_FILES if path in folder.names
    )
    try:
        num_characters = token_ids.added_characters(documents)
        tokens = token_ids.tokens_without_embedding(config, documents, template)
    # A tokenizer of another form than transformers writes is reported by the step that loads it.
    except (AttributeError, KeyError, TypeError, ValueError):
        return []
    if num_characters > bounded.MAX_ADDED_CHARACTERS:
        return [f"{LABEL}: {bounded.too_long_tokens(num_characters)}"]
    if not tokens:
        return []
    token, last_id = max(tokens.items(), key=lambda pair: pair[1])
    rows = language_config(config).get("vocab_size")
    return [
        f"{LABEL}: the tokenizer has {len(tokens)} tokens beyond the embedding, up to {token!r} with the id {last_id}, "
        f"and the embedding has {rows} rows (vocab_size); resize the embedding and save the base again "
        "(resize_token_embeddings of transformers), or remove the tokens from the tokenizer's files"
    ]


def _context_faults(config: Mapping[str, Any], demands: Demands) -> list[str]:
    """Compare the longest row, and the longest answer after it, with what the model takes."""
    limit, rows, new_tokens = max_context_tokens(config), demands.max_row_tokens, demands.max_new_tokens
    if limit is None:
        return []
    if virtual_tokens := num_virtual_tokens(demands.train):
        limit -= virtual_tokens
        if limit < rows + new_tokens:
            return [
                f"train.num_virtual_tokens: {virtual_tokens} tokens before each row leave {max(limit, 0)} of the "
                f"{limit + virtual_tokens} that the base takes (max_position_embeddings), and rows may have {rows} "
                f"(data.max_length_tokens), to which evaluate.max_new_tokens adds {new_tokens}; lower one of the three"
            ]
    if rows > limit:
        return [
            f"data.max_length_tokens: rows may have {rows} tokens, and the base takes {limit} "
            f"(max_position_embeddings); set it to {limit} or less"
        ]

    if rows + new_tokens <= limit:
        return []
    advice = f"set data.max_length_tokens to {limit - new_tokens} or less, or " if limit - new_tokens >= 16 else ""
    return [
        f"data.max_length_tokens: rows may have {rows} tokens, and evaluate.max_new_tokens adds {new_tokens} to a "
        f"prompt, which is more than the {limit} that the base takes (max_position_embeddings); {advice}lower "
        "evaluate.max_new_tokens"
    ]


def _precision_faults(stored: str | None, demands: Demands) -> list[str]:
    if demands.compute_dtype != "float16":
        return []
    if stored == "bfloat16":
        return [
            "quantize.compute_dtype: float16, and the base is stored in bfloat16, whose largest numbers overflow in "
            "float16; set quantize.compute_dtype: bfloat16"
        ]
    if demands.train_precision != "float32":
        return [
            f"quantize.compute_dtype: float16, and train.precision is {demands.train_precision}: training would "
            "compute in float16, whose gradients underflow; set quantize.compute_dtype: bfloat16, or train.precision: "
            "float32"
        ]
    return []


def _stored_dtype(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> str | None:
    """Return the type of the weights as torch names it: of the most tensors in a header, else as config.json says."""
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    stored = [names[e["dtype"]] for e in tensors.values() if isinstance(e, dict) and e.get("dtype") in names]
    if stored:
        return max(sorted(set(stored)), key=stored.count)
    for part in (config, language_config(config)):
        if isinstance(dtype := part.get("dtype") or part.get("torch_dtype"), str):
            return dtype.removeprefix("torch.")
    return None
