"""The Kubernetes operator against the API over HTTP: no secret can be read anywhere, no permission is unused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from qlora_retrain.core import graph
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes import canaries
from tests.runtimes.kubernetes.tasks import failure_of, rebuild_trigger, resume, run_until_deferred, task_context

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import FakeCluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize("access", ["kubeconfig", "connection"])
def test_no_credential_is_in_a_pod_a_trigger_a_log_or_a_rendered_template(
    cluster: FakeCluster,
    plan: Plan,
    make_task: Callable[..., Any],
    access: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is not in an XCom either: the task has no way to push one, and would fail if it tried."""
    if access == "connection":
        for name, text in canaries.connection(cluster.kubeconfig).items():
            monkeypatch.setenv(name, text)
        monkeypatch.delenv("KUBECONFIG")
        cluster.kubeconfig.rename(cluster.kubeconfig.with_name("elsewhere"))

    with caplog.at_level(logging.DEBUG):
        task = make_task()
        deferred = run_until_deferred(task, task_context(plan))
        cluster.end_container(1, termination_message="validate_data: internal error (1): boom")
        message, _ = failure_of(lambda: resume(deferred, task, task_context(plan)))

    printed = capsys.readouterr()
    places = {
        "pod": str(cluster.pods()),
        "sent": str([request.data for request in cluster.emulator if request.data]),
        "trigger": str(deferred.trigger.serialize()),
        "log": caplog.text + printed.out + printed.err,
        "failure": message,
        "templates": str([getattr(task, name, None) for name in task.template_fields]),
    }
    # The search would find a canary: each place has the text that belongs there.
    assert "created in namespace" in places["log"], "the operator's own log is searched"
    assert "internal error (1): boom" in places["failure"]
    assert "components.validate_data" in places["sent"]
    assert {place for place, text in places.items() if "canary" in text} == set()


def allowed_verbs(role_name: str) -> set[tuple[str, str]]:
    """Return the (verb, resource) pairs of one of Airflow's roles."""
    documents = yaml.safe_load_all((project_root() / "manifests" / "base" / "rbac.yaml").read_text())
    (role,) = [d for d in documents if (d["kind"], d["metadata"]["name"]) == ("Role", role_name)]
    return {(verb, resource) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}


def test_the_tasks_and_the_triggerer_use_what_their_roles_allow_and_nothing_else(
    cluster: FakeCluster, plan: Plan, make_task: Callable[..., Any]
) -> None:
    # A pod that fails, one that does not start in time, and one that is killed: together they use every permission.
    tasks, triggerer = set[tuple[str, str]](), set[tuple[str, str]]()
    cluster.emulator.used_verbs = tasks
    deferred = run_until_deferred(make_task(), task_context(plan))
    cluster.end_container(75)
    event = {"status": "failed", "name": deferred.trigger.pod_name, "namespace": "qlora-retrain"}
    failure_of(lambda: make_task().resume_execution(deferred.method_name, {"event": event}, task_context(plan)))

    deferred = run_until_deferred(make_task(), task_context(plan, try_number=2))
    event = {**event, "status": "timeout", "message": "too long"}
    failure_of(
        lambda: make_task().resume_execution(deferred.method_name, {"event": event}, task_context(plan, try_number=2))
    )

    deferred = run_until_deferred(make_task(), task_context(plan, try_number=3))
    cluster.emulator.used_verbs = triggerer

    async def follow_until(verb: tuple[str, str]) -> None:
        trigger = rebuild_trigger(deferred)
        trigger.logging_interval = 0.1  # seconds
        event = asyncio.create_task(anext(trigger.run()))
        while verb not in triggerer and not event.done():
            await asyncio.sleep(0.1)
        event.cancel()
        await asyncio.wait([event])
        await trigger.on_kill()

    asyncio.run(follow_until(("watch", "events")))
    cluster.emulator.used_verbs = tasks
    deferred = run_until_deferred(make_task(), task_context(plan, try_number=4))
    cluster.start_container()
    cluster.emulator.used_verbs = triggerer
    asyncio.run(follow_until(("get", "pods/log")))

    for used, role in ((tasks, "qlora-retrain-tasks"), (triggerer, "qlora-retrain-triggerer")):
        assert used - allowed_verbs(role) == set(), "forbidden in a real cluster"
        assert allowed_verbs(role) - used == set(), "more than it needs"
    assert ("create", "pods") not in allowed_verbs("qlora-retrain-triggerer"), "whoever creates pods runs any image"


def test_every_step_has_a_pod_name_that_is_a_host_name() -> None:
    from qlora_retrain.runtimes.kubernetes import pod_spec

    for step in graph.STEPS:
        name = pod_spec.pod_name(step.name, "0" * 64, "20260131T030000Z-0123456789ab")
        assert len(name) <= 63
        assert name == name.lower()
