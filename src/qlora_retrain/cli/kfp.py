"""The verbs of `qlora-retrain kfp`: the pipeline compiled, submitted, scheduled, or run on the local engine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.core.arguments import Parser, root
from qlora_retrain.core.errors import UsageError

if TYPE_CHECKING:
    from qlora_retrain.config.profile import Profile


def add_verbs(kfp: argparse.ArgumentParser, common: Parser, stored: Parser, settings: Parser) -> None:
    """Add the verbs below `kfp`; the other parsers are the options that they share with the rest."""
    verbs = kfp.add_subparsers(required=True, metavar="VERB")
    cluster = Parser(add_help=False)
    cluster.add_argument("--profile", type=Path, metavar="FILE", help="the cluster: images, nodes, secrets (YAML)")
    cluster.add_argument("--light-image", metavar="REF", help="image without torch, by tag or digest")
    cluster.add_argument("--train-image", metavar="REF", help="image with the training stack, by tag or digest")
    line = Parser(add_help=False)
    line.add_argument("config", type=Path, help="the line's YAML file")
    server = Parser(add_help=False)
    server.add_argument("--endpoint", metavar="URL", help="KFP's API; default: KF_PIPELINES_ENDPOINT")
    server.add_argument("--namespace", default="kubeflow", metavar="NAME", help="the user's, where there are several")
    plan = Parser(add_help=False)
    plan.add_argument("--plan", default="", metavar="URI", help="finish this plan instead of making one")

    verb = verbs.add_parser("compile", help="write the YAML that KFP takes", parents=[common, cluster])
    verb.add_argument("--out", type=Path, metavar="FILE", help="default: .state/kfp/retrain.yaml")
    verb.set_defaults(run=_compile)

    parents = [stored, cluster, line, settings]
    verb = verbs.add_parser("submit", help="start a run on a cluster", parents=[*parents, server, plan])
    verb.set_defaults(run=_submit)

    verb = verbs.add_parser("schedule", help="have a cluster run the line on its schedule", parents=[*parents, server])
    verb.add_argument("--remove", action="store_true", help="take the line's schedule away")
    verb.set_defaults(run=_schedule)

    verb = verbs.add_parser("run", help="run the pipeline in containers on the local engine", parents=[*parents, plan])
    verb.add_argument("--outputs", type=Path, metavar="FOLDER", help="keep there what KFP's UI would show")
    verb.set_defaults(run=_run)


def _compile(args: argparse.Namespace) -> int:
    from qlora_retrain.pipeline import code_identity

    kubeflow = _with_kfp("components")
    out = args.out or code_identity.project_root() / ".state" / "kfp" / "retrain.yaml"
    profile = _profile(args)
    kubeflow.compile_to(out, profile)
    print(f"{out}: pipeline retrain of {profile.light_image}, {profile.train_image}")
    return 0


def _submit(args: argparse.Namespace) -> int:
    api = _with_kfp("api")
    cluster = api.Cluster(args.endpoint, args.namespace, _profile(args))
    print(cluster.submit(args.config, root(args), plan_uri=args.plan, overrides=args.set))
    return 0


def _schedule(args: argparse.Namespace) -> int:
    api = _with_kfp("api")
    cluster = api.Cluster(args.endpoint, args.namespace, _profile(args))
    if args.remove:
        print(cluster.unschedule(args.config))
    else:
        print(cluster.schedule(args.config, root(args), overrides=args.set))
    return 0


def _run(args: argparse.Namespace) -> int:
    local = _with_kfp("local")
    code: int = local.run(
        args.config, root(args), _profile(args), plan_uri=args.plan, overrides=args.set, outputs=args.outputs
    )
    return code


def _profile(args: argparse.Namespace) -> Profile:
    from qlora_retrain.config import profile
    from qlora_retrain.core import images

    found = profile.load(args.profile) if args.profile else profile.Profile()
    given = {"light_image": args.light_image, "train_image": args.train_image}
    return found.model_copy(update={name: images.pinned(ref) for name, ref in given.items() if ref})


def _with_kfp(module: str) -> Any:
    """A module of `runtimes` that imports kfp.

    Raises:
        UsageError: Where kfp is not installed, saying where it is.
    """
    import importlib

    try:
        return importlib.import_module(f"qlora_retrain.runtimes.kubeflow.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("kfp", "docker"):
            raise
        raise UsageError(
            f"{error.name} is not in this environment ({sys.prefix}); kfp has one of its own: "
            "run it with .venv-kfp/bin/qlora-retrain"
        ) from error
