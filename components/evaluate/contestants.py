"""Who is scored: each contestant's model with its tokenizer, one in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import scoring
from qlora_retrain.lm import loading


@dataclass(frozen=True, slots=True)
class Folders:
    """Where the contestants' models are; a version's folder holds `model/`."""

    base_model: Path
    base_nf4: Path
    adapter: Path
    champion: Path | None
    anchor: Path | None

    @property
    def names(self) -> tuple[str, ...]:
        """The contestants, in the order in which they are scored."""
        versions = {"champion": self.champion, "anchor": self.anchor}
        return ("base", "base_nf4", "challenger", *(name for name, folder in versions.items() if folder))


@dataclass(frozen=True, slots=True)
class Contestant:
    """A loaded model, the folder of its tokenizer, and what it must be scored under."""

    name: str
    folder: Path
    model: Any
    under: Callable[[], AbstractContextManager[Any]] = nullcontext


def load(config: EvaluateConfig, folders: Folders) -> Iterator[Contestant]:
    """Every contestant in turn; the one before must be let go of.

    The 4-bit base and the challenger share one loaded model, with the adapter switched off and on.
    """
    where: dict[str, Any] = {"device": config.device, "attention": scoring.attention(config.device)}
    where["dtype"] = config.precision
    yield Contestant("base", folders.base_model, loading.load_base(folders.base_model, **where))
    gc.collect()
    shared = loading.attach(loading.load_nf4(folders.base_nf4, **where), folders.adapter)
    yield Contestant("base_nf4", folders.base_nf4, shared, shared.disable_adapter)
    yield Contestant("challenger", folders.base_nf4, shared)
    del shared
    for name, version in (("champion", folders.champion), ("anchor", folders.anchor)):
        if version:
            gc.collect()
            yield Contestant(name, version / "model", loading.load_base(version / "model", **where))
