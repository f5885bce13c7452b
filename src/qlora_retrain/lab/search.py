"""Search instead of a grid: Optuna proposes points, and stops runs early whose evaluation loss is behind the others'.

The study is a file beside the report. So a search that was stopped goes on where it was, and one with more trials goes
on from where the last one ended. Every trial is an ordinary run: one that is proposed again is in the store already.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_retrain.core.errors import Exit, UsageError
from qlora_retrain.lab.grid import Point
from qlora_retrain.lab.runs import Outcome
from qlora_retrain.lab.variations import NamedSettings, Variation

FILE = "study.log"
_LOCK_FILE = "study.lock"
# Before so many trials have ended, no median says much.
_TRIALS_BEFORE_STOPPING = 4
_NAMED, _SPACE = "points", "space"
# Why the line refuses a trial; how its run ended; whether another run would give no number, either.
_REFUSED, _ENDED, _FINAL = "refused", "ended", "final"


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


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other searches out of a folder: to one that begins, the trials of another that runs look interrupted.

    Raises:
        UsageError: If another search is running in it.
    """
    with (folder / _LOCK_FILE).open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"--out {folder}: another search is running in this folder; wait for its end, or name another one"
            ) from error
        yield


class Search:
    """Proposes points, and learns of each how it ended.

    Args:
        folder: Where the study's file is.
        variations: The settings, with their values or ranges.
        named: Settings that belong together, of which each point has one.
        num_parallel: How many trials run at once.

    Raises:
        UsageError: If Optuna is not installed, or if the study in the folder is damaged or one of other settings.
    """

    def __init__(
        self, folder: Path, variations: Sequence[Variation], named: Sequence[NamedSettings], num_parallel: int
    ) -> None:
        self._variations, self._named = variations, {item.name: item for item in named}
        _drop_torn_end(folder / FILE)
        self._study = _open_study(folder / FILE, is_parallel=num_parallel > 1)
        space: dict[str, Any] = {v.knob: str(v.range) if v.range else list(v.values) for v in variations}
        space |= {_NAMED: {item.name: dict(item.settings) for item in named}} if named else {}
        if self._study.user_attrs.setdefault(_SPACE, space) != space:
            raise UsageError(f"{folder / FILE}: is a search of other settings; name another folder with --out")
        self._study.set_user_attr(_SPACE, space)

        # What ran when the last search was stopped is proposed again: its run goes on where it was. So is what failed
        # for a reason that may be gone, such as a disk that was full.
        self._first_number = len(self._study.get_trials(deepcopy=False))
        again = [*self._trials("RUNNING"), *(trial for trial in self._trials("FAIL") if _ENDED in trial.user_attrs)]
        settled = [trial.params for trial in self._ended()]
        settled += [trial.system_attrs.get("fixed_params") for trial in self._trials("WAITING")]
        for trial in self._trials("RUNNING"):
            self._study.tell(trial.number, state=_state("FAIL"))
        for parameters in {json.dumps(trial.params): trial.params for trial in again}.values():
            if parameters not in settled:
                self._study.enqueue_trial(parameters)

    @property
    def num_ended(self) -> int:
        """How many trials have ended; one that was interrupted has not."""
        return len(self._ended())

    def ended_points(self) -> list[tuple[Point, Outcome]]:
        """Return the points that have run, in this search and in those that it goes on from, and how they ended."""
        ended = [trial for trial in self._ended() if _REFUSED not in trial.user_attrs]
        return [(self._point(trial.params), _outcome_of(trial)) for trial in ended]

    def refused_points(self) -> dict[str, str]:
        """Return the labels of the points that the line refuses, with the reasons."""
        refused = [trial for trial in self._ended() if _REFUSED in trial.user_attrs]
        return {self._point(trial.params).label: str(trial.user_attrs[_REFUSED]) for trial in refused}

    def propose(self) -> Trial:
        """Return the next point."""
        trial = self._study.ask()
        for variation in self._variations:
            _suggest(trial, variation)
        if self._named:
            trial.suggest_categorical(_NAMED, list(self._named))
        return Trial(self._point(trial.params), trial)

    def refuse(self, trial: Trial, reason: str) -> None:
        """Note that the line refuses a point; it counts as a trial, so that a search ends."""
        trial.of_study.set_user_attr(_REFUSED, reason)
        self._study.tell(trial.of_study, state=_state("FAIL"))

    def tell(self, trial: Trial, outcome: Outcome, value: float | None) -> None:
        """Note how a trial ended; `value` is what is minimized, and None where nothing was measured."""
        trial.of_study.set_user_attr(_ENDED, [outcome.code, outcome.message])
        if outcome.is_stopped:
            self._study.tell(trial.of_study, state=_state("PRUNED"))
        elif value is None or not math.isfinite(value):
            trial.of_study.set_user_attr(_FINAL, outcome.code in (Exit.DONE, Exit.DIVERGED))
            self._study.tell(trial.of_study, state=_state("FAIL"))
        else:
            self._study.tell(trial.of_study, value)

    def _ended(self) -> list[Any]:
        """Return the trials that need no other run, and those that failed in this search."""
        failed = [trial for trial in self._trials("FAIL") if _is_final(trial) or self._has_failed_now(trial)]
        return sorted((*self._trials("COMPLETE"), *self._trials("PRUNED"), *failed), key=lambda trial: trial.number)

    def _has_failed_now(self, trial: Any) -> bool:
        return _ENDED in trial.user_attrs and trial.number >= self._first_number

    def _trials(self, state: str) -> list[Any]:
        trials: list[Any] = self._study.get_trials(deepcopy=False, states=(_state(state),))
        return trials

    def _point(self, parameters: dict[str, Any]) -> Point:
        settings = tuple(
            (v.knob, parameters[v.knob] if v.range else json.loads(parameters[v.knob])) for v in self._variations
        )
        return Point(settings, None, self._named[parameters[_NAMED]] if self._named else None)


def _is_final(trial: Any) -> bool:
    """Return whether a trial without a number would have none in another run, too."""
    return _REFUSED in trial.user_attrs or bool(trial.user_attrs.get(_FINAL))


def _outcome_of(trial: Any) -> Outcome:
    code, message = trial.user_attrs.get(_ENDED, (int(Exit.DONE), ""))
    return Outcome(code, message, is_stopped=trial.state == _state("PRUNED"))


def _suggest(trial: Any, variation: Variation) -> None:
    """Let a trial choose a value; Optuna takes no list as one, so all are JSON."""
    ends = variation.range
    if ends is None:
        trial.suggest_categorical(variation.knob, [json.dumps(value) for value in variation.values])
    elif isinstance(ends.low, int) and isinstance(ends.high, int):
        trial.suggest_int(variation.knob, ends.low, ends.high, log=ends.is_logarithmic)
    else:
        trial.suggest_float(variation.knob, ends.low, ends.high, log=ends.is_logarithmic)


def _drop_torn_end(path: Path) -> None:
    """Remove the last line of a study where a crash has cut it off: what it was to say has not happened."""
    data = path.read_bytes() if path.is_file() else b""
    if not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


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
    try:
        study = optuna.create_study(
            study_name="lab",
            storage=JournalStorage(JournalFileBackend(str(path))),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_TRIALS_BEFORE_STOPPING),
            direction="minimize",
            load_if_exists=True,
        )
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: is damaged, or no study of Optuna's; remove it, and the search begins anew, with the runs that "
            "are in the store"
        ) from error
    # A search that is made again proposes the same points. One that goes on must not propose its first ones once more.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), constant_liar=is_parallel)
    return study


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]
