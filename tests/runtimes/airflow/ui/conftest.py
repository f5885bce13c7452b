"""Airflow's real API server in this process, with the plugin, a database and users; and a store with versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_retrain.storage import open_store, registry
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store
from tests.published import publish_version

DAGS = Path(__file__).parent / "dags"
ORIGIN = "http://airflow.example"
USERS = {"admin": "admin", "operator": "user", "reader": "viewer", "clerk": "user"}
SETTINGS = {
    "CORE__AUTH_MANAGER": "tests.runtimes.airflow.ui.line_permissions.LinePermissions",
    "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
    "CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{user}:{role}" for user, role in USERS.items()),
    "API_AUTH__JWT_SECRET": "s" * 64,
    "API__SECRET_KEY": "k" * 32,
    "API__BASE_URL": ORIGIN,
}


# Of a module and no longer, since its settings are those of this process.
@pytest.fixture(scope="module")
def airflow_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The API server's application, with three DAGs in its database; the plugin is the installed one."""
    folder = tmp_path_factory.mktemp("plugins")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(f"AIRFLOW__{name}", value)
        patch.setenv("AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE", str(folder / "passwords.json"))

        from airflow import plugins_manager, settings
        from airflow.api_fastapi import app as api
        from airflow.utils.db import initdb

        patch.setattr(settings, "PLUGINS_FOLDER", str(folder))
        caches = (plugins_manager._get_plugins, plugins_manager._get_ui_plugins, plugins_manager.get_fastapi_plugins)
        for cache in caches:
            cache.cache_clear()
        initdb()
        write_dags()
        yield api.create_app(apps="core")
        for cache in caches:
            cache.cache_clear()
        api.purge_cached_app()


def write_dags() -> None:
    """Put the stand-in DAGs into the database, as the DAG processor does."""
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
    from airflow.models.dagbundle import DagBundleModel
    from airflow.utils.session import create_session

    with create_session() as session:
        session.merge(DagBundleModel(name="tests"))
    bag = DagBag(str(DAGS), bundle_path=DAGS, bundle_name="tests")
    assert bag.import_errors == {}
    sync_bag_to_db(bag, "tests", None)


@pytest.fixture
def browser(airflow_app: Any) -> Callable[..., Any]:
    """A client for a user, with the session's cookie; None: without a session."""
    from airflow.api_fastapi.app import get_auth_manager
    from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
    from fastapi.testclient import TestClient

    def client(user: str | None = "admin") -> Any:
        session = TestClient(airflow_app, base_url=ORIGIN, follow_redirects=False)
        if user is not None:
            role = USERS.get(user, "").upper() or None
            token = get_auth_manager().generate_jwt(SimpleAuthManagerUser(username=user, role=role))
            session.cookies.set("_token", token)
        return session

    return client


@pytest.fixture
def store(root_uri: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store that the pages read: one of this test alone."""
    monkeypatch.setenv("QLORA_RETRAIN_ROOT", root_uri)
    return open_store(root_uri)


@pytest.fixture
def publish(store: Store, tmp_path: Path) -> Callable[..., Release]:
    """Publish a version with reports, a recipe and verdicts, without training; return its manifest."""

    def publish_one(number: int, *, line: str = "intents", **arguments: Any) -> Release:
        return publish_version(store, tmp_path / f"version-{line}-{number}", number, line=line, **arguments)

    return publish_one


@pytest.fixture
def two_versions(store: Store, publish: Callable[..., Release]) -> tuple[Release, Release]:
    """Two versions of `intents`, of which the second is in production, and one of `secrets`."""
    first, second = publish(1), publish(2, accuracy=0.85)
    for release in (first, second):
        for alias in (registry.LATEST, registry.PRODUCTION):
            registry.move_alias(store, "intents", alias, release, reason="a <b>test</b>")
    registry.move_alias(store, "secrets", registry.PRODUCTION, publish(3, line="secrets"), reason="a test")
    return first, second
