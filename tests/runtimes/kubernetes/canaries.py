"""A fake secret for every way in which one can reach Airflow through its environment; none may be found afterwards."""

from __future__ import annotations

import json
from pathlib import Path

VARIABLES = {
    "AWS_ACCESS_KEY_ID": "canary-key-31d0",
    "AWS_SECRET_ACCESS_KEY": "canary-environment-04b7",
    "AWS_SESSION_TOKEN": "canary-session-c55e",
    "HF_TOKEN": "canary-huggingface-90aa",
    "WANDB_API_KEY": "canary-wandb-7c1f",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-2b66",
    "AIRFLOW_VAR_TOKEN": "canary-variable-d9e4",
    "AIRFLOW_CONN_AWS_DEFAULT": "aws://key:canary-aws-connection-77@",
}
FILES = {
    "AWS_SHARED_CREDENTIALS_FILE": "[default]\naws_secret_access_key = canary-file-7f3a\n",
    "AWS_CONFIG_FILE": "[profile other]\naws_secret_access_key = canary-config-9c1d\n",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "canary-token-22e8",
    "HF_TOKEN_PATH": "canary-huggingface-file-58bc",
}


def environment(folder: Path) -> dict[str, str]:
    """Return the variables for every channel but Kubernetes' own; their files are in `folder`."""
    for name, text in FILES.items():
        (folder / name.lower()).write_text(text)
    return {**VARIABLES, **{name: str(folder / name.lower()) for name in FILES}}


SERVICE_ACCOUNT = "canary-service-account-e1f3"


def connection(kubeconfig: Path) -> dict[str, str]:
    """Return Airflow's connection to the cluster, which contains the kubeconfig with its token."""
    extra = {"kube_config": kubeconfig.read_text()}
    document = {"conn_type": "kubernetes", "password": "canary-connection-8a60", "extra": extra}
    return {"AIRFLOW_CONN_KUBERNETES_DEFAULT": json.dumps(document)}
