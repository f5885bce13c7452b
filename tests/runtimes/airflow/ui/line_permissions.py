"""An auth manager that lets one user read one DAG alone, as those of real deployments do."""

from __future__ import annotations

from typing import Any

from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager

ONE_LINE_USER = "clerk"
ITS_LINE = "intents"


class LinePermissions(SimpleAuthManager):
    """Airflow's simple one, whose roles hold for all DAGs, with one user who is limited to a line."""

    def is_authorized_dag(self, *, method: Any, user: Any, access_entity: Any = None, details: Any = None) -> bool:
        if user.username == ONE_LINE_USER and (details is None or details.id != ITS_LINE):
            return False
        return bool(super().is_authorized_dag(method=method, user=user, access_entity=access_entity, details=details))
