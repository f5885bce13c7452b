"""The verbs of `qlora-retrain kfp`: the pipeline compiled, submitted, scheduled, or run on the local engine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_retrain.cli.options import Options
from qlora_retrain.core.arguments import Parser, store_root
from qlora_retrain.core.errors import UsageError

if TYPE_CHECKING:
    from qlora_retrain.config.cluster_profile import ClusterProfile


def add_verbs(kfp: argparse.ArgumentParser, options: Options) -> None:
    """Add the verbs below `kfp`."""
    verbs = kfp.add_subparsers(required=True, metavar="VERB")

    # Groups of options that several of the verbs share.
    cluster = Parser(add_help=False)
    cluster.add_argument(
        "--profile", type=Path, metavar="FILE", help="the cluster's profile: images, nodes, secrets (YAML)"
    )
    cluster.add_argument("--light-image", metavar="REF", help="image without torch, by tag or digest")
    cluster.add_argument("--train-image", metavar="REF", help="image with the training stack, by tag or digest")
    line = Parser(add_help=False)
    line.add_argument("config", type=Path, help="the line's YAML file")
    server = Parser(add_help=False)
    server.add_argument("--endpoint", metavar="URL", help="KFP's API; default: KF_PIPELINES_ENDPOINT")
    server.add_argument(
        "--namespace",
        default="kubeflow",
        metavar="NAME",
        help="the user's namespace, if KFP serves several users; default: kubeflow",
    )
    plan = Parser(add_help=False)
    plan.add_argument("--resume", default="", metavar="RUN", help="finish this run of the store instead of a new one")

    verb = verbs.add_parser("compile", help="write the pipeline as YAML for KFP", parents=[options.common, cluster])
    verb.add_argument("--out", type=Path, metavar="FILE", help="where it is written; default: .state/kfp/retrain.yaml")
    verb.set_defaults(run=_compile)

    parents = [options.stored, cluster, line, options.settings]
    verb = verbs.add_parser("submit", help="start a run on a cluster", parents=[*parents, server, plan])
    verb.set_defaults(run=_submit)

    verb = verbs.add_parser(
        "schedule", help="run the line on a cluster, on the line's own schedule", parents=[*parents, server]
    )
    verb.add_argument("--remove", action="store_true", help="remove the line's schedule from the cluster")
    verb.set_defaults(run=_schedule)

    verb = verbs.add_parser("run", help="run the pipeline in containers on the local engine", parents=[*parents, plan])
    verb.add_argument("--outputs", type=Path, metavar="FOLDER", help="save there what KFP's UI would show")
    verb.set_defaults(run=_run)


def _compile(args: argparse.Namespace) -> int:
    from qlora_retrain.pipeline import code_identity

    # kfp is imported before the profile is read, so that a wrong environment is reported first.
    kubeflow = _with_kfp("tasks")
    out = args.out or code_identity.project_root() / ".state" / "kfp" / "retrain.yaml"
    profile = _profile(args)
    kubeflow.compile_to(out, profile)
    print(f"{out}: pipeline retrain of {profile.light_image}, {profile.train_image}")
    return 0


def _submit(args: argparse.Namespace) -> int:
    client = _with_kfp("client")
    cluster = client.KubeflowClient(args.endpoint, args.namespace, _profile(args))
    print(cluster.submit(args.config, store_root(args), resume_run=args.resume, overrides=args.set))
    return 0


def _schedule(args: argparse.Namespace) -> int:
    client = _with_kfp("client")
    cluster = client.KubeflowClient(args.endpoint, args.namespace, _profile(args))
    # Without a store: removing a schedule reads only the line's name.
    if args.remove:
        print(cluster.unschedule(args.config))
    else:
        print(cluster.schedule(args.config, store_root(args), overrides=args.set))
    return 0


def _run(args: argparse.Namespace) -> int:
    local = _with_kfp("local")
    code: int = local.run(
        args.config, store_root(args), _profile(args), resume_run=args.resume, overrides=args.set, outputs=args.outputs
    )
    return code


def _profile(args: argparse.Namespace) -> ClusterProfile:
    from qlora_retrain.config import cluster_profile
    from qlora_retrain.core import images

    # Options of the command line override the file.
    cluster = cluster_profile.load(args.profile) if args.profile else cluster_profile.ClusterProfile()
    refs = {"light_image": args.light_image, "train_image": args.train_image}
    return cluster.model_copy(update={name: images.require_pinned(ref) for name, ref in refs.items() if ref})


def _with_kfp(module: str) -> Any:
    """Import a module of `runtimes.kubeflow`, which imports kfp.

    Raises:
        UsageError: If kfp is not installed in this environment.
    """
    import importlib

    # Only the absence of kfp or docker is a usage error; any other missing module is a bug and raised as it is.
    try:
        return importlib.import_module(f"qlora_retrain.runtimes.kubeflow.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("kfp", "docker"):
            raise
        raise UsageError(
            f"{error.name} is not installed in this environment ({sys.prefix}); kfp has an environment of its own: "
            "run .venv-kfp/bin/qlora-retrain"
        ) from error
