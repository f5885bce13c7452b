"""The parameters of a run of the pipeline, from a line's YAML. It needs no kfp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_retrain.config.line import document, load
from qlora_retrain.core.aliases import alias_of_run


def pipeline_parameters(
    config_path: Path, root: str, *, resume_run: str = "", overrides: Sequence[str] = (), started_by: str = "hand"
) -> dict[str, Any]:
    """Return what `dags/retrain_kfp.py` takes.

    The line's name and the alias are taken from the line with its overrides, and never from a plan: every step compares
    its plan with them.
    """
    config = load(config_path, overrides)
    return {
        # Without the overrides, which are a parameter of their own, so that the plan records them.
        "line": document(load(config_path)),
        "line_name": config.line,
        "root": root,
        "alias": alias_of_run(config.publish.promote_to, has_approval=config.publish.approval) or "",
        "resume_run": resume_run,
        "overrides": list(overrides),
        # A run of the schedule needs as many new rows as the line says.
        "started_by": started_by,
    }
