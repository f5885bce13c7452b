"""The tasks that bring the version in production to a line's mirrors; each is a teardown, as messages are.

They mirror what `production` names when they run, and not what this run has published. So a task that failed is made up
for by the next run, and a late one never brings back a version that was rolled back.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowSkipException, AirflowTaskTimeout

from qlora_retrain.core.aliases import PRODUCTION
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Problem, UsageError
from qlora_retrain.runtimes.airflow import form_fields
from qlora_retrain.runtimes.airflow.dag_run import own_run_id, store_root
from qlora_retrain.runtimes.airflow.move import fail, line_config
from qlora_retrain.runtimes.airflow.notify_operators import MOVED_ALIAS
from qlora_retrain.runtimes.deadlines import MIRROR_RETRIES, MIRROR_TIMEOUT

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.config.mirrors import MirrorConfig
    from qlora_retrain.runtimes.airflow.mirror_command import MirrorCommand

# A hub that is down for minutes; after longer, the next run's task does it.
_DEFAULTS: dict[str, Any] = {
    "retries": MIRROR_RETRIES,
    "retry_delay": timedelta(minutes=2),
    "retry_exponential_backoff": 2.0,
    "execution_timeout": MIRROR_TIMEOUT,
}


class _MirrorsOperator(BaseOperator):  # type: ignore[misc]
    template_fields: Sequence[str] = ()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**_DEFAULTS, **kwargs})
        self._command: MirrorCommand | None = None

    def on_kill(self) -> None:
        """Stop the command."""
        if self._command is not None:
            self._command.on_kill()

    def mirror(self, line: str, entry: MirrorConfig, context: Context) -> Ending:
        """Run the command for one mirror; return how it ended."""
        from qlora_retrain.runtimes.airflow.mirror_command import mirror_command
        from qlora_retrain.storage.keys import MIRROR

        try:
            self._command = mirror_command(line, entry)
            arguments = [MIRROR, line, PRODUCTION, f"--to={entry.to}", f"--root={store_root()}"]
            return self._command.run_command(arguments, own_run_id(context), MIRROR_TIMEOUT)
        except Problem as problem:
            return Ending.from_problem(MIRROR, problem)
        except AirflowTaskTimeout:
            if self._command is not None:
                self._command.stop_step()
            return Ending.from_problem(
                MIRROR, UsageError(f"{entry.to}: stopped at its deadline, after {MIRROR_TIMEOUT}")
            )


class MirrorOperator(_MirrorsOperator):
    """Make sure that one mirror of a line has the version that production names.

    Args:
        entry: The entry of `platform.yaml`.
        line: The line.
    """

    def __init__(self, *, entry: MirrorConfig, line: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.entry, self.line = entry, line

    def execute(self, context: Context) -> None:
        """Mirror the version, if there is one."""
        from qlora_retrain.storage import open_store, registry

        if form_fields.is_dry_run(context["params"]):
            raise AirflowSkipException("this run is a dry run")
        try:
            state, _ = registry.read_alias(open_store(store_root()), self.line, PRODUCTION)
        except Problem as problem:
            fail(Ending.from_problem(self.task_id, problem))
        if state is None:
            raise AirflowSkipException(f"{self.line}@{PRODUCTION} names no version yet")
        ending = self.mirror(self.line, self.entry, context)
        if ending.code:
            fail(ending)


class MoveMirrorsOperator(_MirrorsOperator):
    """Bring the version that a person moved production to, to every mirror of its line; where one fails, to the others.

    Args:
        pipelines: The folder of the lines.
    """

    def __init__(self, *, pipelines: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pipelines = str(pipelines)

    def execute(self, context: Context) -> None:
        """Mirror the version, if production moved and its line has mirrors."""
        from qlora_retrain.config import platform

        moved_alias = context["ti"].xcom_pull(task_ids=next(iter(self.upstream_task_ids)), key=MOVED_ALIAS)
        if moved_alias != PRODUCTION:
            raise AirflowSkipException(f"{PRODUCTION} did not move")
        try:
            config = line_config(self.pipelines, context["params"]["line"])
            entries = platform.load().mirrors_of(config)
        except Problem as problem:
            fail(Ending.from_problem(self.task_id, problem))
        if not entries:
            raise AirflowSkipException(f"line {config.line} has no mirror")
        endings = [self.mirror(config.line, entry, context) for entry in entries]
        if failures := [ending for ending in endings if ending.code]:
            # One that may be tried again comes first; those that succeeded find their version there.
            fail(min(failures, key=lambda ending: not ending.retry))
