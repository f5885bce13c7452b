"""The pods that the operator would submit, run by podman: the whole pipeline, an eviction, and how the others end.

`node.py` says how a pod's spec becomes `podman run`, and what it leaves out.
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

from qlora_retrain.config.profile import Profile
from qlora_retrain.config.sections import RuntimeConfig
from qlora_retrain.core import graph
from qlora_retrain.core.errors import Exit
from qlora_retrain.core.images import DEFAULT
from qlora_retrain.pipeline import execute, plan
from qlora_retrain.pipeline.code_identity import project_root
from qlora_retrain.pipeline.plan import Plan
from qlora_retrain.storage import open_store, registry
from tests.containers.node import TOKEN, Node

if TYPE_CHECKING:
    from qlora_retrain.runtimes.kubernetes.pod_status import Ending
    from tests.containers.conftest import Engine

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Airflow's own, while it is imported
]
MANIFESTS = project_root() / "manifests"
STEPS_OF_A_LONG_RUN = 600  # a quarter of a minute, so that it can be evicted in the middle


@pytest.fixture(scope="module")
def config(make_line: Callable[..., Path], s3: str) -> Path:
    """A line whose sources are in S3, since a pod sees no file of anybody's machine."""
    path = make_line()
    document = yaml.safe_load(path.read_text())
    for name, source in document["sources"].items():
        folder = Path(source)
        for file in [folder] if folder.is_file() else sorted(folder.iterdir()):
            boto3.client("s3").upload_file(str(file), "models", f"sources/{name}/{file.name}")
        document["sources"][name] = f"s3://models/sources/{name}"
    document["runtime"] = {"kind": "kubernetes"}
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def node(tmp_path: Path, engine: Engine, images: None, canaries: dict[str, str]) -> Iterator[Node]:
    """A node, in a cluster that has what docs/deploy.md makes by hand or by an overlay."""
    for folder in (*tmp_path.parents[:2], tmp_path):
        folder.chmod(0o755)
    made = Node(tmp_path, engine)
    credentials = f"[default]\naws_access_key_id = a\naws_secret_access_key = {canaries['credentials file']}\n"
    made.secrets["qlora-retrain-store"] = {"credentials": credentials}
    for account in yaml.safe_load_all((MANIFESTS / "overlays" / "production" / "roles.yaml").read_text()):
        role = account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
        made.roles[account["metadata"]["name"]] = (role, canaries["token file"])
    made.claims["qlora-retrain-cache"] = tmp_path / "claim"
    (tmp_path / "claim").mkdir(mode=0o770)  # as volumes.yaml tells its driver: 770, 10001:10001
    os.chown(tmp_path / "claim", 10001, 10001)
    yield made
    made.sweep()


