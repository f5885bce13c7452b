"""The verbs on what roles and pods may do: policy, egress."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.cli.options import Options
from qlora_retrain.core.arguments import store_root
from qlora_retrain.core.errors import UsageError

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import ClusterProfile


def add_verbs(verbs: Any, options: Options) -> None:
    """Add the verbs to a parser's subparsers."""
    description = "print the AWS policies of a line's roles, or of the bucket, as JSON"
    verb = verbs.add_parser("policy", help=description, parents=[options.stored, options.settings])
    verb.add_argument("config", type=Path, help="the line's YAML file")
    verb.add_argument(
        "--role", action="append", default=[], metavar="NAME", help="print only this role's policy (repeatable)"
    )
    verb.add_argument(
        "--bucket", action="store_true", help="print the policy of the store's bucket, which holds for all roles"
    )
    verb.add_argument(
        "--kms", metavar="ARN", help="the key or alias in KMS that a role signs with; {role} stands for the role"
    )
    verb.add_argument("--to", type=Path, metavar="FOLDER", help="write each policy to FOLDER/<role>.json instead")
    verb.set_defaults(run=_policy)

    description = "print the network policies of a cluster's profile, as YAML"
    verb = verbs.add_parser("egress", help=description, parents=[options.common])
    verb.add_argument("profile", type=Path, help="the cluster's profile, e.g. manifests/profiles/production.yaml")
    verb.add_argument(
        "--messages",
        action="store_true",
        help="print the policy for the pods of `messages` in Airflow's namespace instead",
    )
    verb.set_defaults(run=_egress)


def _policy(args: argparse.Namespace) -> int:
    from qlora_retrain.config.line import load
    from qlora_retrain.pipeline import access, policies

    config, root = load(args.config, args.set), store_root(args)
    if args.bucket:
        documents = {"bucket": policies.bucket_policy(root)}
    else:
        names = args.role or access.roles(config.line)
        signers = [name for name in names if access.access(config, name).signs]
        if args.kms and "{role}" not in args.kms and len(signers) > 1:
            raise UsageError(
                f"--kms {args.kms}: one key for {', '.join(signers)}; write {{role}} in it, or name one --role"
            )
        documents = {name: policies.role_policy(config, name, root, args.kms) for name in names}

    if args.to is None:
        # One policy is printed as it is, so that it can be handed on.
        print(json.dumps(documents if len(documents) > 1 else next(iter(documents.values())), indent=2))
        return 0
    args.to.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        (args.to / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"{args.to}: {', '.join(f'{name}.json' for name in documents)}")
    return 0


def _egress(args: argparse.Namespace) -> int:
    import yaml

    from qlora_retrain.config import cluster_profile
    from qlora_retrain.runtimes.kubernetes import egress

    profile = cluster_profile.load(args.profile)
    policies = [_message_policy(args.profile, profile)] if args.messages else egress.network_policies(profile)
    print(f"# qlora-retrain egress {args.profile}{' --messages' if args.messages else ''}")
    print(yaml.safe_dump_all(policies, sort_keys=False), end="")
    return 0


def _message_policy(path: Path, profile: ClusterProfile) -> dict[str, Any]:
    from qlora_retrain.runtimes.kubernetes import egress

    if profile.messages is None:
        raise UsageError(f"{path}: has no section messages, by which they get pods of their own; see docs/airflow.md")
    return egress.message_policy(profile.messages)
