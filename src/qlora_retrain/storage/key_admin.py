"""Make, replace and hand out the keys of a store.

Every document that is in the store when a key is made or replaced is recorded in `trust.json` by its hash, and stays
accepted. So a key that was replaced signs nothing new that anybody accepts, whoever has a copy of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from qlora_retrain.core import graph, hashing
from qlora_retrain.core.errors import UsageError
from qlora_retrain.core.progress import say
from qlora_retrain.storage import atomic_files, keys, kms, signed_documents
from qlora_retrain.storage.keys import PLANNER, TRUST_FILE, Keyring, PublicKey, Trust, publish_role
from qlora_retrain.storage.store import NotFound, Store, root_option

_LINE = re.compile(r"[a-z0-9][a-z0-9-]*")


def create(
    store: Store, lines: Iterable[str] = (), kms_pattern: str | None = None, *, is_lost: bool = False
) -> Keyring:
    """Make the keys of a store that has none, or those that are missing for further lines.

    Args:
        store: The store. Its documents, if there are any, are accepted as they are now.
        lines: The lines to publish: each has a publisher's key of its own.
        kms_pattern: The id of a role's key in AWS KMS, with `{role}` in it. None: keys in files.
        is_lost: Accept what is there also where it is signed, since the keys that signed it are lost.

    Raises:
        UsageError: If a line cannot have that name, the folder cannot be written, or the store has keys elsewhere.
    """
    roles = [PLANNER, *(s.name for s in graph.STEPS if s.kind != graph.StepKind.PUBLISH)]
    roles += [publish_role(_checked_line(line)) for line in lines]
    folder = keys.keys_folder(store.uri)

    with _lock(folder):
        keyring = keys.read_keyring(folder, store.uri)
        trust = keyring.trust if keyring else Trust(store=store.uri, roles={})
        if keyring is None:
            trust = trust.model_copy(update={"accepted": _hashes_before_keys(store, is_lost=is_lost)})
        added = {role: _new_key(folder, role, kms_pattern) for role in roles if role not in trust.roles}
        if added:
            _write(folder, trust.model_copy(update={"roles": {**trust.roles, **added}}))
    return require_keyring(store)


def create_for_new_store(store: Store, line: str) -> Keyring | None:
    """Make the keys of a store in a folder that has no plan yet, and the line's where the store's are at hand.

    A store elsewhere is used by machines that do not share a folder of keys, so its keys are made on purpose.

    Returns:
        The keys that were made; None where none were.
    """
    keyring = keys.find_keyring(store.uri)
    if keyring is None:
        # A container's folders are gone when it ends, and the keys with them.
        if not _is_new_folder(store) or "QLORA_RETRAIN_IMAGE" in os.environ:
            return None
    elif publish_role(line) in keyring.trust.roles or not (keyring.folder / f"{PLANNER}.pem").is_file():
        return None
    try:
        return create(store, [line])
    except UsageError as error:
        # A service account has no home to write to. The store works without keys, and the plan says so.
        if keyring is not None:
            raise
        say(f"no keys are made for this new store: {error}")
        return None


def _is_new_folder(store: Store) -> bool:
    """Return whether a store in a folder has no document yet that would be signed; a first failure leaves an ending."""
    return store.uri.startswith("file:") and not (
        any(True for folder in ("artifacts", "models") for _ in store.children(folder))
        or any("plan.json" in store.children(f"runs/{run}") for run in store.children("runs"))
    )


def rotate(store: Store, role: str, *, is_stolen: bool = False, kms_key: str | None = None) -> Keyring:
    """Replace a role's key; a key in KMS is replaced by the one that its id, or the new id, names now.

    Args:
        store: The store.
        role: The role.
        is_stolen: Accept nothing that a key of this role signed, earlier ones included: somebody may learn of a theft
            after a rotation. Otherwise every document that the old key has signed so far stays accepted.
        kms_key: The id of the new key in KMS; None: the present id, or a file where there is none.

    Raises:
        UsageError: If the store has no key for the role, or KMS has no new one.
    """
    folder = require_keyring(store).folder
    with _lock(folder):
        # Read under the lock: another process may be adding a line's key.
        keyring = require_keyring(store)
        trust, old = keyring.trust, public_key(keyring, role)
        if is_stolen:
            accepted = {p: h for p, h in trust.accepted.items() if not _may_be_signed_by(store, role, p, h)}
        else:
            accepted = trust.accepted | _hashes_signed_by(store, role, old.key)
        new = _new_key(folder, role, kms_key or old.kms)
        if new.key == old.key:
            raise UsageError(f"{role}: KMS still has the same key for {new.kms}; point it at a new one, or give --kms")
        _write(folder, trust.model_copy(update={"roles": {**trust.roles, role: new}, "accepted": accepted}))
    return require_keyring(store)


def accept(store: Store, paths: Sequence[str]) -> list[str]:
    """Accept documents of the store as they are now, whoever signed them: after a stolen key, for what is known good.

    Returns:
        A text about each, for the person who accepts it: its hash, who signed it and what it holds.

    Raises:
        UsageError: If one is no document that is signed, or is not there.
    """
    folder, texts = require_keyring(store).folder, []
    with _lock(folder):
        trust = require_keyring(store).trust
        accepted = dict(trust.accepted)
        for path in paths:
            if not signed_documents.is_one(path):
                raise UsageError(f"{path}: expected a plan, a manifest, an alias, an audit entry or a marker")
            try:
                data = store.read(path).data
            except NotFound as error:
                raise UsageError(f"{store.uri}/{path}: is not there") from error
            accepted[path] = hashing.sha256_bytes(data)
            texts.append(_description(trust, path, data))
        _write(folder, trust.model_copy(update={"accepted": accepted}))
    return texts


def _description(trust: Trust, path: str, data: bytes) -> str:
    """Return what a person has to know of a document that they accept: its hash, its signer and its short fields."""
    _, key, fields = signed_documents.signer(path, data)
    names = sorted(role for role, public in trust.roles.items() if public.key == key)
    signer = "not signed" if key is None else f"signed by {', '.join(names) or 'a key that is not known'}"
    values = [f"{k} {v!r:.100}" for k, v in fields.items() if isinstance(v, str | int | float | None)]
    return f"{path}: sha256 {hashing.sha256_bytes(data)[:12]}, {signer}: {', '.join(values[:20])}"


def export(store: Store, roles: Sequence[str], target: Path) -> None:
    """Write a new folder with the keys that roles need: their private keys, where files have them, and `trust.json`.

    Raises:
        UsageError: If the store has no keys, no such role, or the folder exists.
    """
    keyring = require_keyring(store)
    for role in roles:
        # That of whoever only checks signatures needs no private key.
        if role not in keys.KEYLESS:
            public_key(keyring, role)
    try:
        target.mkdir(mode=0o700, parents=True)
    except FileExistsError as error:
        raise UsageError(f"{target}: exists already; expected a new folder") from error
    for name, mode in ((TRUST_FILE, 0o644), *((f"{role}.pem", 0o600) for role in roles)):
        if (keyring.folder / name).is_file():
            _write_file(target / name, (keyring.folder / name).read_bytes(), mode)


def public_key(keyring: Keyring, role: str) -> PublicKey:
    """Return a role's public key.

    Raises:
        UsageError: If there is none.
    """
    if role not in keyring.trust.roles:
        role_names = ", ".join(sorted(keyring.trust.roles))
        raise UsageError(f"{keyring.folder}: has no key of {role!r}; expected one of {role_names}")
    return keyring.trust.roles[role]


def require_keyring(store: Store) -> Keyring:
    """Return the store's keys.

    Raises:
        UsageError: If there are none.
    """
    keyring = keys.find_keyring(store.uri)
    if keyring is None:
        raise UsageError(
            f"{store.uri}: has no keys in {keys.keys_folder(store.uri)}; make them with: "
            f"qlora-retrain keys create {root_option(store)}"
        )
    return keyring


def _new_key(folder: Path, role: str, kms_key: str | None) -> PublicKey:
    """Make a role's key, or ask KMS for its public part; a private key goes into a file of the folder."""
    if kms_key is not None:
        key_id = kms_key.replace("{role}", role)
        return PublicKey(key=kms.public_key(key_id), kms=key_id)

    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_file(folder / f"{role}.pem", pem, 0o600)
    return PublicKey(key=keys.encode_public_key(private.public_key()))


