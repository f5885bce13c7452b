"""Names of Kubernetes objects (RFC 1123) and labels, as the cluster's server checks them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

_PART = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
Namespace = Annotated[str, Field(pattern=rf"^{_PART}$", max_length=63)]
Name = Annotated[str, Field(pattern=rf"^{_PART}(\.{_PART})*$", max_length=253)]
LabelKey = Annotated[str, Field(pattern=rf"^({_PART}(\.{_PART})*/)?{_LABEL}$")]
LabelValue = Annotated[str, Field(pattern=rf"^({_LABEL})?$")]
