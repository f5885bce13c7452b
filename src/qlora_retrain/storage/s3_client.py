"""The client of a server that speaks S3.

Endpoint, region and credentials come from the environment's own chain (AWS_ENDPOINT_URL, roles, mounted files). So do
boto3's other settings: AWS_REQUEST_CHECKSUM_CALCULATION, AWS_RESPONSE_CHECKSUM_VALIDATION, AWS_MAX_ATTEMPTS, and so on.
Where the environment says nothing, a request is tried up to 8 times.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

_DEFAULT_ATTEMPTS = 8  # of a request, where AWS_MAX_ATTEMPTS says nothing
_CONNECT_TIMEOUT_SECONDS = 10


def connect(max_pool_connections: int) -> Any:
    """Return a client with the settings of the environment.

    Raises:
        ValueError: If AWS_ENDPOINT_URL is not a URL, or AWS_MAX_ATTEMPTS no number.
    """
    import boto3.session
    import botocore.session

    session = botocore.session.get_session()
    config = _config(session, max_pool_connections)
    client = boto3.session.Session(botocore_session=session).client("s3", config=config)
    if client.meta.config.request_checksum_calculation == "when_required":
        client.meta.events.register("before-sign.s3.DeleteObjects", _send_md5)
    return client


def _config(session: Any, max_pool_connections: int) -> Any:
    """Return the settings of a client; what the environment or its config file sets stays as it is there."""
    from botocore.config import Config

    retries = {"total_max_attempts": session.get_config_variable("max_attempts") or _DEFAULT_ATTEMPTS}
    # None: that of AWS_DEFAULTS_MODE, whose sets of defaults have timeouts of their own.
    is_legacy = session.get_config_variable("defaults_mode") in (None, "legacy")
    timeout = _CONNECT_TIMEOUT_SECONDS if is_legacy else None
    return Config(retries=retries, max_pool_connections=max_pool_connections, connect_timeout=timeout)


def _send_md5(request: Any, **_: object) -> None:
    """Send a delete of many objects with an MD5 in the place of boto3's checksum.

    S3 requires one of the two, and an older server knows the MD5 alone.
    """
    for name in [
        name for name in request.headers if name.lower().startswith(("x-amz-checksum-", "x-amz-sdk-checksum"))
    ]:
        del request.headers[name]
    digest = hashlib.md5(request.body, usedforsecurity=False).digest()
    request.headers["Content-MD5"] = base64.b64encode(digest).decode()
