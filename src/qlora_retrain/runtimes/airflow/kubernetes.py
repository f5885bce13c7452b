"""An Airflow task that runs a step as a pod on Kubernetes, and waits for it in the triggerer, without a worker.

The pod is named from the step's key and the run, so the cluster refuses a second one. A retried task looks for the
pod of that name. It follows a pod that runs, reads the ending of one that nobody has checked, and replaces one that
was checked or whose node is lost. Where the artifact is complete already, it creates no pod.

`pod_spec.py` has what a pod gets, `pod_api.py` the calls to the API, `pod_status.py` how a pod's ending is read.

A failed pod is kept for `kubectl describe` until the next try, which learns from it (`retries.py`). After the last
try it is deleted once its log is in the task's log, because its volume would fill the namespace's quota.

Environment: that of Airflow's Kubernetes connection; and `QLORA_RETRAIN_PROFILE`, for the DAG.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk.exceptions import TaskDeferralTimeout
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from qlora_retrain.core import errors, graph
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause, Problem, TryAgain
from qlora_retrain.runtimes import deadlines
from qlora_retrain.runtimes.airflow.dag_run import plan_uri
from qlora_retrain.runtimes.airflow.operators import StepOperator, StepOutput, fail_task
from qlora_retrain.runtimes.airflow.pod_defaults import OPERATOR_DEFAULTS
from qlora_retrain.runtimes.airflow.pod_trigger import PodTrigger
from qlora_retrain.runtimes.docker import container_spec
from qlora_retrain.runtimes.kubernetes import pod_api, pod_size, pod_spec, pod_status, retries
from qlora_retrain.runtimes.kubernetes.pod_api import PodApi
from qlora_retrain.runtimes.kubernetes.pod_status import PodEnding

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.config.cluster_profile import ClusterProfile
    from qlora_retrain.config.platform import RuntimeConfig
    from qlora_retrain.pipeline.plan import Plan

_POLL_INTERVAL_SECONDS = 5
# The status of an event of ours: the cluster has not reported the pod's end by its deadline.
_OVERDUE = "overdue"


class KubernetesStepOperator(StepOperator, KubernetesPodOperator):  # type: ignore[misc]
    """One step of the graph in a pod.

    Args:
        step: The step's name.
        line: The line's name.
        runtime: What the platform says for the line.
        profile: The cluster's profile.
    """

    def __init__(self, *, step: str, line: str, runtime: RuntimeConfig, profile: ClusterProfile, **kwargs: Any) -> None:
        super().__init__(
            step=step,
            line=line,
            **pod_spec.operator_arguments(graph.step(step), line, profile, runtime),
            poll_interval=_POLL_INTERVAL_SECONDS,
            **{**OPERATOR_DEFAULTS, **kwargs},
        )
        self.runtime, self.profile = runtime, profile

    def prepare_pod(self, plan_uri: str, key: str, run_id: str) -> None:
        """Fill in what depends on the run: the pod's name, its command, its labels and its deadline."""
        self.active_deadline_seconds = math.ceil(self.execution_timeout.total_seconds())
        self.name = pod_spec.pod_name(self.step, key, run_id)
        # Set after Airflow rendered its templates, so a `{{` in a URI is never evaluated.
        self.arguments = [*container_spec.step_command(self.step, plan_uri), *self.step_arguments]
        self.labels = {**pod_spec.labels(self.step, self.line), "qlora-retrain.run": run_id}
        self.pod_request_obj = self.build_pod_request_obj(dry_run=True)
        self.pod = self.pod_request_obj  # the pod that `on_kill` deletes

    def size_pod(self, plan: Plan) -> None:
        """Give the pod what the planner says of this run's step, where its memory or disk is `auto`."""
        step = graph.step(self.step)
        if not pod_size.follows_plan(step, self.profile, self.runtime):
            return
        self.runtime, failure = pod_size.with_numbers(plan, step, self.profile, self.runtime)
        if failure:
            self.log.warning("the pod's size is not estimated, so it gets the profile's: %s", failure)
        arguments = pod_spec.operator_arguments(step, self.line, self.profile, self.runtime)
        self.container_resources, self.volumes = arguments["container_resources"], arguments["volumes"]
        self.pod_request_obj = self.build_pod_request_obj(dry_run=True)

    def run_step(self, plan: Plan, context: Context) -> None:
        """Create the pod, or follow the one of an earlier try; leave the waiting to the triggerer."""
        self.prepare_pod(plan.uri, plan.step(self.step).key, plan.run_id)
        pod = self._follow_or_create_pod(plan)

        # A pod that ended before anything followed it is judged here, without waiting.
        ending = pod_status.read_ending(pod)
        if ending is None:
            self._defer_to_triggerer()
        self._finish(plan, context, pod, ending)

    def remove_leftovers(self, plan: Plan) -> None:
        """Copy the log of a pod that no task has followed to its end, then delete the pod."""
        self.prepare_pod(plan.uri, plan.step(self.step).key, plan.run_id)
        try:
            if self._pod_api.read() is not None:
                self._copy_log(None)
                self._pod_api.delete()
        # The artifact is complete, so a failing API must not fail the task.
        except (ApiException, HTTPError) as error:
            self.log.warning("pod %s could not be looked up and may be left: %s", self.name, error)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Resume the task, also where the triggerer waited in vain."""
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except TaskDeferralTimeout:
            return self.trigger_reentry(context, {"status": _OVERDUE})

    def stop_step(self) -> None:
        """Delete the pod."""
        try:
            self._pod_api.delete()
        except (ApiException, HTTPError) as error:
            self.log.warning("pod %s could not be deleted: %s", self.name, error)

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> None:
        """Resume the task after the trigger fired."""
        from qlora_retrain.pipeline.plan import Plan

        try:
            self.plan = plan = Plan.load(plan_uri(context))
            self.prepare_pod(plan.uri, plan.step(self.step).key, plan.run_id)
            try:
                self._handle_event(plan, context, event)
            except (ApiException, HTTPError) as error:
                raise TryAgain(
                    f"the Kubernetes API failed; the pod is not affected: {error}", cause=Cause.THROTTLED
                ) from error
            self.check_artifact(plan, context)
        except Problem as problem:
            fail_task(context, Ending.from_problem(self.step, problem))

    def _handle_event(self, plan: Plan, context: Context, event: dict[str, Any]) -> None:
        """Return if the pod did its work; otherwise defer again, or fail the task."""
        from qlora_retrain.pipeline import status

        pod = self._pod_api.read()
        ending = pod_status.POD_IS_GONE if pod is None else pod_status.read_ending(pod)

        # The trigger of a cleared try deletes its pod, which may be the one that this try follows.
        redefer_count = int(event.get("_redefer_count", 0))
        is_replaceable = pod is None and event["status"] != _OVERDUE and redefer_count < self.MAX_REDEFER_ATTEMPTS
        if is_replaceable and status.exit_code(plan, self.step) is None:
            self.log.warning("pod %s is gone: creating it again", self.name)
            self._follow_or_create_pod(plan)
            self._defer_to_triggerer(_redefer_count=redefer_count + 1)

        if ending is None and event["status"] == _OVERDUE:
            self.stop_step()
            fail_task(context, deadlines.ending(self.step, self.execution_timeout))
        # A pod that did not start would hold its quota and its GPU's pool slots for nothing.
        startup_failure = None if pod is None or ending else pod_status.startup_failure(pod)
        is_late = ending is None and event["status"] == "timeout" and not pod_status.is_running(pod)
        if startup_failure is None and is_late:
            startup_failure = pod_status.startup_timeout(
                pod, self._pod_api.warnings(pod.metadata.uid), str(event["message"])
            )
        if startup_failure is not None:
            self._pod_api.delete()
            fail_task(context, startup_failure.as_ending(self.step))

        if ending is None and (lost_node := pod_status.lost_node(pod)):
            fail_task(context, lost_node.as_ending(self.step))  # the next try replaces the pod

        # The pod runs. The trigger lost its connection to the API, or timed out just before the container started.
        if ending is None:
            if redefer_count >= self.MAX_REDEFER_ATTEMPTS:
                raise TryAgain(f"the triggerer cannot follow the pod: {event.get('message')}", cause=Cause.THROTTLED)
            self._defer_to_triggerer(event.get("last_log_time"), _redefer_count=redefer_count + 1)
        self._finish(plan, context, pod, ending, event.get("last_log_time"))

    def _defer_to_triggerer(self, last_log_time: Any = None, **trigger_kwargs: Any) -> NoReturn:
        """Free the worker until the trigger fires."""
        trigger = PodTrigger.following(self, last_log_time, trigger_kwargs)
        # The cluster's own deadline comes first. This one is for a cluster that does not answer any more.
        seconds = self.startup_timeout_seconds + self.active_deadline_seconds + pod_status.LOST_NODE_SECONDS
        self.defer(trigger=trigger, method_name="trigger_reentry", timeout=timedelta(seconds=seconds))
        raise AssertionError("unreachable")

    def _finish(self, plan: Plan, context: Context, pod: Any, ending: PodEnding, last_log_time: Any = None) -> None:
        """Copy the log; then delete the pod if it did its work, otherwise fail the task."""
        from qlora_retrain.pipeline import status

        output = self._copy_log(last_log_time) if pod is not None else StepOutput(None, "")
        # The kubelet may have kept no message, or only a part; the log has the ending too.
        if ending.step_ending is None and output is not None and output.ending is not None:
            ending = pod_status.read_ending(pod, output.ending) or ending

        # A pod may complete its artifact and be evicted before it exits. Then the manifest counts, not the exit code.
        exit_code = status.exit_code(plan, self.step)
        if exit_code is not None and exit_code != ending.exit_code:
            refusal = None if exit_code == errors.Exit.DONE else status.earlier_refusal(plan, self.step)
            ending = PodEnding(exit_code, step_ending=refusal)
        if ending.exit_code == errors.Exit.DONE:
            self._pod_api.delete()
            return

        # How often this step died before, and with how much memory, is in the pod's annotations.
        may_retry, explanation = retries.decide_retry(pod, ending, graph.step(self.step), self.profile)
        if pod is not None:
            has_next_try = may_retry and context["ti"].try_number <= context["ti"].max_tries
            self._keep_or_delete(pod, keep=has_next_try or output is None)

        # The pod's status has the end of the output only where the kubelet could still save it.
        lines = output.last_lines if output else ""
        final = ending.as_ending(self.step, explanation=explanation, log_lines=lines)
        fail_task(context, final, is_last_try=not may_retry)

    def _keep_or_delete(self, pod: Any, *, keep: bool) -> None:
        """Mark a kept pod as checked, so that the next try replaces it; delete any other.

        A pod is kept where the next try learns from it, or where its log could not be copied.
        """
        if keep:
            # The label is Airflow's own: a pod without it may hold the result of a try that nobody judged.
            self.patch_already_checked(pod, reraise=False)
            return
        self.stop_step()

    def _follow_or_create_pod(self, plan: Plan) -> Any:
        """Return the pod that does this step's work: the one that exists, or a new one.

        Raises:
            TryAgain: If the cluster does not accept the pod now, or does not answer.
            UsageError: If it will not accept the pod later either.
        """
        self.size_pod(plan)
        try:
            pod = self._find_pod_to_follow()
            if pod is None:
                pod = self._pod_api.create(self.pod_request_obj)
                self.log.info("pod %s created in namespace %s", self.name, self.namespace)
        except ApiException as error:
            pod_api.raise_for_rejected_pod(self.namespace, error)
        except HTTPError as error:
            raise TryAgain(f"the Kubernetes API does not answer: {error}", cause=Cause.THROTTLED) from error
        return pod

    def _find_pod_to_follow(self) -> Any:
        """Return the pod of this name that runs, or that ended and was not checked; None where there is none.

        A pod that was checked, that is being deleted or whose node is lost is removed first, since its name is needed.
        """
        pod = self._pod_api.read()
        if pod is None:
            return None

        is_checked = (pod.metadata.labels or {}).get(self.POD_CHECKED_KEY) == "True"
        lost_node = pod_status.lost_node(pod)
        if not (is_checked or lost_node or pod.metadata.deletion_timestamp):
            self.log.info("pod %s exists already: following it", self.name)
            return pod

        self._learn_from(pod)
        if lost_node is not None:
            self.log.warning("pod %s is replaced: %s", self.name, lost_node.reason)
            # Its container may still run. That is safe: of two attempts the store accepts only the first to complete.
            self._pod_api.delete(grace_period_seconds=0)
        elif is_checked:
            self._pod_api.delete()
        self._pod_api.wait_until_deleted()
        return None

    def _learn_from(self, pod: Any) -> None:
        """Set the next pod's memory and its annotations by how this one ended."""
        # The operator built its request before this pod was known, so the request is built again at the end.
        step, ending = graph.step(self.step), pod_status.read_ending(pod)
        memory_gib = retries.next_memory_gib(pod, ending, step, self.profile, self.runtime)
        self.container_resources = pod_spec.resource_requirements(step, self.profile, self.runtime, memory_gib)
        self.annotations = {**pod_spec.ANNOTATIONS, **retries.death_annotations(pod, ending, memory_gib)}
        self.pod_request_obj = self.build_pod_request_obj(dry_run=True)

    @property
    def _pod_api(self) -> PodApi:
        return PodApi(self.client, self.namespace, self.name)

    def _copy_log(self, since: Any) -> StepOutput | None:
        """Copy what the step printed since that time to the task's log.

        Returns:
            The ending and the last lines in that output; None where the log cannot be read.
        """
        try:
            return self.copy_output(self._pod_api.log(since))
        except (ApiException, HTTPError) as error:
            self.log.warning("the pod's log cannot be read: %s", getattr(error, "reason", error))
            return None
