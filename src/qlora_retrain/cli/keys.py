"""The verbs of `qlora-retrain keys`: make, show, replace and hand out the keys that sign a store's documents."""

from __future__ import annotations

import argparse
from pathlib import Path

from qlora_retrain.cli.options import Options
from qlora_retrain.core.arguments import store_root


def add_verbs(keys: argparse.ArgumentParser, options: Options) -> None:
    """Add the verbs below `keys`."""
    verbs = keys.add_subparsers(required=True, metavar="VERB")

    verb = verbs.add_parser("create", help="make the keys of a store, or of a further line", parents=[options.stored])
    verb.add_argument(
        "--line", action="append", default=[], metavar="NAME", help="make the key of this line's publisher (repeatable)"
    )
    verb.add_argument(
        "--kms", metavar="ID", help="sign with keys in AWS KMS, e.g. alias/qlora-{role}; without it, keys in files"
    )
    verb.add_argument(
        "--lost", action="store_true", help="the store's keys are lost: accept what they signed as it is now"
    )
    verb.set_defaults(run=_create)

    verb = verbs.add_parser("show", help="print whose keys a store trusts", parents=[options.stored])
    verb.add_argument("--pem", metavar="ROLE", help="print this role's public key, for --verify-key and model_signing")
    verb.set_defaults(run=_show)

    verb = verbs.add_parser("rotate", help="replace a role's key", parents=[options.stored])
    verb.add_argument("role", help="the role, as `keys show` lists it")
    verb.add_argument("--stolen", action="store_true", help="accept nothing that the old key signed")
    verb.add_argument("--kms", metavar="ID", help="the new key in AWS KMS")
    verb.set_defaults(run=_rotate)

    verb = verbs.add_parser(
        "accept", help="accept documents as they are now, whoever signed them", parents=[options.stored]
    )
    verb.add_argument(
        "path", nargs="+", help="the document's path in the store, e.g. models/my-line/aliases/production.json"
    )
    verb.set_defaults(run=_accept)

    verb = verbs.add_parser("export", help="write the keys that a step needs to a new folder", parents=[options.stored])
    verb.add_argument("role", nargs="+", help="roles, as `keys show` lists them; mirror: without a private key")
    verb.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder, for a secret or a mount")
    verb.set_defaults(run=_export)


def _create(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import key_admin, open_store

    keyring = key_admin.create(open_store(store_root(args)), args.line, args.kms, is_lost=args.lost)
    print(f"{keyring.folder}: keys of {', '.join(sorted(keyring.trust.roles))}")
    if keyring.trust.accepted:
        print(f"{len(keyring.trust.accepted)} documents that were there before are accepted as they are")
    return 0


def _show(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import key_admin, open_store
    from qlora_retrain.storage.keys import as_pem, fingerprint

    keyring = key_admin.require_keyring(open_store(store_root(args)))
    if args.pem:
        print(as_pem(key_admin.public_key(keyring, args.pem).key), end="")
        return 0
    print(f"{keyring.folder}: keys of {keyring.trust.store}")
    for role, public in sorted(keyring.trust.roles.items()):
        # Where a role's private key is decides who can sign in its name.
        file = keyring.folder / f"{role}.pem"
        where = f"KMS {public.kms}" if public.kms else "here" if file.is_file() else "not here"
        print(f"  {role:<30} {fingerprint(public.key)}  {where}")
    if keyring.trust.accepted:
        print(f"accepted by their hash: {len(keyring.trust.accepted)} documents from before a key was made")
    return 0


def _rotate(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import key_admin, open_store
    from qlora_retrain.storage.keys import fingerprint

    store = open_store(store_root(args))
    keyring = key_admin.rotate(store, args.role, is_stolen=args.stolen, kms_key=args.kms)
    print(f"{args.role}: {fingerprint(keyring.trust.roles[args.role].key)}")
    print(
        "nothing that a key of this role signed is accepted any more"
        if args.stolen
        else "documents that the old key signed so far are accepted by their hash"
    )
    print("give the new trust.json to every machine that has keys, and its fingerprint to whoever pulls")
    return 0


def _accept(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import key_admin, open_store

    texts = key_admin.accept(open_store(store_root(args)), args.path)
    print("accepted by their hash, whatever signed them:", *texts, sep="\n")
    return 0


def _export(args: argparse.Namespace) -> int:
    from qlora_retrain.storage import key_admin, open_store

    key_admin.export(open_store(store_root(args)), args.role, args.to)
    print(f"{args.to}: keys of {', '.join(args.role)}; keep the folder as you keep a password")
    return 0
