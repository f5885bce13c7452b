"""The tiny model in 4 bits, quantized by the step that quantizes, and rows of different lengths over three intents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.quantize_model.step import run as quantize
from qlora_retrain.config.sections import QuantizeConfig

PHRASES = {
    "refund": "I want my money back for order",
    "delivery": "where is the parcel of order",
    "login": "I cannot sign in to see order",
}


@pytest.fixture(scope="session")
def nf4(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base_nf4")
    quantize(QuantizeConfig(), tiny_model, folder)
    return folder


@pytest.fixture(scope="session")
def chats():
    """So many chats of different lengths."""

    def made(count: int) -> list[list[dict[str, Any]]]:
        found = []
        for i in range(count):
            intent, phrase = list(PHRASES.items())[i % 3]
            text = f"{phrase} number {1000 + i}" + " and please hurry" * (i % 5)
            found.append([{"role": "user", "content": text}, {"role": "assistant", "content": intent}])
        return found

    return made
