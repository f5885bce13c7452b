"""Search instead of a grid: Optuna proposes points, and stops runs early whose evaluation loss is behind the others'.

The study is a file beside the report. So a search that was stopped goes on where it was, and one with more trials goes
on from where the last one ended. Every trial is an ordinary run: one that is proposed again is in the store already.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_retrain.core.errors import UsageError
from qlora_retrain.lab.grid import Point
from qlora_retrain.lab.runs import Outcome
from qlora_retrain.lab.variations import NamedSettings, Variation

FILE = "study.log"
# Before so many trials have ended, no median says much.
_TRIALS_BEFORE_STOPPING = 4
_NAMED, _SPACE, _REFUSED = "points", "space", "refused"


@dataclass(slots=True)
class Trial:
    """A proposed point, with Optuna's own object for it."""

    point: Point
    of_study: Any
    num_evaluations: int = 0

    def is_hopeless(self, loss: float) -> bool:
        """Note an evaluation loss of the training; return whether it is above the median of the other trials'."""
        self.num_evaluations += 1
        self.of_study.report(loss, self.num_evaluations)
        return bool(self.of_study.should_prune())


class Search:
    """Proposes points, and learns of each how it ended.

    Args:
        folder: Where the study's file is.
        variations: The settings, with their values or ranges.
        named: Settings that belong together, of which each point has one.
        num_parallel: How many trials run at once.

    Raises:
        UsageError: If Optuna is not installed, or the study in the folder is one of other settings.
    """

    def __init__(
        self, folder: Path, variations: Sequence[Variation], named: Sequence[NamedSettings], num_parallel: int
    ) -> None:
        self._variations, self._named = variations, {item.name: item for item in named}
        self._study = _open_study(folder / FILE, is_parallel=num_parallel > 1)
        space: dict[str, Any] = {v.knob: str(v.range) if v.range else list(v.values) for v in variations}
        space |= {_NAMED: {item.name: dict(item.settings) for item in named}} if named else {}
        if self._study.user_attrs.setdefault(_SPACE, space) != space:
            raise UsageError(f"{folder / FILE}: is a search of other settings; name another folder with --out")
        self._study.set_user_attr(_SPACE, space)

        # What ran when the last search was stopped is proposed again: its run goes on where it was.
        for trial in self._trials("RUNNING"):
            self._study.enqueue_trial(trial.params)
            self._study.tell(trial.number, state=_state("FAIL"))

    @property
    def num_ended(self) -> int:
        """How many trials have ended; one that was interrupted has not."""
        refused = [trial for trial in self._trials("FAIL") if _REFUSED in trial.user_attrs]
        return len(self._trials("COMPLETE")) + len(self._trials("PRUNED")) + len(refused)

    def measured_points(self) -> list[Point]:
        """Return the points that were measured, in this search and in those that it goes on from."""
        return [self._point(trial.params) for trial in self._trials("COMPLETE")]

    def propose(self) -> Trial:
        """Return the next point."""
        trial = self._study.ask()
        for variation in self._variations:
            _suggest(trial, variation)
        if self._named:
            trial.suggest_categorical(_NAMED, list(self._named))
        return Trial(self._point(trial.params), trial)

    def refuse(self, trial: Trial) -> None:
        """Note that a point cannot be run, or gave no number; it counts as a trial, so that a search ends."""
        trial.of_study.set_user_attr(_REFUSED, True)
        self._study.tell(trial.of_study, state=_state("FAIL"))

    def tell(self, trial: Trial, outcome: Outcome, value: float | None) -> None:
        """Note how a trial ended; `value` is what is minimized, and None where nothing was measured."""
        if outcome.is_stopped:
            self._study.tell(trial.of_study, state=_state("PRUNED"))
        elif value is None or not math.isfinite(value):
            self.refuse(trial)
        else:
            self._study.tell(trial.of_study, value)

    def _trials(self, state: str) -> list[Any]:
        trials: list[Any] = self._study.get_trials(deepcopy=False, states=(_state(state),))
        return trials

    def _point(self, parameters: dict[str, Any]) -> Point:
        settings = tuple(
            (v.knob, parameters[v.knob] if v.range else json.loads(parameters[v.knob])) for v in self._variations
        )
        return Point(settings, None, self._named[parameters[_NAMED]] if self._named else None)


def _suggest(trial: Any, variation: Variation) -> None:
    """Let a trial choose a value; Optuna takes no list as one, so all are JSON."""
    ends = variation.range
    if ends is None:
        trial.suggest_categorical(variation.knob, [json.dumps(value) for value in variation.values])
    elif isinstance(ends.low, int) and isinstance(ends.high, int):
        trial.suggest_int(variation.knob, ends.low, ends.high, log=ends.is_logarithmic)
    else:
        trial.suggest_float(variation.knob, ends.low, ends.high, log=ends.is_logarithmic)


def _open_study(path: Path, *, is_parallel: bool) -> Any:
    try:
        import optuna
    except ImportError:
        raise UsageError(
            "--search optuna: Optuna is not installed here; install it with: pip install 'qlora-retrain[search]'"
        ) from None
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="lab",
        storage=JournalStorage(JournalFileBackend(str(path))),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_TRIALS_BEFORE_STOPPING),
        direction="minimize",
        load_if_exists=True,
    )
    # A search that is made again proposes the same points. One that goes on must not propose its first ones once more.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), constant_liar=is_parallel)
    return study


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]
