"""With `auto`, a pod gets the memory and the disk that the planner estimates for its step; a number always wins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest

from qlora_retrain.config.cluster_profile import ClusterProfile, PodConfig
from qlora_retrain.config.cluster_profile import load as load_profile
from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.core import graph
from qlora_retrain.pipeline import make_plan, pod_sizes
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.runtimes.kubernetes.pod_security import restricted
from tests.runtimes.kubernetes.tasks import failure_of, resume, run_until_deferred, task_context

if TYPE_CHECKING:
    from tests.runtimes.kubernetes.cluster import FakeCluster

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
STEPS = [step.name for step in graph.STEPS]
LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True,
}  # fmt: skip
AUTO = RuntimeConfig(kind="kubernetes", memory_gib="auto", disk_gib="auto")
BOUNDED_AUTO = {"memory_gib": "auto", "max_memory_gib": 64}


@pytest.fixture
def plan(line: Path, root_uri: str) -> Plan:
    """The plan of a line over a base of 1.2 billion weights, of which the planner reads the config.json alone."""
    (line.parent / "base" / "config.json").write_text(json.dumps(LLAMA_1B))
    return make_plan.make_plan(line, root_uri, overrides=["train.device=cpu", "train.precision=float32"])


def profile(**changes: Any) -> ClusterProfile:
    document = load_profile(project_root() / "manifests" / "profiles" / "gpu.yaml").model_dump(exclude_unset=True)
    return ClusterProfile.model_validate({**document, **changes})


def render_pod(plan: Plan, step: str, cluster: ClusterProfile, runtime: RuntimeConfig) -> dict[str, Any]:
    """Render the pod as the operator sends it, for a run of this plan."""
    from kubernetes.client import ApiClient

    from qlora_retrain.runtimes.airflow.kubernetes import KubernetesStepOperator

    task = KubernetesStepOperator(task_id=step, step=step, line=plan.line, runtime=runtime, profile=cluster)
    task.prepare_pod(plan.uri, plan.step(step).key, plan.run_id)
    task.size_pod(plan)
    pod: dict[str, Any] = ApiClient().sanitize_for_serialization(task.pod_request_obj)
    kubernetes_validate.validate(pod, "1.32", strict=True)
    assert restricted(pod) == []
    return pod


def sizes_of(pod: dict[str, Any]) -> tuple[str | None, str, str]:
    """Return the memory, the storage of the node and the size of the work volume; requests and limits are equal."""
    resources = pod["spec"]["containers"][0]["resources"]
    for name in ("memory", "ephemeral-storage"):
        assert resources["requests"].get(name) == resources["limits"].get(name)
    (work,) = (volume for volume in pod["spec"]["volumes"] if volume["name"] == "work")
    return resources["limits"].get("memory"), resources["limits"]["ephemeral-storage"], work["emptyDir"]["sizeLimit"]


@pytest.mark.parametrize("step", STEPS)
def test_each_steps_pod_has_what_the_plan_prints_for_it(plan: Plan, step: str) -> None:
    size = pod_sizes.planned_sizes(plan)[step]
    expected = (f"{size.memory_gib}Gi", f"{size.disk_gib + 2}Gi", f"{size.disk_gib}Gi")
    # Whether the platform says it for a line, or the profile for all.
    everywhere = profile(light=BOUNDED_AUTO, train=BOUNDED_AUTO, gpu=BOUNDED_AUTO, disk_gib="auto")
    assert sizes_of(render_pod(plan, step, profile(), AUTO)) == expected
    assert sizes_of(render_pod(plan, step, everywhere, RuntimeConfig(kind="kubernetes"))) == expected


def test_the_steps_get_different_sizes(plan: Plan) -> None:
    memory = {step: sizes_of(render_pod(plan, step, profile(), AUTO))[0] for step in STEPS}
    # Merging measures a form of 1.2 billion weights in fp32; quantizing holds a few tensors.
    assert memory["publish"] == "1Gi"
    assert memory["merge_adapter"] == "7Gi"
    assert memory["quantize_model"] == "3Gi"


@pytest.mark.parametrize(("settings", "bits"), [(["format=none"], 16), (["format=mixed", "bits_per_weight=8"], 8)])
def test_the_disk_has_room_for_the_bits_of_the_base(line: Path, root_uri: str, settings: list[str], bits: int) -> None:
    # So many weights that what every step gets beside the base does not count.
    (line.parent / "base" / "config.json").write_text(json.dumps(LLAMA_1B | {"num_hidden_layers": 160}))
    overrides = ["train.device=cpu", "train.precision=float32"]
    nf4, wider = (
        pod_sizes.planned_sizes(make_plan.make_plan(line, root_uri, overrides=[*overrides, *extra]))
        for extra in ([], [f"quantize.{setting}" for setting in settings])
    )
    weights = 160 * (2048 * (2 * 2048 + 2 * 512) + 3 * 2048 * 8192)
    surplus_gib = weights * (bits - 4.127) / 8 / 2**30
    # Packed tensors lie in mapped files before they are saved; a copy in 16 bits is written once.
    copies = {"quantize_model": 1 if bits == 16 else 2, "train_qlora": 1, "evaluate": 1, "merge_adapter": 1}
    for step in STEPS:
        assert wider[step].disk_gib - nf4[step].disk_gib == pytest.approx(copies.get(step, 0) * surplus_gib, abs=2)


def test_a_number_of_the_platform_wins_over_auto_of_the_profile_and_the_other_way_round(plan: Plan) -> None:
    size = pod_sizes.planned_sizes(plan)["merge_adapter"]
    auto_profile = profile(train=BOUNDED_AUTO, gpu=BOUNDED_AUTO, disk_gib="auto")
    numbers = RuntimeConfig(kind="kubernetes", memory_gib=20, disk_gib=30)
    assert sizes_of(render_pod(plan, "merge_adapter", auto_profile, numbers)) == ("20Gi", "32Gi", "30Gi")
    # Each for itself: memory by the plan, disk by a number.
    mixed = RuntimeConfig(kind="kubernetes", memory_gib="auto", disk_gib=30)
    assert sizes_of(render_pod(plan, "merge_adapter", profile(), mixed)) == (f"{size.memory_gib}Gi", "32Gi", "30Gi")
    fixed_disk = RuntimeConfig(kind="kubernetes", disk_gib="auto")
    pod = render_pod(plan, "merge_adapter", profile(), fixed_disk)
    assert sizes_of(pod) == ("32Gi", f"{size.disk_gib + 2}Gi", f"{size.disk_gib}Gi"), "the profile's memory"


def test_memory_stays_below_the_profiles_maximum(plan: Plan) -> None:
    assert pod_sizes.planned_sizes(plan)["merge_adapter"].memory_gib > 5
    bounded = profile(train={"memory_gib": "auto", "max_memory_gib": 5})
    pod = render_pod(plan, "merge_adapter", bounded, RuntimeConfig(kind="kubernetes"))
    assert sizes_of(pod)[0] == "5Gi"


def test_a_volume_of_its_own_has_the_planned_size(plan: Plan) -> None:
    size = pod_sizes.planned_sizes(plan)["merge_adapter"]
    pod = render_pod(plan, "merge_adapter", profile(storage_class="fast"), AUTO)
    (work,) = (volume for volume in pod["spec"]["volumes"] if volume["name"] == "work")
    claim = work["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert claim["resources"] == {"requests": {"storage": f"{size.disk_gib}Gi"}}
    assert pod["spec"]["containers"][0]["resources"]["limits"]["ephemeral-storage"] == "2Gi"


def test_what_cannot_be_estimated_gets_the_profiles_numbers_and_the_log_says_why(
    plan: Plan, line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line.parent / "base" / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    unknown = make_plan.make_plan(line, plan.root)
    assert sizes_of(render_pod(unknown, "merge_adapter", profile(), AUTO)) == ("32Gi", "102Gi", "100Gi")
    logged = capsys.readouterr().out
    assert "the pod's size is not estimated, so it gets the profile's: config.json: has none of" in logged
    # Where the profile has no numbers either: its maximum, and the disk of a profile that says nothing.
    everywhere = profile(train=BOUNDED_AUTO, disk_gib="auto")
    pod = render_pod(unknown, "merge_adapter", everywhere, RuntimeConfig(kind="kubernetes"))
    assert sizes_of(pod) == ("64Gi", "102Gi", "100Gi")
    # Nobody bounds it: as without a setting, the cluster's own default applies.
    assert sizes_of(render_pod(unknown, "merge_adapter", profile(train={}), AUTO))[0] is None


def test_without_auto_a_pod_is_what_it_was_and_nothing_is_estimated(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_sizes, "planned_sizes", None)
    assert sizes_of(render_pod(plan, "train_qlora", profile(), RuntimeConfig()))[0] == "64Gi"


@pytest.mark.timeout(600)
def test_a_pod_that_is_killed_for_memory_gets_more_than_the_estimate(
    cluster: FakeCluster, make_task: Callable[..., Any], plan_in: Callable[..., Plan], tmp_path: Path
) -> None:
    tiny_plan = plan_in((tmp_path / "store").as_uri())
    estimated = pod_sizes.planned_sizes(tiny_plan)["validate_data"].memory_gib
    limits, settings = [], {"light": {"memory_gib": "auto", "max_memory_gib": 3.5}, "disk_gib": "auto"}
    for number in (1, 2):
        context = task_context(tiny_plan, number)
        deferred = run_until_deferred(make_task(**settings), context)
        limits.append(cluster.pod()["spec"]["containers"][0]["resources"]["limits"]["memory"])
        cluster.end_container(137, container_reason="OOMKilled")
        _, is_retried = failure_of(lambda: resume(deferred, make_task(**settings), context))  # noqa: B023
        assert is_retried
    assert limits == [f"{estimated}Gi", f"{1.5 * estimated:g}Gi"] == ["2Gi", "3Gi"]


def test_auto_without_a_bound_or_without_pods_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_gib: auto needs max_memory_gib"):
        PodConfig.model_validate({"memory_gib": "auto"})
    for kind in ("local", "docker"):
        for name in ("memory_gib", "disk_gib"):
            with pytest.raises(ValueError, match=f"{name}: auto is for kind: kubernetes; expected a number or null"):
                RuntimeConfig.model_validate({"kind": kind, name: "auto"})
