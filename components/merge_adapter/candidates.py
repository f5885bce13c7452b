"""The two bases that an adapter can be added to, measured beside the live model; the better one is chosen.

Neither is better in general: the 4-bit values are what the adapter was trained over, the original ones are what they
stand for. So both are built and scored, one half of the evaluation rows chooses, the other half judges the choice.
"""

from __future__ import annotations

import gc
import hashlib
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.merge_adapter import agreement
from components.merge_adapter.agreement import Agreement
from components.merge_adapter.merge import Merged, merge
from qlora_retrain.config.sections import EvaluateConfig, MergeConfig
from qlora_retrain.core import progress
from qlora_retrain.evaluation import scoring
from qlora_retrain.evaluation.scoring import Row, RowScore
from qlora_retrain.lm import chat, loading

BASES = ("dequantized", "original")  # of equals the first: what was judged is then what ships
_FOLDER = "candidates"


@dataclass(frozen=True, slots=True)
class Measured:
    """A form of the merged model on the evaluation rows, and beside the live model."""

    scores: list[RowScore]
    agreement: list[Agreement]

    def on(self, ids: frozenset[str]) -> Measured:
        """The same on some of the rows."""
        return Measured([s for s in self.scores if s.id in ids], [a for a in self.agreement if a.id in ids])

    @property
    def loss(self) -> float:
        """Nats a token; infinite where a row's is not finite."""
        total, tokens = sum(s.loss_nats for s in self.scores), sum(s.tokens for s in self.scores)
        return total / tokens if tokens and math.isfinite(total) else math.inf


@dataclass(frozen=True, slots=True)
class Bench:
    """What every form is measured with.

    Attributes:
        live: The 4-bit base with the adapter over it, in memory.
        rows: The evaluation rows; all are scored.
        compared: The ids of those on which a form is compared with the live model, which costs two passes a row.
        labels: The closed set of answers, or None.
        where: How models are loaded: device, attention, precision.
        settings: Of the evaluation: what is measured, and the tokens of a forward pass.
    """

    live: Any
    rows: Sequence[Row]
    compared: frozenset[str]
    labels: Sequence[str] | None
    where: Mapping[str, Any]
    settings: EvaluateConfig

    @classmethod
    def of(
        cls,
        config: MergeConfig,
        settings: EvaluateConfig,
        rows: Sequence[Row],
        compared: frozenset[str],
        labels: Sequence[str] | None,
        base_nf4: Path,
        adapter: Path,
    ) -> Bench:
        """Load the live model."""
        device = config.device
        where = {"device": device, "attention": scoring.attention(device), "dtype": config.precision}
        live = loading.attach(loading.load_nf4(base_nf4, **where), adapter)
        return cls(live, rows, compared, labels, where, settings)

    def measure(self, name: str, model: Any, tokenizer: Path, rows: Sequence[Row] | None = None) -> Measured:
        """Score a loaded form on these rows (all), and compare it with the live model where that is wanted."""
        found, rows = chat.load_tokenizer(tokenizer), self.rows if rows is None else rows
        scores, _ = scoring.score_by(self.settings, model, found, rows, self.labels, what=f"scoring {name}")
        rows = [row for row in rows if row.id in self.compared]
        what = f"comparing {name} with the live model"
        return Measured(scores, agreement.compare(self.live, model, found, rows, self.settings.batch_tokens, what))


def build(config: MergeConfig, base_model: Path, base_nf4: Path, adapter: Path, model: Path) -> dict[str, Merged]:
    """Write every candidate into a folder of its own below `model`."""
    built = {}
    for name in BASES if config.base == "measured" else (config.base,):
        folder = model / _FOLDER / name
        folder.mkdir(parents=True)
        built[name] = merge(
            base_model,
            base_nf4,
            adapter,
            folder,
            dequantized=name == "dequantized",
            max_shard_gib=config.max_shard_gib,
        )
        progress.say(f"{name}: merged {built[name].modules} modules, {built[name].weights_bytes / 2**30:.2f} GiB")
    return built


def measure(bench: Bench, names: Iterable[str], model: Path) -> dict[str, Measured]:
    """Measure the candidates, one in memory at a time beside the live model."""
    found = {}
    for name in names:
        folder = model / _FOLDER / name
        loaded = loading.load_base(folder, **bench.where)
        found[name] = bench.measure(name, loaded, folder)
        del loaded
        gc.collect()
    return found


def halves(rows: Sequence[Row]) -> tuple[frozenset[str], frozenset[str]]:
    """The ids of the rows to choose on and of those to certify on: the same rows always fall the same way."""
    # Hashed once more: how an id is made must not decide the side.
    ids = sorted((row.id for row in rows), key=lambda i: hashlib.sha256(f"merge:{i}".encode()).digest())
    return frozenset(ids[: len(ids) // 2]), frozenset(ids[len(ids) // 2 :])


def better(found: Mapping[str, Measured], chosen_on: frozenset[str]) -> str:
    """The candidate of the lower loss on these rows; of equals the first.

    The loss decides for label tasks too: two forms of one model differ on a row or two of a hundred, if at all, and in
    the loss of every row.
    """
    return min(found, key=lambda name: found[name].on(chosen_on).loss)


def keep(winner: str, model: Path) -> None:
    """Move the winner's files to where the model belongs, and remove the others."""
    for path in (model / _FOLDER / winner).iterdir():
        path.rename(model / path.name)
    shutil.rmtree(model / _FOLDER)
