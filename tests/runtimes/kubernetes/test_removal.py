"""The Kubernetes operator against the API over HTTP: a pod that no try follows goes, and what it said stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qlora_retrain.pipeline.plan import Plan
from tests.runtimes.kubernetes.tasks import begin, context, ends, go_on

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import Cluster

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
    pytest.mark.timeout(120),
]


@pytest.mark.slow
def test_a_pod_that_did_the_work_while_nobody_looked_is_removed_and_its_log_is_in_the_tasks(
    cluster: Cluster, made: Plan, step: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    begin(step(), context(made))
    assert cluster.does_the_work() == 0
    step().execute(context(made, tries=2))
    assert (cluster.created(), cluster.pods()) == (1, [])
    assert "validate_data: done: " in capsys.readouterr().out
    cluster.emulator.refuses["GET"] = (500, "etcdserver: request timed out")
    step().execute(context(made, tries=3))
    assert "may be left" in capsys.readouterr().out, "it is made, whatever the API says"


@pytest.mark.slow
@pytest.mark.parametrize("seen", [True, False])
def test_a_step_that_refuses_leaves_no_pod(
    cluster: Cluster, plan_in: Callable[..., Plan], step: Callable[..., Any], tmp_path: Path, seen: bool
) -> None:
    made = plan_in((tmp_path / "store").as_uri(), "data.min_train_rows=100000")
    left = begin(step(), context(made))
    assert cluster.does_the_work() == 10
    said, again = ends(lambda: go_on(left, step(), context(made)) if seen else step().execute(context(made, tries=2)))
    assert (said.startswith("validate_data: data refused (10): "), again) == (True, False)
    assert (cluster.created(), cluster.pods()) == (1, [])


@pytest.mark.parametrize("code", [1, 12, 13, 14])
def test_a_pod_that_no_try_follows_is_removed_when_its_log_is_in_the_tasks(
    cluster: Cluster, made: Plan, step: Callable[..., Any], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    left = begin(step(), context(made))
    cluster.emulator.logs[left.trigger.pod_name] = "epoch 3\nvalidate_data: it said why\n"
    cluster.ends(code)
    said, again = ends(lambda: go_on(left, step(), context(made)))
    assert (said.endswith("validate_data: it said why"), again) == (True, False)
    assert cluster.pods() == []
    assert "epoch 3" in capsys.readouterr().out


def test_a_pod_is_kept_for_the_next_try_and_removed_after_the_last_one(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    for tries, left_over in ((1, 1), (2, 1), (3, 0)):
        left = begin(step(), context(made, tries, most=3))
        cluster.ends(75)
        _, again = ends(lambda left=left, tries=tries: go_on(left, step(), context(made, tries, most=3)))  # type: ignore[misc]
        assert (again, len(cluster.pods())) == (True, left_over)


def test_a_failed_pod_whose_log_cannot_be_read_is_kept_with_it_until_somebody_clears_the_task(
    cluster: Cluster, made: Plan, step: Callable[..., Any]
) -> None:
    left = begin(step(), context(made))
    cluster.ends(1)
    cluster.emulator.logs_fail = True
    _, again = ends(lambda: go_on(left, step(), context(made)))
    assert (again, len(cluster.pods())) == (False, 1)
    begin(step(), context(made, tries=2))
    assert (cluster.created(), len(cluster.pods())) == (2, 1)
