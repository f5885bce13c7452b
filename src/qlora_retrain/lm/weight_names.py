"""Match the names of weights in a file with those in the model that is loaded from it. Standard library only."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def names_in_model(file_names: Iterable[str], model_names: Collection[str]) -> dict[str, str]:
    """Return by its name in a file the name that each weight has in the model.

    Files of some families leave out the name of the model's body, as Bloom's (`h.0` for `transformer.h.0`);
    transformers adds it when it loads them. A weight that the model has under no such name keeps its own.

    Args:
        file_names: The names in the file.
        model_names: The names in the model.
    """
    bodies = sorted({name.partition(".")[0] for name in model_names})
    names = {}
    for name in file_names:
        with_body = [f"{body}.{name}" for body in bodies if f"{body}.{name}" in model_names]
        names[name] = with_body[0] if name not in model_names and len(with_body) == 1 else name
    return names
