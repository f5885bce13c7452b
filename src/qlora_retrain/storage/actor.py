"""Who moves an alias, as the platform says: the `actor` of every entry of the audit trail.

    os:alice@host                                            a store in a folder: the user of the operating system
    sts:arn:aws:sts::111122223333:assumed-role/ROLE/SESSION  a store in S3: whom STS takes these credentials for
    airflow:alice via sts:arn:...                            the user who triggered the run, as Airflow told the step

What stands after `via`, or alone, is proved by credentials or by the kernel. What stands before it is the word of
whoever started the process: Airflow, from the user whom its API authenticated, never from a form. A role that may
publish could say another name there, and no other role.

Whoever triggers a run may say why. The audit trail has that text behind the reason of the program, as the word of that
person.
"""

from __future__ import annotations

import os
import pwd
import re
import socket

from qlora_retrain.core.arguments import MAX_REASON_CHARACTERS
from qlora_retrain.core.errors import UsageError
from qlora_retrain.storage.store import Store

_CONNECT_SECONDS = 5
_orchestrator = ""
_run_reason = ""


def name_orchestrator(text: str) -> None:
    """Set what the orchestrator says of this process's run, for the rest of the process.

    Raises:
        UsageError: If the text could be taken for another part of an actor.
    """
    global _orchestrator
    if not re.fullmatch(r"[a-z-]+:[^\s]{1,1000}", text) or not text.isprintable():
        raise UsageError(f"--triggered-by {text!r}: expected SYSTEM:NAME without spaces, e.g. airflow:alice")
    _orchestrator = text


def state_run_reason(text: str) -> None:
    """Set why a person started this process's run, for the rest of the process.

    Raises:
        UsageError: If the text is too long, or not on one line.
    """
    global _run_reason
    if len(text) > MAX_REASON_CHARACTERS or not text.isprintable():
        raise UsageError(
            f"--reason {text[:50]!r}: expected one line of at most {MAX_REASON_CHARACTERS} printable characters, found "
            f"{len(text)}"
        )
    _run_reason = text


def with_run_reason(reason: str) -> str:
    """Return the reason of a move with what the person said who started this process's run."""
    return f"{reason}; the run's reason: {_run_reason}" if _run_reason else reason


def describe(store: Store) -> str:
    """Return who moves an alias of this store now."""
    proved = _sts_actor() if store.uri.startswith("s3:") else _os_actor()
    return f"{_orchestrator} via {proved}" if _orchestrator else proved


def _os_actor() -> str:
    """Return the user whom the operating system runs this process as."""
    # Never an environment variable such as LOGNAME: whoever starts the process sets those.
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # the user of a container often has no name
        user = f"user {os.geteuid()}"
    return f"os:{user}@{socket.gethostname()}"


def _sts_actor() -> str:
    """Return whom STS takes this process's credentials for; the operating system's user, marked, if it does not say."""
    import boto3.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    # Servers that only speak S3 have no STS. A publication must neither fail nor wait for minutes because of that.
    config = Config(connect_timeout=_CONNECT_SECONDS, read_timeout=_CONNECT_SECONDS, retries={"total_max_attempts": 1})
    try:
        answer = boto3.session.Session().client("sts", config=config).get_caller_identity()
        return f"sts:{answer['Arn']}"
    except (BotoCoreError, ClientError, KeyError, ValueError) as error:
        return f"{_os_actor()} (STS did not say: {type(error).__name__})"
