"""With `memory_gib: auto` a Kubeflow task's memory is an output of task 0, which the run's plan decides."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_retrain.cli import main
from qlora_retrain.config.cluster_profile import ClusterProfile
from qlora_retrain.core import graph
from qlora_retrain.pipeline import make_plan, pod_sizes
from tests.dags.conftest import PROFILE, CompiledPipeline, kfp_name

STEPS = [step.name for step in graph.STEPS]
LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True,
}  # fmt: skip
# GPU steps follow the plan, and so do light ones; the others have a number.
AUTO_PROFILE: dict[str, Any] = {
    **PROFILE,
    "disk_gib": "auto",
    "light": {"memory_gib": "auto", "max_memory_gib": 8},
    "gpu": {**PROFILE["gpu"], "memory_gib": "auto", "max_memory_gib": 96},
}


@pytest.mark.kfp
def test_a_task_takes_its_memory_from_task_zero_where_the_profile_says_auto(
    in_kfp: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(AUTO_PROFILE))
    out = tmp_path / "retrain.yaml"
    completed = in_kfp(
        "-m", "qlora_retrain.cli", "kfp", "compile", "--out", out, "--profile", tmp_path / "cluster.yaml"
    )
    assert completed.returncode == 0, completed.stderr
    compiled = CompiledPipeline(*yaml.safe_load_all(out.read_text()), out.read_text())

    profile = ClusterProfile.model_validate(AUTO_PROFILE)
    auto = [step.name for step in graph.STEPS if profile.pod(step).memory_gib == "auto"]
    assert 0 < len(auto) < len(STEPS)
    for name in STEPS:
        resources, inputs = compiled.container(name)["resources"], compiled.steps[kfp_name(name)]["inputs"]
        if name not in auto:
            assert resources["memoryLimit"] == resources["memoryRequest"] == pytest.approx(32 * 2**30 / 1e9)
            continue
        parameter = f"pipelinechannel--plan-memory_{name}"
        expected = f"{{{{$.inputs.parameters['{parameter}']}}}}"
        assert (resources["resourceMemoryLimit"], resources["resourceMemoryRequest"]) == (expected, expected)
        source = {"producerTask": "plan", "outputParameterKey": f"memory_{name}"}
        assert inputs["parameters"][parameter]["taskOutputParameter"] == source

    # Task 0 writes these outputs and `uri`; itself and the summary have no plan to follow.
    assert set(compiled.component("plan")["outputDefinitions"]["parameters"]) == {"uri", *(f"memory_{n}" for n in auto)}
    command = compiled.container("plan")["command"]
    for name in auto:
        place = command.index(name)
        max_gib = 96 if profile.gpus(graph.step(name)) else 8
        file = f"{{{{$.outputs.parameters['memory_{name}'].output_file}}}}"
        assert command[place - 1 : place + 3] == ["--memory-to", name, str(max_gib), file]
    for name in ("plan", "summary"):
        assert compiled.container(name)["resources"]["memoryLimit"] == pytest.approx(2 * 2**30 / 1e9)
    # The size of a volume is fixed when the pipeline is compiled.
    assert {
        mount["sizeLimit"] for mount in compiled.pod("train_qlora")["emptyDirMounts"] if mount["volumeName"] == "work"
    } == {"100Gi"}


def ended_with(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    return ended.value.code


def test_task_zero_writes_the_memory_of_the_steps_pods(
    line: Path, root_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line.parent / "base" / "config.json").write_text(json.dumps(LLAMA_1B))
    requests = [("merge_adapter", "64"), ("train_qlora", "3.5"), ("publish", "8")]
    arguments = [word for step, most in requests for word in ("--memory-to", step, most, str(tmp_path / "out" / step))]
    settings = ["--set", "train.device=cpu"]
    exit_codes = [ended_with(["plan", str(line), "--root", root_uri, *settings, *arguments])]
    sizes = pod_sizes.planned_sizes(make_plan.make_plan(line, root_uri, overrides=["train.device=cpu"]))
    assert sizes["train_qlora"].memory_gib > 3.5, "so the profile's maximum counts"
    texts = {step: (tmp_path / "out" / step).read_text() for step, _ in requests}
    assert texts == {
        "merge_adapter": f"{sizes['merge_adapter'].memory_gib}Gi",
        "train_qlora": "3584Mi",
        "publish": "1Gi",
    }

    # Kubernetes needs a number, also where nothing can be estimated.
    (line.parent / "base" / "config.json").write_text("{}")
    capsys.readouterr()
    exit_codes.append(ended_with(["plan", str(line), "--root", root_uri, *arguments]))
    assert exit_codes == [0, 0]
    assert (
        "the pods' memory is not estimated, so they get the most that they may: config.json" in capsys.readouterr().out
    )
    assert [(tmp_path / "out" / step).read_text() for step, _ in requests] == ["64Gi", "3584Mi", "8Gi"]
