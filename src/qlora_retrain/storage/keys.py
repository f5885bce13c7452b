"""The keys of a store: who may sign what, and what was there before.

    <folder>/trust.json     the public key of each role; hashes of documents that are accepted without a signature
    <folder>/<role>.pem     a role's private key, readable by its owner alone; absent where a key service signs

The folder is outside of the store, since whoever may write to the store must not be able to change what is trusted.

Environment: `QLORA_RETRAIN_KEYS`, the folder; without it, `qlora-retrain/keys/<name>-<hash of the store's URI>` below
`XDG_CONFIG_HOME`, else `~/.config`. A store without such a folder has no keys: nothing in it is signed or checked.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_retrain.core import graph, uris
from qlora_retrain.core.errors import UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

KEYS_VARIABLE = "QLORA_RETRAIN_KEYS"
TRUST_FILE = "trust.json"
# Makes every plan.
PLANNER = "planner"
# Copies versions to other registries: it checks signatures, and has no key of its own.
MIRROR = "mirror"
# Tells people and servers how a run ended; it has no key either.
MESSAGE = "message"
KEYLESS = (MIRROR, MESSAGE)
_PUBLISH = next(step for step in graph.STEPS if step.kind == graph.StepKind.PUBLISH)


class PublicKey(BaseModel):
    """The key by which a role's signatures are checked.

    Attributes:
        key: The public key, DER in Base64, as signatures name it.
        kms: The id of the key in AWS KMS, which then signs; None: a file beside this one does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    key: str
    kms: str | None = None


class Trust(BaseModel):
    """The content of `trust.json`.

    Attributes:
        store: The store that the keys were made for.
        roles: The public key of each role.
        accepted: The sha256 of each document that is accepted without a valid signature, by its path: those that were
            there when the keys were made, or when their role's key was replaced.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    store: str
    roles: dict[str, PublicKey]
    accepted: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Keyring:
    """A store's keys, as far as this process may read them."""

    folder: Path
    trust: Trust

    def public_keys(self, role: str) -> set[str]:
        """Return the keys that count for a role; none where it has none."""
        return {self.trust.roles[role].key} if role in self.trust.roles else set()

    def sign(self, role: str, data: bytes) -> bytes:
        """Return the signature of the data by a role's key: ECDSA over P-256 with SHA-256, in DER.

        Raises:
            UsageError: If the role has no key, or this process does not have its private key.
            TryAgain: If the key service does not answer.
        """
        public = self.trust.roles.get(role)
        if public is None:
            raise UsageError(f"{self.folder}: has no key for {role}; make one with: qlora-retrain keys create")
        if public.kms is not None:
            from qlora_retrain.storage import kms

            signature = kms.sign(public.kms, data)
            if not is_valid_signature(public.key, signature, data):
                raise UsageError(
                    f"KMS, {public.kms}: signed with another key than {TRUST_FILE} names for {role}; if it was "
                    f"replaced, run: qlora-retrain keys rotate {role}"
                )
            return signature

        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        private = _private_key(self.folder / f"{role}.pem", role)
        # A file of other keys would make signatures that everybody refuses, hours later.
        if encode_public_key(private.public_key()) != public.key:
            raise UsageError(f"{self.folder / f'{role}.pem'}: is not the key that {TRUST_FILE} names for {role}")
        return private.sign(data, ec.ECDSA(hashes.SHA256()))


def publish_role(line: str) -> str:
    """Return the role that publishes the versions of a line and moves its aliases."""
    return f"{_PUBLISH.name}-{line}"


def step_role(step: graph.Step, line: str) -> str:
    """Return the role that signs what a step makes; `publish` has one for each line."""
    return publish_role(line) if step is _PUBLISH else step.name


def default_folder(store_uri: str) -> Path:
    """Return the folder of a store's keys where the environment names no other."""
    # `expanduser` leaves the ~ where a container's user has no home.
    base = Path("/", os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))  # noqa: PTH111
    uri = _place(store_uri)
    name = uri.rpartition("/")[2] or "store"
    return base / "qlora-retrain" / "keys" / f"{name}-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"


def _place(store_uri: str) -> str:
    """Return the one address of a store: of a folder that of the place which its links lead to."""
    uri = uris.absolute(store_uri)
    return uris.local_path(uri).resolve().as_uri() if uri.startswith("file:") else uri


