"""Where artifacts, plans and published versions are stored. `open_store` is the entrance."""

from __future__ import annotations

from urllib.parse import urlsplit

from qlora_retrain.core import uris
from qlora_retrain.core.errors import UsageError
from qlora_retrain.storage.store import Store


def open_store(uri: str) -> Store:
    """Open the store at `uri`: `s3://bucket/prefix`, `file:///folder` or a bare path.

    Raises:
        UsageError: For another scheme, or a URI with a secret in it.
    """
    if not uri:
        # As a path it would be the working directory.
        raise UsageError("expected the URI of a store (file:///folder or s3://bucket/prefix), found an empty text")
    uri = uris.absolute(uri)
    scheme = urlsplit(uri).scheme
    # Each backend is imported where it is used: boto3 takes a second and is not installed everywhere.
    if scheme == "file":
        from qlora_retrain.storage.local import LocalStore

        return LocalStore(uri)
    if scheme == "s3":
        from qlora_retrain.storage.s3 import S3Store

        return S3Store(uri)
    raise UsageError(f"{uris.mask_secrets(uri)}: a store is file:///folder or s3://bucket/prefix")
