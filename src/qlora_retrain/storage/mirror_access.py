"""The servers and the tokens of mirrors: from the environment, or from the files of a mounted secret.

They are read here alone, and they are in no config, no log and no error. Their names are those of the clients that
people know: `HF_TOKEN`, `HF_ENDPOINT`, `MLFLOW_TRACKING_URI`, `MLFLOW_TRACKING_TOKEN`, `MLFLOW_TRACKING_USERNAME`,
`MLFLOW_TRACKING_PASSWORD`.

Environment: these variables; `QLORA_RETRAIN_MIRROR_SECRET`, a folder with files of these names, which come first.
"""

from __future__ import annotations

import os
from pathlib import Path

from qlora_retrain.core.errors import UsageError

FOLDER_VARIABLE = "QLORA_RETRAIN_MIRROR_SECRET"


def read(name: str) -> str | None:
    """Return a token or an address; None where there is none.

    Raises:
        UsageError: If its file cannot be read.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    file = Path(folder) / name if folder else None
    # Whoever writes a secret by hand ends it with a line break.
    if file is None or not file.exists():
        return os.environ.get(name, "").strip() or None
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read: {type(error).__name__}") from None