def keys_folder(store_uri: str) -> Path:
    """Return the folder in which a store's keys are looked for."""
    named = os.environ.get(KEYS_VARIABLE)
    return Path(named) if named else default_folder(store_uri)


def find_keyring(store_uri: str) -> Keyring | None:
    """Return the store's keys; None where it has none.

    Raises:
        UsageError: If the environment names a folder without keys, or the keys cannot be read.
    """
    named, folder = os.environ.get(KEYS_VARIABLE), keys_folder(store_uri)
    # Another user's home is as good as none: a container has HOME from its image, and its user from elsewhere.
    if not named and not os.access(folder, os.X_OK):
        return None

    keyring = read_keyring(folder, store_uri)
    # A step whose keys were not mounted must not go on as if there were none.
    if keyring is None and named:
        raise UsageError(
            f"{KEYS_VARIABLE} names {named}: expected {TRUST_FILE} there, and found none; make the keys with: "
            "qlora-retrain keys create"
        )
    if keyring is None and any(folder.glob("*.pem")):
        raise UsageError(
            f"{folder}: has private keys and no {TRUST_FILE}, without which nothing in the store is checked; put your "
            "copy of it there. If it is lost, look at what is in the store, and run: qlora-retrain keys create --lost"
        )
    return keyring


def read_keyring(folder: Path, store_uri: str) -> Keyring | None:
    """Return a store's keys in a folder; None where it has none.

    Raises:
        UsageError: If they cannot be read, or are those of another store.
    """
    path = folder / TRUST_FILE
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise UsageError(f"{path}: other users may write this file, and so say whose keys are trusted: chmod go-w")
    trust = _read_trust(path, (status.st_mtime_ns, status.st_ino))
    # With the same keys, a document of one store would pass for one of another.
    if _place(trust.store) != _place(store_uri):
        raise UsageError(
            f"{folder}: has the keys of {trust.store}, expected those of {store_uri}; every store has keys of its own. "
            f"If the store was moved, change `store` in {path}"
        )
    return Keyring(folder, trust)


@functools.lru_cache(maxsize=8)
def _read_trust(path: Path, state: tuple[int, int]) -> Trust:
    """Read `trust.json`; `state` changes with the file, so that a new one is read again."""
    try:
        return Trust.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise UsageError(f"{path}: expected the keys of a store; {error.errors()[0]['msg']}") from error


def encode_public_key(key: EllipticCurvePublicKey) -> str:
    """Return a public key as signatures and `trust.json` name it: DER (SubjectPublicKeyInfo) in Base64."""
    from cryptography.hazmat.primitives import serialization

    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(der).decode()


def as_pem(public_key: str) -> str:
    """Return a public key in PEM, as OpenSSL and model signing read it."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_der_public_key(base64.b64decode(public_key))
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def fingerprint(public_key: str) -> str:
    """Return the name of a public key for people: the sha256 of its DER, as `openssl dgst -sha256` prints it."""
    return hashlib.sha256(base64.b64decode(public_key)).hexdigest()


def read_fingerprint(text: str) -> str:
    """Return the fingerprint of a public key that a person names: by 64 hex digits, or by a file in PEM.

    Raises:
        UsageError: If it is neither.
    """
    if re.fullmatch(r"[0-9a-fA-F]{64}", text):
        return text.lower()

    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(Path(text).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{text}: expected 64 hex digits, or a file with a public key in PEM: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UsageError(f"{text}: expected an ECDSA key")
    return fingerprint(encode_public_key(key))


def is_valid_signature(public_key: str, signature: bytes, data: bytes) -> bool:
    """Return whether a signature is that of the data by a key; a key of another kind signs nothing."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_der_public_key(base64.b64decode(public_key, validate=True))
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            return False
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _private_key(path: Path, role: str) -> EllipticCurvePrivateKey:
    """Read a role's private key.

    Raises:
        UsageError: If it is missing, others may read it, or it is no key of this kind.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            # In a cluster a secret is mounted with the rights that the platform chose, and belongs to another user.
            if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o077:
                raise UsageError(f"{path}: other users may read this private key; expected chmod 600")
            data = file.read()
    except OSError as error:
        raise UsageError(
            f"{path}: the private key of {role} cannot be read ({error.strerror}). Run this where it is; if it is "
            f"lost, make a new one with: qlora-retrain keys rotate {role}"
        ) from error

    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: is no private key in PEM without a password") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError(f"{path}: expected an ECDSA key over P-256, which model signing and KMS use too")
    return key
