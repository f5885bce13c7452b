"""The pods that the operator would submit, run by podman: the whole pipeline, an eviction, and other endings.

`node.py` translates a pod's spec to `podman run`, and lists what it leaves out.
"""

from __future__ import annotations

import json
import os
import textwrap
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
import yaml

from qlora_retrain.config.cluster_profile import ClusterProfile
from qlora_retrain.config.platform import RuntimeConfig
from qlora_retrain.core import graph
from qlora_retrain.core.errors import Exit
from qlora_retrain.core.images import DEFAULT_IMAGES
from qlora_retrain.pipeline import make_plan, status
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store, registry
from tests.containers.node import MESSAGE_BYTES, TOKEN, Node

if TYPE_CHECKING:
    from qlora_retrain.runtimes.kubernetes.pod_status import PodEnding
    from tests.containers.conftest import Engine

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
]
MANIFESTS = project_root() / "manifests"
STEPS_OF_A_LONG_RUN = 600  # 15 seconds of training, so that it can be evicted in the middle


@pytest.fixture(scope="module")
def config(make_line: Callable[..., Path], s3: str) -> Path:
    """Make a line whose sources are in S3, because a pod sees no file of this machine."""
    path = make_line()
    document = yaml.safe_load(path.read_text())
    for name, source in document["sources"].items():
        folder = Path(source)
        for file in [folder] if folder.is_file() else sorted(folder.iterdir()):
            boto3.client("s3").upload_file(str(file), "models", f"sources/{name}/{file.name}")
        document["sources"][name] = f"s3://models/sources/{name}"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def node(tmp_path: Path, engine: Engine, images: None, canaries: dict[str, str]) -> Iterator[Node]:
    """Make a node in a cluster with the secrets, roles and volumes that docs/deploy.md and the overlays create."""
    for folder in (*tmp_path.parents[:2], tmp_path):
        folder.chmod(0o755)
    node = Node(tmp_path, engine)
    credentials = f"[default]\naws_access_key_id = a\naws_secret_access_key = {canaries['credentials file']}\n"
    node.secrets["qlora-retrain-store"] = {"credentials": credentials}
    for account in yaml.safe_load_all((MANIFESTS / "overlays" / "production" / "accounts.yaml").read_text()):
        role = account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        # `publish` has an account for each line, whose entry is copied with the line's name.
        node.roles[account["metadata"]["name"].replace("my-line", "boxed")] = (role, canaries["token file"])

    node.claims["qlora-retrain-cache"] = tmp_path / "claim"
    (tmp_path / "claim").mkdir(mode=0o770)  # as volumes.yaml sets for its driver: 770, 10001:10001
    os.chown(tmp_path / "claim", 10001, 10001)
    yield node
    node.remove_everything()


