"""Runs and schedules on a cluster, through KFP's API.

A run's parameters (`parameters.py`) are the line's document with absolute sources, the store, the overrides and what
follows from them. So an image needs nothing of the checkout that submits, except the code. Refused (12) before anything
is sent: a line that is not valid, and a store or a source that a cluster cannot see.

Environment: `KF_PIPELINES_ENDPOINT`, the API's URL where none is given; `KF_PIPELINES_SA_TOKEN_PATH`, a file with the
token that the API requires. A token is never an argument.

Command: `.venv-kfp/bin/qlora-retrain kfp submit | schedule LINE.yaml --endpoint URL --root s3://bucket/prefix`
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import kfp
import kfp_server_api
from kfp.client import ServiceAccountTokenVolumeCredentials
from urllib3.exceptions import HTTPError

from qlora_retrain.config.cluster_profile import ClusterProfile
from qlora_retrain.config.line import LineConfig, load
from qlora_retrain.core import uris
from qlora_retrain.core.errors import Cause, TryAgain, UsageError
from qlora_retrain.runtimes.kubeflow import tasks
from qlora_retrain.runtimes.kubeflow.cron import kfp_cron
from qlora_retrain.runtimes.kubeflow.parameters import pipeline_parameters

ENDPOINT_VARIABLE = "KF_PIPELINES_ENDPOINT"
TOKEN_FILE_VARIABLE = "KF_PIPELINES_SA_TOKEN_PATH"  # noqa: S105 - the name of a variable that names a file
_PAGE_SIZE = 100


class KubeflowClient:
    """KFP on a cluster.

    Args:
        endpoint: The API's URL; None: that of `KF_PIPELINES_ENDPOINT`.
        namespace: The user's namespace, where KFP serves several users.
        profile: The cluster's profile.
    """

    def __init__(self, endpoint: str | None, namespace: str, profile: ClusterProfile) -> None:
        self.endpoint = _check_endpoint(endpoint or os.environ.get(ENDPOINT_VARIABLE, ""))
        self.namespace, self.profile = namespace, profile

    def submit(self, config_path: Path, root: str, *, resume_run: str, overrides: Sequence[str]) -> str:
        """Start a run; return a sentence with its link."""
        if resume_run and overrides:
            raise UsageError("--resume with --set: its plan is made already; change settings without --resume")
        config = _load_cluster_line(config_path, root, overrides)
        # A person reads the name in KFP's list of runs; nothing else uses it.
        name = f"{config.line} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
        params = pipeline_parameters(config_path, root, resume_run=resume_run, overrides=overrides)

        with self._client() as client, self._compiled_pipeline() as package:
            # One experiment per line, which KFP's UI lists its runs by; an existing one is returned.
            experiment = client.create_experiment(config.line, namespace=self._user_namespace(client))
            run = client.run_pipeline(
                experiment.experiment_id,
                job_name=name,
                pipeline_package_path=package,
                params=params,
                enable_caching=False,
                service_account=self.profile.service_account,
            )
        return f"run {run.run_id} of line {config.line}: {self.endpoint}/#/runs/details/{run.run_id}"

    def schedule(self, config_path: Path, root: str, *, overrides: Sequence[str]) -> str:
        """Run the line on its schedule from now on, in place of any schedule it had; return a sentence."""
        config = _load_cluster_line(config_path, root, overrides)
        if config.schedule is None:
            raise UsageError(f"{config_path}: schedule is null; set it in the line, e.g. '0 3 * * 1', or pass --remove")
        cron = kfp_cron(config.schedule)

        with self._client() as client, self._compiled_pipeline() as package:
            experiment = client.create_experiment(config.line, namespace=self._user_namespace(client))
            previous_ids = self._recurring_run_ids(client, config.line)
            recurring_run = client.create_recurring_run(
                experiment.experiment_id,
                job_name=config.line,
                description=config.description,
                cron_expression=cron,
                # One run of a line at a time, and no runs for the time in which the cluster was down.
                max_concurrency=1,
                no_catchup=True,
                params=pipeline_parameters(config_path, root, overrides=overrides, started_by="schedule"),
                pipeline_package_path=package,
                enable_caching=False,
                service_account=self.profile.service_account,
            )
            # Deleted last, so that a failure leaves the line with its old schedule and not with none.
            for previous_id in previous_ids:
                client.delete_recurring_run(previous_id)

        replaced = f", in place of {len(previous_ids)} before" if previous_ids else ""
        return (
            f"line {config.line} runs at {config.schedule.cron!r} (UTC) as {recurring_run.recurring_run_id}{replaced}"
        )

    def unschedule(self, config_path: Path) -> str:
        """Remove the line's schedules; return a sentence."""
        line = load(config_path).line
        with self._client() as client:
            previous_ids = self._recurring_run_ids(client, line)
            for previous_id in previous_ids:
                client.delete_recurring_run(previous_id)
        return f"line {line}: {len(previous_ids) or 'no'} schedule{'s' if len(previous_ids) != 1 else ''} removed"

    def _recurring_run_ids(self, client: kfp.Client, line: str) -> list[str]:
        """List the ids of the line's schedules, from every page of the answer."""
        ids: list[str] = []
        page_token = ""
        while True:
            response = client.list_recurring_runs(
                page_token=page_token, page_size=_PAGE_SIZE, namespace=self._user_namespace(client)
            )
            ids += [r.recurring_run_id for r in response.recurring_runs or () if r.display_name == line]
            page_token = response.next_page_token or ""
            if not page_token:
                return ids

    def _user_namespace(self, client: kfp.Client) -> str | None:
        """Return the namespace for requests; None unless KFP serves several users, since only then it knows any."""
        return self.namespace if client.get_kfp_healthz().multi_user else None

    @contextlib.contextmanager
    def _client(self) -> Iterator[kfp.Client]:
        """Yield a client, and translate the errors of the block into ours, which say what to do.

        Raises:
            TryAgain: If the API is throttled, fails or does not answer.
            UsageError: For any other answer, or a token file that cannot be read.
        """
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore", FutureWarning)  # kfp lists the servers it supports at every start
            try:
                credentials = ServiceAccountTokenVolumeCredentials() if os.environ.get(TOKEN_FILE_VARIABLE) else None
                yield kfp.Client(host=self.endpoint, credentials=credentials)

            except kfp_server_api.ApiException as error:
                message = f"{self.endpoint}: answered {error.status} {error.reason}: {_response_text(error)}"
                if error.status in (401, 403):
                    raise UsageError(f"{message}; {TOKEN_FILE_VARIABLE} names the file with the token") from error
                if error.status == 429 or (error.status or 0) >= 500:
                    raise TryAgain(message, cause=Cause.THROTTLED) from error
                raise UsageError(message) from error
            except (HTTPError, TimeoutError) as error:
                raise TryAgain(f"{self.endpoint}: does not answer: {error}", cause=Cause.THROTTLED) from error
            # After TimeoutError, which is an OSError too: what remains is the token's file.
            except OSError as error:
                raise UsageError(f"{TOKEN_FILE_VARIABLE}: {error}") from error

    @contextlib.contextmanager
    def _compiled_pipeline(self) -> Iterator[str]:
        """Compile the pipeline into a temporary file; yield its path."""
        with tempfile.TemporaryDirectory(prefix="qlora-retrain-kfp-") as folder:
            package = Path(folder) / "retrain.yaml"
            tasks.compile_to(package, self.profile)
            yield str(package)


def _check_endpoint(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"no KFP API: pass --endpoint https://... or set {ENDPOINT_VARIABLE}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"{uris.mask_secrets(url)}: a URL must hold no user, password or query; see {TOKEN_FILE_VARIABLE}"
        )
    return url.rstrip("/")


def _load_cluster_line(config_path: Path, root: str, overrides: Sequence[str]) -> LineConfig:
    """Load the line.

    Raises:
        UsageError: If it is not valid, or a cluster cannot see its store or one of its sources.
    """
    config = load(config_path, overrides)
    source_uris = {f"sources.{name}": uri for name, uri in config.sources.declared_uris().items()}
    faults = [
        f"{field}: {uri}: is on this machine, which a pod does not see; expected s3://..."
        for field, uri in {"--root": uris.absolute(root), **source_uris}.items()
        if uri.startswith("file:")
    ]
    if faults:
        raise UsageError("\n".join(faults))
    return config


def _response_text(error: kfp_server_api.ApiException) -> str:
    """Return the start of the API's answer, on one line."""
    body = error.body if isinstance(error.body, str) else ""
    return " ".join(body.split())[:300]
