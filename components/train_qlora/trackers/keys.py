"""Find out, without the network, whether a tracker is installed and has what it needs to log in."""

from __future__ import annotations

import configparser
import netrc
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from qlora_retrain.core.errors import UsageError

_WANDB_URL = "https://api.wandb.ai"
_WITHOUT_A_SERVER = ("offline", "disabled", "dryrun")


def refuse_unready(name: str) -> None:
    """Refuse a tracker whose package or key is missing.

    Raises:
        UsageError: If it is.
    """
    if not _is_installed(name):
        raise UsageError(
            f"train.report_to: {name} is not installed where the step runs; install it or leave it out of the line"
        )
    missing = {"mlflow": _missing_for_mlflow, "wandb": _missing_for_wandb}[name](os.environ, Path.home())
    if missing:
        raise UsageError(f"train.report_to: {name} {missing}, or leave it out of the line")


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    # It is imported already, without a spec.
    except ValueError:
        return name in sys.modules


def _missing_for_mlflow(variables: Mapping[str, str], home: Path) -> str | None:
    if variables.get("MLFLOW_TRACKING_USERNAME") and not variables.get("MLFLOW_TRACKING_PASSWORD"):
        return "has a user and no password; set MLFLOW_TRACKING_PASSWORD where the step runs"
    # A server of one's own may need no key; Databricks always does.
    uri = variables.get("MLFLOW_TRACKING_URI", "")
    has_key = any(variables.get(name) for name in ("DATABRICKS_TOKEN", "DATABRICKS_CLIENT_SECRET"))
    profiles = Path(variables.get("DATABRICKS_CONFIG_FILE") or home / ".databrickscfg")
    if uri.partition(":")[0] == "databricks" and not has_key and not profiles.is_file():
        return "has no key for Databricks; set DATABRICKS_HOST and DATABRICKS_TOKEN where the step runs"
    return None


def _missing_for_wandb(variables: Mapping[str, str], home: Path) -> str | None:
    settings = _wandb_settings(variables, home)
    mode = variables.get("WANDB_MODE") or settings.get("mode", "")
    if mode in _WITHOUT_A_SERVER or variables.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return None
    if variables.get("WANDB_API_KEY") or variables.get("WANDB_IDENTITY_TOKEN_FILE") or settings.get("api_key"):
        return None

    host = urlsplit(variables.get("WANDB_BASE_URL") or settings.get("base_url") or _WANDB_URL).hostname or ""
    if _has_netrc_entry(host, variables, home):
        return None
    return (
        f"has no key for {host}; set WANDB_API_KEY where the step runs (or WANDB_MODE=offline, which keeps the numbers "
        "on its disk)"
    )


def _wandb_settings(variables: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return what wandb's settings files say; the one of the working folder comes last."""
    folders = [
        Path(variables.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb"),
        Path(variables.get("WANDB_DIR") or ".") / "wandb",
    ]
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([folder / "settings" for folder in folders], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}


def _has_netrc_entry(host: str, variables: Mapping[str, str], home: Path) -> bool:
    names = [variables["NETRC"]] if variables.get("NETRC") else [str(home / name) for name in (".netrc", "_netrc")]
    for name in names:
        try:
            if netrc.netrc(name).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
