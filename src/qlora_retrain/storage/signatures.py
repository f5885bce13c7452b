"""Signed documents: plans, manifests of artifacts and versions, aliases and the markers of checkpoints.

A document holds its signature, so both become visible in one write. What is signed is the document's path in the store
with all of its other fields, so that no document can pass for one at another place.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from qlora_retrain.core import hashing, json_depth
from qlora_retrain.core.errors import IntegrityError, UsageError
from qlora_retrain.storage import keys
from qlora_retrain.storage.store import Store, root_option

# Before every signed text, so that a key's signature of something else is never taken for that of a document.
_PREFIX = b"qlora-retrain document 1\n"
# In the largest document, a plan of 100,000 files, 500,000. Ten bytes of JSON can take a hundred times that in memory.
_MAX_VALUES = 5_000_000
_AUDIT_ENTRY = re.compile(r"(models/[^/]+)/audit/\d+-([a-z0-9-]+)-[0-9a-f]+\.json")


class Signature(BaseModel):
    """Who signed a document.

    Attributes:
        role: The role, for people: the key decides, and the reader's `trust.json` says whose it is.
        key: The public key, DER in Base64.
        value: The signature, ECDSA over P-256 with SHA-256, DER in Base64.
    """

    model_config = ConfigDict(frozen=True)
    role: str
    key: str
    value: str


class Signed(BaseModel):
    """A document that may hold a signature."""

    model_config = ConfigDict(frozen=True)
    # Left out where there is none, as in the documents of stores without keys.
    signature: Signature | None = Field(default=None, exclude_if=lambda value: value is None)
    # Whose valid signature the document had when it was read.
    _signer: str | None = PrivateAttr(default=None)

    @property
    def signer(self) -> str | None:
        """The public key whose valid signature was found when the document was read; None where there was none."""
        return self._signer


_SignedT = TypeVar("_SignedT", bound=Signed)


def sign(store: Store, path: str, document: _SignedT, role: str) -> _SignedT:
    """Return the document with the signature of a role; as it is where the store has no keys.

    Raises:
        UsageError: If this process does not have the role's private key.
    """
    fields = json.loads(document.model_dump_json(exclude={"signature"}))
    signature = sign_fields(store, path, fields, role)
    return document if signature is None else document.model_copy(update={"signature": signature})


def sign_fields(store: Store, path: str, fields: Mapping[str, Any], role: str) -> Signature | None:
    """Return the signature of a document's fields; None where the store has no keys."""
    keyring = keys.find_keyring(store.uri)
    if keyring is None:
        return None
    value = keyring.sign(role, _signed_text(path, fields))
    return Signature(role=role, key=keyring.trust.roles[role].key, value=base64.b64encode(value).decode())


def refuse_without_key(store: Store, role: str) -> None:
    """Refuse to begin work whose result this process cannot sign.

    Raises:
        UsageError: If the store has keys, and this process does not have the role's private key.
    """
    keyring = keys.find_keyring(store.uri)
    if keyring is not None:
        keyring.sign(role, _PREFIX)


def parse(
    store: Store,
    path: str,
    data: bytes,
    model: type[_SignedT],
    role: str | Callable[[Mapping[str, Any]], str],
    *,
    signed_path: str | None = None,
) -> _SignedT:
    """Return the document in a file's bytes, after checking that the role signed it for this path.

    Without keys nobody knows who may sign, so only a signature that is none is refused. A reader who must not go on
    then asks `refuse_unverified`.

    Args:
        store: The store.
        path: Where the document is in the store.
        data: Its bytes.
        model: The kind of document.
        role: The role that must have signed it, or what says so from the document's fields.
        signed_path: The path that its signature is for; None: `path`.

    Raises:
        IntegrityError: If the store has keys, and the role did not sign this document; or if its signature is that of
            another document.
        ValueError: If it is no document of that kind.
    """
    # Parsed once: what is checked is what is used.
    fields = parse_fields(data)
    signer = signer_of(signed_path or path, fields)
    check(store, path, signer, role(fields) if callable(role) else role, hashing.sha256_bytes(data))
    document = model.model_validate(fields)
    if document.signature is not None and signer is None and keys.find_keyring(store.uri) is None:
        raise IntegrityError(f"{store.uri}/{path}: its signature is not one of this document: somebody changed it")
    document._signer = signer
    return document