@pytest.fixture
def load_profile(s3: str, engine: Engine, images: None) -> Callable[[str], ClusterProfile]:
    """Load a profile of the repository, with this machine's images and store."""

    def read(name: str) -> ClusterProfile:
        document = yaml.safe_load((MANIFESTS / "profiles" / f"{name}.yaml").read_text())
        document["env"]["AWS_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
        for kind, image in DEFAULT_IMAGES.items() if document.get("require_digests") else ():
            digest = engine("image", "inspect", "--format", "{{.Digest}}", image).strip()
            document[f"{kind}_image"] = f"localhost/{image.partition(':')[0]}@{digest}"
        return ClusterProfile.model_validate(document)

    return read


@pytest.fixture
def plan(s3: str, config: Path) -> Plan:
    return make_plan.make_plan(config, f"{s3}/{uuid.uuid4().hex}")


def render_pod(plan: Plan, step: str, profile: ClusterProfile, runtime: RuntimeConfig | None = None) -> dict[str, Any]:
    """Render the pod as the operator would send it."""
    from kubernetes.client import ApiClient

    from qlora_retrain.runtimes.airflow.kubernetes import KubernetesStepOperator

    runtime = runtime or RuntimeConfig(kind="kubernetes")
    task = KubernetesStepOperator(task_id=step, step=step, line=plan.line, runtime=runtime, profile=profile)
    task.prepare_pod(plan.uri, plan.step(step).key, plan.run_id)
    pod = ApiClient().sanitize_for_serialization(task.build_pod_request_obj(dry_run=True))
    assert isinstance(pod, dict)
    return pod


def run_pod(node: Node, pod: dict[str, Any]) -> PodEnding:
    node.start(pod)
    return wait_for_ending(node, pod)


def wait_for_ending(node: Node, pod: dict[str, Any]) -> PodEnding:
    """Wait for the pod's end; return what the operator reads of it."""
    from qlora_retrain.runtimes.kubernetes import pod_status

    ending = pod_status.read_ending(node.wait_until_ended(pod))
    assert ending is not None
    return ending


def with_program(pod: dict[str, Any], text: str) -> dict[str, Any]:
    """Put a program in the place of the pod's step."""
    pod["spec"]["containers"][0]["args"] = ["python", "-c", textwrap.dedent(text)]
    return pod


def everything_written(node: Node, root: str) -> dict[str, str]:
    """Collect what pods wrote: their logs, their statuses, and every document in the store."""
    store = open_store(root)
    stored = {e.path: store.read(e.path).data.decode(errors="replace") for e in store.list("")}
    return {**stored, "logs": "".join(node.logs), "statuses": "".join(node.statuses)}


def test_the_pods_that_would_be_submitted_run_the_whole_pipeline_though_the_training_is_evicted(
    node: Node,
    s3: str,
    load_profile: Callable[[str], ClusterProfile],
    config: Path,
    tmp_path: Path,
    wait_until: Callable[..., None],
) -> None:
    """With the production profile no secret is mounted: a pod's access to the store comes from its account's token."""
    long_run_overrides = (f"train.max_steps={STEPS_OF_A_LONG_RUN}",)
    plan, profile = make_plan.make_plan(config, f"{s3}/whole", overrides=long_run_overrides), load_profile("production")
    for step in graph.STEPS:
        pod = render_pod(plan, step.name, profile)
        if step.scratch:
            node.start(pod)
            store, scratch = open_store(plan.root), f"scratch/{step.name}/{plan.step(step.name).key}"
            # Training is in the middle once a checkpoint is complete in the store.
            wait_until(lambda: any(e.path.endswith("_complete.json") for e in store.list(scratch)), 900)  # noqa: B023
            own_volume, shared_cache = node.volume(pod, "work"), node.claims["qlora-retrain-cache"]
            assert {path.name for path in own_volume.glob("work/*/*")} >= {step.makes, "scratch"}
            assert list(own_volume.glob("work/*/scratch/checkpoint-*"))
            assert list(shared_cache.glob("work/*")) == [], "the cache has inputs, and nothing of the step's own"

            node.evict(pod)
            ending = wait_for_ending(node, pod)
            assert (ending.exit_code, ending.reason) == (Exit.TRY_AGAIN, "the pod was deleted while it ran")
            assert ending.step_ending is not None
            assert ending.step_ending.sentence().startswith(f"{step.name}: try again (75)")
            pod = render_pod(plan, step.name, profile)

        ending = run_pod(node, pod)
        assert ending.exit_code == Exit.DONE, ending
        assert ("resuming from scratch/train_qlora/" in node.logs[-1]) == step.scratch
        manifest = status.find_manifest(plan, step.name)
        assert manifest is not None
        assert manifest.provenance["image"] == profile.image(step.image)
        assert manifest.provenance["host"] == pod["metadata"]["name"]
    assert {path.name for path in node.claims["qlora-retrain-cache"].iterdir()} >= {"dataset", "base_nf4", "adapter"}

    plan_elsewhere = make_plan.make_plan(config, (tmp_path / "elsewhere").as_uri(), overrides=long_run_overrides)
    assert {step.name: step.key for step in plan.steps} == {step.name: step.key for step in plan_elsewhere.steps}
    alias, _ = registry.read_alias(open_store(plan.root), plan.line, registry.PRODUCTION)
    assert alias is not None
    release = registry.read_release(open_store(plan.root), plan.line, alias.version, sha256=alias.manifest_sha256)
    assert release.provenance["run_id"] == plan.run_id
    assert [place for place, text in everything_written(node, plan.root).items() if "canary" in text] == []


INSPECT_PROGRAM = """
    import json, os
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
    def writable(path):
        try:
            open(path + "/probe", "w").close()
        except OSError:
            return False
        return True
    def gib(path):
        return os.statvfs(path).f_blocks * os.statvfs(path).f_frsize / 2**30
    open("/dev/termination-log", "w").write(json.dumps({
        "user": [os.getuid(), os.getgid(), os.getgroups()],
        **{name: status[name].strip() for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")},
        "writable": [p for p in ("/", "/app", "/opt/venv", "/etc", "/run", "/var/tmp", "/tmp", "/workspace", "/cache",
                                 "/dev/shm", "/run/secrets/aws") if writable(p)],
        "gib": {p: gib(p) for p in ("/tmp", "/workspace", "/dev/shm")},
        "mode": oct(os.stat("/workspace").st_mode),
        "read": [p for p in ("/run/secrets/aws/credentials", "TOKEN/token")
                 if os.path.exists(p) and "canary" in open(p).read()],
        "canaries": sorted(name for name, value in os.environ.items() if "canary" in value),
        "host": os.uname().nodename,
    }))
"""


@pytest.mark.parametrize("name", ["gpu", "production"])
def test_a_pod_is_as_confined_as_its_spec_says_and_its_volumes_are_of_their_sizes(
    node: Node, plan: Plan, load_profile: Callable[[str], ClusterProfile], name: str
) -> None:
    if name == "gpu":
        node.roles.clear()
    pod = with_program(render_pod(plan, "train_qlora", load_profile(name)), INSPECT_PROGRAM.replace("TOKEN", TOKEN))
    report = json.loads(run_pod(node, pod).last_lines)
    in_production = name == "production"
    assert report == {
        "user": [10001, 10001, [10001]],
        "CapEff": "0" * 16,
        "CapBnd": "0" * 16,
        "NoNewPrivs": "1",
        "Seccomp": "2",
        "writable": ["/tmp", "/workspace", *(["/cache"] if in_production else []), "/dev/shm"],
        "gib": {"/tmp": 1, "/workspace": 200 if in_production else 100, "/dev/shm": 1},
        "mode": "0o42775" if in_production else "0o42777",
        "read": [f"{TOKEN}/token"] if in_production else ["/run/secrets/aws/credentials"],
        "canaries": [],
        "host": pod["metadata"]["name"],
    }


def test_a_step_that_refuses_ends_its_pod_with_its_code_and_its_reason_in_the_status(
    node: Node, s3: str, load_profile: Callable[[str], ClusterProfile], config: Path
) -> None:
    plan = make_plan.make_plan(config, f"{s3}/refused", overrides=["data.min_train_rows=1000"])
    ending = run_pod(node, render_pod(plan, "validate_data", load_profile("gpu")))
    assert (ending.exit_code, ending.reason) == (Exit.DATA_REFUSED, "")
    assert ending.step_ending is not None
    assert ending.step_ending.sentence().startswith("validate_data: data refused (10): ")
    assert "min_train_rows" in ending.step_ending.reason
    terminated = json.loads(node.statuses[-1])["status"]["containerStatuses"][0]["state"]["terminated"]
    assert len(terminated["message"]) <= MESSAGE_BYTES
    assert [place for place, text in everything_written(node, plan.root).items() if "canary" in text] == []


def test_a_pod_that_takes_too_much_memory_is_read_as_killed_for_it(
    node: Node, plan: Plan, load_profile: Callable[[str], ClusterProfile]
) -> None:
    pod = render_pod(plan, "validate_data", load_profile("gpu"), RuntimeConfig(kind="kubernetes", memory_gib=0.1))
    assert (
        run_pod(node, with_program(pod, "held = [bytearray(2**20) for _ in range(1000)]")).exit_code
        == Exit.OUT_OF_MEMORY
    )


def test_a_pod_that_loses_a_process_to_the_kernel_and_goes_on_ends_as_it_says(
    node: Node, plan: Plan, load_profile: Callable[[str], ClusterProfile]
) -> None:
    """Training does this: it continues with a smaller micro-batch."""
    pod = render_pod(plan, "validate_data", load_profile("gpu"), RuntimeConfig(kind="kubernetes", memory_gib=0.1))
    child = "import subprocess, sys; held = 'held = [bytearray(2**20) for _ in range(1000)]'; "
    judged = child + "sys.exit(0 if subprocess.run([sys.executable, '-c', held]).returncode == -9 else 13)"
    assert run_pod(node, with_program(pod, judged)).exit_code == Exit.DONE


def test_a_volume_that_is_full_is_an_error_that_a_step_can_say(
    node: Node, plan: Plan, load_profile: Callable[[str], ClusterProfile]
) -> None:
    """A kubelet would evict the pod as well; either way it is tried again."""
    pod = with_program(
        render_pod(plan, "validate_data", load_profile("gpu")), "open('/tmp/x', 'wb').write(bytes(2**30 + 2**20))"
    )
    assert "No space left on device" in run_pod(node, pod).last_lines


@pytest.mark.parametrize(
    "change",
    [
        {"hostPID": True},
        {"initContainers": [{"name": "another", "image": "i"}]},
        {"dnsPolicy": "None"},
        {"volumes": [{"name": "work", "emptyDir": {"sizeLimit": "1Gi"}, "more": 1}]},
    ],
)
def test_what_cannot_be_translated_is_not_skipped(
    node: Node, plan: Plan, load_profile: Callable[[str], ClusterProfile], change: dict[str, Any]
) -> None:
    pod = render_pod(plan, "publish", load_profile("gpu"))
    node.command(pod)
    node.remove_everything()
    with pytest.raises((AssertionError, KeyError)):
        node.command({**pod, "spec": {**pod["spec"], **change}})
