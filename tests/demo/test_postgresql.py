"""Airflow on PostgreSQL, as in production: two lines run side by side, each to its own end, and nothing twice."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from qlora_retrain.demo import host
from qlora_retrain.demo.standalone_airflow import StandaloneAirflow
from qlora_retrain.pipeline.plan import Plan

pytestmark = [pytest.mark.airflow, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(3600)]
# Debian's place; initdb and the server refuse to run as root.
BINARIES = Path("/usr/lib/postgresql/15/bin")


def as_server_user(*command: object, folder: Path) -> None:
    arguments = [str(part) for part in command]
    if os.geteuid() == 0:
        arguments = ["runuser", "-u", "postgres", "--", *arguments]
    result = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The URL of an empty database on loopback, of a server of this module's own."""
    if not (BINARIES / "initdb").exists():
        pytest.skip(
            f"{BINARIES}/initdb is missing: nothing of Airflow on PostgreSQL is tested; apt install postgresql-15"
        )
    # Not below pytest's folder, which only this user may enter.
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/qlora-retrain-postgresql-XXXXXX"], text=True).strip())
    if os.geteuid() == 0:
        os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
    port, reservation = host.reserve_port()
    control = (BINARIES / "pg_ctl", "-D", folder / "data", "-w", "-t", "240")
    options = f"-p {port} -h 127.0.0.1 -k {folder} -c fsync=off"
    try:
        as_server_user(BINARIES / "initdb", "-D", folder / "data", "-A", "trust", "-U", "airflow", "-N", folder=folder)
        as_server_user(*control, "-l", folder / "log", "-o", options, "start", folder=folder)
        as_server_user(BINARIES / "createdb", "-h", "127.0.0.1", "-p", port, "-U", "airflow", "airflow", folder=folder)
        yield f"127.0.0.1:{port}/airflow"
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            as_server_user(*control, "-m", "immediate", "stop", folder=folder)
        reservation.close()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def airflow(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    write_tickets: Callable[[Path, int], Path],
    database: str,
) -> Iterator[StandaloneAirflow]:
    folder = tmp_path_factory.mktemp("postgresql")
    (folder / "lines").mkdir()
    for line, count in (("tickets", 100), ("letters", 80)):
        # The data gate refuses, so the runs are short; each line has data of its own.
        sources = {"raw_data": str(write_tickets(folder / f"{line}.jsonl", count)), "base_model": str(tiny_model)}
        document = {"line": line, "sources": sources, "data": {"min_train_rows": 100_000}}
        (folder / "lines" / f"{line}.yaml").write_text(yaml.safe_dump(document))
    environment = {
        "QLORA_RETRAIN_PIPELINES": str(folder / "lines"),
        "QLORA_RETRAIN_ROOT": (folder / "store").as_uri(),
        "QLORA_RETRAIN_CACHE": str(folder / "cache"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"postgresql+psycopg2://airflow@{database}",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC": f"postgresql+asyncpg://airflow@{database}",
    }
    with StandaloneAirflow(folder / "home", parallelism=4, environment=environment) as airflow:
        for line in ("tickets", "letters"):
            airflow.wait_for_dag(line)
            airflow.api.unpause(line)
        yield airflow


def test_two_lines_run_side_by_side_each_to_its_own_end(airflow: StandaloneAirflow) -> None:
    run_ids = {line: airflow.api.trigger(line) for line in ("tickets", "letters")}
    for line, run_id in run_ids.items():
        assert airflow.api.wait_until_finished(line, run_id, timeout_seconds=400) == "failed"
        states = {t.task_id: (t.state, t.try_number) for t in airflow.api.task_states(line, run_id)}
        assert states["plan"] == ("success", 1)
        assert states["validate_data"] == ("failed", 1)
        assert states["quantize_model"] == ("success", 1)
        assert "data refused (10)" in airflow.api.failure_message(line, run_id, "validate_data")
    assert not (airflow.home / "airflow.db").exists()

    # They ran at the same time: each began before the other had ended.
    runs = [airflow.api.dag_run(line, run_id) for line, run_id in run_ids.items()]
    assert max(run["start_date"] for run in runs) < min(run["end_date"] for run in runs)
    # One plan for each line, and the base that both need is there once.
    store = airflow.home.parent / "store"
    plans = [Plan.read(path.as_uri()) for path in store.glob("runs/*/plan.json")]
    assert sorted(plan.line for plan in plans) == ["letters", "tickets"]
    for artifact, number in (("base_nf4", 1), ("dataset", 2)):
        assert len(list(store.glob(f"artifacts/{artifact}/*/_manifest.json"))) == number
    assert len({plan.step("quantize_model").key for plan in plans}) == 1
