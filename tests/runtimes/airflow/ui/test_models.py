"""The pages of published models: who sees which lines, what they show, and what a broken or hostile store does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from qlora_retrain.core.errors import Cause, TryAgain
from qlora_retrain.runtimes.airflow.ui import headers, model_routes
from qlora_retrain.storage import open_store, registry
from qlora_retrain.storage.registry import Release
from qlora_retrain.storage.store import Store

pytestmark = pytest.mark.filterwarnings("ignore")  # Airflow's own, while it starts
MODELS = "/qlora-retrain/models"
Browser = Callable[..., Any]
Versions = tuple[Release, Release]


def pages_of(versions: Versions) -> list[str]:
    first, second = (release.version for release in versions)
    return [
        MODELS,
        f"{MODELS}/intents",
        f"{MODELS}/intents/{second}",
        f"{MODELS}/intents/{second}?tab=data",
        f"{MODELS}/intents/{second}/reports/data",
        f"{MODELS}/intents/diff?a={first}&b={second}",
    ]


def test_no_page_is_shown_without_a_session(browser: Browser, two_versions: Versions) -> None:
    for url in pages_of(two_versions):
        answer = browser(None).get(url)
        assert (answer.status_code, "Not logged in" in answer.text) == (401, True), url
    stranger = browser(None)
    stranger.cookies.set("_token", "no token of this server")
    assert {stranger.get(url).status_code for url in pages_of(two_versions)} <= {401, 403}


def test_a_page_of_a_line_needs_the_permission_to_read_its_dag(browser: Browser, two_versions: Versions) -> None:
    clerk, nobody = browser("clerk"), browser("nobody")
    for url in pages_of(two_versions):
        assert clerk.get(url).status_code == 200, url
        assert clerk.get(url.replace("/intents", "/secrets")).status_code == (200 if url == MODELS else 403), url
        if url != MODELS:
            assert nobody.get(url).status_code == 403, url
    assert "secrets" not in clerk.get(MODELS).text
    assert "intents" not in nobody.get(MODELS).text
    assert {"intents", "secrets"} <= set(re.findall(r"models/(\w+)\"", browser("reader").get(MODELS).text))


def test_a_line_shows_versions_aliases_and_verdicts_with_intervals(browser: Browser, two_versions: Versions) -> None:
    page = browser("reader").get(f"{MODELS}/intents").text
    for release in two_versions:
        assert f"{MODELS}/intents/{release.version}" in page
    assert "0.8500" in page
    assert "0.8000 to 0.9000" in page
    assert "latest, production" in page
    # The plot has both versions, each beside the best version before it.
    assert page.count("<circle") == 2 * 2 + 2
    assert f"{two_versions[1].version}: 0.83 (0.8 to 0.9)" in page
    assert "a &lt;b&gt;test&lt;/b&gt;" in page


def test_two_versions_are_compared(browser: Browser, two_versions: Versions) -> None:
    page = browser("reader").get(pages_of(two_versions)[-1]).text.replace("<wbr>", "")
    rows = {re.sub(r"<[^>]+>", "", row.replace("</td>", "|")) for row in re.findall(r"<tr>(.*?)</tr>", page)}
    assert {
        "train_qlora.rank|1|2|",
        "rows_train|100|200|",
        "raw_data: tickets.jsonl|sha256:111111111111|sha256:222222222222|",
        "accuracy|0.80000.7500 to 0.8500|0.85000.8000 to 0.9000|",
    } <= rows
    assert not any("train_qlora.seed" in row or "seconds" in row for row in rows)
    assert "Nothing differs in: base model" in page


def test_every_page_forbids_what_it_does_not_need(browser: Browser, two_versions: Versions) -> None:
    reports = {url: "/reports/" in url for url in pages_of(two_versions)}
    for url, is_report in reports.items():
        answer = browser("reader").get(url)
        assert answer.headers["content-security-policy"] == (
            headers.REPORT_POLICY if is_report else headers.PAGE_POLICY
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "<script" not in answer.text
        # The hash in the policy allows the style sheet alone.
        assert is_report or " style=" not in answer.text
    assert browser(None).get("/qlora-retrain/nothing").headers["content-security-policy"] == headers.PAGE_POLICY


@pytest.mark.parametrize(
    "path",
    [
        "no-line",
        "intents/20260101T000000Z-000000000000",
        "intents/latest",
        "intents/..%2f..%2faliases",
        "intents/{version}/reports/manifest",
        "intents/{version}/reports/..%2f..%2fmanifest.json",
        "intents/{version}/reports/training",
        "..%2f..%2fetc",
        "Intents%00",
        "intents/{version}/../../../aliases/production.json",
    ],
)
def test_what_does_not_exist_is_not_found(browser: Browser, two_versions: Versions, path: str) -> None:
    answer = browser().get(f"{MODELS}/{path.format(version=two_versions[1].version)}")
    assert answer.status_code == 404
    assert "rows_train" not in answer.text


def test_a_report_whose_bytes_were_changed_is_not_shown(
    browser: Browser, two_versions: Versions, store: Store, tmp_path: Any
) -> None:
    version = two_versions[1].version
    (tmp_path / "data.html").write_text("<script>alert(1)</script>")
    store.upload(tmp_path, f"{registry.version_folder('intents', version)}/reports", ["data.html"])
    answer = browser().get(f"{MODELS}/intents/{version}/reports/data")
    assert (answer.status_code, "sha256 differs" in answer.text) == (503, True)
    assert "<script" not in answer.text


def test_a_version_that_cannot_be_read_takes_no_other_down(
    browser: Browser, two_versions: Versions, publish: Callable[..., Release], store: Store
) -> None:
    third = publish(4)
    path = f"{registry.version_folder('intents', third.version)}/manifest.json"
    store.swap(path, b"{}", store.read(path).tag)
    answer = browser().get(f"{MODELS}/intents")
    assert answer.status_code == 200
    assert f"version {third.version} cannot be shown" in answer.text
    assert two_versions[0].version in answer.text
    assert browser().get(f"{MODELS}/intents/{third.version}").status_code == 503

    # The version that a rollback would go back to is lost.
    store.delete([f"{registry.version_folder('intents', two_versions[0].version)}/manifest.json"])
    answer = browser().get(f"{MODELS}/intents")
    assert (answer.status_code, f"Roll back to {two_versions[0].version}" in answer.text) == (200, True)


@pytest.mark.parametrize(
    "evaluation",
    [
        {},
        {"metric": 7, "contestants": []},
        {"metric": "accuracy", "contestants": {"challenger": {"accuracy": "<script>", "accuracy_low": 10**400}}},
        {"metric": "<script>", "sentence": ["<script>"], "verdict": {"a": "<script>"}, "contestants": {"champion": 3}},
        {"metric": "accuracy", "contestants": {"challenger": {"accuracy": float("nan"), "accuracy_low": 1.0}}},
    ],
)
def test_whatever_a_document_of_a_version_holds_is_text(
    browser: Browser, two_versions: Versions, publish: Callable[..., Release], evaluation: dict[str, Any]
) -> None:
    documents = {"evaluation/evaluation.json": evaluation, "recipe.json": {"steps": {"a": 3}, "code": "<script>"}}
    release = publish(5, **documents)
    for path in ("", f"/{release.version}", f"/diff?a={release.version}&b={two_versions[0].version}"):
        answer = browser().get(f"{MODELS}/intents{path}")
        assert answer.status_code == 200
        assert "<script" not in answer.text


def test_a_store_that_is_away_is_said_so(
    browser: Browser, two_versions: Versions, monkeypatch: pytest.MonkeyPatch, airflow_app: Any
) -> None:
    def away() -> Store:
        raise TryAgain("s3://bucket: no connection <now>", cause=Cause.THROTTLED)

    monkeypatch.setattr(model_routes, "open_store", lambda uri: away())
    for url in pages_of(two_versions):
        answer = browser().get(url)
        assert (answer.status_code, "no connection &lt;now&gt;" in answer.text) == (503, True), url


def test_an_empty_store_shows_no_lines(browser: Browser, store: Store) -> None:
    assert open_store(store.uri).uri == store.uri
    assert "0 lines" in browser().get(MODELS).text
    assert browser().get(f"{MODELS}/intents").status_code == 404


def test_links_hold_where_airflow_stands_below_a_path(
    browser: Browser, two_versions: Versions, monkeypatch: pytest.MonkeyPatch, airflow_app: Any
) -> None:
    monkeypatch.setattr(airflow_app, "root_path", "/teams/airflow")
    page = browser().get(f"/teams/airflow{MODELS}/intents").text
    targets = set(re.findall(r'(?:href|action|src)="([^"]*)"', page))
    assert len(targets) > 4
    assert all(target.startswith(f"/teams/airflow{MODELS}") for target in targets)


def test_every_route_asks_for_a_session(browser: Browser) -> None:
    from qlora_retrain.runtimes.airflow.ui.app import create_pages

    operations = [(path, method) for path, item in create_pages().openapi()["paths"].items() for method in item]
    assert len(operations) == 8
    for path, method in operations:
        url = re.sub(r"\{\w+\}", "intents", path)
        assert browser(None).request(method.upper(), f"/qlora-retrain{url}", data={}).status_code == 401, url
