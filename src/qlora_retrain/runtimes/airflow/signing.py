"""Sign a request by HTTP as the Standard Webhooks specification says, so that a receiver can use any of its libraries.

    webhook-id          the event's id, the same at every try
    webhook-timestamp   when it was signed, in seconds since 1970
    webhook-signature   v1,BASE64(HMAC-SHA256(key, "ID.TIMESTAMP.BODY"))

The key is `whsec_` and its bytes in base64.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

from qlora_retrain.core.errors import UsageError

_PREFIX = "whsec_"
_MIN_KEY_BYTES, _MAX_KEY_BYTES = 24, 64


def headers(key: str, event_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the three headers.

    Args:
        key: The key, as the connection's password holds it.
        event_id: The event's id.
        timestamp: The time, in seconds since 1970.
        body: The body of the request, byte for byte.

    Raises:
        UsageError: If the key is none.
    """
    signed = b".".join((event_id.encode(), str(timestamp).encode(), body))
    signature = base64.b64encode(hmac.digest(_key_bytes(key), signed, hashlib.sha256)).decode()
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }


def _key_bytes(key: str) -> bytes:
    try:
        data = base64.b64decode(key.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not key.startswith(_PREFIX) or not _MIN_KEY_BYTES <= len(data) <= _MAX_KEY_BYTES:
        raise UsageError(
            f"its password is no key: expected {_PREFIX} and {_MIN_KEY_BYTES} to {_MAX_KEY_BYTES} random bytes in "
            f"base64; make one with: echo {_PREFIX}$(openssl rand -base64 32)"
        )
    return data
