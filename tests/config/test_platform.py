"""The platform's settings: found where no author of a line writes, and out of reach of a line and of a trigger."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qlora_retrain.cli import main
from qlora_retrain.config import line, platform
from qlora_retrain.config.platform import PLATFORM_VARIABLE, PlatformConfig, RuntimeConfig
from qlora_retrain.core.errors import UsageError
from qlora_retrain.runtimes.airflow import params

SetPlatform = Callable[..., Path]


@pytest.fixture
def line_file(tmp_path: Path) -> Path:
    path = tmp_path / "pipelines" / "tickets.yaml"
    path.parent.mkdir()
    path.write_text(
        f"line: tickets\nsources: {{raw_data: {tmp_path}/data/a.jsonl, base_model: {tmp_path}/data/base}}\n"
    )
    return path


@pytest.fixture
def set_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SetPlatform:
    def set_to(**settings: object) -> Path:
        path = tmp_path / "of the platform" / "platform.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(settings))
        monkeypatch.setenv(PLATFORM_VARIABLE, str(path))
        return path

    return set_to


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        line.load(path, overrides)
    assert caught.value.exit_code == 12
    return str(caught.value)


@pytest.mark.parametrize("knob", sorted(RuntimeConfig.model_fields))
def test_a_line_that_sets_what_is_the_platforms_is_refused_with_the_new_place(line_file: Path, knob: str) -> None:
    assert "runtime is the platform's to say: its owner sets it in platform.yaml" in refusal(
        line_file, f"runtime.{knob}=1"
    )
    line_file.write_text(f"{line_file.read_text()}runtime:\n  {knob}: '{{{{ conn.store.password }}}}'\n")
    message = refusal(line_file)
    assert f"{line_file}:3: runtime: unknown field; " in message
    assert "platform.yaml" in message


@pytest.mark.parametrize("name", ["runtime", "runtime.network", "sources", "sources.raw_data", "lines", "platform"])
def test_a_trigger_cannot_set_it_either(line_file: Path, name: str) -> None:
    config = line.load(line_file)
    assert name not in params.form_fields(config)
    with pytest.raises(UsageError, match="not in the form"):
        params.overrides(config, {name: {"kind": "docker"}})


def test_a_document_that_travels_as_a_parameter_cannot_either(line_file: Path, set_platform: SetPlatform) -> None:
    document = line.document(line.load(line_file))
    set_platform(sources=["file:///elsewhere/"])
    for changed in ({**document, "runtime": {"network": "host"}}, document):
        with pytest.raises(UsageError, match=r"platform\.yaml"):
            line.load(json.dumps(changed))


@pytest.mark.parametrize(
    "reference", ["{{ conn.store.password }}:1", "a:{{ 7 * 7 }}", "a:1\n", "-v:1", "a b:1", "$X:1"]
)
def test_an_image_is_never_a_template(set_platform: SetPlatform, reference: str) -> None:
    set_platform(runtime={"kind": "docker", "train_image": reference})
    with pytest.raises(UsageError, match="expected letters, digits and"):
        platform.load()


def test_without_a_file_steps_are_subprocesses_and_sources_lie_anywhere(
    line_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PLATFORM_VARIABLE, raising=False)
    monkeypatch.setattr(platform, "default_path", lambda: tmp_path / "project" / "platform.yaml")
    assert platform.load() == PlatformConfig()
    assert platform.load().runtime_of("tickets").kind == "local"
    assert line.load(line_file).sources.raw_data.uri == (tmp_path / "data" / "a.jsonl").as_uri()


def test_the_file_of_the_project_counts_unless_the_variable_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_platform: SetPlatform
) -> None:
    assert platform.default_path().parent.joinpath("components").is_dir()
    monkeypatch.setattr(platform, "default_path", lambda: tmp_path / "platform.yaml")
    (tmp_path / "platform.yaml").write_text("runtime: {kind: docker}\n")
    for value in (None, ""):
        monkeypatch.delenv(PLATFORM_VARIABLE, raising=False) if value is None else monkeypatch.setenv(
            PLATFORM_VARIABLE, value
        )
        assert platform.load().runtime.kind == "docker"
    set_platform(runtime={"kind": "kubernetes"})
    assert platform.load().runtime.kind == "kubernetes"


@pytest.mark.parametrize("state", ["missing", "folder", "pipe", "a link to nothing", "too large", "no mapping"])
def test_a_file_that_cannot_be_used_stops_every_line(
    line_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    path = tmp_path / "platform.yaml"
    monkeypatch.setenv(PLATFORM_VARIABLE, str(path))
    if state == "folder":
        path.mkdir()
    elif state == "pipe":
        os.mkfifo(path)
    elif state == "a link to nothing":
        monkeypatch.delenv(PLATFORM_VARIABLE)
        monkeypatch.setattr(platform, "default_path", lambda: path)
        path.symlink_to(tmp_path / "gone")
    elif state != "missing":
        path.write_text("#" * 70_000 if state == "too large" else "")
    assert str(path) in refusal(line_file)


def test_every_error_of_the_file_comes_at_once(set_platform: SetPlatform) -> None:
    path = set_platform(
        runtime={"knd": "docker", "pids": 0},
        lines={"Not A Line": {}},
        sources=["file:///data/../", "http://x/", "s3://a//b"],
    )
    with pytest.raises(UsageError) as caught:
        platform.load()
    message = str(caught.value)
    for part in (
        "runtime.knd: unknown field; did you mean kind?",
        "runtime.pids",
        "lines",
        "parts . and ..",
        "sources.1: ",
        "sources.2: ",
    ):
        assert part in message
    assert all(row.startswith(f"{path}:") for row in message.splitlines())


@pytest.mark.parametrize("is_link", [False, True])
def test_a_file_in_the_folder_of_lines_is_not_the_platforms(
    line_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_link: bool
) -> None:
    path = line_file.with_name("platform.yaml")
    path.write_text("runtime: {kind: docker, network: host}\n")
    if is_link:
        (tmp_path / "platform.yaml").symlink_to(path)
        path = tmp_path / "platform.yaml"
    # By itself it is another broken line, and nothing reads it.
    assert line.load(line_file).line == "tickets"
    monkeypatch.setenv(PLATFORM_VARIABLE, str(path))
    assert "is in the folder of lines" in refusal(line_file)


def test_the_repositorys_file_for_a_cluster_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = Path(__file__).parents[2] / "manifests"
    monkeypatch.setenv(PLATFORM_VARIABLE, str(manifests / "platform.yaml"))
    assert (platform.load().runtime.kind, platform.load().sources) == (
        "kubernetes",
        ("s3://my-data/", "hf://HuggingFaceTB/"),
    )
    values = yaml.safe_load((manifests / "airflow" / "values.yaml").read_text())
    variables = {variable["name"]: variable["value"] for variable in values["env"]}
    assert variables[PLATFORM_VARIABLE] == "/opt/airflow/dags/repo/manifests/platform.yaml"


def test_a_line_may_have_a_runtime_of_its_own(set_platform: SetPlatform) -> None:
    set_platform(
        runtime={"kind": "docker", "network": "none"}, lines={"large": {"kind": "kubernetes", "memory_gib": 48}}
    )
    assert platform.load().runtime_of("tickets") == RuntimeConfig(kind="docker", network="none")
    assert platform.load().runtime_of("large") == RuntimeConfig(kind="kubernetes", memory_gib=48)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"priorities": {"tickets": 0}}, "priorities.tickets: .*greater than or equal to 1"),
        ({"priorities": {"tickets": 1001}}, "priorities.tickets: .*less than or equal to 1000"),
        ({"priorities": {"Not A Line": 5}}, "priorities.*should match pattern"),
        (
            {"runtime": {"kind": "kubernetes", "gpu_pool": "gpu"}},
            "gpu_pool: has no effect with kind: kubernetes",
        ),
        ({"runtime": {"gpu_pool": "two words"}}, "runtime.gpu_pool: .*should match pattern"),
    ],
)
def test_a_priority_or_pool_that_cannot_be_is_refused(
    set_platform: SetPlatform, settings: dict[str, object], words: str
) -> None:
    set_platform(**settings)
    with pytest.raises(UsageError, match=words):
        platform.load()


def test_check_shows_a_lines_priority(set_platform: SetPlatform) -> None:
    set_platform(runtime={"kind": "docker"}, priorities={"tickets": 5})
    assert "steps run with kind docker, priority 5;" in platform.load().describe("tickets")
    assert "priority" not in platform.load().describe("mails")


def test_check_shows_what_the_platform_says(
    line_file: Path, tmp_path: Path, set_platform: SetPlatform, capsys: pytest.CaptureFixture[str]
) -> None:
    path = set_platform(runtime={"kind": "docker", "network": "none"}, sources=[f"file://{tmp_path}/data", "hf://org"])
    with pytest.raises(SystemExit) as ended:
        main.main(["check", str(line_file)])
    assert ended.value.code == 0
    expected = (
        f"{path}: steps run with kind docker, network none; sources may lie below file://{tmp_path}/data/, hf://org/"
    )
    assert expected in capsys.readouterr().out

    set_platform(sources=["s3://data/"])
    with pytest.raises(SystemExit) as ended:
        main.main(["check", str(line_file)])
    assert ended.value.code == 12
    output = capsys.readouterr().err
    for field in ("raw_data", "base_model"):
        assert f"{line_file}:2: sources.{field}.uri: not below an allowed source; {path} allows s3://data/" in output


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
def test_a_dag_takes_its_runtime_from_the_platform(
    line_file: Path, monkeypatch: pytest.MonkeyPatch, set_platform: SetPlatform
) -> None:
    monkeypatch.setenv("QLORA_RETRAIN_PIPELINES", str(line_file.parent))
    spec = importlib.util.spec_from_file_location("dag_file", Path(__file__).parents[2] / "dags" / "retrain.py")
    assert spec is not None
    assert spec.loader is not None

    def dag() -> object:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.DAGS["tickets"]

    set_platform(lines={"tickets": {"kind": "docker", "network": "of-the-platform", "light_image": "light:7"}})
    task = dag().get_task("validate_data")  # type: ignore[attr-defined]
    assert (task.image, task.network_mode, list(task.template_fields)) == ("light:7", "of-the-platform", [])
    set_platform(runtime={"kind": "dokcer"})
    assert "did you mean docker?" in dag().doc_md  # type: ignore[attr-defined]


def test_a_template_is_the_lines_own_or_below_an_allowed_source(
    line_file: Path, tmp_path: Path, set_platform: SetPlatform
) -> None:
    (tmp_path / "airflow.cfg.txt").write_text("fernet_key = secret\nname = {{ ti.dag_id }}\n")
    own = line_file.with_name("chat.jinja")
    own.write_text("{{ messages }}")
    line_file.with_name("link.jinja").symlink_to(tmp_path / "airflow.cfg.txt")
    os.mkfifo(line_file.with_name("pipe.jinja"))
    assert line.load(line_file, ["data.template=../airflow.cfg.txt"]).data.template

    set_platform(sources=[(tmp_path / "data").as_uri()])
    assert line.load(line_file, ["data.template=chat.jinja"]).data.template == "{{ messages }}"
    for name in ("../airflow.cfg.txt", "link.jinja", str(tmp_path / "airflow.cfg.txt"), "pipe.jinja"):
        message = refusal(line_file, f"data.template={name}")
        assert "data.template: " in message
        assert "secret" not in message


def test_a_line_with_approvers_moves_production_only_when_it_asks(line_file: Path, set_platform: SetPlatform) -> None:
    path = set_platform(approvers={"tickets": ["bob", "carol@example.org"]})
    assert platform.load().approvers["tickets"] == ("bob", "carol@example.org")
    assert f"{path}: approvers of line tickets: its runs move production without asking" in refusal(line_file)
    for override in ("publish.approval=true", "publish.promote_to=null", "publish.promote_to=canary"):
        assert line.load(line_file, [override]).line == "tickets"
    assert "approval is for the alias production, and promote_to is canary" in refusal(
        line_file, "publish.approval=true", "publish.promote_to=canary"
    )


@pytest.mark.parametrize("names", [[], ["a b"], [""], "bob"])
def test_approvers_are_names_of_users(set_platform: SetPlatform, names: object) -> None:
    set_platform(approvers={"tickets": names})
    with pytest.raises(UsageError, match=r"approvers"):
        platform.load()


def test_a_repository_mirrors_one_line_since_each_would_remove_the_others_model() -> None:
    def entry(line_name: str, to: str) -> dict[str, str]:
        return {"line": line_name, "to": to, "connection": "c"}

    PlatformConfig.model_validate({"mirrors": [entry(name, "mlflow") for name in ("one", "two")]})
    PlatformConfig.model_validate({"mirrors": [entry(name, f"hf://acme/{name}") for name in ("one", "two")]})
    with pytest.raises(ValueError, match="hf://acme/Model: a repository holds the versions of one line, and lines one"):
        PlatformConfig.model_validate({"mirrors": [entry("one", "hf://acme/model"), entry("two", "hf://acme/Model")]})
