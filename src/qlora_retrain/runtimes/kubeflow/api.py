"""Runs and schedules on a cluster, through KFP's API.

A run's parameters are the line's document (its sources absolute), the store and the settings changed by hand: nothing
of the checkout that submits needs to be in an image but the code. Refused (12) before anything is sent: a line that is
not valid, and a store or a source that a cluster cannot see.

Environment: `KF_PIPELINES_ENDPOINT`, the API's URL where none is given; `KF_PIPELINES_SA_TOKEN_PATH`, a file with the
token that the API wants. A token is never an argument.

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
from typing import Any
from urllib.parse import urlsplit

import kfp
import kfp_server_api
from kfp.client import ServiceAccountTokenVolumeCredentials
from urllib3.exceptions import HTTPError

from qlora_retrain.config.line import LineConfig, document, load
from qlora_retrain.config.profile import Profile
from qlora_retrain.core import uris
from qlora_retrain.core.errors import TryAgain, UsageError
from qlora_retrain.runtimes.kubeflow import components

ENDPOINT = "KF_PIPELINES_ENDPOINT"
TOKEN_FILE = "KF_PIPELINES_SA_TOKEN_PATH"  # noqa: S105 - the name of a variable that names a file
_PAGE = 100


class Cluster:
    """KFP on a cluster.

    Args:
        endpoint: The API's URL; None: the environment's.
        namespace: The user's namespace, where KFP serves several.
        profile: What the pods get.
    """

    def __init__(self, endpoint: str | None, namespace: str, profile: Profile) -> None:
        self.endpoint = _endpoint(endpoint or os.environ.get(ENDPOINT, ""))
        self.namespace, self.profile = namespace, profile

    def submit(self, config_path: Path, root: str, *, plan_uri: str, overrides: Sequence[str]) -> str:
        """Start a run; returns a sentence with its link."""
        if plan_uri and overrides:
            raise UsageError("--plan with --set: a plan is made already; change settings without --plan")
        config = _visible(config_path, root, overrides)
        name = f"{config.line} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
        params = _parameters(config_path, root, plan_uri, overrides)
        with self._client() as client, self._package() as package:
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
        """Have the line run on its schedule, in place of whatever schedule it had; returns a sentence."""
        config = _visible(config_path, root, overrides)
        if config.schedule is None:
            raise UsageError(f"{config_path}: schedule: is null; say when, e.g. '0 3 * * 1', or pass --remove")
        # KFP's cron has six fields, seconds first; names like @daily are the same.
        cron = config.schedule if config.schedule.startswith("@") else f"0 {config.schedule}"
        with self._client() as client, self._package() as package:
            experiment = client.create_experiment(config.line, namespace=self._user_namespace(client))
            before = self._recurring(client, config.line)
            made = client.create_recurring_run(
                experiment.experiment_id,
                job_name=config.line,
                description=config.description,
                cron_expression=cron,
                max_concurrency=1,
                no_catchup=True,
                params=_parameters(config_path, root, "", overrides),
                pipeline_package_path=package,
                enable_caching=False,
                service_account=self.profile.service_account,
            )
            for old in before:  # only now, so that a failure leaves the line with one schedule and not with none
                client.delete_recurring_run(old)
        replaced = f", in place of {len(before)} before" if before else ""
        return f"line {config.line} runs at {config.schedule!r} (UTC) as {made.recurring_run_id}{replaced}"

    def unschedule(self, config_path: Path) -> str:
        """Take the line's schedules away; returns a sentence."""
        line = load(config_path).line
        with self._client() as client:
            before = self._recurring(client, line)
            for old in before:
                client.delete_recurring_run(old)
        return f"line {line}: {len(before) or 'no'} schedule{'s' if len(before) != 1 else ''} removed"

    def _recurring(self, client: kfp.Client, line: str) -> list[str]:
        """The ids of the line's schedules."""
        found: list[str] = []
        token = ""
        while True:
            answer = client.list_recurring_runs(
                page_token=token, page_size=_PAGE, namespace=self._user_namespace(client)
            )
            found += [r.recurring_run_id for r in answer.recurring_runs or () if r.display_name == line]
            token = answer.next_page_token or ""
            if not token:
                return found

    def _user_namespace(self, client: kfp.Client) -> str | None:
        """The namespace that requests name: only KFP for several users knows any."""
        return self.namespace if client.get_kfp_healthz().multi_user else None

    @contextlib.contextmanager
    def _client(self) -> Iterator[kfp.Client]:
        """A client; what goes wrong in the block is told by what a person can do about it."""
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore", FutureWarning)  # kfp says at every start which servers it knows
            try:
                credentials = ServiceAccountTokenVolumeCredentials() if os.environ.get(TOKEN_FILE) else None
                yield kfp.Client(host=self.endpoint, credentials=credentials)
            except kfp_server_api.ApiException as error:
                what = f"{self.endpoint}: answered {error.status} {error.reason}: {_detail(error)}"
                if error.status in (401, 403):
                    raise UsageError(f"{what}; {TOKEN_FILE} names the file with the token") from error
                if error.status == 429 or (error.status or 0) >= 500:
                    raise TryAgain(what) from error
                raise UsageError(what) from error
            except (HTTPError, TimeoutError) as error:
                raise TryAgain(f"{self.endpoint}: does not answer: {error}") from error
            except OSError as error:
                raise UsageError(f"{TOKEN_FILE}: {error}") from error

    @contextlib.contextmanager
    def _package(self) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="qlora-retrain-kfp-") as folder:
            package = Path(folder) / "retrain.yaml"
            components.compile_to(package, self.profile)
            yield str(package)


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"no KFP API: pass --endpoint https://... or set {ENDPOINT}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(f"{uris.masked(url)}: a URL must hold no user, password or query; see {TOKEN_FILE}")
    return url.rstrip("/")


def _visible(config_path: Path, root: str, overrides: Sequence[str]) -> LineConfig:
    """The line, if a cluster can see its store and its sources."""
    config = load(config_path, overrides)
    here = {f"sources.{name}": uri for name, uri in config.sources.given().items()}
    faults = [
        f"{what}: {uri}: is on this machine, which a pod does not see; wanted s3://..."
        for what, uri in {"--root": uris.absolute(root), **here}.items()
        if uri.startswith("file:")
    ]
    if faults:
        raise UsageError("\n".join(faults))
    return config


def _parameters(config_path: Path, root: str, plan_uri: str, overrides: Sequence[str]) -> dict[str, Any]:
    line = document(load(config_path))
    return {"line": line, "root": root, "plan_uri": plan_uri, "overrides": list(overrides)}


def _detail(error: kfp_server_api.ApiException) -> str:
    body = error.body if isinstance(error.body, str) else ""
    return " ".join(body.split())[:300]