def parse_fields(data: bytes) -> dict[str, Any]:
    """Return the fields of a JSON document; raise `ValueError` where it is none."""
    if sum(data.count(sign) for sign in (b",", b"[", b"{")) > _MAX_VALUES:
        raise ValueError(f"has more than {_MAX_VALUES:,} values")
    fields = json_depth.loads(data)
    if not isinstance(fields, dict):
        raise ValueError("expected an object")
    return fields


def check(store: Store, path: str, signer: str | None, role: str, sha256: str) -> None:
    """Check that a role signed a document of the store, or that it was accepted by its hash.

    Args:
        store: The store.
        path: Where the document is in the store.
        signer: The public key whose valid signature it has for that path; None: it has none.
        role: The role that must have signed it.
        sha256: The hash of the document's bytes.

    Raises:
        IntegrityError: If the store has keys, and neither is so.
    """
    keyring = keys.find_keyring(store.uri)
    if keyring is None or keyring.trust.accepted.get(path) == sha256:
        return
    expected = keyring.public_keys(role)
    if signer is None or signer not in expected:
        actual = f"a signature by {keys.fingerprint(signer)[:12]}" if signer else "no valid signature"
        names = ", ".join(sorted(keys.fingerprint(key)[:12] for key in expected)) or "no key is known"
        raise IntegrityError(
            f"{store.uri}/{path}: expected a signature by {role} ({names}), found {actual}: somebody else wrote or "
            f"changed it, or it was signed with a key that was replaced; the keys are in {keyring.folder}"
        )


def signer_of(path: str, fields: Mapping[str, Any]) -> str | None:
    """Return the public key whose valid signature a document holds for this path; None where it holds none."""
    try:
        signature = Signature.model_validate(fields.get("signature"))
        value = base64.b64decode(signature.value, validate=True)
        text = _signed_text(path, {name: field for name, field in fields.items() if name != "signature"})
    except (ValidationError, binascii.Error, ValueError):
        return None
    return signature.key if keys.is_valid_signature(signature.key, value, text) else None


def describe(store: Store) -> str:
    """Return a sentence that says whether documents of the store are signed."""
    keyring = keys.find_keyring(store.uri)
    if keyring is None:
        return (
            "nothing in this store is signed, or its keys are not in "
            f"{keys.keys_folder(store.uri)}: whoever may write to it can change what is published; to sign a store "
            f"without keys, run: qlora-retrain keys create {root_option(store)}"
        )
    return f"signatures are checked with the keys in {keyring.folder}"


def signed_path(path: str) -> str:
    """Return the path that a document's signature is for: its own, but an audit entry repeats an alias's document."""
    entry = _AUDIT_ENTRY.fullmatch(path)
    return f"{entry[1]}/aliases/{entry[2]}.json" if entry else path


def refuse_unverified(store: Store, path: str, signature: Signature | None) -> None:
    """Refuse to go on from a signed document that this process cannot check, since what it writes would be unsigned.

    Raises:
        UsageError: If the document is signed, and there are no keys of the store.
    """
    if signature is not None and keys.find_keyring(store.uri) is None:
        raise UsageError(
            f"{store.uri}/{path}: is signed by {signature.role}, and this process has no keys of the store; give it "
            f"their folder in {keys.KEYS_VARIABLE} (looked for: {keys.keys_folder(store.uri)})"
        )


def _signed_text(path: str, fields: Mapping[str, Any]) -> bytes:
    return _PREFIX + hashing.canonical_json({"path": path, "document": fields})
