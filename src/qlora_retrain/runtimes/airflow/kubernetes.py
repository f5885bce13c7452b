"""An Airflow task that runs a step as a pod on Kubernetes, and waits for it in the triggerer, without a worker.

The pod is named from the step's key and the run, so the cluster refuses a second one. A retried task looks for the
pod of that name. It follows a pod that runs, reads the ending of one that nobody has checked, and replaces one that
was checked or whose node is lost. Where the artifact is complete already, it creates no pod.

`pod_step.py` has what a task requests, `pod_spec.py` what a pod gets, `pod_api.py` the calls to the API,
`pod_status.py` how a pod's ending is read, `pod_observation.py` what the trigger saw of a pod that is gone.

A failed pod is kept for `kubectl describe` until the next try, which learns from it (`retries.py`). After the last
try it is deleted once its log is in the task's log, because its volume would fill the namespace's quota.

Environment: that of Airflow's Kubernetes connection; and `QLORA_RETRAIN_PROFILE`, for the DAG.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk.exceptions import TaskDeferralTimeout
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from qlora_retrain.core import errors, graph
from qlora_retrain.core.endings import Ending
from qlora_retrain.core.errors import Cause, Problem, TryAgain
from qlora_retrain.runtimes import deadlines
from qlora_retrain.runtimes.airflow.dag_run import plan_uri
from qlora_retrain.runtimes.airflow.operators import StepOutput, fail_task
from qlora_retrain.runtimes.airflow.pod_observation import Observation
from qlora_retrain.runtimes.airflow.pod_step import PodStepOperator
from qlora_retrain.runtimes.airflow.pod_trigger import PodTrigger
from qlora_retrain.runtimes.kubernetes import pod_api, pod_status, retries
from qlora_retrain.runtimes.kubernetes.pod_api import LogUnavailable, PodApi
from qlora_retrain.runtimes.kubernetes.pod_status import PodEnding

if TYPE_CHECKING:
    from airflow.sdk import Context

    from qlora_retrain.pipeline.plan import Plan

# The status of an event of ours: the cluster has not reported the pod's end by its deadline.
_OVERDUE = "overdue"
# A trigger that followed a pod for this long is no broken one, so its failures are counted from the beginning.
_STEADY_SECONDS = 600


class KubernetesStepOperator(PodStepOperator):
    """One step of the graph in a pod: create it, follow it, and judge how it ended."""

    def run_step(self, plan: Plan, context: Context) -> None:
        """Create the pod, or follow the one of an earlier try; leave the waiting to the triggerer."""
        self.prepare_pod(plan.uri, plan.step(self.step).key, plan.run_id)
        pod = self._follow_or_create_pod(plan)

        # A pod that ended before anything followed it is judged here, without waiting.
        ending = pod_status.read_ending(pod)
        if ending is None:
            self._defer_to_triggerer(pod)
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
            self.log.warning("pod %s could not be looked up and may be left: %s", self.name, pod_api.describe(error))

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
            self.log.warning("pod %s could not be deleted: %s", self.name, pod_api.describe(error))

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
                    f"the Kubernetes API failed; the pod is not affected: {pod_api.describe(error)}",
                    cause=Cause.THROTTLED,
                ) from error
            self.check_artifact(plan, context)
        except Problem as problem:
            fail_task(context, Ending.from_problem(self.step, problem))

    def _handle_event(self, plan: Plan, context: Context, event: dict[str, Any]) -> None:
        """Return if the pod did its work; otherwise defer again, or fail the task."""
        observation = Observation.from_event(event)
        redefer_count = int(event.get("_redefer_count", 0))
        pod = self._pod_api.read()
        if pod is None:
            gone_ending = self._gone_ending(observation, event)
            if event["status"] != _OVERDUE and redefer_count < self.MAX_REDEFER_ATTEMPTS:
                self._replace_gone_pod(plan, observation, gone_ending, redefer_count)
        ending = gone_ending if pod is None else pod_status.read_ending(pod)

        if ending is None and event["status"] == _OVERDUE:
            self.stop_step()
            fail_task(context, deadlines.ending(self.step, self.execution_timeout))
        # A pod that did not start would hold its quota and its GPU's pool slots for nothing.
        startup_failure = None if pod is None or ending else pod_status.startup_failure(pod)
        is_late = ending is None and event["status"] == "timeout" and not pod_status.is_running(pod)
        if startup_failure is None and is_late:
            startup_failure = pod_status.startup_timeout(
                pod, self._pod_api.events(pod.metadata.uid, selector="type=Warning"), str(event["message"])
            )
        if startup_failure is not None:
            self._pod_api.delete()
            fail_task(context, startup_failure.as_ending(self.step))

        if ending is None and (lost_node := pod_status.lost_node(pod)):
            fail_task(context, lost_node.as_ending(self.step))  # the next try replaces the pod

        # The pod runs. The trigger lost its connection to the API, or timed out just before the container started.
        if ending is None:
            redefer_count = 0 if observation.followed_seconds >= _STEADY_SECONDS else redefer_count
            if redefer_count >= self.MAX_REDEFER_ATTEMPTS:
                raise TryAgain(f"the triggerer cannot follow the pod: {event.get('message')}", cause=Cause.THROTTLED)
            self._defer_to_triggerer(pod, event.get("last_log_time"), _redefer_count=redefer_count + 1)
        self._finish(plan, context, pod, ending, event.get("last_log_time"), observation)

    def _replace_gone_pod(self, plan: Plan, observation: Observation, ending: PodEnding, redefer_count: int) -> None:
        """Create a pod that is gone again, and follow it; return where its step is done or would fail again."""
        from qlora_retrain.pipeline import status

        may_retry, _ = self._decide_retry(observation.pod, ending)
        # The trigger of a cleared try deletes its pod, which may be the one that this try follows.
        if may_retry and status.exit_code(plan, self.step) is None:
            self.copy_output(observation.last_lines)
            why = ending.reason or f"it is gone; its container ended with {ending.exit_code}"
            self.log.warning("pod %s is created again: %s", self.name, why)
            pod = self._follow_or_create_pod(plan, gone_pod=observation.pod)
            self._defer_to_triggerer(pod, _redefer_count=redefer_count + 1)

    def _gone_ending(self, observation: Observation, event: dict[str, Any]) -> PodEnding:
        """Return the ending of a pod that is gone: from what the trigger saw, else from the cluster's events."""
        events = []
        uid = observation.pod.metadata.uid if observation.pod else event.get("pod_uid")
        # Without its events the pod is gone all the same.
        with contextlib.suppress(ApiException, HTTPError):
            events = self._pod_api.events(uid) if uid else []
        return pod_status.gone_ending(observation.pod, events)

    def _defer_to_triggerer(self, pod: Any, last_log_time: Any = None, **trigger_kwargs: Any) -> NoReturn:
        """Free the worker until the trigger fires."""
        trigger = PodTrigger.following(self, last_log_time, {"pod_uid": pod.metadata.uid, **trigger_kwargs})
        # The cluster's own deadline comes first. This one is for a cluster that does not answer any more.
        seconds = self.startup_timeout_seconds + self.active_deadline_seconds + pod_status.LOST_NODE_SECONDS
        seconds += self.max_queue_seconds
        self.defer(trigger=trigger, method_name="trigger_reentry", timeout=timedelta(seconds=seconds))
        raise AssertionError("unreachable")

    def _finish(
        self,
        plan: Plan,
        context: Context,
        pod: Any,
        ending: PodEnding,
        last_log_time: Any = None,
        observation: Observation = Observation(),  # noqa: B008 - it is frozen
    ) -> None:
        """Copy the log; then delete the pod if it did its work, otherwise fail the task."""
        from qlora_retrain.pipeline import status

        output = self.copy_output(observation.last_lines) if pod is None else self._copy_log(last_log_time)
        # The kubelet may have kept no message, or only a part; the log has the ending too.
        if ending.step_ending is None and output is not None and output.ending is not None:
            ending = pod_status.read_ending(pod or observation.pod, output.ending) or ending

        # A pod may complete its artifact and be evicted before it exits. Then the manifest counts, not the exit code.
        exit_code = status.exit_code(plan, self.step)
        if exit_code is not None and exit_code != ending.exit_code:
            refusal = None if exit_code == errors.Exit.DONE else status.earlier_refusal(plan, self.step)
            ending = PodEnding(exit_code, step_ending=refusal)
        if ending.exit_code == errors.Exit.DONE:
            self._pod_api.delete()
            return

        # How often this step died before, and with how much memory, is in the pod's annotations.
        may_retry, explanation = self._decide_retry(pod or observation.pod, ending)
        if pod is not None:
            has_next_try = may_retry and context["ti"].try_number <= context["ti"].max_tries
            self._keep_or_delete(keep=has_next_try or output is None)

        # The pod's status has the end of the output only where the kubelet could still save it.
        lines = output.last_lines if output else ""
        final = ending.as_ending(self.step, explanation=explanation, log_lines=lines)
        fail_task(context, final, is_last_try=not may_retry)

    def _decide_retry(self, pod: Any, ending: PodEnding) -> tuple[bool, str]:
        return retries.decide_retry(pod, ending, graph.step(self.step), self.profile)

    def _keep_or_delete(self, *, keep: bool) -> None:
        """Mark a kept pod as checked, so that the next try replaces it; delete any other.

        A pod is kept where the next try learns from it, or where its log could not be copied.
        """
        if not keep:
            self.stop_step()
            return
        try:
            # The label is Airflow's own: a pod without it may hold the result of a try that nobody judged.
            self._pod_api.add_label(self.POD_CHECKED_KEY, "True")
        except (ApiException, HTTPError) as error:
            self.log.warning("pod %s could not be marked as checked: %s", self.name, pod_api.describe(error))

    def _follow_or_create_pod(self, plan: Plan, gone_pod: Any = None) -> Any:
        """Return the pod that does this step's work: the one that exists, or a new one.

        Args:
            plan: The run's plan.
            gone_pod: The pod of this try that is gone, as it was last seen; the new one learns from it.

        Raises:
            TryAgain: If the cluster does not accept the pod now, or does not answer.
            UsageError: If it will not accept the pod later either.
        """
        self.size_pod(plan)
        if gone_pod is not None:
            self.learn_from(gone_pod)
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

        self.learn_from(pod)
        if lost_node is not None:
            self.log.warning("pod %s is replaced: %s", self.name, lost_node.reason)
            # Its container may still run. That is safe: of two attempts the store accepts only the first to complete.
            self._pod_api.delete(grace_period_seconds=0)
        elif is_checked:
            self._pod_api.delete()
        self._pod_api.wait_until_deleted()
        return None

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
        except (ApiException, HTTPError, LogUnavailable) as error:
            self.log.warning("the pod's log cannot be read: %s", pod_api.describe(error))
            return None
