"""Which sources may be read: URIs in one canonical form, compared with prefixes part by part.

Of a local path the place counts that its links lead to, so a link is as good as its target.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FORMS = "file:///folder/, s3://bucket/prefix/ or hf://owner/name@commit"
Parts = tuple[str, ...]


@dataclass(frozen=True)
class SourceAccess:
    """What may be read. The longest prefix that a source lies below decides.

    Attributes:
        allowed: Prefixes below which sources may lie; None: anywhere.
        closed: Prefixes below which none may lie, unless a longer one, or the same, is allowed.
        origin: Where the prefixes are written, for messages.
    """

    allowed: tuple[str, ...] | None = None
    closed: tuple[str, ...] = ()
    origin: str = "platform.yaml"

    def refusal(self, uri: str) -> str | None:
        """Return why a source may not be read; None where it may."""
        try:
            return None if self.allowed is None else self._refusal(_comparable_parts(uri))
        except ValueError as error:
            return str(error)

    def path_refusal(self, resolved: str) -> str | None:
        """Return why a local file or folder may not be read, given its path without links; None where it may."""
        return None if self.allowed is None else self._refusal(("file", *Path(resolved).parts))

    def _refusal(self, parts: Parts) -> str | None:
        allowed = max((len(p) for p in self._allowed_parts if parts[: len(p)] == p), default=0)
        closed = max((len(p) for p in self._closed_parts if parts[: len(p)] == p), default=0)
        if allowed and allowed >= closed:
            return None
        prefixes = ", ".join(self.allowed or ()) or "no source at all"
        reason = "in one of the store's own folders" if allowed else "not below an allowed source"
        return f"{reason}; {self.origin} allows {prefixes}: move the data there, or ask the owner of that file"

    @cached_property
    def _allowed_parts(self) -> tuple[Parts, ...]:
        return tuple(_comparable_parts(prefix) for prefix in self.allowed or ())

    @cached_property
    def _closed_parts(self) -> tuple[Parts, ...]:
        return tuple(_comparable_parts(prefix) for prefix in self.closed)


def canonical(uri: str) -> str:
    """Return the one form of a source's URI, or of a prefix of such URIs.

    Raises:
        ValueError: For another scheme, and for what one reader could take for another place, such as `..`.
    """
    if any(ord(character) < 32 or ord(character) == 127 for character in uri):
        raise ValueError("a URI must not hold control characters")
    split = urlsplit(uri)
    if split.scheme not in ("file", "s3", "hf"):
        raise ValueError(f"expected {_FORMS}")

    # In S3 a percent sign is a character of a key, but a server between may decode it.
    path = unquote(split.path)
    if {".", ".."} & {*path.split("/"), *split.path.split("/"), split.netloc} or "\0" in path:
        raise ValueError("a URI must not hold the parts . and .. nor a zero byte; write where it leads to")
    if split.scheme == "file":
        if split.netloc not in ("", "localhost") or not path.startswith("/"):
            raise ValueError("expected file:///folder: three slashes, and no host")
        return Path(f"/{path.strip('/')}").as_uri()
    if "//" in path.rstrip("/") or "%2f" in split.path.lower() or (path and not split.netloc):
        raise ValueError("a URI must not hold empty parts (//) nor an encoded slash (%2F)")
    return f"{split.scheme}://{split.netloc}{split.path.rstrip('/')}"


def _comparable_parts(uri: str) -> Parts:
    """Return a canonical URI in parts: of a file those of the place that its links lead to."""
    scheme, _, place = canonical(uri).partition("://")
    if scheme == "file":
        return (scheme, *Path(os.path.realpath(unquote(place))).parts)
    # A repository without its commit is a prefix of it with any.
    return (scheme, *filter(None, (place.replace("@", "/") if scheme == "hf" else place).split("/")))
