"""The Kubernetes operator against the API over HTTP: how a pod ends decides what comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes.tasks import begin, context, ends, go_on

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import Cluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(120),
]
NO_DRIVER = (
    "failed to create containerd task: nvidia-container-cli: initialization error: nvml error: driver not loaded"
)


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
        (137, {}, "ended by signal 9 (-9): nothing says that it was for memory", True),
        (128, {"because": "StartError", "said": NO_DRIVER}, f"did not start: StartError: {NO_DRIVER}", True),
        (127, {"because": "ContainerCannotRun", "said": NO_DRIVER}, f"ContainerCannotRun: {NO_DRIVER}", True),
        (14, {"because": "OOMKilled"}, "training diverged (14)", False),
        (
            137,
            {"said": "validate_data: killed for memory (137): the GPU's memory does not do: take a smaller batch"},
            "(137): more of the host's memory would not help; validate_data: killed for memory (137): the GPU's memory",
            False,
        ),
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


def test_a_step_that_says_itself_that_memory_ran_out_gets_more_too(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    cluster.ends(137, said="validate_data: killed for memory (137): out of memory: can't allocate memory")
    said, again = ends(lambda: go_on(left, step(), context(made)))
    assert ("the next try gets 12 GiB" in said, again) == (True, True)


@pytest.mark.parametrize("phase", ["its container ended", "no container is left to ask"])
@pytest.mark.parametrize(
    ("message", "setting"),
    [
        ('Usage of EmptyDir volume "work" exceeds the limit "100Gi". ', "work_gib"),
        ('Container base exceeded its local ephemeral storage limit "101Gi". ', "work_gib"),
        ("Pod ephemeral local storage usage exceeds the total limit of containers 101Gi. ", "runtime.disk_gib"),
        ('Usage of EmptyDir volume "tmp" exceeds the limit "1Gi". ', "No setting gives more"),
    ],
)
def test_a_pod_that_is_evicted_for_its_own_disk_fails_now_and_names_the_setting(
    cluster: Cluster, made: Plan, step: Callable[..., Any], message: str, setting: str, phase: str
) -> None:
    left = begin(step(), context(made))
    if phase == "its container ended":
        cluster.ends(137, reason="Evicted", message=message)
    else:
        cluster.set(left.trigger.pod_name, phase="Failed", reason="Evicted", message=message)
    said, again = ends(lambda: go_on(left, step(), context(made)))
    assert said.startswith(f"config or usage (12): Evicted: {message}")
    assert setting in said
    assert (again, cluster.pods()) == (False, [])


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
    plan_in: Callable[..., Plan],
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
