"""The images themselves: their labels, their user, and what they do not contain."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from qlora_retrain.core import graph
from qlora_retrain.core.images import DEFAULT_IMAGES
from qlora_retrain.pipeline import code_identity
from qlora_retrain.pipeline.code_identity import project_root

if TYPE_CHECKING:
    from tests.containers.conftest import Engine

pytestmark = [pytest.mark.containers, pytest.mark.timeout(3000)]
INSPECT_PROGRAM = """
import importlib.util, json, os, shutil, sys
from qlora_retrain.core import graph
from qlora_retrain.pipeline import code_identity as code
installed = {n for n in ("torch", "pip", "airflow", "kfp", "pytest") if importlib.util.find_spec(n)}
keys = {s.name: code.code_hash(s.name) for s in graph.STEPS}
print(json.dumps([os.getuid(), sorted(installed), shutil.which("pip"), sorted(os.listdir("/app")), keys]))
"""

QUANTIZE_PROGRAM = """
import gguf, torch
from components.merge_adapter import gguf_blocks
print(gguf_blocks.quantize_by_llama_cpp(torch.ones(2, 256), gguf.GGMLQuantizationType.Q4_K).shape)
"""


@pytest.fixture(scope="module", params=["light", "train"])
def kind(request: pytest.FixtureRequest, images: None) -> str:
    return str(request.param)


def test_an_image_names_its_revision_and_runs_as_nobody_in_particular(kind: graph.Image, engine: Engine) -> None:
    labels = engine("image", "inspect", "--format", "{{json .Config.Labels}} {{.Config.User}}", DEFAULT_IMAGES[kind])
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    assert f'"org.opencontainers.image.revision":"{head.stdout.strip()}"' in labels
    assert labels.split()[-1] == "10001:10001"


# The files differ in what they install; the soak has both.
@pytest.mark.parametrize("kind", ["light", pytest.param("train", marks=pytest.mark.soak)], indirect=True)
def test_an_image_built_again_from_the_same_code_names_the_newer_revision(kind: graph.Image, engine: Engine) -> None:
    """Buildah reuses a cached LABEL or ENV although an argument in it changed, unless a RUN comes before it."""
    arguments = [f"--build-arg={name}" for name in (f"BASE={engine.base}", "TORCH=cpu", "REVISION=newer")]
    file = project_root() / "images" / f"{kind}.Dockerfile"
    built = engine("build", "-q", "--network=none", *arguments, "-f", str(file), str(project_root())).strip()
    image_config = engine("image", "inspect", "--format", "{{.Config.Labels}} {{.Config.Env}}", built)
    engine("rmi", built)
    assert "image.revision:newer " in image_config
    assert f"QLORA_RETRAIN_IMAGE={kind}:newer]" in image_config


def test_an_image_holds_the_code_that_the_keys_are_of_and_no_more_than_it_needs(
    kind: graph.Image, engine: Engine
) -> None:
    contents = json.loads(
        engine("run", "--rm", "--read-only", "--network", "none", DEFAULT_IMAGES[kind], "python", "-c", INSPECT_PROGRAM)
    )
    assert contents == [
        10001,
        ["torch"] if kind == "train" else [],
        None,
        ["components", "constraints.txt", "entrypoint", "pyproject.toml", "src"],
        {step.name: code_identity.code_hash(step.name) for step in graph.STEPS},
    ]


def test_the_train_image_writes_the_mixtures_of_llama_cpp(images: None, engine: Engine) -> None:
    """Whoever exports gguf-q4_k_m would otherwise learn after hours of training that the image cannot."""
    output = engine("run", "--rm", "--network", "none", DEFAULT_IMAGES["train"], "python", "-c", QUANTIZE_PROGRAM)
    assert output.strip() == "(2, 144)"


def test_a_container_ends_soon_when_it_is_asked_to(
    kind: graph.Image, engine: Engine, wait_until: Callable[..., None]
) -> None:
    """SIGTERM has no default effect on process 1, so the entrypoint must pass it on to the step."""
    name = f"qlora-retrain-test-{kind}-{uuid.uuid4().hex}"
    engine(
        "run",
        "-d",
        "--name",
        name,
        DEFAULT_IMAGES[kind],
        "python",
        "-c",
        "import time; print('up', flush=True); time.sleep(999)",
    )
    try:
        wait_until(lambda: "up" in engine("logs", name))
        engine("stop", "--time", "200", name)
        assert engine("inspect", "--format", "{{.State.ExitCode}}", name).strip() == "143", "128 and SIGTERM, not 137"
    finally:
        engine("rm", "-f", name)
