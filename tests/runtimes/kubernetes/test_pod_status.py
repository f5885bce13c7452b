"""The Kubernetes operator against the API over HTTP: how a pod ended decides whether it is tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from qlora_retrain.core import endings
from qlora_retrain.core.errors import Cause
from qlora_retrain.demo import host
from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes.tasks import failure_of, resume, run_until_deferred, task_context, written_ending

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import FakeCluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(600),
]
NO_DRIVER = (
    "failed to create containerd task: nvidia-container-cli: initialization error: nvml error: driver not loaded"
)


@pytest.mark.parametrize(
    ("exit_code", "status", "expected_message", "is_retried"),
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
        (
            137,
            {"reason": "DeadlineExceeded", "message": "Pod was active on the node longer than the specified deadline"},
            "config or usage error (12): DeadlineExceeded: stopped at its deadline, after 24 hours; if it needs more, "
            "raise runtime.max_step_hours in platform.yaml",
            False,
        ),
        # A step that was asked to stop says that it may be tried again.
        (
            75,
            {"reason": "DeadlineExceeded", "termination_message": written_ending(75, Cause.PREEMPTED, "saved")},
            "raise runtime.max_step_hours in platform.yaml; last output: saved",
            False,
        ),
        (137, {"container_reason": "ContainerStatusUnknown"}, "the node lost its container", True),
        (75, {}, "try again (75)", True),
        (75, {"container_reason": "OOMKilled"}, "try again (75)", True),
        (
            137,
            {"container_reason": "OOMKilled", "reason": "Evicted", "message": "DiskPressure"},
            "try again (75): Evicted",
            True,
        ),
        (137, {}, "ended by signal 9 (-9): nothing shows that memory ran out", True),
        (
            128,
            {"container_reason": "StartError", "termination_message": NO_DRIVER},
            f"did not start: StartError: {NO_DRIVER}",
            True,
        ),
        (
            127,
            {"container_reason": "ContainerCannotRun", "termination_message": NO_DRIVER},
            f"ContainerCannotRun: {NO_DRIVER}",
            True,
        ),
        (14, {"container_reason": "OOMKilled"}, "training diverged (14)", False),
        (
            137,
            {"termination_message": written_ending(137, Cause.GPU_OOM, "the GPU ran out of memory")},
            "out of memory (137): more of the host's memory would not help; the GPU ran out of memory",
            False,
        ),
        (
            137,
            {"termination_message": "validate_data: killed for memory (137): an older sentence"},
            "ended by signal 9 (-9): nothing shows that memory ran out; last output: validate_data: killed",
            True,
        ),
        (1, {}, "internal error (1)", False),
        (13, {}, "integrity or security (13)", False),
        (10, {}, "data refused (10)", False),
    ],
)
def test_what_ended_a_pod_decides_whether_it_is_tried_again(
    cluster: FakeCluster,
    plan: Plan,
    make_task: Callable[..., Any],
    exit_code: int,
    status: dict[str, Any],
    expected_message: str,
    is_retried: bool,
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.end_container(exit_code, **status)
    message, may_retry = failure_of(lambda: resume(deferred, make_task(), task_context(plan)))
    assert expected_message in message
    assert may_retry is is_retried

    # The next pod gets the same memory: nothing here was for want of it.
    if is_retried:
        memory = cluster.pod()["spec"]["containers"][0]["resources"]["limits"]["memory"]
        run_until_deferred(make_task(), task_context(plan, try_number=2))
        assert cluster.created_count() == 2
        assert cluster.pod()["spec"]["containers"][0]["resources"]["limits"]["memory"] == memory


def test_a_pod_that_is_killed_for_memory_gets_half_as_much_more_until_the_profile_says_enough(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    limits = []
    # One try more than the limits can grow, so that the loop would notice a limit above the maximum.
    for try_number in range(1, 6):
        deferred = run_until_deferred(make_task(), task_context(plan, try_number))
        limits.append(cluster.pod()["spec"]["containers"][0]["resources"]["limits"]["memory"])
        cluster.end_container(137, container_reason="OOMKilled")
        message, is_retried = failure_of(
            lambda deferred=deferred, try_number=try_number: resume(
                deferred, make_task(), task_context(plan, try_number)
            )
        )  # type: ignore[misc]
        assert "out of memory (137)" in message
        if not is_retried:
            break

    assert limits == ["8Gi", "12Gi", "18Gi", "27Gi", "32Gi"], "the profile's light.max_memory_gib is 32"
    assert not is_retried
    assert "max_memory_gib (32)" in message


def test_a_step_that_says_itself_that_memory_ran_out_gets_more_too(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.end_container(137, termination_message=written_ending(137, Cause.HOST_OOM, "can't allocate memory"))
    message, is_retried = failure_of(lambda: resume(deferred, make_task(), task_context(plan)))
    assert ("the next try gets 12 GiB" in message, is_retried) == (True, True)


def test_an_ending_that_only_the_log_has_counts_too(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    line = endings.MARK + written_ending(137, Cause.GPU_OOM, "the GPU ran out of memory")
    cluster.emulator.logs[deferred.trigger.pod_name] = f"epoch 3\n{line}\n"
    cluster.end_container(137)
    message, is_retried = failure_of(lambda: resume(deferred, make_task(), task_context(plan)))
    assert ("the GPU ran out of memory" in message, is_retried) == (True, False)


@pytest.mark.parametrize("phase", ["its container ended", "no container is left to ask"])
@pytest.mark.parametrize(
    ("eviction_message", "setting"),
    [
        ('Usage of EmptyDir volume "work" exceeds the limit "100Gi". ', "disk_gib"),
        ('Container base exceeded its local ephemeral storage limit "101Gi". ', "disk_gib"),
        ("Pod ephemeral local storage usage exceeds the total limit of containers 101Gi. ", "runtime.disk_gib"),
        ('Usage of EmptyDir volume "tmp" exceeds the limit "1Gi". ', "no setting raises this limit"),
    ],
)
def test_a_pod_that_is_evicted_for_its_own_disk_fails_now_and_names_the_setting(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any], eviction_message: str, setting: str, phase: str
) -> None:
    deferred = run_until_deferred(make_task(), task_context(plan))
    if phase == "its container ended":
        cluster.end_container(137, reason="Evicted", message=eviction_message)
    else:
        cluster.set_status(deferred.trigger.pod_name, phase="Failed", reason="Evicted", message=eviction_message)

    message, is_retried = failure_of(lambda: resume(deferred, make_task(), task_context(plan)))
    assert message.startswith(f"config or usage error (12): Evicted: {eviction_message}")
    assert setting in message
    assert (is_retried, cluster.pods()) == (False, [])


class Bucket:
    """A local S3 that can be stopped and started again; moto keeps its objects in this process."""

    def __init__(self) -> None:
        # While nobody listens there, no other program gets the port.
        self.port, self.reservation = host.reserve_port()
        self.start()

    def start(self) -> None:
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()

    def stop(self) -> None:
        self.server.stop()


@pytest.fixture
def bucket(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    bucket = Bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{bucket.port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="models")
    yield bucket
    bucket.stop()
    bucket.reservation.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_store_that_is_out_of_reach_costs_a_try_whoever_finds_it_so_and_the_next_one_does_the_work(
    cluster: FakeCluster,
    bucket: Bucket,
    plan_in: Callable[..., Plan],
    make_task: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_in("s3://models/team")
    deferred = run_until_deferred(make_task(), task_context(plan))

    bucket.stop()
    assert cluster.run_step() == 75, "the step, after boto3's own tries"
    assert "try again (75)" in cluster.emulator.logs[deferred.trigger.pod_name]

    # The task asks the store too; boto3 would sleep for many seconds between its own tries.
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)
    message, is_retried = failure_of(lambda: resume(deferred, make_task(), task_context(plan)))
    assert (message.startswith("try again (75): "), is_retried) == (True, True), message
    message, is_retried = failure_of(lambda: make_task().execute(task_context(plan, try_number=2)))
    assert (message.startswith("try again (75): "), is_retried) == (True, True), message
    assert cluster.created_count() == 1, "the task that cannot look for the artifact makes no pod"

    bucket.start()
    message, is_retried = failure_of(lambda: make_task().execute(task_context(plan, try_number=3)))
    assert is_retried, "the pod's own ending had not been checked yet"
    deferred = run_until_deferred(make_task(), task_context(plan, try_number=4))
    assert cluster.run_step() == 0
    resume(deferred, make_task(), task_context(plan, try_number=4))
    assert (cluster.created_count(), cluster.pods()) == (2, [])
