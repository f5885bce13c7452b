"""The Kubernetes operator against the API over HTTP: what is made, followed, judged, tried again and deleted.

The trigger is Airflow's own, made from what was serialized, as the triggerer does it.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from qlora_retrain import graph, plan
from qlora_retrain.config.profile import Profile
from qlora_retrain.config.profile import load as load_profile
from qlora_retrain.config.sections import RuntimeConfig
from qlora_retrain.plan import Plan

if TYPE_CHECKING:
    from tests.runtimes.cluster import Cluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(120),
]
PROJECT = Path(__file__).resolve().parents[2]
CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary-environment-04b7",
    "AWS_SESSION_TOKEN": "canary-session-c55e",
    "AIRFLOW_CONN_KUBERNETES_DEFAULT": '{"conn_type": "kubernetes", "password": "canary-connection-8a60"}',
    "AIRFLOW_CONN_AWS_DEFAULT": "aws://key:canary-aws-connection-77@",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    from tests.runtimes.cluster import running

    for made in running(tmp_path):
        monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
        # Both clients read the variable while they are imported.
        for module in ("kubernetes.config.kube_config", "kubernetes_asyncio.config.kube_config"):
            monkeypatch.setattr(importlib.import_module(module), "KUBE_CONFIG_DEFAULT_LOCATION", str(made.kubeconfig))
        for name, value in CANARIES.items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def made(tmp_path: Path, tickets: Path, tiny_model: Path) -> Plan:
    path = tmp_path / "line.yaml"
    sources = {"raw_data": str(tickets), "base_model": str(tiny_model)}
    data = {"task": "labels", "system": "Name the intent.", "eval_fraction": 0.2, "max_length_tokens": 256}
    path.write_text(yaml.safe_dump({"line": "tickets", "sources": sources, "data": data}))
    return plan.make(path, (tmp_path / "store").as_uri())


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a step's task anew, as every process does that takes it up."""
    from qlora_retrain.runtimes import airflow_kubernetes

    monkeypatch.setattr(airflow_kubernetes, "_POLL_SECONDS", 0.1)

    def make(name: str = "validate_data", **cluster: object) -> Any:
        profile = load_profile(PROJECT / "manifests" / "profiles" / "gpu.yaml")
        document = {**profile.model_dump(exclude_unset=True), **cluster}
        return airflow_kubernetes.KubernetesStepOperator(
            task_id=name, step=name, line="tickets", runtime=RuntimeConfig(), profile=Profile.model_validate(document)
        )

    return make


def context(made: Plan, tries: int = 1) -> dict[str, Any]:
    run = SimpleNamespace(dag_id="tickets", run_id="x", run_after=datetime(2026, 1, 31, 3, tzinfo=UTC))
    return {"dag_run": run, "params": {"plan_uri": made.uri}, "ti": SimpleNamespace(try_number=tries)}


def begin(task: Any, run: dict[str, Any]) -> Any:
    """Run the task up to where it leaves the worker."""
    from airflow.sdk.exceptions import TaskDeferred

    with pytest.raises(TaskDeferred) as left:
        task.execute(run)
    return left.value


def trigger_of(left: Any) -> Any:
    """The trigger as another process makes it: from its name and arguments."""
    path, arguments = left.trigger.serialize()
    module, _, name = path.rpartition(".")
    trigger = getattr(importlib.import_module(module), name)(**arguments)
    trigger.startup_check_interval = 0.1
    return trigger


def event_of(left: Any) -> dict[str, Any]:
    async def first() -> dict[str, Any]:
        trigger = trigger_of(left)
        async for event in trigger.run():
            payload: dict[str, Any] = event.payload
            return payload
        raise AssertionError("the trigger said nothing")

    return asyncio.run(first())


def go_on(left: Any, task: Any, run: dict[str, Any]) -> None:
    """Wait in the trigger, then take the task up in a process that knows nothing of the first."""
    task.resume_execution(left.method_name, {"event": event_of(left)}, run)


