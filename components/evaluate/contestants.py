"""Load the contestants: the model and the tokenizer of each, with one model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qlora_retrain.config.evaluate import EvaluateConfig
from qlora_retrain.evaluation import scoring
from qlora_retrain.lm import loading, own_adapter, served_model
from qlora_retrain.lm.loading import LoadOptions


@dataclass(frozen=True, slots=True)
class ContestantFolders:
    """The folders of the contestants' models; a version's holds `model/`, and `adapter/` where that ships alone."""

    base_model: Path
    base_nf4: Path
    adapter: Path
    champion: Path | None
    anchor: Path | None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the contestants, in the order in which they are scored."""
        versions = {"champion": self.champion, "anchor": self.anchor}
        return ("base", "base_nf4", "challenger", *(name for name, folder in versions.items() if folder))


@dataclass(frozen=True, slots=True)
class Contestant:
    """A loaded model.

    Attributes:
        name: The contestant's name.
        tokenizer_folder: The folder of its tokenizer.
        is_published: Whether it is a published version, which states its own chat format.
        model: The model.
        scoring_context: The context in which it must be scored, e.g. with its adapter switched off.
    """

    name: str
    tokenizer_folder: Path
    model: Any
    is_published: bool = False
    scoring_context: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def is_trained(self) -> bool:
        """Whether it is more than the base."""
        return self.name not in ("base", "base_nf4")


def load_contestants(config: EvaluateConfig, folders: ContestantFolders) -> Iterator[Contestant]:
    """Load every contestant in turn; the caller must release each before it asks for the next one.

    The stored base and a challenger with an adapter share one loaded model, with the adapter switched off and on.
    """
    # All contestants compute in the same precision, so that differences are those of the weights.
    attention = scoring.attn_implementation(config.device)
    options: LoadOptions = {"device": config.device, "attn_implementation": attention, "dtype": config.precision}
    load_base, load_nf4 = partial(loading.load_base, **options), partial(loading.load_nf4, **options)

    yield Contestant("base", folders.base_model, load_base(folders.base_model))

    if loading.has_all_weights(folders.adapter):
        yield Contestant("base_nf4", folders.base_nf4, load_nf4(folders.base_nf4))
        yield Contestant("challenger", folders.base_nf4, load_base(folders.adapter))
    else:
        yield from _share_base(folders, load_nf4)

    for name, version in (("champion", folders.champion), ("anchor", folders.anchor)):
        if version:
            # One that ships as an adapter alone is loaded over the base of this run, which must be its own.
            model = served_model.load(
                version / "model", version / "adapter", folders.base_model, folders.base_nf4, **options
            )
            yield Contestant(name, version / "model", model, is_published=True)
            del model


def _share_base(folders: ContestantFolders, load_nf4: Callable[[Path], Any]) -> Iterator[Contestant]:
    # Loaded once for two contestants, which saves the time and memory of a second model.
    nf4_with_adapter = loading.attach_adapter(load_nf4(folders.base_nf4), folders.adapter)
    disabled = partial(own_adapter.disabled, nf4_with_adapter)
    yield Contestant("base_nf4", folders.base_nf4, nf4_with_adapter, scoring_context=disabled)
    yield Contestant("challenger", folders.base_nf4, nf4_with_adapter)
