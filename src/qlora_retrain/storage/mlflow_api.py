"""MLflow's REST API, as far as a mirror needs it, by plain HTTP: its client is no dependency of this project.

No error quotes a token, nor the server's address. Redirects are not followed, since they could lead a token elsewhere.

Environment: see `mirror_access.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_retrain.core import visible_text
from qlora_retrain.core.errors import Cause, TryAgain, UsageError
from qlora_retrain.storage import mirror_access

_TIMEOUT_SECONDS = 20.0
_MAX_REASON_CHARACTERS = 300
_PAGE_SIZE = 200
Document = dict[str, Any]


class Refused(UsageError):
    """The server says no.

    Attributes:
        code: MLflow's word for the reason, such as RESOURCE_DOES_NOT_EXIST.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class MlflowServer:
    """The server that `MLFLOW_TRACKING_URI` names.

    Raises:
        UsageError: If it names none.
    """

    def __init__(self) -> None:
        import httpx2

        address = mirror_access.read("MLFLOW_TRACKING_URI") or ""
        if not address.startswith(("https://", "http://")):
            raise UsageError("MLFLOW_TRACKING_URI: expected the address of an MLflow server, https://server.example")
        user, password = (mirror_access.read(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
        token = mirror_access.read("MLFLOW_TRACKING_TOKEN")
        try:
            self._client = httpx2.Client(
                base_url=f"{address.rstrip('/')}/api/2.0/mlflow",
                headers={"Authorization": f"Bearer {token}"} if token else {},
                auth=(user or "", password) if password and not token else None,
                timeout=_TIMEOUT_SECONDS,
                follow_redirects=False,
            )
        except (httpx2.InvalidURL, ValueError, UnicodeError):
            raise UsageError("MLflow: its address or its token cannot be sent; correct them") from None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def get(self, path: str, **params: Any) -> Document:
        """Ask for something.

        Raises:
            Refused: If the server says no.
            UsageError: If it accepts no such token.
            TryAgain: If it cannot be reached, or is busy.
        """
        return self._request("GET", path, params=params)

    def post(self, path: str, document: Mapping[str, Any]) -> Document:
        """Change something; raises what `get` does."""
        return self._request("POST", path, json=dict(document))

    def delete(self, path: str, document: Mapping[str, Any]) -> Document:
        """Delete something; raises what `get` does."""
        return self._request("DELETE", path, json=dict(document))

    def pages(self, path: str, field: str, **params: Any) -> Iterator[Document]:
        """Yield the entries of a list that comes in pages."""
        token: str | None = ""
        while token is not None:
            answer = self.get(path, max_results=_PAGE_SIZE, **params, **({"page_token": token} if token else {}))
            yield from answer.get(field) or ()
            token = answer.get("next_page_token") or None

    def _request(self, method: str, path: str, **arguments: Any) -> Document:
        import httpx2

        try:
            response = self._client.request(method, path, **arguments)
        except (httpx2.InvalidURL, httpx2.LocalProtocolError, UnicodeError):
            raise UsageError("MLflow: its address or its token cannot be sent; correct them") from None
        except httpx2.HTTPError as error:
            raise TryAgain(
                f"MLflow: the server cannot be reached ({type(error).__name__})", cause=Cause.THROTTLED
            ) from None

        try:
            document = response.json()
        except ValueError:
            document = None
        status = response.status_code
        if 200 <= status < 300 and isinstance(document, dict):
            return document
        if status in (401, 403):
            raise UsageError(f"MLflow: the server answered {status}: its token or its user may not do this ({path})")
        if status >= 500 or status in (408, 409, 425, 429):
            raise TryAgain(f"MLflow: the server answered {status} to {path}", cause=Cause.THROTTLED)
        fields = document if isinstance(document, dict) else {}
        reason = visible_text.escape_controls(str(fields.get("message", "no MLflow server answers there")))
        raise Refused(
            f"MLflow: the server answered {status} to {path}: {reason[:_MAX_REASON_CHARACTERS]}",
            str(fields.get("error_code", "")),
        )
