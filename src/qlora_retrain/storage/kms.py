"""Sign with keys in AWS KMS, which never leave it: `ECC_NIST_P256` keys for `SIGN_VERIFY`, one for each role."""

from __future__ import annotations

import hashlib
from typing import Any

from qlora_retrain.core.errors import Cause, TryAgain, UsageError
from qlora_retrain.storage.keys import encode_public_key

_BUSY = ("ThrottlingException", "KMSInternalException", "DependencyTimeoutException", "KeyUnavailableException")


def sign(key_id: str, data: bytes) -> bytes:
    """Return a key's signature of the data, in DER.

    Raises:
        UsageError: If this role may not sign with the key, or there is none.
        TryAgain: If KMS does not answer.
    """
    # A digest, because KMS takes at most 4 KiB of a message itself.
    answer = _call(
        key_id,
        "sign",
        Message=hashlib.sha256(data).digest(),
        MessageType="DIGEST",
        SigningAlgorithm="ECDSA_SHA_256",
    )
    signature: bytes = answer["Signature"]
    return signature


def public_key(key_id: str) -> str:
    """Return the public key of a key, as signatures name it.

    Raises:
        UsageError: If KMS does not give it, or it is a key of another kind.
        TryAgain: If KMS does not answer.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = serialization.load_der_public_key(_call(key_id, "get_public_key")["PublicKey"])
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError(f"KMS, {key_id}: expected a key of the kind ECC_NIST_P256")
    return encode_public_key(key)


def _call(key_id: str, operation: str, **parameters: Any) -> dict[str, Any]:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = boto3.client("kms", region_name=_region(key_id))
        answer: dict[str, Any] = getattr(client, operation)(KeyId=key_id, **parameters)
    except ClientError as error:
        details = error.response.get("Error", {})
        message = f"KMS, {key_id}: {operation} was refused: {details.get('Code')}: {details.get('Message')}"
        if details.get("Code") in _BUSY:
            raise TryAgain(message, cause=Cause.THROTTLED) from error
        raise UsageError(message) from error
    except BotoCoreError as error:
        raise TryAgain(f"KMS, {key_id}: {operation}: {error}", cause=Cause.THROTTLED) from error
    return answer


def _region(key_id: str) -> str | None:
    """Return the region in a key's ARN; None where the environment chooses."""
    parts = key_id.split(":")
    return parts[3] if len(parts) > 4 and parts[0] == "arn" else None
