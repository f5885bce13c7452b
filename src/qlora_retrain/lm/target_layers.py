"""Find the layers that `train.target_modules` means, and the rank and alpha of each."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_retrain.core.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_retrain.config.sections import TrainConfig

ATTENTION_MODULE_NAMES = ("attn", "attention")  # parts of the names that model families give to the block
# No pattern needs longer for a name; one that goes through a name again and again is refused.
_TIMEOUT_SECONDS = 1.0
# Of Llama, after which most decoders are built: keys and values, and the last layer of the MLP.
_IA3_NAMES = (("k_proj", "v_proj"), "down_proj")
Number = TypeVar("Number", int, float)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the paths of all linear layers but the output layer, which stays in 16 bits."""
    from torch.nn import Linear

    lm_head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, Linear) and module is not lm_head]


def target_modules(model: PreTrainedModel, requested_modules: str | Sequence[str]) -> list[str]:
    """Return the sorted names of the requested linear layers, as PEFT takes them.

    Raises:
        UsageError: If a name is unknown (the message names the nearest one), or no layer matches.
    """
    paths = linear_layers(model)
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    attention_names = {
        # "model.layers.0.self_attn.q_proj": the block's name is the last but one.
        p.rsplit(".", 1)[-1]
        for p in paths
        if any(word in p.rsplit(".", 2)[-2] for word in ATTENTION_MODULE_NAMES)
    }

    if requested_modules == "all-linear":
        selected = names
    elif requested_modules == "attention":
        selected = sorted(attention_names)
    elif requested_modules == "mlp":
        selected = sorted(set(names) - attention_names)
    elif isinstance(requested_modules, str):
        selected = sorted(path for path in paths if matches(requested_modules, path, "train.target_modules"))
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
        example = f"; a regular expression must match a whole path, such as {paths[0]}" if paths else ""
        raise UsageError(
            f"train.target_modules: {requested_modules!r} matches no layer, there are "
            f"{', '.join(names) or 'none'}{example}"
        )

    # PEFT adapts every module of a name. Where others have it too, as the numbers in lists do, whole paths are needed.
    taken_names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name not in paths}
    return sorted(
        target
        for name in selected
        for target in ([p for p in paths if p.rsplit(".", 1)[-1] == name] if name in taken_names else [name])
    )


def refuse_unfit_modules(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Refuse names of `train.modules_to_save` that are not the embeddings' or the output layer's.

    Raises:
        UsageError: For such a name; or where both share one weight, of which one copy would learn alone.
    """
    if not names:
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    allowed = [path.rsplit(".", 1)[-1] for path, module in model.named_modules() if module in (embeddings, head)]
    if unknown := sorted(set(names) - set(allowed)):
        raise UsageError(
            f"train.modules_to_save: {unknown[0]} is none of {' and '.join(allowed)}, the embeddings and the output "
            f"layer of {type(model).__name__}; other layers learn by train.target_modules"
        )
    if embeddings.weight is head.weight:
        raise UsageError(
            f"train.modules_to_save: {' and '.join(allowed)} of {type(model).__name__} share one weight, so neither "
            "can learn alone; leave it out, or choose a base with two weights (tie_word_embeddings: false)"
        )


def ia3_layers(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Return the names of the layers that IA3 scales, and those of them whose input it scales instead of the output.

    They are keys, values and the MLP's last layer, as in the paper; for families that name their layers otherwise,
    those that PEFT knows.

    Raises:
        UsageError: If the family's layers have other names, with these.
    """
    from peft.utils import constants

    names = {path.rsplit(".", 1)[-1] for path in linear_layers(model)}
    keys_and_values, last_of_mlp = _IA3_NAMES
    if names >= {*keys_and_values, last_of_mlp}:
        return [*keys_and_values, last_of_mlp], [last_of_mlp]
    family = model.config.get_text_config().model_type
    layers: list[str] = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(family, [])
    scaled_inputs: list[str] = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(family, [])
    # PEFT knows the paths' ends, e.g. `mlp.dense_4h_to_h`.
    if not layers or not names >= {layer.rsplit(".", 1)[-1] for layer in layers}:
        raise UsageError(
            f"train.method: ia3 scales keys, values and the input of the MLP's last layer, and nothing tells which of "
            f"the linear layers of {type(model).__name__} these are: {', '.join(sorted(names)) or 'none'}; set "
            "train.method: lora"
        )
    return layers, scaled_inputs


def adapted_paths(model: PreTrainedModel, targets: Collection[str]) -> set[str]:
    """Return the paths of the layers that the names of `target_modules` stand for."""
    return {
        name for name, _ in model.named_modules() if name in targets or any(name.endswith(f".{t}") for t in targets)
    }


def patterns_by_path(config: TrainConfig, paths: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return PEFT's `rank_pattern` and `alpha_pattern`, with a path of its own for every layer that has another value.

    Raises:
        UsageError: If a pattern matches no adapted layer.
    """
    settings: dict[str, Mapping[str, Any]] = {
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    return {name: _values_by_path(f"train.{name}", patterns, paths) for name, patterns in settings.items()}


def _values_by_path(knob: str, patterns: Mapping[str, Number], paths: Collection[str]) -> dict[str, Number]:
    """Return the value of the first pattern that matches the end of each path; the path is escaped for PEFT."""
    import regex

    values: dict[str, Number] = {}
    unused = dict.fromkeys(patterns)
    for path in sorted(paths):
        for pattern, value in patterns.items():
            if matches(rf"(?:.*\.)?(?:{pattern})", path, knob):
                values[regex.escape(path)] = value
                unused.pop(pattern, None)
                break
    if unused:
        raise UsageError(
            f"{knob}: {next(iter(unused))!r} matches no adapted layer that an earlier pattern leaves; a path is such "
            f"as {min(paths)}"
        )
    return values


def matches(pattern: str, path: str, knob: str) -> bool:
    """Return whether a regular expression of a knob matches a whole path.

    Raises:
        UsageError: If it is none, or takes too long.
    """
    import regex

    try:
        return regex.fullmatch(pattern, path, timeout=_TIMEOUT_SECONDS) is not None
    except regex.error as error:
        raise UsageError(f"{knob}: {pattern!r} is no regular expression: {error}") from error
    except TimeoutError as error:
        raise UsageError(
            f"{knob}: {pattern!r} takes more than a second for one name; write it without nested repeats"
        ) from error
