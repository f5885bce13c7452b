"""The verbs on a cluster: deploy-check before anything is applied, doctor inside it afterwards."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.cli.options import Options
from qlora_retrain.core.arguments import Parser, store_root
from qlora_retrain.core.errors import UsageError

if TYPE_CHECKING:
    from qlora_retrain.config.line import LineConfig


def add_verbs(verbs: Any, options: Options) -> None:
    """Add the verbs to a parser's subparsers."""
    shared = Parser(add_help=False)
    shared.add_argument(
        "--line",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a line that will run on the cluster (repeatable)",
    )
    shared.add_argument("--json", action="store_true", help="print JSON instead of text")

    description = "check the manifests, a profile and its pods, without a cluster"
    verb = verbs.add_parser("deploy-check", help=description, parents=[options.common, shared])
    verb.add_argument(
        "--profile",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a cluster's profile (YAML; repeatable); default: QLORA_RETRAIN_PROFILE",
    )
    verb.add_argument(
        "--overlay",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="an overlay (repeatable); default: the one with the profile's name, and Kubeflow's if it fits the profile",
    )
    verb.add_argument(
        "--kubernetes",
        default="1.32",
        metavar="VERSION",
        help="the Kubernetes version whose schemas are used; default: 1.32",
    )
    verb.set_defaults(run=_deploy_check)

    description = "check inside a cluster whether store, roles, quota, nodes and images would let a run succeed"
    verb = verbs.add_parser("doctor", help=description, parents=[options.stored, shared])
    verb.add_argument(
        "--profile", type=Path, metavar="FILE", help="the cluster's profile (YAML); default: QLORA_RETRAIN_PROFILE"
    )
    verb.add_argument("--airflow", metavar="URL", help="Airflow's API; without it the pool is not checked")
    verb.set_defaults(run=_doctor)


def _deploy_check(args: argparse.Namespace) -> int:
    from qlora_retrain.runtimes.kubernetes import findings
    from qlora_retrain.runtimes.kubernetes.deploy import check
    from qlora_retrain.runtimes.kubernetes.deploy.by_hand import short_path

    lines, documents = _lines(args), []
    for profile in args.profile or [_profile_path(None)]:
        for folder in args.overlay or check.default_overlays(profile):
            report = check.check(profile, folder, lines, args.kubernetes)
            title = f"deploy-check: {short_path(profile)} with {short_path(folder)}"
            documents.append({**findings.as_document(title, report.findings), "by_hand": report.by_hand})
            if not args.json:
                print(findings.as_text(title, report.findings))
                print("\nStill to do by hand:")
                print("".join(f"  - {step}\n" for step in report.by_hand))
    if args.json:
        print(json.dumps(documents, indent=2))
    return max(int(str(document["exit_code"])) for document in documents)


def _doctor(args: argparse.Namespace) -> int:
    from qlora_retrain.core import uris
    from qlora_retrain.runtimes.kubernetes import findings
    from qlora_retrain.runtimes.kubernetes.doctor import doctor

    # A server that does not answer is reported within seconds, and not after eight tries.
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "2")
    profile, root = _profile_path(args.profile), store_root(args)
    results = doctor.examine(profile, root, _lines(args), airflow_url=args.airflow)
    title = f"doctor: {uris.mask_secrets(root)} with {profile}"
    print(json.dumps(findings.as_document(title, results), indent=2) if args.json else findings.as_text(title, results))
    return findings.exit_code(results)


def _profile_path(option: Path | None) -> Path:
    from qlora_retrain.config.cluster_profile import PROFILE_VARIABLE

    named = option or os.environ.get(PROFILE_VARIABLE)
    if not named:
        raise UsageError(f"no profile: pass --profile FILE or set {PROFILE_VARIABLE}")
    return Path(named)


def _lines(args: argparse.Namespace) -> list[LineConfig]:
    from qlora_retrain.config.line import load

    return [load(path) for path in args.line]
