"""The signature of a published version in the format of OpenSSF Model Signing, for whoever does not use this project.

It is a Sigstore bundle with a DSSE envelope, whose in-toto statement lists every file with its sha256. The command
`model_signing verify key FOLDER --signature FOLDER/model.sig --public_key KEY.pem` checks a pulled version.

Sources of the formats: https://github.com/sigstore/model-transparency (predicate `model_signing/signature/v1.0`),
https://github.com/secure-systems-lab/dsse/blob/master/protocol.md (the text that is signed).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable

from qlora_retrain.storage import keys
from qlora_retrain.storage.artifact import File
from qlora_retrain.storage.keys import Keyring
from qlora_retrain.storage.pulled_folder import RECORD

SIGNATURE_FILE = "model.sig"
# Written after the signature: by `publish`, and by `pull`.
_UNSIGNED_FILES = [SIGNATURE_FILE, "manifest.json", RECORD]
_PAYLOAD_TYPE = "application/vnd.in-toto+json"


def sign_model(keyring: Keyring, role: str, name: str, files: Iterable[File]) -> str:
    """Return the content of `model.sig`.

    Args:
        keyring: The store's keys.
        role: The role that signs.
        name: The version's name, for people.
        files: Every file of the version but those that are written later.
    """
    payload = _payload(name, files)
    return _bundle(keyring.trust.roles[role].key, payload, keyring.sign(role, _signed_text(payload)))


def is_signature(text: bytes, keyring: Keyring, role: str, name: str, files: Iterable[File]) -> bool:
    """Return whether a text is what `sign_model` could have returned: no two signatures of it are the same."""
    key, payload = keyring.trust.roles[role].key, _payload(name, files)
    try:
        signature = base64.b64decode(json.loads(text)["dsseEnvelope"]["signatures"][0]["sig"])
        # Whatever else the text holds, it holds nothing but a signature of its own.
        return _bundle(key, payload, signature).encode() == text and keys.is_valid_signature(
            key, signature, _signed_text(payload)
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def _payload(name: str, files: Iterable[File]) -> bytes:
    return json.dumps(_statement(name, sorted(files, key=lambda file: file.path)), indent=1).encode()


def _signed_text(payload: bytes) -> bytes:
    # DSSE signs its "pre-authentication encoding": the type and the payload, each with its length before it.
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def _bundle(key: str, payload: bytes, signature: bytes) -> str:
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {
            "publicKey": {"hint": hashlib.sha256(keys.as_pem(key).encode()).hexdigest()},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode()}],
        },
    }
    return json.dumps(bundle, indent=1) + "\n"


def _statement(name: str, files: list[File]) -> dict[str, object]:
    """Return the in-toto statement about a version's files."""
    # The subject's digest is that of all files' digests, in their order.
    total = hashlib.sha256(b"".join(bytes.fromhex(file.sha256) for file in files))
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": total.hexdigest()}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": _UNSIGNED_FILES,
            },
            "resources": [{"name": file.path, "algorithm": "sha256", "digest": file.sha256} for file in files],
        },
    }
