"""The tasks for mirrors: what a DAG gets, which version they bring, with which token, and what they never change."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from qlora_retrain.config.mirrors import MirrorConfig
from qlora_retrain.config.platform import PlatformConfig
from qlora_retrain.config.yaml_reader import load_section
from qlora_retrain.core.errors import UsageError
from qlora_retrain.storage import open_store, registry
from tests import hub_repository
from tests.hub_repository import NAME, TOKEN, HubRepository
from tests.storage.small_versions import LINE, publish

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
DAGS = Path(__file__).resolve().parents[3] / "dags"
HUB = {"line": LINE, "to": f"hf://{NAME}", "connection": "hub"}
MLFLOW = {"line": "*", "to": "mlflow", "connection": "mlflow"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubRepository]:
    with hub_repository.serve(monkeypatch) as server:
        # The worker's own, which a mirror must not use.
        monkeypatch.setenv("HF_TOKEN", "of-the-worker")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        yield server


@pytest.fixture(autouse=True)
def own_store(root_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_RETRAIN_ROOT", root_uri)
    monkeypatch.setenv("QLORA_RETRAIN_WORK", str(tmp_path / "work"))


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def write(mirror: list[str] | None = None, **platform: object) -> Path:
        folder = tmp_path / "lines"
        folder.mkdir(exist_ok=True)
        document: dict[str, object] = {"line": LINE, "sources": {"raw_data": "a.jsonl", "base_model": "model"}}
        if mirror:
            document["publish"] = {"mirror": mirror}
        (folder / f"{LINE}.yaml").write_text(yaml.safe_dump(document))
        (tmp_path / "platform.yaml").write_text(yaml.safe_dump(platform))
        monkeypatch.setenv("QLORA_RETRAIN_PIPELINES", str(folder))
        monkeypatch.setenv("QLORA_RETRAIN_PLATFORM", str(tmp_path / "platform.yaml"))
        return folder

    return write


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("dag_file", DAGS / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def context_of(**params: object) -> dict[str, Any]:
    dag_run = SimpleNamespace(dag_id=LINE, run_id="manual__1", run_after=datetime(2026, 1, 31, 3, tzinfo=UTC))
    ti = SimpleNamespace(xcom_pull=lambda task_ids, key: "production")
    return {"dag_run": dag_run, "ti": ti, "params": params}


def test_a_line_gets_a_task_for_each_of_its_mirrors_which_never_changes_how_its_run_ended(
    lines: Callable[..., Path],
) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    lines(["mlflow", HUB["to"]], mirrors=[HUB, MLFLOW])
    dag = load("retrain.py").DAGS[LINE]
    added = {task.task_id: task for task in dag.tasks if task.task_id.startswith("mirror")}
    assert set(added) == {"mirror_mlflow", "mirror_hf-owner-model"}
    for task in added.values():
        assert task.upstream_task_ids == {"publish"}
        assert task.is_teardown
        assert not task.on_failure_fail_dagrun
        assert (task.retries, task.template_fields) == (2, ())
    DagSerialization.to_dict(dag)
    lines(mirrors=[HUB, MLFLOW])
    assert dag.dagrun_timeout - load("retrain.py").DAGS[LINE].dagrun_timeout == timedelta(hours=12)
    moves = load("move.py")
    for dag, task_id in ((moves.move_dag, "move"), (moves.approval_dag, "approve")):
        assert dag.get_task("mirrors").is_teardown
        assert dag.get_task("mirrors").upstream_task_ids == {task_id}
        DagSerialization.to_dict(dag)


def test_without_mirrors_there_is_no_task_and_without_permission_there_is_no_line(lines: Callable[..., Path]) -> None:
    lines()
    assert not [t for t in load("retrain.py").DAGS[LINE].task_ids if t.startswith("mirror")]
    assert not load("move.py").move_dag.has_task("mirrors")
    for platform in ({}, {"mirrors": [MLFLOW]}, {"mirrors": [{**HUB, "line": "another"}]}):
        lines([HUB["to"]], **platform)
        dag = load("retrain.py").DAGS[LINE]
        assert "broken" in dag.tags
        assert f"hf://{NAME}: line {LINE} may have" in dag.doc_md


def test_a_mirror_needs_what_the_runtime_of_the_line_gets_its_token_from(lines: Callable[..., Path]) -> None:
    from qlora_retrain.config.line import load as load_line

    path = lines(["mlflow"], runtime={"kind": "kubernetes"}, mirrors=[MLFLOW]) / f"{LINE}.yaml"
    with pytest.raises(UsageError, match="mlflow: needs secret"):
        load_line(path)
    lines(["mlflow"], mirrors=[{"line": "*", "to": "mlflow", "secret": "mlflow-token"}])
    with pytest.raises(UsageError, match="mlflow: needs connection"):
        load_line(path)


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"line": "*", "to": "hf://owner/model", "connection": "hub"}, "holds the versions of one line"),
        ({"line": "a-line", "to": "hf://owner/model"}, "expected connection"),
        ({"line": "a-line", "to": "hf://owner", "connection": "hub"}, "mirrors.0.to"),
        ({"line": "a-line", "to": "https://a:b@server/x", "connection": "hub"}, "mirrors.0.to"),
        ({"line": "a-line", "to": "mlflow", "connection": "a.b"}, "mirrors.0.connection"),
        ({"line": "a-line", "to": "mlflow", "secret": "A_B"}, "mirrors.0.secret"),
        ({"line": "a-line", "to": "mlflow", "connection": "a", "token": "t"}, "mirrors.0.token"),
    ],
)
def test_a_wrong_entry_is_refused_by_its_place(tmp_path: Path, entry: dict[str, str], fault: str) -> None:
    (tmp_path / "platform.yaml").write_text(yaml.safe_dump({"mirrors": [entry]}))
    with pytest.raises(UsageError) as caught:
        load_section(PlatformConfig, tmp_path / "platform.yaml")
    assert fault in str(caught.value)


def environment_of(entry: dict[str, str]) -> dict[str, str]:
    from qlora_retrain.runtimes.airflow.mirror_command import mirror_command

    command: Any = mirror_command(LINE, MirrorConfig.model_validate(entry))
    return dict(command.process_environment())


def test_a_mirrors_process_has_its_connections_token_and_none_of_the_workers(
    lines: Callable[..., Path], connect: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines()
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "MLFLOW_TRACKING_PASSWORD", "AIRFLOW__CORE__FERNET_KEY"):
        monkeypatch.setenv(name, "of-the-worker")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-worker")
    monkeypatch.setenv("QLORA_RETRAIN_CREDENTIALS", str(tmp_path / "roles"))
    (tmp_path / "roles").mkdir()
    (tmp_path / "roles" / "mirror").touch()

    connect("hub", conn_type="http", password="t")
    environment = environment_of(HUB)
    assert environment["HF_TOKEN"] == "t"
    assert environment["AWS_SHARED_CREDENTIALS_FILE"] == str(tmp_path / "roles" / "mirror")
    assert "of-the-worker" not in environment.values()
    connect("mlflow", conn_type="http", host="https://m.example", password="t")
    environment = environment_of(MLFLOW)
    names = {name for name in environment if name.startswith(("HF_TOKEN", "MLFLOW"))}
    assert names == {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN"}
    connect("mlflow", conn_type="http", host="https://m.example", login="u", password="t")
    names = {name for name in environment_of(MLFLOW) if name.startswith("MLFLOW")}
    assert names == {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}

    connect("hub", conn_type="http", host="hub.example", password="a-secret")
    with pytest.raises(UsageError, match="expected the whole URL") as refused:
        environment_of(HUB)
    assert "a-secret" not in str(refused.value)
    connect("hub", conn_type="http")
    with pytest.raises(UsageError, match="has no password"):
        environment_of(HUB)


def test_nothing_is_mirrored_before_there_is_a_version_in_a_dry_run_or_where_another_alias_moved(
    lines: Callable[..., Path], connect: Callable[..., None]
) -> None:
    from airflow.sdk import DAG, BaseOperator
    from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

    from qlora_retrain.runtimes.airflow import mirrors
    from qlora_retrain.runtimes.airflow.mirror_operators import MirrorOperator

    pipelines = lines(mirrors=[HUB])
    task = MirrorOperator(task_id="m", entry=MirrorConfig.model_validate(HUB), line=LINE)
    with pytest.raises(AirflowSkipException, match="dry run"):
        task.execute(context_of(dry_run=True))
    with pytest.raises(AirflowSkipException, match="names no version yet"):
        task.execute(context_of())
    with DAG("qlora-retrain-move") as dag:
        mirrors.add_move_tasks(dag, BaseOperator(task_id="move"), pipelines)
    with pytest.raises(AirflowSkipException, match="has no mirror"):
        dag.get_task("mirrors").execute(context_of(line=LINE))
    with pytest.raises(AirflowSkipException, match="did not move"):
        dag.get_task("mirrors").execute(
            {**context_of(line=LINE), "ti": SimpleNamespace(xcom_pull=lambda task_ids, key: "staging")}
        )
    publish(open_store((pipelines.parent / "store").as_uri()), 1)
    with pytest.raises(AirflowFailException, match="connection hub: not defined"):
        task.execute(context_of())


@pytest.mark.slow
def test_a_move_reaches_every_mirror_that_works_and_no_log_has_the_token(
    lines: Callable[..., Path], connect: Callable[..., None], hub: HubRepository, root_uri: str,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from airflow.sdk import DAG, BaseOperator
    from airflow.sdk.exceptions import AirflowFailException

    from qlora_retrain.runtimes.airflow import mirrors
    from qlora_retrain.runtimes.airflow.mirror_operators import MirrorOperator

    caplog.set_level(logging.INFO)
    store = open_store(root_uri)
    publish(store, 1)
    second = publish(store, 2)
    pipelines = lines(["mlflow", HUB["to"]], mirrors=[HUB, MLFLOW])
    connect("hub", conn_type="http", host=hub.url, password=TOKEN)
    with DAG("qlora-retrain-move") as dag:
        mirrors.add_move_tasks(dag, BaseOperator(task_id="move"), pipelines)
    with pytest.raises(AirflowFailException, match="connection mlflow: not defined"):
        dag.get_task("mirrors").execute(context_of(line=LINE))
    assert set(hub.tags) == {second.version}
    assert hub.content("main") == hub.content(second.version)

    # The version is in production whatever the mirror says.
    connect("hub", conn_type="http", host=hub.url, password="another-token")
    task = MirrorOperator(task_id="m", entry=MirrorConfig.model_validate(HUB), line=LINE)
    with pytest.raises(AirflowFailException, match=r"config or usage error \(12\).*the Hub answered 401") as refused:
        task.execute(context_of())
    state, _ = registry.read_alias(store, LINE, "production")
    assert state is not None
    assert state.version == second.version
    output = capfd.readouterr()
    text = caplog.text + output.out + output.err + str(refused.value)
    assert TOKEN not in text
    assert "another-token" not in text
