"""The container images of the steps, by name: what is built here is what the runtimes ask for."""

from __future__ import annotations

import re

from qlora_retrain import __version__
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.graph import Image

DEFAULT: dict[Image, str] = {
    "light": f"qlora-retrain-light:{__version__}",
    "train": f"qlora-retrain-train:{__version__}",
}


def pinned(ref: str) -> str:
    """The reference itself.

    Raises:
        UsageError: If it has neither a tag nor a digest, or the tag `latest`: the plan and every step must be one code.
    """
    tag = ref.rpartition("/")[2].partition(":")[2]  # after the last /, so that a registry's port is no tag
    if "@sha256:" not in ref and tag in ("", "latest"):
        raise UsageError(f"image {ref!r}: wanted a tag other than latest, or a digest: name:tag or name@sha256:...")
    return ref


def by_digest(ref: str) -> bool:
    """Whether the reference names bytes, and not a tag that somebody can move."""
    return re.search(r"@sha256:[0-9a-f]{64}$", ref) is not None
