"""The container images of the steps, by name: `make images` builds them, and the runtimes ask for them."""

from __future__ import annotations

import re

from qlora_retrain import __version__
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.graph import Image

DEFAULT_IMAGES: dict[Image, str] = {
    "light": f"qlora-retrain-light:{__version__}",
    "train": f"qlora-retrain-train:{__version__}",
}


def require_pinned(reference: str) -> str:
    """Return the image reference if it is pinned.

    Raises:
        UsageError: If it is no name of an image, has neither a digest nor a tag, or has the tag `latest`.
    """
    # Whatever renders templates on the way to an engine finds none.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", reference):
        raise UsageError(f"image {reference!r}: expected letters, digits and . _ : / @ - alone")
    # The plan and every step must run the same code, and `latest` may move between two steps of one run.
    # Only what follows the last / can hold the tag: a colon before it is a registry's port.
    tag = reference.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in reference and tag in ("", "latest"):
        raise UsageError(
            f"image {reference!r}: expected a tag other than latest, or a digest: name:tag or name@sha256:..."
        )
    return reference


def has_digest(reference: str) -> bool:
    """Return whether the reference names an image by its digest; a tag can be moved to another image."""
    return re.search(r"@sha256:[0-9a-f]{64}$", reference) is not None
