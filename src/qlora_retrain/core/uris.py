"""URIs of sources and stores: parsed once, in one place, and never with a secret in them."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qlora_retrain.core.errors import UsageError

# User info (a password may hold a /, so up to the last @; an hf:// commit follows an @ of its own), or what could be
# one, and a query or a fragment.
_USER = re.compile(r"""(?<!hf)://[^\s/'"][^\s'"]*@|://[^\s/'"]*@|://[^\s/'"]*:[^\s'"]*""")
_ENDPOINT = re.compile(r"https?://[^\s/@:?#]+:\d{1,5}(/[^@]*)?")  # a server with its port, and no user
_QUERY = re.compile(r"""(://[^\s?#'"]*[?#])[^\s'"]*""")


def masked(text: str) -> str:
    """A URI, or a text with URIs in it, without user info, query and fragment, fit for a message."""
    return _QUERY.sub(r"\1***", _USER.sub("://***@", text))


def refuse_secrets(uri: str) -> None:
    """Raise `ValueError` for a URI that holds user info or a query; its message holds neither."""
    parts = urlsplit(uri)
    # hf://owner/name@commit has its @ in the path; only the part before the first / is a host. A colon there ends a
    # user's name too: a password may hold a /, and neither a bucket nor an owner has one.
    if parts.scheme and ("@" in parts.netloc or ":" in parts.netloc) and not _ENDPOINT.fullmatch(uri):
        raise ValueError(
            f"{masked(uri)}: a URI must not hold a user or password; credentials come from the environment"
        )
    if parts.scheme and (parts.query or parts.fragment):
        raise ValueError(
            f"{masked(uri)}: a URI must not hold a query (?) or a fragment (#); credentials come from the environment"
        )


def local_path(uri: str) -> Path:
    """The path of a `file://` URI or of a bare path.

    Raises:
        UsageError: If the URI names a host or another scheme.
    """
    parts = urlsplit(uri)
    if not parts.scheme:
        return Path(uri).expanduser().resolve()
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise UsageError(f"{masked(uri)}: wanted file:///folder")
    return Path(unquote(parts.path))


def absolute(uri: str) -> str:
    """The URI with a bare path made an absolute `file://` URI, no trailing slash, no secrets.

    Raises:
        UsageError: If it holds a secret or its scheme is not one that a store or a source has.
    """
    try:
        refuse_secrets(uri)
    except ValueError as error:
        raise UsageError(str(error)) from error
    parts = urlsplit(uri)
    if not parts.scheme:
        return Path(uri).expanduser().resolve().as_uri()
    if parts.scheme not in ("file", "s3", "hf"):
        raise UsageError(f"{masked(uri)}: unknown scheme {parts.scheme!r}; wanted file://, s3:// or a path")
    return uri.rstrip("/")


def bucket_and_prefix(uri: str) -> tuple[str, str]:
    """`s3://bucket/a/b` as ("bucket", "a/b")."""
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc:
        raise UsageError(f"{masked(uri)}: wanted s3://bucket/prefix")
    return parts.netloc, parts.path.strip("/")
