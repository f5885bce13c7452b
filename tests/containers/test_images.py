"""The images themselves: what they are labelled with, whom they run as, and what is not in them."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from qlora_retrain.core import graph
from qlora_retrain.core.images import DEFAULT
from qlora_retrain.pipeline import code_identity
from qlora_retrain.pipeline.code_identity import project_root

if TYPE_CHECKING:
    from tests.containers.conftest import Engine

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1500)]
LOOK = """
import importlib.util, json, os, shutil, sys
from qlora_retrain.core import graph
from qlora_retrain.pipeline import code_identity as code
there = {n for n in ("torch", "pip", "airflow", "kfp", "pytest") if importlib.util.find_spec(n)}
keys = {s.name: code.identity(s.name) for s in graph.STEPS}
print(json.dumps([os.getuid(), sorted(there), shutil.which("pip"), sorted(os.listdir("/app")), keys]))
"""


@pytest.fixture(scope="module", params=["light", "train"])
def kind(request: pytest.FixtureRequest, images: None) -> str:
    return str(request.param)


def test_an_image_names_its_revision_and_runs_as_nobody_in_particular(kind: graph.Image, engine: Engine) -> None:
    labels = engine("image", "inspect", "--format", "{{json .Config.Labels}} {{.Config.User}}", DEFAULT[kind])
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    assert f'"org.opencontainers.image.revision":"{head.stdout.strip()}"' in labels
    assert labels.split()[-1] == "10001:10001"


def test_an_image_built_again_from_the_same_code_names_the_newer_revision(kind: graph.Image, engine: Engine) -> None:
    """Buildah takes LABEL and ENV from its cache though an argument in them has changed, unless a RUN comes between."""
    arguments = [f"--build-arg={name}" for name in (f"BASE={engine.base}", "TORCH=cpu", "REVISION=newer")]
    file = project_root() / "images" / f"{kind}.Dockerfile"
    built = engine("build", "-q", "--network=none", *arguments, "-f", str(file), str(project_root())).strip()
    told = engine("image", "inspect", "--format", "{{.Config.Labels}} {{.Config.Env}}", built)
    engine("rmi", built)
    assert "image.revision:newer " in told
    assert f"QLORA_RETRAIN_IMAGE={kind}:newer]" in told


def test_an_image_holds_the_code_that_the_keys_are_of_and_no_more_than_it_needs(
    kind: graph.Image, engine: Engine
) -> None:
    told = json.loads(engine("run", "--rm", "--read-only", "--network", "none", DEFAULT[kind], "python", "-c", LOOK))
    assert told == [
        10001,
        ["torch"] if kind == "train" else [],
        None,
        ["components", "constraints.txt", "entrypoint", "pyproject.toml", "src"],
        {step.name: code_identity.identity(step.name) for step in graph.STEPS},
    ]


def test_a_container_ends_soon_when_it_is_asked_to(kind: graph.Image, engine: Engine) -> None:
    """A program that is process 1 would not even be ended by SIGTERM; the first process passes it on."""
    name = f"qlora-retrain-test-{kind}"
    engine(
        "run",
        "-d",
        "--name",
        name,
        DEFAULT[kind],
        "python",
        "-c",
        "import time; print('up', flush=True); time.sleep(99)",
    )
    try:
        for _ in range(100):
            if "up" in engine("logs", name):
                break
        engine("stop", "--time", "30", name)
        assert engine("inspect", "--format", "{{.State.ExitCode}}", name).strip() == "143", "128 and SIGTERM, not 137"
    finally:
        engine("rm", "-f", name)
