"""URIs of sources and stores: parsed in one place, and never with a secret in them."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qlora_retrain.core import source_access
from qlora_retrain.core.errors import UsageError

# The folders of a store that hold files of any size.
STORE_FOLDERS = ("artifacts", "histories", "models", "runs", "scratch")
# User info, or what could be user info. A password may hold a /, so it reaches up to the last @; the first branch
# leaves hf:// out, whose commit follows an @ of its own.
_USER = re.compile(r"""(?<!hf)://[^\s/'"][^\s'"]*@|://[^\s/'"]*@|://[^\s/'"]*:[^\s'"]*""")
# A server with its port and no user, such as http://localhost:9000.
_ENDPOINT = re.compile(r"https?://[^\s/@:?#]+:\d{1,5}(/[^@]*)?")
# A user and a password, or a token alone, for certain.
_PASSWORD = re.compile(r"""://[^\s/'"@]+@""")
# A query (a presigned URL holds its signature there) or a fragment.
_QUERY = re.compile(r"""(://[^\s?#'"]*[?#])[^\s'"]*""")


def mask_secrets(text: str) -> str:
    """Return a URI, or a text with URIs in it, without user info, query and fragment, fit for a message."""
    return _QUERY.sub(r"\1***", _USER.sub("://***@", text))


def mask_secrets_of_errors(text: str) -> str:
    """Return a library's message without passwords and queries in its URLs, and with its servers and ports."""
    return _QUERY.sub(r"\1***", _PASSWORD.sub("://***@", text))


def refuse_secrets(uri: str) -> None:
    """Raise `ValueError` for a URI that holds user info, a query or a fragment; its message holds none of them."""
    parts = urlsplit(uri)
    # Only the part before the first / is looked at: hf://owner/name@commit has its @ in the path. A colon there can
    # also end a user's name, since the password after it may hold a /; neither a bucket nor an owner has a colon.
    if parts.scheme and ("@" in parts.netloc or ":" in parts.netloc) and not _ENDPOINT.fullmatch(uri):
        raise ValueError(
            f"{mask_secrets(uri)}: a URI must not hold a user or password; credentials come from the environment"
        )

    if parts.scheme and (parts.query or parts.fragment):
        raise ValueError(
            f"{mask_secrets(uri)}: a URI must not hold a query (?) or a fragment (#); "
            "credentials come from the environment"
        )


def local_path(uri: str) -> Path:
    """Return the path that a `file://` URI or a bare path names.

    Raises:
        UsageError: If the URI names a host or another scheme.
    """
    parts = urlsplit(uri)
    if not parts.scheme:
        return Path(uri).expanduser().resolve()
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise UsageError(f"{mask_secrets(uri)}: expected file:///folder")
    return Path(unquote(parts.path))


def absolute(uri: str) -> str:
    """Return the one form of a URI; a bare path becomes an absolute `file://` URI.

    One form, because a store's keys are found by its URI: another spelling of it would be a store without keys.

    Raises:
        UsageError: If it holds a secret or a part such as `..`, or its scheme is not one that a store or a source has.
    """
    try:
        refuse_secrets(uri)
    except ValueError as error:
        raise UsageError(str(error)) from error

    parts = urlsplit(uri)
    if not parts.scheme:
        return Path(uri).expanduser().resolve().as_uri()
    if parts.scheme not in ("file", "s3", "hf"):
        hint = "; of a server that speaks S3 give s3://bucket/prefix, and its address in AWS_ENDPOINT_URL"
        raise UsageError(
            f"{mask_secrets_of_errors(uri)}: unknown scheme {parts.scheme!r}; expected file://, s3:// or a path"
            + (hint if parts.scheme in ("http", "https") else "")
        )
    try:
        return source_access.canonical(uri)
    except ValueError as error:
        raise UsageError(f"{mask_secrets(uri)}: {error}") from error


def bucket_and_prefix(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/a/b` into ("bucket", "a/b").

    Raises:
        UsageError: If the URI has another scheme or names no bucket.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc:
        raise UsageError(f"{mask_secrets(uri)}: expected s3://bucket/prefix")
    return parts.netloc, parts.path.strip("/")
