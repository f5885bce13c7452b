"""An Airflow task that runs a step as a pod on Kubernetes, and waits for it in the triggerer, without a worker.

The pod is named from the step's key and the run, so the cluster refuses a second one: a task that is tried again
follows the pod of that name while it runs, judges it if it ended unseen, and replaces it once it was judged, or was
given up with its node. What a pod gets is in `pods.py`, what is asked of the API in `pod_api.py`, how a pod's end is
read in `pod_endings.py`. Where the artifact is made already, no pod is made.

A failed pod is kept for `kubectl describe` until the next try, which learns from it (`pod_tries.py`). One that no try
follows is deleted once its log is in the task's: its volume would fill the namespace's quota.

Environment: that of Airflow's Kubernetes connection; and `QLORA_RETRAIN_PROFILE`, for the DAG.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk.exceptions import AirflowFailException
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from qlora_retrain.core import errors, graph
from qlora_retrain.core.errors import Problem, TryAgain
from qlora_retrain.runtimes.airflow.operators import StepOperator, fail, plan_uri
from qlora_retrain.runtimes.airflow.pod_trigger import PodTrigger
from qlora_retrain.runtimes.docker import container_spec
from qlora_retrain.runtimes.kubernetes import api, pod_spec, pod_status, retries
from qlora_retrain.runtimes.kubernetes.api import PodApi
from qlora_retrain.runtimes.kubernetes.pod_status import Ending

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.config.profile import Profile
    from qlora_retrain.config.sections import RuntimeConfig
    from qlora_retrain.pipeline.plan import Plan

_START_SECONDS = 1800  # a node pool may have to grow, and the image is gigabytes
_LOG_SECONDS = 30
_POLL_SECONDS = 5
# A full quota, a drain or a lost node lasts longer than a store's bad minute; at least half an hour in all.
_RETRIES = 8
_BACKOFF: dict[str, Any] = {"retry_delay": timedelta(seconds=15), "max_retry_delay": timedelta(minutes=10)}
_GONE = Ending(errors.Exit.TRY_AGAIN, "the pod is gone: its node was lost, or somebody deleted it")


class KubernetesStepOperator(StepOperator, KubernetesPodOperator):  # type: ignore[misc]
    """One step of the graph in a pod.

    Args:
        step: The step's name.
        line: The line.
        runtime: The line's section of that name.
        profile: The cluster's.
    """

    def __init__(self, *, step: str, line: str, runtime: RuntimeConfig, profile: Profile, **kwargs: Any) -> None:
        super().__init__(
            step=step,
            line=line,
            **pod_spec.arguments(graph.step(step), line, profile, runtime),
            random_name_suffix=False,
            deferrable=True,
            do_xcom_push=False,
            get_logs=True,
            logging_interval=_LOG_SECONDS,
            poll_interval=_POLL_SECONDS,
            startup_timeout_seconds=_START_SECONDS,
            on_finish_action="delete_succeeded_pod",
            on_kill_action="delete_pod",
            log_pod_spec_on_failure=False,
            **{"retries": _RETRIES, **_BACKOFF, **kwargs},
        )
        self.runtime, self.profile = runtime, profile

    def prepare(self, plan_uri: str, key: str, run_id: str) -> None:
        """Say which pod it is; before that, nothing depends on the run."""
        self.name = pod_spec.name(self.step, key, run_id)
        self.arguments = container_spec.command(self.step, plan_uri)  # after Airflow's templating: no `{{` in it counts
        self.labels = {**pod_spec.labels(self.step, self.line), "qlora-retrain.run": run_id}
        self.pod_request_obj = self.build_pod_request_obj(dry_run=True)
        self.pod = self.pod_request_obj  # what `on_kill` deletes

    def run_step(self, plan: Plan, context: Context) -> None:
        """Make the pod, or follow the one of an earlier try; leave the waiting to the triggerer."""
        self.prepare(plan.uri, plan.step(self.step).key, plan.run_id)
        try:
            pod = self._earlier()
            if pod is None:
                pod = self._api.create(self.pod_request_obj)
                self.log.info("pod %s made in namespace %s", self.name, self.namespace)
        except ApiException as error:
            api.refused(self.step, self.namespace, error)
        except HTTPError as error:
            raise TryAgain(f"{self.step}: the Kubernetes API does not answer: {error}") from error
        ended = pod_status.ending(pod)
        if ended is None:
            self._wait()
        self._end(plan, context, pod, ended)

    def tidy(self, plan: Plan) -> None:
        """Remove the pod that nobody saw end; what it wrote is kept first."""
        self.prepare(plan.uri, plan.step(self.step).key, plan.run_id)
        try:
            if self._api.read() is not None:
                self._log(None)
                self._api.delete()
        except (ApiException, HTTPError) as error:
            self.log.warning("pod %s may be left: %s", self.name, error)

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> None:
        """Where the task goes on when the triggerer has something to say of the pod."""
        from qlora_retrain.pipeline.plan import Plan

        try:
            plan = Plan.load(plan_uri(context))
            self.prepare(plan.uri, plan.step(self.step).key, plan.run_id)
            try:
                self._go_on(plan, context, event)
            except (ApiException, HTTPError) as error:
                raise TryAgain(f"{self.step}: the Kubernetes API failed, the pod goes on: {error}") from error
            self.judge(plan, context)
        except Problem as problem:
            fail(problem.exit_code, str(problem))

    def _go_on(self, plan: Plan, context: Context, event: dict[str, Any]) -> None:
        """Return where the pod did its work; wait on, or end the task, where it did not."""
        pod = self._api.read()
        ended = _GONE if pod is None else pod_status.ending(pod)
        hindered = None if pod is None or ended else pod_status.stuck(pod)
        if hindered is None and ended is None and event["status"] == "timeout" and not pod_status.running(pod):
            hindered = pod_status.late(pod, self._api.warnings(pod.metadata.uid), str(event["message"]))
        if hindered is not None:
            self._api.delete()
            fail(hindered.code, hindered.why)
        if ended is None and (lost := pod_status.lost(pod)):
            fail(lost.code, lost.why)  # the next try takes its place
        if ended is None:  # the triggerer lost sight of it, or gave it up just before it began
            times = int(event.get("_redefer_count", 0))
            if times >= self.MAX_REDEFER_ATTEMPTS:
                raise TryAgain(f"{self.step}: the triggerer cannot follow the pod: {event.get('message')}")
            self._wait(event.get("last_log_time"), _redefer_count=times + 1)
        self._end(plan, context, pod, ended, event.get("last_log_time"))

    def _wait(self, last_log_time: Any = None, **carried: Any) -> NoReturn:
        """Leave the worker. The trigger finds its own way to the cluster: no credential of this worker is in it.

        By itself it looks for a kubeconfig and not for the service account that a pod has, so it is told.
        """
        trigger = PodTrigger(
            pod_name=self.name,
            pod_namespace=self.namespace,
            trigger_start_time=datetime.now(UTC),
            base_container_name=pod_spec.CONTAINER,
            kubernetes_conn_id=self.kubernetes_conn_id,
            in_cluster=self.hook.is_in_cluster or None,
            poll_interval=self.poll_interval,
            startup_timeout=self.startup_timeout_seconds,
            schedule_timeout=self.startup_timeout_seconds,
            on_finish_action="keep_pod",
            termination_grace_period=self.termination_grace_period,
            last_log_time=last_log_time,
            logging_interval=self.logging_interval,
            trigger_kwargs=carried,
        )
        self.defer(trigger=trigger, method_name="trigger_reentry")
        raise AssertionError("unreachable")

    def _end(self, plan: Plan, context: Context, pod: Any, ended: Ending, last_log_time: Any = None) -> None:
        """Copy the log; then delete the pod that did its work, or end the task."""
        from qlora_retrain.pipeline import execute

        logged = self._log(last_log_time) if pod is not None else ""
        made = execute.found(plan, self.step)
        if made is not None and made != ended.code:  # it made its artifact, and was taken away before it could end
            said = "" if made == errors.Exit.DONE else execute.refused_before(plan, self.step)
            ended = Ending(made, said=said)
        if ended.code == errors.Exit.DONE:
            self._api.delete()
            return
        may, told = retries.again(pod, ended.code, graph.step(self.step), self.profile)
        if pod is not None:
            another = may and context["ti"].try_number <= context["ti"].max_tries
            self._leave(pod, keep=another or logged is None)
        last = self.reason_in(ended.said.splitlines()) or logged
        reason = "; ".join(filter(None, (told, "; last: ".join(filter(None, (ended.why, last))))))
        if errors.may_retry(ended.code) and not may:
            raise AirflowFailException(f"{errors.describe(ended.code)} ({ended.code}): {reason}")
        fail(ended.code, reason)

    def _leave(self, pod: Any, *, keep: bool) -> None:
        """Mark a pod as judged where the next try learns from it, or its log is nowhere else; or else delete it."""
        if keep:
            self.patch_already_checked(pod, reraise=False)
            return
        try:
            self._api.delete()
        except (ApiException, HTTPError) as error:
            self.log.warning("pod %s is left: %s", self.name, error)

    def _earlier(self) -> Any:
        """The pod of this name that runs or ended unseen; one that was judged, goes or is given up is replaced."""
        pod = self._api.read()
        if pod is None:
            return None
        judged = (pod.metadata.labels or {}).get(self.POD_CHECKED_KEY) == "True"
        lost = pod_status.lost(pod)
        if not (judged or lost or pod.metadata.deletion_timestamp):
            self.log.info("pod %s is there already: following it", self.name)
            return pod
        self._learn_from(pod)
        if lost is not None:  # where its container still runs, the store sees to it that only one of the two counts
            self.log.warning("pod %s is given up: %s", self.name, lost.why)
            self._api.delete(grace_seconds=0)
        elif judged:
            self._api.delete()
        self._api.wait_until_gone()
        return None

    def _learn_from(self, pod: Any) -> None:
        """Have the next pod made with what this one's end tells."""
        step, ended = graph.step(self.step), pod_status.ending(pod)
        memory = retries.memory_gib(pod, ended, step, self.profile, self.runtime)
        self.container_resources = pod_spec.resources(step, self.profile, self.runtime, memory)
        self.annotations = {**pod_spec.ANNOTATIONS, **retries.counts(pod, ended, memory)}
        self.pod_request_obj = self.build_pod_request_obj(dry_run=True)

    @property
    def _api(self) -> PodApi:
        return PodApi(self.client, self.namespace, self.name)

    def _log(self, since: Any) -> str | None:
        """Copy what the step wrote since then to the task's log; return what to read, None where it cannot be had."""
        try:
            return self.last_lines(self._api.log(since))
        except (ApiException, HTTPError) as error:
            self.log.warning("the pod's log cannot be read: %s", getattr(error, "reason", error))
            return None
