"""The tasks of a consumer: what they pull, what they ask, when they do nothing, and how they fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_retrain.config.consumers import ConsumerConfig
from qlora_retrain.core.aliases import PRODUCTION
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store
from tests.storage import small_versions

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Airflow's own, while it is imported
LINE = small_versions.LINE
Context = dict[str, Any]


@pytest.fixture
def entry(tmp_path: Path, root_uri: str, monkeypatch: pytest.MonkeyPatch) -> ConsumerConfig:
    monkeypatch.setenv("QLORA_RETRAIN_ROOT", root_uri)
    (tmp_path / "questions.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    return ConsumerConfig(
        folder=str(tmp_path / "model"),
        questions=str(tmp_path / "questions.jsonl"),
        answers=str(tmp_path / "answers.jsonl"),
    )


def task(kind: str, entry: ConsumerConfig) -> Any:
    from qlora_retrain.runtimes.airflow import consume

    return {"pull": consume.PullOperator, "ask": consume.AskOperator}[kind](task_id=kind, line=LINE, entry=entry)


def context(*extras: dict[str, Any], **form: Any) -> Context:
    notes: list[str] = []
    events = {"asset": [SimpleNamespace(extra=extra) for extra in extras]}
    return {
        "params": {"questions": None, "min_right_fraction": 1.0, **form},
        "ti": SimpleNamespace(xcom_push=lambda key, value: notes.append(value)),
        "triggering_asset_events": events,
        "notes": notes,
    }


def failure(run: Callable[[], object]) -> str:
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException) as caught:
        run()
    return str(caught.value)


def test_it_pulls_what_the_alias_names_and_fails_with_the_reason_of_pull(
    entry: ConsumerConfig, store: Store, tmp_path: Path
) -> None:
    release = small_versions.publish(store, 1)
    ran = context({"alias": PRODUCTION})
    assert task("pull", entry).execute(ran) == release.version
    assert small_versions.pulled_files(Path(entry.folder)) == small_versions.files_of(1)

    # A file of the version is changed where it was published.
    file = tmp_path / "store" / "models" / LINE / "versions" / release.version / "README.md"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes().upper())
    shutil.rmtree(entry.folder)
    message = failure(lambda: task("pull", entry).execute(ran))
    assert message.startswith("integrity or security (13): ")
    assert ran["notes"] == [f"pull: {message}"]


def test_a_move_of_another_alias_is_none_of_its_business(entry: ConsumerConfig) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    with pytest.raises(AirflowSkipException, match="latest, staging moved, and this follows production"):
        task("pull", entry).execute(context({"alias": "staging"}, {"alias": "latest"}))
    # An event that names no alias may be of production; here it names no version yet.
    for extras in ([{"alias": "staging"}, {}], []):
        message = failure(lambda extras=extras: task("pull", entry).execute(context(*extras)))
        assert "line intents has no alias production" in message


def test_a_worker_that_does_not_see_the_folder_says_so(entry: ConsumerConfig) -> None:
    assert "nothing was pulled there, or this worker does not see the folder" in failure(
        lambda: task("ask", entry).execute(context())
    )


@pytest.fixture
def pulled(entry: ConsumerConfig, store: Store, tiny_model: Path) -> Release:
    """A version with the tiny model, pulled."""
    files = {f"model/{path.name}": path.read_bytes() for path in tiny_model.iterdir()}
    recipe = {"steps": {"validate_data": {"system": None}}}
    release = small_versions.publish(store, 1, {**files, "recipe.json": json.dumps(recipe).encode()})
    task("pull", entry).execute(context())
    return release


def test_a_wrong_answer_fails_the_run_with_numbers_and_no_text(
    entry: ConsumerConfig, pulled: Release, tmp_path: Path
) -> None:
    ran = context(questions=[{"question": "where is it", "answer": "a secret text"}])
    message = failure(lambda: task("ask", entry).execute(ran))
    assert message == ("quality refused or insufficient evidence (11): 0 of 1 answers are right; at least 1 must be")
    assert ran["notes"] == [f"ask: {message}"]
    report = json.loads((tmp_path / "answers.jsonl").read_text())
    assert (report["line"], report["right"], report["expected"]) == (1, False, "a secret text")
