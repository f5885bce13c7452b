"""Build candidates: the adapter, or an averaged, cut or weakened form of it, merged into either base. One ships.

Neither base is better in general: the adapter was trained over the 4-bit values, and these approximate the original
ones. So both are merged and scored. One candidate is in memory at a time, and the unmerged model beside none of them;
the disk holds two at most. An adapter that ships alone is a candidate over either base, and nothing is merged.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components.merge_adapter import adapter_alone, adapter_forms
from components.merge_adapter.chat_files import write_chat_files
from components.merge_adapter.form_scores import FormScorer, FormScores
from components.merge_adapter.lora import CONFIG_FILE, WEIGHTS_FILE, LoraAdapter
from components.merge_adapter.merge import MergeStats, merge, open_base
from qlora_retrain.config.merge import MergeConfig
from qlora_retrain.config.sections import EvaluateConfig
from qlora_retrain.core import progress
from qlora_retrain.lm import served_model
from qlora_retrain.lm.adapter_kind import ships_alone
from qlora_retrain.lm.chat import ChatTokenizer
from qlora_retrain.lm.loading import LoadOptions

BASES = ("dequantized", "original")  # with equal losses the first ships, as it computes what was evaluated
MAX_FORMS = 12  # that one run builds and scores
ADAPTER_FOLDER = "adapter"  # of the result, where another adapter was merged than the one that was trained
_FOLDER = "candidates"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A form that may ship.

    Attributes:
        base: The base that the adapter is merged into: `dequantized` or `original`.
        rank: The rank to which the adapter is cut; None: as it was trained.
        strength: What B A is multiplied by.
        has_reduced_intruders: Whether the intruder dimensions are scaled down.
        num_adapters: The number of adapters that are averaged, this run's and earlier versions'.
    """

    base: str
    rank: int | None = None
    strength: float = 1.0
    has_reduced_intruders: bool = False
    num_adapters: int = 1

    @property
    def name(self) -> str:
        """Return its name in `certificate.json`: the base, and what else differs from the adapter that was trained."""
        return self.base + self._adapter_name

    @property
    def _adapter_name(self) -> str:
        soup = f", soup of {self.num_adapters}" if self.num_adapters > 1 else ""
        rank = f", rank {self.rank}" if self.rank else ""
        strength = f", strength {self.strength:g}" if self.strength != 1 else ""
        return soup + rank + strength + (", reduced intruders" if self.has_reduced_intruders else "")

    @property
    def has_trained_adapter(self) -> bool:
        """Whether the adapter is merged as it was trained."""
        return not self._adapter_name


