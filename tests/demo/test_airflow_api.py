"""The client of Airflow's REST API: an answer that passes is asked for again, and no run is started twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from qlora_retrain.demo import airflow_api
from qlora_retrain.demo.airflow_api import AirflowApi, AirflowApiError


class Server(BaseHTTPRequestHandler):
    """Answers with the statuses of `answers`, one after the other, with 0 nothing at all; keeps what was asked."""

    answers: ClassVar[list[int]] = []
    requests: ClassVar[list[tuple[str, dict[str, object]]]] = []
    tokens: ClassVar[list[str | None]] = []

    def _answer(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        self.requests.append((self.command, body))
        self.tokens.append(self.headers.get("Authorization"))
        answer = {"detail": "the reason", "dag_run_id": "another", "access_token": str(len(self.requests))}
        status = self.answers.pop(0)
        if not status:
            self.connection.recv(1)
            return
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    do_GET = do_PATCH = do_POST = _answer  # noqa: N815 - the names of http.server

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[AirflowApi]:
    monkeypatch.setattr(airflow_api, "_PAUSE_SECONDS", 0.0)
    Server.answers, Server.requests, Server.tokens = [], [], []
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield AirflowApi(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_what_a_busy_database_refuses_is_asked_for_again(api: AirflowApi) -> None:
    Server.answers = [500, 503, 200, 500, 200]
    api.unpause("tickets")
    api.dag("tickets")
    assert [method for method, _ in Server.requests] == ["PATCH"] * 3 + ["GET"] * 2


def test_a_server_that_is_too_busy_to_answer_is_asked_again(api: AirflowApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(airflow_api, "TIMEOUT_SECONDS", 1.0)
    Server.answers = [0, *[200] * 4]
    api.dag("tickets")
    assert len(Server.requests) > 1


@pytest.mark.parametrize("answers", [[200], [500, 200], [500, 409], [503, 500, 409]])
def test_a_run_is_started_once_whatever_became_of_the_first_answer(api: AirflowApi, answers: list[int]) -> None:
    Server.answers = list(answers)
    run_id = api.trigger("tickets", {"train.rank": 8})
    assert {body["dag_run_id"] for _, body in Server.requests} == {run_id}
    assert len(Server.requests) == len(answers)


@pytest.mark.parametrize("answers", [[400], [409], [500] * 5])
def test_a_refusal_is_final_and_so_is_the_last_try(api: AirflowApi, answers: list[int]) -> None:
    Server.answers = list(answers)
    with pytest.raises(AirflowApiError, match="the reason") as caught:
        api.trigger("tickets")
    assert caught.value.status == answers[-1]
    assert Server.answers == []


def test_a_client_signs_in_once_and_again_when_its_token_is_no_longer_taken(api: AirflowApi) -> None:
    signed_in = AirflowApi(api.url, "secret")
    Server.answers = [201, 200, 200, 401, 201, 200]
    for _ in range(3):
        signed_in.dag("tickets")
    sign_in, get = ("POST", {"username": "admin", "password": "secret"}), ("GET", {})
    assert Server.requests == [sign_in, get, get, get, sign_in, get]
    assert Server.tokens == [None, "Bearer 1", "Bearer 1", "Bearer 1", None, "Bearer 5"]