def ends(run: Callable[[], object]) -> tuple[str, bool]:
    """How a task ends that fails: what it says, and whether Airflow tries it again."""
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    with pytest.raises(AirflowException) as caught:
        run()
    return str(caught.value), not isinstance(caught.value, AirflowFailException)


@pytest.mark.slow
def test_a_pod_does_the_work_once_and_is_deleted_and_a_made_artifact_needs_no_pod(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    assert cluster.does_the_work() == 0
    go_on(left, step(), context(made))
    assert cluster.pods() == []
    step().execute(context(made, tries=2))  # made already: nothing to do
    assert cluster.created() == 1
    from qlora_retrain import runner

    assert runner.found(made, "validate_data") == 0


def test_a_worker_that_dies_leaves_a_pod_that_the_next_try_follows(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    begin(step(), context(made))  # and its worker, scheduler or triggerer is gone with all it knew
    cluster.runs()
    left = begin(step(), context(made, tries=2))
    assert cluster.created() == 1
    cluster.ends(12, said="validate_data: config or usage (12): the same one ended")
    said, again = ends(lambda: go_on(left, step(), context(made, tries=2)))
    assert (again, "the same one ended" in said) == (False, True)
    assert cluster.created() == 1


def test_an_answer_that_is_lost_after_the_pod_was_made_makes_no_second_one(
    cluster: Cluster, made: Plan, step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(step(), context(made))
    task = step()
    monkeypatch.setattr(task, "_earlier", lambda: None)  # looked before the first one was there
    left = begin(task, context(made))
    assert left.trigger.pod_name == cluster.pod()["metadata"]["name"]
    assert len(cluster.pods()) == 1


def test_a_pod_that_ended_while_nobody_looked_is_judged_and_not_run_again(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    begin(step(), context(made))
    cluster.ends(14, said="validate_data: training diverged (14): nan")
    said, again = ends(lambda: step().execute(context(made, tries=2)))
    assert (said, again) == ("validate_data: training diverged (14): nan", False)
    assert cluster.created() == 1
    # It was judged: whoever clears the task wants another try.
    begin(step(), context(made, tries=3))
    assert cluster.created() == 2
    assert len(cluster.pods()) == 1


@pytest.mark.parametrize(
    ("code", "status", "said", "again"),
    [
        (137, {"reason": "Evicted", "message": "The node was low on resource: memory."}, "low on resource", True),
        (143, {"reason": "Preempting", "message": "Preempted for a critical pod"}, "critical pod", True),
        (
            137,
            {
                "conditions": [
                    {
                        "type": "DisruptionTarget",
                        "status": "True",
                        "reason": "PreemptionByScheduler",
                        "message": "default-scheduler: preempting to accommodate a higher priority pod",
                    }
                ]
            },
            "DisruptionTarget, PreemptionByScheduler",
            True,
        ),
        (75, {}, "try again (75)", True),
        (1, {}, "our bug (1)", False),
        (13, {}, "integrity or security (13)", False),
        (10, {}, "data refused (10)", False),
    ],
)
def test_what_ended_a_pod_decides_whether_it_is_tried_again(
    cluster: Cluster,
    made: Plan,
    step: Callable[..., Any],
    code: int,
    status: dict[str, Any],
    said: str,
    again: bool,
) -> None:
    left = begin(step(), context(made))
    cluster.ends(code, **status)
    told, may_retry = ends(lambda: go_on(left, step(), context(made)))
    assert said in told
    assert may_retry is again
    if again:
        memory = cluster.pod()["spec"]["containers"][0]["resources"]["limits"]["memory"]
        begin(step(), context(made, tries=2))
        assert cluster.created() == 2
        assert cluster.pod()["spec"]["containers"][0]["resources"]["limits"]["memory"] == memory


def test_a_pod_that_is_killed_for_memory_gets_half_as_much_more_until_the_profile_says_enough(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    limits = []
    for tries in range(1, 6):
        left = begin(step(), context(made, tries))
        limits.append(cluster.pod()["spec"]["containers"][0]["resources"]["limits"]["memory"])
        cluster.ends(137, because="OOMKilled")
        said, again = ends(lambda left=left, tries=tries: go_on(left, step(), context(made, tries)))  # type: ignore[misc]
        assert "killed for memory (137)" in said
        if not again:
            break
    assert limits == ["8Gi", "12Gi", "18Gi", "27Gi", "32Gi"], "the profile's light.max_memory_gib is 32"
    assert not again
    assert "max_memory_gib (32)" in said


def test_killing_a_task_in_the_worker_deletes_its_pod(cluster: Cluster, made: Plan, step: Callable[..., Any]) -> None:
    task = step()
    begin(task, context(made))
    task.on_kill()
    assert cluster.pods() == []


def test_killing_a_deferred_task_deletes_its_pod_and_a_triggerer_that_stops_does_not(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    cluster.runs()
    asyncio.run(trigger_of(left).cleanup())  # what a triggerer does that goes away
    assert len(cluster.pods()) == 1
    asyncio.run(trigger_of(left).on_kill())  # what it does when somebody fails or clears the task
    assert cluster.pods() == []


def test_a_pod_that_still_saves_is_waited_for_and_there_are_never_two(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    cluster.emulator.graceful = True
    task = step()
    begin(task, context(made))
    cluster.runs()
    task.on_kill()
    assert cluster.pod()["metadata"]["deletionTimestamp"]
    most = []
    letting_go = threading.Timer(2, cluster.removes)
    letting_go.start()
    started = time.monotonic()
    begin(step(), context(made, tries=2))
    most.append(len(cluster.pods()))
    letting_go.join()
    assert time.monotonic() - started > 1.5
    assert most == [1]


def test_a_lost_pod_is_made_again(cluster: Cluster, made: Plan, step: Callable[..., Any]) -> None:
    left = begin(step(), context(made))
    event = {"status": "error", "name": left.trigger.pod_name, "namespace": "qlora-retrain", "message": "404"}
    cluster.api.delete_namespaced_pod(left.trigger.pod_name, "qlora-retrain")
    said, again = ends(lambda: step().resume_execution(left.method_name, {"event": event}, context(made)))
    assert "the pod is gone: its node was lost" in said
    assert again
    begin(step(), context(made, tries=2))
    assert len(cluster.pods()) == 1


def test_a_pod_that_the_triggerer_lost_sight_of_is_followed_on(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    from airflow.sdk.exceptions import AirflowException, TaskDeferred

    left = begin(step(), context(made))
    cluster.runs()
    event = {"status": "error", "name": left.trigger.pod_name, "namespace": "qlora-retrain", "message": "503"}
    for _ in range(3):
        with pytest.raises(TaskDeferred) as again:
            step().resume_execution(left.method_name, {"event": event}, context(made))
        event = {**event, **again.value.trigger.trigger_kwargs}
    with pytest.raises(AirflowException, match="cannot follow the pod"):
        step().resume_execution(left.method_name, {"event": event}, context(made))
    assert cluster.created() == 1


def test_an_image_that_cannot_be_pulled_is_named_and_its_pod_removed(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    cluster.waits("ImagePullBackOff", "Back-off pulling image: not found")
    said, again = ends(lambda: go_on(left, step(), context(made)))
    assert "ImagePullBackOff (qlora-retrain-light:0.1.0)" in said
    assert again
    assert cluster.pods() == []


@pytest.mark.parametrize("reason", ["InvalidImageName", "CreateContainerConfigError"])
def test_a_name_or_a_secret_that_is_wrong_fails_now(
    cluster: Cluster, made: Plan, step: Callable[..., Any], reason: str
) -> None:
    left = begin(step(), context(made))
    cluster.waits(reason, 'secret "qlora-retrain-store" not found')
    event = {"status": "timeout", "name": left.trigger.pod_name, "namespace": "qlora-retrain", "message": "too long"}
    said, again = ends(lambda: step().resume_execution(left.method_name, {"event": event}, context(made)))
    assert said.startswith(f"config or usage (12): the pod did not start: {reason}")
    assert not again
    assert cluster.pods() == []


def test_a_pod_that_no_node_takes_is_removed_with_the_schedulers_words(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    words = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    cluster.set(left.trigger.pod_name, conditions=[condition])
    trigger = trigger_of(left)
    trigger.schedule_timeout = 0  # half an hour, for a test
    events = trigger.run()
    event = asyncio.run(anext(events)).payload
    said, again = ends(lambda: step().resume_execution(left.method_name, {"event": event}, context(made)))
    assert said == f"try again (75): no node takes the pod: {words}"
    assert again
    assert cluster.pods() == []


@pytest.mark.parametrize(
    ("status", "message", "said", "again"),
    [
        (403, 'pods "x" is forbidden: exceeded quota: qlora-retrain', "quota is used up", True),
        (403, 'pods is forbidden: User "airflow" cannot create resource', "may not manage pods", False),
        (422, "Pod is invalid: spec.containers[0].resources", "refuses the pod (422)", False),
        (500, "etcdserver: request timed out", "Kubernetes API failed (500)", True),
    ],
)
def test_a_pod_that_the_api_does_not_take_is_explained(
    cluster: Cluster, made: Plan, step: Callable[..., Any], status: int, message: str, said: str, again: bool
) -> None:
    cluster.emulator.refuses["POST"] = (status, message)
    told, may_retry = ends(lambda: step().execute(context(made)))
    assert said in told
    assert may_retry is again
    assert cluster.pods() == []


def test_no_credential_is_in_a_pod_a_trigger_a_log_or_a_rendered_template(
    cluster: Cluster,
    made: Plan,
    step: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor in an XCom: the task has no way to push one, and would fail if it tried."""
    caplog.set_level(logging.DEBUG)
    task = step()
    left = begin(task, context(made))
    cluster.ends(1, said="validate_data: our bug (1): boom")
    with caplog.at_level(logging.DEBUG):
        said, _ = ends(lambda: go_on(left, task, context(made)))
    printed = capsys.readouterr()
    seen = {
        "pod": str(cluster.pods()),
        "trigger": str(left.trigger.serialize()),
        "log": caplog.text + printed.out + printed.err,
        "failure": said,
        "templates": str([getattr(task, name, None) for name in task.template_fields]),
    }
    assert "made in namespace" in seen["log"], "the operator's own log is looked at"
    assert {place for place, text in seen.items() if "canary" in text} == set()


def test_the_operator_uses_what_its_role_allows_and_nothing_else(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    cluster.ends(75)
    cluster.emulator.verbs.discard(("patch", "pods"))  # the test's own
    ends(lambda: go_on(left, step(), context(made)))
    cluster.emulator.verbs.discard(("list", "pods"))  # the test's own
    task = step()
    task_left = begin(task, context(made, tries=2))
    asyncio.run(trigger_of(task_left).on_kill())
    role = next(
        document
        for document in yaml.safe_load_all((PROJECT / "manifests" / "base" / "rbac.yaml").read_text())
        if document["kind"] == "Role"
    )
    allowed = {(v, r) for rule in role["rules"] for r in rule["resources"] for v in rule["verbs"]}
    used = cluster.emulator.verbs - {("list", "pods")}
    assert used - allowed == set(), "forbidden in a real cluster"
    assert allowed - used <= {("list", "events"), ("watch", "events")}, "more than it needs"


def test_every_step_has_a_pod_name_that_is_a_host_name() -> None:
    from qlora_retrain.runtimes import pods

    for item in graph.STEPS:
        name = pods.name(item.name, "0" * 64, "20260131T030000Z-0123456789ab")
        assert len(name) <= 63
        assert name == name.lower()
        assert "_" not in name