@dataclass(slots=True)
class Workshop:
    """Builds candidates in folders below the result's.

    Attributes:
        config: The settings of the merge.
        settings: Those of the evaluation: which directions are intruders.
        base_model: The original base.
        base_nf4: The 4-bit base.
        adapter: The adapter as it was trained.
        tokenizer: The line's.
        model: The folder of the result.
        earlier: The adapters of earlier versions, the newest first, with which this one can be averaged.
        stats: The statistics of every merge.
        num_intruders: The number of intruder dimensions; None where none were looked for.
    """

    config: MergeConfig
    settings: EvaluateConfig
    base_model: Path
    base_nf4: Path
    adapter: Path
    tokenizer: ChatTokenizer
    model: Path
    earlier: tuple[Path, ...] = ()
    stats: dict[Candidate, MergeStats] = field(default_factory=dict)
    num_intruders: int | None = None

    def build_bases(self) -> list[Candidate]:
        """Build the adapter as it was trained, merged into each base that the settings allow."""
        candidates = [Candidate(b) for b in (BASES if self.config.base == "measured" else (self.config.base,))]
        for candidate in candidates:
            self.build(candidate)
        return candidates

    def build(self, candidate: Candidate) -> None:
        """Write a candidate into a folder of its own, complete with the line's chat files."""
        assert len(self.stats) < MAX_FORMS, "the stages of the choice must share the number of forms"
        adapter = self.adapter_of(candidate)
        # Below the model folder, so that keeping the winner is a rename and not a copy of gigabytes.
        folder = self._folder(candidate)
        folder.mkdir(parents=True)
        is_dequantized = candidate.base == "dequantized"
        if self.is_alone:
            stats = adapter_alone.write(self.base_model, self.base_nf4, adapter, folder, dequantized=is_dequantized)
            description = "the adapter alone over this base"
        else:
            stats = merge(
                self.base_model,
                self.base_nf4,
                adapter,
                folder,
                dequantized=is_dequantized,
                max_shard_gib=self.config.max_shard_gib,
            )
            description = f"merged {stats.modules} modules, {stats.weights_bytes / 2**30:.2f} GiB"
        write_chat_files(folder, self.tokenizer)
        self.stats[candidate] = stats
        progress.say(f"{candidate.name}: {description}")

    def score(self, candidate: Candidate, scorer: FormScorer) -> FormScores:
        """Score a candidate that was built; its model is dropped before another one can be loaded."""
        folder = self._folder(candidate)
        loaded = self.load(folder, self.adapter_of(candidate), scorer.load_options)
        return scorer.score_candidate(candidate.name, loaded, folder)

    def load(self, folder: Path, adapter: Path, options: LoadOptions) -> Any:
        """Load the form in a folder: a merged model, or the adapter over the base of the form."""
        return served_model.load(folder, adapter, self.base_model, self.base_nf4, **options)

    @property
    def is_alone(self) -> bool:
        """Whether the adapter ships without a merged model: it cannot be merged, or the line wants none."""
        return not self.config.ships_model or ships_alone(self.adapter)

    def drop(self, candidate: Candidate) -> None:
        """Remove a candidate's files."""
        shutil.rmtree(self._folder(candidate))

    def keep(self, candidate: Candidate) -> Path:
        """Move a candidate's files into the result, and remove all others.

        Returns:
            The folder of the adapter that was merged: below the result's if it is not the one that was trained.
        """
        for path in self._folder(candidate).iterdir():
            path.rename(self.model / path.name)
        adapter = self.adapter_of(candidate)
        if not candidate.has_trained_adapter:
            merged = self.model / ADAPTER_FOLDER
            merged.mkdir()
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                (adapter / name).rename(merged / name)
            adapter = merged
        shutil.rmtree(self.model / _FOLDER)
        return adapter

    @contextmanager
    def merged_model(self, candidate: Candidate, adapter: Path) -> Iterator[Path]:
        """Yield the merged model of the form that ships, of which exports are made; it is built where it does not ship.

        Args:
            candidate: The form that ships.
            adapter: Its adapter.
        """
        if not self.is_alone or self.config.exports == ["bf16"]:
            yield self.model
            return
        # Beside the model folder, so that it never becomes a part of the artifact.
        with TemporaryDirectory(dir=self.model.parent) as name:
            folder = Path(name)
            merge(
                self.base_model,
                self.base_nf4,
                adapter,
                folder,
                dequantized=candidate.base == "dequantized",
                max_shard_gib=self.config.max_shard_gib,
            )
            write_chat_files(folder, self.tokenizer)
            yield folder

    def adapter_of(self, candidate: Candidate) -> Path:
        """Return the folder of the adapter that a candidate merges; it is made the first time."""
        whole, name = self.adapter, "adapter"
        if candidate.num_adapters > 1:
            name = "soup"
            whole = self.model / _FOLDER / name
            if not whole.is_dir():
                adapter_forms.average(self.adapter, self.earlier, whole)
        adapter = whole
        if candidate.rank is not None:
            adapter = self.model / _FOLDER / f"{name}-rank-{candidate.rank}"
            if not adapter.is_dir():
                adapter_forms.cut(whole, adapter, candidate.rank)

        changed = adapter
        if candidate.has_reduced_intruders:
            changed = self.model / _FOLDER / f"{adapter.name}-intruders-{candidate.base}"
            if not changed.is_dir():
                self.num_intruders = self._reduce_intruders(candidate, adapter, changed)
        elif candidate.strength != 1:
            changed = self.model / _FOLDER / f"{adapter.name}-strength-{candidate.strength:g}"
            if not changed.is_dir():
                adapter_forms.weaken(adapter, changed, candidate.strength)
        return changed

    def _reduce_intruders(self, candidate: Candidate, adapter: Path, folder: Path) -> int:
        with LoraAdapter(adapter) as lora:
            modules = lora.modules
        is_dequantized = candidate.base == "dequantized"
        with open_base(self.base_model, self.base_nf4, modules, dequantized=is_dequantized) as base:
            return adapter_forms.reduce_intruders(
                adapter, folder, base.module_weight, self.settings.intruder_top_k, self.settings.intruder_epsilon
            )

    def _folder(self, candidate: Candidate) -> Path:
        return self.model / _FOLDER / candidate.name.replace(", ", "-").replace(" ", "-")
