"""Examine a cluster from inside, before the first run does: one page that says whether a run would get through.

Reads the store, the Kubernetes API and, where it is named, Airflow's. Writes nothing that stays: two files below
`.probe/` in the store, which are deleted, and dry runs. Returns one finding for each check that is well, and one for
each fault and for what cannot be seen.

Command: `qlora-retrain doctor --profile FILE --root URI`, in a pod; `manifests/doctor` has its account and its job
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.config import platform
from qlora_retrain.core import graph
from qlora_retrain.core.graph import StepKind
from qlora_retrain.runtimes.kubernetes.deploy.check import load_profile
from qlora_retrain.runtimes.kubernetes.doctor import access_checks, dry_run, namespace_checks, node_checks
from qlora_retrain.runtimes.kubernetes.doctor.airflow_pool import check_pool
from qlora_retrain.runtimes.kubernetes.doctor.cluster_api import ClusterApi, Unreachable
from qlora_retrain.runtimes.kubernetes.doctor.cluster_view import ClusterView
from qlora_retrain.runtimes.kubernetes.doctor.store_checks import StoreExamination, clock_findings, skew_seconds
from qlora_retrain.runtimes.kubernetes.findings import Check, Finding, fault, unknown
from qlora_retrain.runtimes.kubernetes.sample_pods import StepPod, step_pods

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import ClusterProfile
    from qlora_retrain.config.line import LineConfig

OLDEST_MINOR = 30  # of Kubernetes 1: the oldest whose admission policies are stable


def examine(
    profile_path: Path,
    root: str,
    lines: Sequence[LineConfig] = (),
    *,
    airflow_url: str | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> list[Finding]:
    """Run every check.

    Args:
        profile_path: The cluster's profile.
        root: The store.
        lines: Lines whose pods are tried; without any, the pods of all steps but those that each line has for itself.
        airflow_url: Airflow's API.
        now: The clock of this machine.

    Raises:
        UsageError: If the profile cannot be read.
    """
    profile, requires_digests = load_profile(profile_path)
    store = StoreExamination(root, now)
    checks = [
        Check("store", "it answers", store.check_reach),
        Check("write", "its role may write and delete", store.check_write),
        Check("conditions", "it refuses writes whose condition does not hold", store.check_conditions),
    ]
    findings = [finding for check in checks for finding in check.findings()]
    clocks = list(clock_findings("the store", store.skew_seconds))

    try:
        cluster = ClusterView(ClusterApi.connect(), profile, _pods(profile, lines))
        version = cluster.api.get("/version")
    except Unreachable as error:
        remedy = "run the doctor in a pod with manifests/doctor, or set KUBECONFIG"
        return [*findings, *clocks, fault("cluster", "the Kubernetes API", "an answer", str(error), remedy)]
    clocks += clock_findings("the API server", skew_seconds(version.headers.get("date", ""), now()))

    checks = [
        Check("clock", "store, API server and this node agree", lambda: clocks),
        Check("cluster", f"Kubernetes 1.{OLDEST_MINOR} or newer", partial(_check_version, version.document)),
        Check("accounts", "every account that a pod runs as exists", partial(access_checks.check_accounts, cluster)),
        Check("roles", "Airflow may do what it must, and no step more", partial(access_checks.check_roles, cluster)),
        Check("quota", "the largest pod of each step fits", partial(namespace_checks.check_quota, cluster)),
        Check("nodes", "a node takes the pod of each step", partial(node_checks.check_nodes, cluster)),
        Check("images", "both by digest", partial(namespace_checks.check_images, cluster, requires_digests)),
        Check("dry run", "the cluster would accept the pod of each step", partial(dry_run.check_pods, cluster)),
        Check("network", "the policies are the profile's", partial(namespace_checks.check_network, cluster)),
        Check("storage", "what pods share is there", partial(namespace_checks.check_storage, cluster)),
        Check("secrets", "the pods mount none", partial(namespace_checks.check_secrets, cluster)),
        Check("pool", "Airflow's pool is as the quota", partial(_check_pool, cluster, airflow_url)),
        Check("lines", "the pods of each line were tried", partial(_check_lines, profile, lines)),
    ]
    return [*findings, *(finding for check in checks for finding in _guarded(check))]


def _guarded(check: Check) -> list[Finding]:
    """Return a check's findings; where the API falls silent in between, that it is not known."""
    try:
        return check.findings()
    except Unreachable as error:
        return [unknown(check.name, str(error), "run the doctor again")]


def _pods(profile: ClusterProfile, lines: Sequence[LineConfig]) -> list[StepPod]:
    settings = platform.load()
    if lines:
        return [pod for config in lines for pod in step_pods(profile, config.line, settings.runtime_of(config.line))]
    pods = step_pods(profile, "doctor", settings.runtime)
    # The account of a step that each line has for itself is not known without a line.
    return [pod for pod in pods if not (profile.account_per_step and pod.step.kind == StepKind.PUBLISH)]


def _check_lines(profile: ClusterProfile, lines: Sequence[LineConfig]) -> Iterator[Finding]:
    if not lines and profile.account_per_step:
        (publish,) = [step.title for step in graph.STEPS if step.kind == StepKind.PUBLISH]
        reason = f"without a line the account of the step `{publish}` is not known"
        yield unknown("lines", reason, "pass --line FILE for each line")


def _check_version(document: dict[str, Any]) -> Iterator[Finding]:
    major, minor = str(document.get("major", "")), str(document.get("minor", "")).rstrip("+")
    if not (major + minor).isdigit():
        yield unknown("cluster", "the API server does not say its version")
    elif int(major) == 1 and int(minor) < OLDEST_MINOR:
        expected = f"1.{OLDEST_MINOR} or newer"
        yield fault("cluster", "the version of Kubernetes", expected, f"{major}.{minor}", "upgrade the cluster")


def _check_pool(cluster: ClusterView, url: str | None) -> Iterator[Finding]:
    _, quotas = cluster.api.items(cluster.path("resourcequotas"))
    yield from check_pool(cluster.profile.gpu_pool, cluster.profile.gpu_resource, quotas, url)
