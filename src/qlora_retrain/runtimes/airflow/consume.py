"""The tasks of a consumer of a line: pull the version that an alias names, then load it and ask golden questions.

Both are subprocesses of the worker, with the account that may pull (`qlora-retrain policy`, role `pull`). The version
is loaded in a process of its own, so that nothing of it outlives the task. What decides is what `pull` decides:
signatures, hashes, and that the alias never goes back in time.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowSkipException, AirflowTaskTimeout

from qlora_retrain.core import json_lines
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Exit, Problem, UsageError
from qlora_retrain.runtimes import credentials
from qlora_retrain.runtimes.airflow import step_log
from qlora_retrain.runtimes.airflow.dag_run import push_note, store_root
from qlora_retrain.runtimes.airflow.move import fail
from qlora_retrain.runtimes.airflow.operators import RETRY_BACKOFF
from qlora_retrain.runtimes.airflow.publish_command import CLI_MODULE, with_reason_first
from qlora_retrain.runtimes.airflow.supervised_process import SupervisedProcess, environment_without_airflow

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.config.consumers import ConsumerConfig

PULL_TASK, ASK_TASK = "pull", "ask"
QUESTIONS, MIN_RIGHT_FRACTION = "questions", "min_right_fraction"
# A model of some hundred gigabytes by a slow network; and its answers by a CPU.
TIMEOUT = timedelta(hours=12)


class _ConsumerOperator(BaseOperator):  # type: ignore[misc]
    """A command of `qlora-retrain` that a consumer runs.

    Args:
        line: The line.
        entry: The entry of `platform.yaml`.
    """

    template_fields: Sequence[str] = ()

    def __init__(self, *, line: str, entry: ConsumerConfig, **kwargs: Any) -> None:
        super().__init__(**{"retries": 2, "execution_timeout": TIMEOUT, **RETRY_BACKOFF, **kwargs})
        self.line, self.entry = line, entry
        self._process = SupervisedProcess()

    def run_command(self, context: Context, *arguments: str) -> str:
        """Run the command to its end; return its last line, or fail the task with the command's reason."""
        from qlora_retrain.pipeline.access import PULL

        try:
            environment = credentials.role_environment(environment_without_airflow(), PULL)
            output, exit_code = self._process.run(
                [sys.executable, "-m", CLI_MODULE, *arguments],
                environment,
                lambda lines: step_log.copy_output(lines, self.log),
            )
        except Problem as problem:
            ending = Ending.from_problem(self.task_id, problem)
        except AirflowTaskTimeout:
            reason = f"stopped at its deadline, after {TIMEOUT}"
            ending = Ending.from_exit_code(self.task_id, Exit.USAGE, reason)
        else:
            if exit_code == Exit.DONE:
                return output.last_lines.partition(step_log.BEFORE_THAT)[0]
            ending = with_reason_first(Ending.from_process(self.task_id, exit_code, None, output.last_lines))
        self._fail(context, ending)

    def _fail(self, context: Context, ending: Ending) -> NoReturn:
        push_note(context, ending.sentence)
        # Airflow's log of errors begins with the reason.
        self.log.error("%s", ending.summary())
        fail(ending)

    def on_kill(self) -> None:
        """Stop the command."""
        self._process.terminate()


class PullOperator(_ConsumerOperator):
    """Pull the version that the alias names, verify every byte of it, and return its name."""

    def execute(self, context: Context) -> str:
        """Pull; skip where the events that started the run say that another alias moved."""
        alias, folder = self.entry.alias, self.entry.folder
        if others := other_aliases(context, alias):
            raise AirflowSkipException(f"{', '.join(sorted(others))} moved, and this follows {alias}")
        key = [f"--verify-key={self.entry.verify_key}"] if self.entry.verify_key else []
        self.run_command(context, "pull", f"{self.line}@{alias}", folder, f"--root={store_root()}", *key)
        return pulled_version(folder)


class AskOperator(_ConsumerOperator):
    """Load the version in a process of its own, and ask it golden questions; return how many answers are right."""

    def execute(self, context: Context) -> str:
        """Ask; fail where too few answers are right."""
        form = context["params"]
        try:
            version = pulled_version(self.entry.folder)
        except Problem as problem:
            self._fail(context, Ending.from_problem(self.task_id, problem))
        with tempfile.TemporaryDirectory(prefix="qlora-retrain-questions-") as temporary:
            questions = Path(self.entry.questions)
            if form.get(QUESTIONS):
                questions = Path(temporary) / "form.jsonl"
                json_lines.write(questions, form[QUESTIONS])
            # Without texts: whoever may read the log is not known here.
            sentence = self.run_command(
                context,
                "ask-golden",
                self.entry.folder,
                str(questions),
                f"--root={store_root()}",
                f"--min-right-fraction={form[MIN_RIGHT_FRACTION]}",
                f"--max-new-tokens={self.entry.max_new_tokens}",
                "--no-text",
                *([f"--report={self.entry.answers}"] if self.entry.answers else []),
                *([f"--base={self.entry.base}"] if self.entry.base else []),
            )
        push_note(context, lambda: f"{version} pulled and verified; {sentence}.")
        return sentence


def other_aliases(context: Context, alias: str) -> set[str]:
    """Return the aliases that moved, if events started the run and each says that another alias than this one did.

    An event that names no alias may be of any.
    """
    triggering: Mapping[Any, Sequence[Any]] = context.get("triggering_asset_events") or {}
    extras = [event.extra or {} for events in triggering.values() for event in events]
    aliases = {str(extra.get("alias") or alias) for extra in extras}
    return set() if alias in aliases else aliases


def pulled_version(folder: str) -> str:
    """Return the version that a pull has made the current one of a folder.

    Raises:
        UsageError: If nothing was pulled there.
    """
    from qlora_retrain.storage.pulled_folder import PulledFolder

    record = PulledFolder(Path(folder)).record()
    if not record:
        raise UsageError(f"{folder}: nothing was pulled there, or this worker does not see the folder of the other one")
    return str(record["version"])