@pytest.fixture
def profile(s3: str, engine: Engine, images: None) -> Callable[[str], Profile]:
    """A profile of the repository, with this machine's images and store."""

    def read(name: str) -> Profile:
        document = yaml.safe_load((MANIFESTS / "profiles" / f"{name}.yaml").read_text())
        document["env"]["AWS_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
        for kind, image in DEFAULT.items() if document.get("require_digests") else ():
            digest = engine("image", "inspect", "--format", "{{.Digest}}", image).strip()
            document[f"{kind}_image"] = f"localhost/{image.partition(':')[0]}@{digest}"
        return Profile.model_validate(document)

    return read


@pytest.fixture
def made(s3: str, config: Path) -> Plan:
    return plan.make(config, f"{s3}/{uuid.uuid4().hex}")


def rendered(made: Plan, step: str, profile: Profile, runtime: RuntimeConfig | None = None) -> dict[str, Any]:
    """The pod as the operator would send it."""
    from kubernetes.client import ApiClient

    from qlora_retrain.runtimes.airflow.kubernetes import KubernetesStepOperator

    runtime = runtime or RuntimeConfig(kind="kubernetes")
    task = KubernetesStepOperator(task_id=step, step=step, line=made.line, runtime=runtime, profile=profile)
    task.prepare(made.uri, made.step(step).key, made.run_id)
    pod = ApiClient().sanitize_for_serialization(task.build_pod_request_obj(dry_run=True))
    assert isinstance(pod, dict)
    return pod


def run(node: Node, pod: dict[str, Any]) -> Ending:
    node.start(pod)
    return end(node, pod)


def end(node: Node, pod: dict[str, Any]) -> Ending:
    """How the operator reads the pod's end."""
    from qlora_retrain.runtimes.kubernetes import pod_status

    found = pod_status.ending(node.ended(pod))
    assert found is not None
    return found


def program(pod: dict[str, Any], text: str) -> dict[str, Any]:
    """The same pod with a program in its step's place."""
    pod["spec"]["containers"][0]["args"] = ["python", "-c", textwrap.dedent(text)]
    return pod


def everything_said(node: Node, root: str) -> dict[str, str]:
    """All that pods have said: in their logs, in their statuses, and into the store."""
    store = open_store(root)
    stored = {e.path: store.read(e.path).data.decode(errors="replace") for e in store.list("")}
    return {**stored, "logs": "".join(node.logs), "statuses": "".join(node.statuses)}


def test_the_pods_that_would_be_submitted_run_the_whole_pipeline_though_the_training_is_evicted(
    node: Node, s3: str, profile: Callable[[str], Profile], config: Path, tmp_path: Path, until: Callable[..., None]
) -> None:
    """Production's: no secret is mounted, what a pod may do in the store comes from its account's token alone."""
    longer = (f"train.max_steps={STEPS_OF_A_LONG_RUN}",)
    made, cluster = plan.make(config, f"{s3}/whole", overrides=longer), profile("production")
    for step in graph.STEPS:
        pod = rendered(made, step.name, cluster)
        if step.scratch:
            node.start(pod)
            store, scratch = open_store(made.root), f"scratch/{step.name}/{made.step(step.name).key}"
            until(lambda: any(e.path.endswith("_complete.json") for e in store.list(scratch)), 240)  # noqa: B023
            own, shared = node.volume(pod, "work"), node.claims["qlora-retrain-cache"]
            assert {path.name for path in own.glob("work/*/*")} >= {step.makes, "scratch"}
            assert list(own.glob("work/*/scratch/checkpoint-*"))
            assert list(shared.glob("work/*")) == [], "inputs arrive there; nothing of the step's own"
            node.evict(pod)
            ended = end(node, pod)
            assert (ended.code, ended.why) == (Exit.TRY_AGAIN, "the pod was deleted while it ran")
            assert f"{step.name}: try again (75)" in ended.said
            pod = rendered(made, step.name, cluster)
        ended = run(node, pod)
        assert ended.code == Exit.DONE, ended.said
        assert ("going on from scratch/train_qlora/" in node.logs[-1]) == step.scratch
        manifest = execute.manifest(made, step.name)
        assert manifest is not None
        assert manifest.provenance["image"] == cluster.image(step.image)
        assert manifest.provenance["host"] == pod["metadata"]["name"]
    assert {path.name for path in node.claims["qlora-retrain-cache"].iterdir()} >= {"dataset", "base_nf4", "adapter"}
    elsewhere = plan.make(config, (tmp_path / "elsewhere").as_uri(), overrides=longer)
    assert {step.name: step.key for step in made.steps} == {step.name: step.key for step in elsewhere.steps}
    alias, _ = registry.alias(open_store(made.root), made.line, registry.PRODUCTION)
    assert alias is not None
    release = registry.read_release(open_store(made.root), made.line, alias.version, sha256=alias.manifest_sha256)
    assert release.provenance["run_id"] == made.run_id
    assert [place for place, text in everything_said(node, made.root).items() if "canary" in text] == []


LOOK = """
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
        "told": sorted(name for name, value in os.environ.items() if "canary" in value),
        "host": os.uname().nodename,
    }))
"""


@pytest.mark.parametrize("name", ["gpu", "production"])
def test_a_pod_is_as_confined_as_its_spec_says_and_its_volumes_are_of_their_sizes(
    node: Node, made: Plan, profile: Callable[[str], Profile], name: str
) -> None:
    if name == "gpu":
        node.roles.clear()
    pod = program(rendered(made, "train_qlora", profile(name)), LOOK.replace("TOKEN", TOKEN))
    told = json.loads(run(node, pod).said)
    in_production = name == "production"
    assert told == {
        "user": [10001, 10001, [10001]],
        "CapEff": "0" * 16,
        "CapBnd": "0" * 16,
        "NoNewPrivs": "1",
        "Seccomp": "2",
        "writable": ["/tmp", "/workspace", *(["/cache"] if in_production else []), "/dev/shm"],
        "gib": {"/tmp": 1, "/workspace": 200 if in_production else 100, "/dev/shm": 1},
        "mode": "0o42775" if in_production else "0o42777",
        "read": [f"{TOKEN}/token"] if in_production else ["/run/secrets/aws/credentials"],
        "told": [],
        "host": pod["metadata"]["name"],
    }


def test_a_step_that_refuses_ends_its_pod_with_its_code_and_its_reason_in_the_status(
    node: Node, s3: str, profile: Callable[[str], Profile], config: Path
) -> None:
    made = plan.make(config, f"{s3}/refused", overrides=["data.min_train_rows=1000"])
    ended = run(node, rendered(made, "validate_data", profile("gpu")))
    assert (ended.code, ended.why) == (Exit.DATA_REFUSED, "")
    assert ended.said.splitlines()[-1].startswith("validate_data: data refused (10): ")
    assert "min_train_rows" in ended.said.splitlines()[-1]
    assert len(ended.said) <= 2048
    assert [place for place, text in everything_said(node, made.root).items() if "canary" in text] == []


def test_a_pod_that_takes_too_much_memory_is_read_as_killed_for_it(
    node: Node, made: Plan, profile: Callable[[str], Profile]
) -> None:
    pod = rendered(made, "validate_data", profile("gpu"), RuntimeConfig(kind="kubernetes", memory_gib=0.1))
    assert run(node, program(pod, "held = [bytearray(2**20) for _ in range(1000)]")).code == Exit.OUT_OF_MEMORY


def test_a_pod_that_loses_a_process_to_the_kernel_and_goes_on_ends_as_it_says(
    node: Node, made: Plan, profile: Callable[[str], Profile]
) -> None:
    """Training does: it goes on with fewer rows a pass."""
    pod = rendered(made, "validate_data", profile("gpu"), RuntimeConfig(kind="kubernetes", memory_gib=0.1))
    child = "import subprocess, sys; held = 'held = [bytearray(2**20) for _ in range(1000)]'; "
    judged = child + "sys.exit(0 if subprocess.run([sys.executable, '-c', held]).returncode == -9 else 13)"
    assert run(node, program(pod, judged)).code == Exit.DONE


def test_a_volume_that_is_full_is_an_error_that_a_step_can_say(
    node: Node, made: Plan, profile: Callable[[str], Profile]
) -> None:
    """And a kubelet would evict the pod; either way it is tried again."""
    pod = program(rendered(made, "validate_data", profile("gpu")), "open('/tmp/x', 'wb').write(bytes(2**30 + 2**20))")
    assert "No space left on device" in run(node, pod).said


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
    node: Node, made: Plan, profile: Callable[[str], Profile], change: dict[str, Any]
) -> None:
    pod = rendered(made, "publish", profile("gpu"))
    node.command(pod)
    node.sweep()
    with pytest.raises((AssertionError, KeyError)):
        node.command({**pod, "spec": {**pod["spec"], **change}})
