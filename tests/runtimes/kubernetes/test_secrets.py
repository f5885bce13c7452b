"""The Kubernetes operator against the API over HTTP: no secret is where somebody reads, no power is unused."""

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
from tests.runtimes.kubernetes.tasks import begin, context, ends, go_on, trigger_of

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import Cluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(120),
]


@pytest.mark.parametrize("way", ["kubeconfig", "connection"])
def test_no_credential_is_in_a_pod_a_trigger_a_log_or_a_rendered_template(
    cluster: Cluster,
    made: Plan,
    step: Callable[..., Any],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor in an XCom: the task has no way to push one, and would fail if it tried."""
    if way == "connection":
        for name, text in canaries.connection(cluster.kubeconfig).items():
            monkeypatch.setenv(name, text)
        monkeypatch.delenv("KUBECONFIG")
        cluster.kubeconfig.rename(cluster.kubeconfig.with_name("elsewhere"))
    with caplog.at_level(logging.DEBUG):
        task = step()
        left = begin(task, context(made))
        cluster.ends(1, said="validate_data: our bug (1): boom")
        said, _ = ends(lambda: go_on(left, task, context(made)))
    printed = capsys.readouterr()
    seen = {
        "pod": str(cluster.pods()),
        "sent": str([request.data for request in cluster.emulator if request.data]),
        "trigger": str(left.trigger.serialize()),
        "log": caplog.text + printed.out + printed.err,
        "failure": said,
        "templates": str([getattr(task, name, None) for name in task.template_fields]),
    }
    assert "made in namespace" in seen["log"], "the operator's own log is looked at"
    assert "our bug (1): boom" in seen["failure"]
    assert "components.validate_data" in seen["sent"]
    assert {place for place, text in seen.items() if "canary" in text} == set()


def test_the_operator_uses_what_its_role_allows_and_nothing_else(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    cluster.ends(75)
    ends(lambda: go_on(left, step(), context(made)))
    left = begin(step(), context(made, tries=2))
    event = {"status": "timeout", "name": left.trigger.pod_name, "namespace": "qlora-retrain", "message": "too long"}
    ends(lambda: step().resume_execution(left.method_name, {"event": event}, context(made, tries=2)))
    left = begin(step(), context(made, tries=3))

    async def killed_while_it_waits() -> None:
        trigger = trigger_of(left)
        waiting = asyncio.create_task(anext(trigger.run()))
        while ("watch", "events") not in cluster.emulator.verbs and not waiting.done():
            await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.wait([waiting])
        await trigger.on_kill()

    asyncio.run(killed_while_it_waits())
    role = next(
        document
        for document in yaml.safe_load_all((project_root() / "manifests" / "base" / "rbac.yaml").read_text())
        if document["kind"] == "Role"
    )
    allowed = {(v, r) for rule in role["rules"] for r in rule["resources"] for v in rule["verbs"]}
    assert cluster.emulator.verbs - allowed == set(), "forbidden in a real cluster"
    assert allowed - cluster.emulator.verbs == set(), "more than it needs"


def test_every_step_has_a_pod_name_that_is_a_host_name() -> None:
    from qlora_retrain.runtimes.kubernetes import pod_spec

    for item in graph.STEPS:
        name = pod_spec.name(item.name, "0" * 64, "20260131T030000Z-0123456789ab")
        assert len(name) <= 63
        assert name == name.lower()
