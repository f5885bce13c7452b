"""The Kubernetes operator against the API over HTTP: how a pod ends, or does not begin, decides what comes next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from qlora_retrain.plan import Plan
from tests.runtimes.kubernetes.tasks import begin, context, ends, go_on, trigger_of

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import Cluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(120),
]


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
        (137, {"because": "ContainerStatusUnknown"}, "the node lost its container", True),
        (75, {}, "try again (75)", True),
        (75, {"because": "OOMKilled"}, "try again (75)", True),
        (
            137,
            {"because": "OOMKilled", "reason": "Evicted", "message": "DiskPressure"},
            "try again (75): Evicted",
            True,
        ),
        (14, {"because": "OOMKilled"}, "training diverged (14)", False),
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
        (403, 'pods "x" is forbidden: violates PodSecurity "restricted:latest"', "refuses the pod (403)", False),
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
    cluster.emulator.refuses.clear()
    begin(step(), context(made, tries=2))
    assert len(cluster.pods()) == 1, "the next try, or whoever clears the task, finds nothing in the way"


class Bucket:
    """S3 that can be out of reach for a while, and has what it had when it is back."""

    def __init__(self) -> None:
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        _, self.port = self.server.get_host_and_port()

    def down(self) -> None:
        self.server.stop()

    def back(self) -> None:
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()


@pytest.fixture
def bucket(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    made = Bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="models")
    yield made
    made.down()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_store_that_is_out_of_reach_costs_a_try_whoever_finds_it_so_and_the_next_one_does_the_work(
    cluster: Cluster,
    bucket: Bucket,
    plan_in: Callable[[str], Plan],
    step: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = plan_in("s3://models/team")
    left = begin(step(), context(made))
    bucket.down()
    assert cluster.does_the_work() == 75, "the step, after boto3's own tries"
    assert "try again (75)" in cluster.emulator.logs[left.trigger.pod_name]
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)  # between boto3's tries, in the task
    said, again = ends(lambda: go_on(left, step(), context(made)))
    assert (said.startswith("try again (75): "), again) == (True, True), said
    said, again = ends(lambda: step().execute(context(made, tries=2)))
    assert (said.startswith("try again (75): "), again) == (True, True), said
    assert cluster.created() == 1, "the task that cannot look for the artifact makes no pod"
    bucket.back()
    said, again = ends(lambda: step().execute(context(made, tries=3)))
    assert again, "the pod's own end had not been judged yet"
    left = begin(step(), context(made, tries=4))
    assert cluster.does_the_work() == 0
    go_on(left, step(), context(made, tries=4))
    assert (cluster.created(), cluster.pods()) == (2, [])
