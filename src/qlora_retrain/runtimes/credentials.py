"""A step's own credentials for the store, on a machine whose steps are subprocesses or containers.

Environment: `QLORA_RETRAIN_CREDENTIALS`, a folder with a credentials file of AWS for each role, `<step>`,
`publish-<line>` and, for a consumer, `pull`, whose policies `qlora-retrain policy` renders. Without it every step has
this process's credentials.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_retrain.core import graph
from qlora_retrain.core.errors import UsageError
from qlora_retrain.runtimes.docker import container_spec
from qlora_retrain.storage.keys import TRUST_FILE, find_keyring, step_role

FOLDER_VARIABLE = "QLORA_RETRAIN_CREDENTIALS"
FILE_VARIABLE = "AWS_SHARED_CREDENTIALS_FILE"
KEYS_DIR = "/run/secrets/keys"  # where a container has the keys of its role
IMAGE_USER = "10001:10001"
# boto3 takes each of these before the file, or where the file has not the profile that it looks for.
_OTHERS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
)
# So it does with these in AWS's file of settings, of which every step has a copy.
_CREDENTIAL_SETTING = re.compile(
    r"^\s*(aws_access_key_id|aws_secret_access_key|aws_session_token|credential_process|credential_source"
    r"|web_identity_token_file|sso_\w+|login_session)\s*=",
    re.MULTILINE | re.IGNORECASE,
)


def step_environment(environment: Mapping[str, str], step: graph.Step, line: str) -> dict[str, str]:
    """Return the environment of a step's process, with its role's credentials alone where there is a folder of them.

    Raises:
        UsageError: If the folder has no file for the role, or AWS's file of settings has other credentials.
    """
    return role_environment(environment, step_role(step, line))


def role_environment(environment: Mapping[str, str], role: str) -> dict[str, str]:
    """Return the environment of a process, with a role's credentials alone where there is a folder of them.

    Raises:
        UsageError: If the folder has no file for the role, or AWS's file of settings has other credentials.
    """
    folder = environment.get(FOLDER_VARIABLE)
    if not folder:
        return dict(environment)
    file = Path(folder) / role
    if not file.is_file():
        raise UsageError(f"{FOLDER_VARIABLE}: {file} is not there; expected a file with the credentials of role {role}")
    _refuse_other_credentials(container_spec.aws_config_file(environment))
    # Nor the folder's name, which leads to the others.
    kept_back = {FOLDER_VARIABLE, *_OTHERS}
    return {**{k: v for k, v in environment.items() if k not in kept_back}, FILE_VARIABLE: str(file)}


def _refuse_other_credentials(config: Path | None) -> None:
    if config is None:
        return
    try:
        setting = _CREDENTIAL_SETTING.search(config.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise UsageError(f"{config}: cannot be read: {error.strerror}") from error
    if setting:
        raise UsageError(
            f"{config}: {setting[1]} gives credentials that every step could take instead of its role's; let "
            f"AWS_CONFIG_FILE name a file with settings alone, while {FOLDER_VARIABLE} has a file for each role"
        )


def key_files(root: str, role: str) -> list[Path]:
    """Return the files of a store's keys that a role needs; empty where the store has no keys."""
    keyring = find_keyring(root)
    if keyring is None:
        return []
    private = keyring.folder / f"{role}.pem"  # absent where KMS signs
    return [keyring.folder / TRUST_FILE, *([private] if private.is_file() else [])]


def give_key_to(user: str | None, files: Sequence[Path]) -> str | None:
    """Make sure that a container's user can read the private key that is mounted; return the user.

    Args:
        user: The user and group that the container is to run as; None: the image's own.
        files: The files that are mounted.

    Returns:
        The user; that of the key's owner where the image's own could not read it.

    Raises:
        UsageError: If the key belongs to another user.
    """
    for file in files:
        if file.suffix == ".pem":
            status = file.stat()
            if os.geteuid() == 0:
                user = user or IMAGE_USER
                owner, _, group = user.partition(":")
                os.chown(file, int(owner), int(group))
            elif user is None:
                user = f"{status.st_uid}:{status.st_gid}"
            elif user.partition(":")[0] != str(status.st_uid):
                raise UsageError(
                    f"{file}: belongs to user {status.st_uid}, and the container runs as {user}, the owner of "
                    "the store; let one user own both"
                )
    return user


def own_environment(step: graph.Step, line: str) -> dict[str, str]:
    """Return `step_environment` of this process."""
    return step_environment(os.environ, step, line)