def _hashes_signed_by(store: Store, role: str, key: str) -> dict[str, str]:
    """Return the sha256 of the documents that a role has signed with a key, by path."""
    # A key counts for its own role's documents alone, so a rotation accepts nothing that readers refuse.
    return {
        path: hashing.sha256_bytes(data)
        for path, data in signed_documents.read_all(store)
        if signed_documents.signer(path, data)[:2] == (role, key)
    }


def _hashes_before_keys(store: Store, *, is_lost: bool) -> dict[str, str]:
    """Return the sha256 of every document of a store for which there are no keys, by path.

    Raises:
        UsageError: If one is signed, so that there were keys, and nobody said that they are lost.
    """
    hashes = {}
    for path, data in signed_documents.read_all(store):
        if not is_lost and signed_documents.signer(path, data)[1] is not None:
            raise UsageError(
                f"{store.uri}/{path}: is signed, so the store has keys, and they are not in "
                f"{keys.keys_folder(store.uri)}; put your copy of them there. If they are lost, look at what is in the "
                "store, since all of it will be accepted as it is, and run: qlora-retrain keys create --lost"
            )
        hashes[path] = hashing.sha256_bytes(data)
    return hashes


def _may_be_signed_by(store: Store, role: str, path: str, sha256: str) -> bool:
    """Return whether an accepted document is one that a key of the role may have signed; not one from before keys."""
    try:
        data = store.read(path).data
    except NotFound:
        data = b""
    signing_role, key, _ = signed_documents.signer(path, data)
    return signing_role == role and (key is not None or hashing.sha256_bytes(data) != sha256)


def _checked_line(line: str) -> str:
    if not _LINE.fullmatch(line):
        raise UsageError(f"{line!r}: expected the name of a line: lower-case letters, digits and -")
    return line


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time change the keys."""
    try:
        atomic_files.make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UsageError(f"{folder}: the keys cannot be changed here: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(folder: Path, trust: Trust) -> None:
    # No secret: a container reads it as another user.
    _write_file(folder / TRUST_FILE, trust.model_dump_json(indent=1).encode() + b"\n", 0o644)


def _write_file(path: Path, data: bytes, mode: int) -> None:
    """Replace a file in one step."""
    # `mkstemp` makes a file that only its owner may read.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
