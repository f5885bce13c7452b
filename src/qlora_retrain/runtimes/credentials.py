"""A step's own credentials for the store, on a machine whose steps are subprocesses or containers.

Environment: `QLORA_RETRAIN_CREDENTIALS`, a folder with a credentials file of AWS for each role, `<step>` and
`publish-<line>`, whose policies `qlora-retrain policy` renders. Without it every step has this process's credentials.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.storage.keys import step_role

FOLDER_VARIABLE = "QLORA_RETRAIN_CREDENTIALS"
FILE_VARIABLE = "AWS_SHARED_CREDENTIALS_FILE"
# boto3 takes each of these before the file.
_STRONGER = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
)


def step_environment(environment: Mapping[str, str], step: graph.Step, line: str) -> dict[str, str]:
    """Return the environment of a step's process, with its role's credentials alone where there is a folder of them.

    Raises:
        UsageError: If the folder has no file for the role.
    """
    folder = environment.get(FOLDER_VARIABLE)
    if not folder:
        return dict(environment)
    role = step_role(step, line)
    file = Path(folder) / role
    if not file.is_file():
        raise UsageError(f"{FOLDER_VARIABLE}: {file} is not there; expected a file with the credentials of role {role}")
    # Nor the folder's name, which leads to the others.
    kept_back = {FOLDER_VARIABLE, *_STRONGER}
    return {**{k: v for k, v in environment.items() if k not in kept_back}, FILE_VARIABLE: str(file)}


def own_environment(step: graph.Step, line: str) -> dict[str, str]:
    """Return `step_environment` of this process."""
    return step_environment(os.environ, step, line)
