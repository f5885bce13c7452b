"""The pages as one FastAPI application: routes, headers, and errors as pages with a sentence.

A store that cannot be read is 503, what does not exist is 404, and a request that is none of ours is 4xx.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from qlora_retrain.core.errors import Problem
from qlora_retrain.runtimes.airflow.ui import model_routes, run_routes
from qlora_retrain.runtimes.airflow.ui.headers import PageHeaders
from qlora_retrain.runtimes.airflow.ui.pages import error_page

_TITLES = {
    401: "Not logged in",
    403: "Not allowed",
    404: "Not found",
    409: "Somebody was faster",
    413: "Too much was sent",
    422: "This cannot be used",
    503: "The store cannot be read",
}
_LOGIN = "Log in to Airflow, then open this page again."


def create_pages() -> FastAPI:
    """Build the application; it has no page that describes itself, which would need no login."""
    app = FastAPI(title="qlora-retrain", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(run_routes.router)
    app.include_router(model_routes.router)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(Problem, _problem)
    app.add_middleware(PageHeaders)
    return app


def _http_error(request: Request, error: Exception) -> HTMLResponse:
    assert isinstance(error, HTTPException)
    sentence = _LOGIN if error.status_code == 401 else str(error.detail)
    return _error(error.status_code, sentence)


def _invalid_request(request: Request, error: Exception) -> HTMLResponse:
    assert isinstance(error, RequestValidationError)
    if any(fault["loc"][0] == "path" for fault in error.errors()):
        return _error(404, "There is no version of this name.")
    faults = [f"{'.'.join(map(str, fault['loc'][1:]))}: {fault['msg']}" for fault in error.errors()]
    return _error(422, "; ".join(faults))


def _problem(request: Request, error: Exception) -> HTMLResponse:
    """Show an error of the store: it is away, refuses this account, or holds other bytes than its manifests say."""
    return _error(503, str(error))


def _error(status: int, sentence: str) -> HTMLResponse:
    return HTMLResponse(error_page(_TITLES.get(status, f"Error {status}"), sentence), status_code=status)
