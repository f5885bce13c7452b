"""The cards that a plan can be estimated for: their memory, their speed, and what an hour of one costs.

Memory is what torch can use of a card, which is less than its name says. Speed is that of dense products in bf16, as
the maker's data sheets have it. Prices are the platform's own: `gpus` in `platform.yaml`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from qlora_retrain.config.fields import Section, operational
from qlora_retrain.core.errors import UsageError

CardName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,30}[a-z0-9])?$")]


class GpuConfig(Section):
    """What the platform's owner says of a card."""

    memory_gib: float | None = operational(
        None, "GiB of the card that torch can use; null: as the list of cards has it", gt=0.0, le=4096
    )
    tflops: float | None = operational(
        None, "10^12 operations a second in dense bf16 products; null: as the list of cards has it", gt=0.0, le=100_000
    )
    price_per_hour: float | None = operational(
        None, "of one card, in whatever currency the platform pays; null: a plan says no cost", gt=0.0, le=10_000
    )


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU.

    Attributes:
        name: As `--gpu` and `platform.yaml` write it.
        memory_gib: GiB that torch can use.
        tflops: 10^12 operations a second in dense bf16 products; None where nobody has said it.
        price_per_hour: None where the platform has no price.
    """

    name: str
    memory_gib: float
    tflops: float | None
    price_per_hour: float | None = None


CARDS = {
    name: Card(name, memory_gib, tflops)
    for name, memory_gib, tflops in (
        ("rtx-3090", 23.6, 71),
        ("rtx-4090", 23.5, 165),
        ("rtx-5090", 31.4, 210),
        ("a6000", 47.4, 155),
        ("l4", 22.0, 121),
        ("l40s", 44.4, 362),
        ("a10g", 22.0, 70),
        ("a100-40gb", 39.4, 312),
        ("a100-80gb", 79.2, 312),
        ("h100", 79.1, 989),
        ("h200", 139.8, 989),
        ("b200", 178.0, 2250),
    )
}


def find_card(name: str, settings: Mapping[str, GpuConfig]) -> Card:
    """Return a card by its name: one of the list, one of the platform's own, or the former with the latter's numbers.

    Raises:
        UsageError: If neither has it, or the platform does not say the memory of a card of its own.
    """
    card, own = CARDS.get(name.lower()), settings.get(name.lower())
    if card is None and own is None:
        names = sorted({*CARDS, *settings})
        nearest = difflib.get_close_matches(name.lower(), names, 1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise UsageError(
            f"no GPU is called {name!r}{hint}; there are {', '.join(names)}; add others to `gpus` in platform.yaml"
        )
    memory_gib = (own and own.memory_gib) or (card and card.memory_gib)
    if not memory_gib:
        raise UsageError(f"platform.yaml: gpus.{name.lower()}: is not in the list of cards, so it needs memory_gib")
    tflops = (own and own.tflops) or (card.tflops if card else None)
    return Card(name.lower(), memory_gib, tflops, own.price_per_hour if own else None)
