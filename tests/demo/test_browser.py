"""What people do in Airflow's UI, in a browser: trigger, watch, read, compare, approve, roll back; and who may not.

With `QLORA_RETRAIN_SCREENSHOTS=FOLDER` each screen is kept there, as in docs/images/.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_retrain.core.aliases import PRODUCTION, STAGING
from qlora_retrain.demo.airflow_api import AirflowApi
from qlora_retrain.demo.standalone_airflow import StandaloneAirflow
from qlora_retrain.runtimes.airflow.move_request import APPROVAL_DAG, MOVE_DAG
from qlora_retrain.storage import open_store, registry
from tests.published import publish_version

pytestmark = [pytest.mark.airflow, pytest.mark.slow, pytest.mark.timeout(1800)]
# alice starts the runs, bob approves, vera may look, and nora has no role at all.
USERS = {"admin": "admin", "alice": "admin", "bob": "admin", "vera": "viewer", "nora": ""}
WAIT_SECONDS = 240.0
LINE = {
    "data": {"task": "labels", "eval_fraction": 0.3, "max_length_tokens": 256},
    "train": {"learning_rate": 5e-3, "epochs": 6, "micro_batch_size": 16, "dropout": 0.0, "rank": 8},
    "evaluate": {"allow_first_release": True, "bootstrap_samples": 200, "stop_rows": 0, "train_rows": 0},
    "merge": {"max_loss_increase_nats": 2.0, "min_prompts": 10},
    "publish": {"approval": True},
}


@dataclass(frozen=True)
class Site:
    """The Airflow of these tests, and where its store is."""

    airflow: StandaloneAirflow
    root: str

    def api(self, user: str) -> AirflowApi:
        passwords = json.loads((self.airflow.home / "passwords.json").read_text())
        return AirflowApi(self.airflow.url, passwords[user], user)


def run_ids(api: AirflowApi, dag_id: str) -> list[str]:
    """List the runs of a DAG, the newest first."""
    answer = api.request("GET", f"dags/{dag_id}/dagRuns?order_by=-run_after&limit=5")
    return [run["dag_run_id"] for run in answer["dag_runs"]]


class Screen:
    """A browser in which a user is signed in."""

    def __init__(self, driver: Any, site: Site, user: str) -> None:
        self.driver, self.site = driver, site
        driver.delete_all_cookies()
        self.open("/auth/login")
        self.type("input[name=username]", user)
        self.type("input[name=password]", json.loads((site.airflow.home / "passwords.json").read_text())[user])
        self.click("button[type=submit]")
        self.wait(lambda: "/auth/login" not in driver.current_url)

    def open(self, path: str) -> None:
        self.driver.switch_to.default_content()
        self.driver.get(self.site.airflow.url + path)

    def wait(self, condition: Callable[[], Any]) -> Any:
        from selenium.common.exceptions import TimeoutException, WebDriverException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, WAIT_SECONDS, ignored_exceptions=(WebDriverException,))
        try:
            return wait.until(lambda _: condition())
        except TimeoutException:
            self.save("late")
            raise

    def find(self, css: str, text: str = "") -> Any:
        """Wait for a visible element that contains the text; return it."""
        return self.wait(
            lambda: next(
                (
                    element
                    for element in self.driver.find_elements("css selector", css)
                    if element.is_displayed() and text in element.text
                ),
                None,
            )
        )

    def click(self, css: str, text: str = "") -> None:
        self.wait(lambda: self.find(css, text).click() or True)

    def type(self, css: str, text: str) -> None:
        element = self.find(css)
        element.clear()
        element.send_keys(text)

    def enter_frame(self) -> None:
        """Go into the frame in which Airflow shows a page of the plugin."""
        self.driver.switch_to.frame(self.find("iframe"))

    def save(self, name: str) -> None:
        if folder := os.environ.get("QLORA_RETRAIN_SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, write_tickets: Callable[[Path, int], Path]
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("browser")
    (folder / "lines").mkdir()
    sources = {"raw_data": str(write_tickets(folder / "rows.jsonl", 200)), "base_model": str(tiny_model)}
    for name in ("letters", "parcels"):
        (folder / "lines" / f"{name}.yaml").write_text(yaml.safe_dump({"line": name, "sources": sources, **LINE}))
    (folder / "platform.yaml").write_text("approvers: {letters: [alice, bob], parcels: [bob]}\n")
    root = (folder / "store").as_uri()
    store = open_store(root)
    for number, accuracy in ((1, 0.78), (2, 0.83), (3, 0.86)):
        release = publish_version(store, folder / str(number), number, line="parcels", accuracy=accuracy)
        registry.move_alias(store, "parcels", PRODUCTION, release, reason="better")
    environment = {
        "QLORA_RETRAIN_PIPELINES": str(folder / "lines"),
        "QLORA_RETRAIN_PLATFORM": str(folder / "platform.yaml"),
        "QLORA_RETRAIN_ROOT": root,
        "QLORA_RETRAIN_CACHE": str(folder / "cache"),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{user}:{role}" for user, role in USERS.items()),
    }
    with StandaloneAirflow(folder / "home", environment=environment) as airflow:
        for dag_id in ("letters", "parcels", MOVE_DAG, APPROVAL_DAG):
            airflow.wait_for_dag(dag_id)
        airflow.api.unpause("letters")
        yield Site(airflow, root)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    program = shutil.which("chromedriver")
    if program is None:
        pytest.skip("there is no chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1440,1000", "--lang=en-US"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(program))
    yield driver
    driver.quit()


def test_a_run_is_triggered_watched_read_and_approved(site: Site, driver: Any) -> None:
    alice = Screen(driver, site, "alice")
    alice.open("/dags/letters")
    alice.find("body", "Retrain letters")
    alice.click("[data-testid=trigger-dag-button]")
    alice.type("[name=element_reason]", "the first version")
    alice.save("trigger")
    alice.click("[data-testid=trigger-dag-submit]")
    api = site.api("alice")
    run_id = alice.wait(lambda: next(iter(run_ids(api, "letters")), None))
    assert api.wait_until_finished("letters", run_id, timeout_seconds=900) == "success"

    alice.open(f"/dags/letters/runs/{run_id}")
    alice.find("body", "Published")
    alice.save("run")
    assert "the first version" in api.dag_run("letters", run_id)["note"]
    alice.open(f"/dags/letters/runs/{run_id}/plugin/qlora-retrain-reports")
    alice.enter_frame()
    for tab, words in (("Data", "rows"), ("Training", "loss"), ("Evaluation", "accuracy"), ("Certificate", "merge")):
        alice.click("nav a", tab)
        alice.find("nav a[aria-current]", tab)
        alice.enter_frame()
        # A frame has an empty body first.
        alice.wait(lambda words=words: words in alice.find("body").text.lower())
        if tab == "Evaluation":
            alice.save("evaluation")
        driver.switch_to.parent_frame()

    # Who asked may not answer, and bob's answer moves production.
    store = open_store(site.root)
    assert registry.read_alias(store, "letters", PRODUCTION)[0] is None
    staged, _ = registry.read_alias(store, "letters", STAGING)
    assert staged is not None
    bob = Screen(driver, site, "bob")
    approval = bob.wait(lambda: next(iter(run_ids(site.api("bob"), APPROVAL_DAG)), None))
    bob.open(f"/dags/{APPROVAL_DAG}/runs/{approval}/tasks/approve/required_actions")
    bob.find("button", "Approve")
    bob.find("body", staged.version)
    bob.save("approval")
    bob.click("button", "Approve")
    assert site.api("bob").wait_until_finished(APPROVAL_DAG, approval, timeout_seconds=600) == "success"
    production, _ = registry.read_alias(store, "letters", PRODUCTION)
    assert production is not None
    assert production.version == staged.version
    assert "bob" in production.actor


def test_a_value_that_the_form_forbids_starts_no_run(site: Site, driver: Any) -> None:
    alice = Screen(driver, site, "alice")
    runs = run_ids(site.api("alice"), "parcels")
    alice.open("/dags/parcels")
    alice.click("[data-testid=trigger-dag-button]")
    alice.click("button", "Finish another run")
    alice.type("[name=element_resume_run]", "../another store")
    alice.click("[data-testid=trigger-dag-submit]")
    alice.find("body", "does not match")
    assert run_ids(site.api("alice"), "parcels") == runs


def test_versions_are_compared_and_rolled_back(site: Site, driver: Any) -> None:
    bob = Screen(driver, site, "bob")
    bob.open("/plugin/qlora-retrain-models")
    bob.enter_frame()
    bob.save("models")
    bob.click("a", "parcels")
    bob.find("svg")
    bob.save("line")
    bob.click("button", "Compare the two")
    assert "rank" in bob.find("body", "rank").text
    bob.save("compare")
    bob.click("a", "parcels")
    bob.type("input[name=reason]", "too many wrong answers")
    bob.click("button", "Roll back")
    store = open_store(site.root)
    version = bob.wait(
        lambda: (state := registry.read_alias(store, "parcels", PRODUCTION)[0]) and state.generation == 4 and state
    )
    assert "too many wrong answers" in version.reason
    assert "bob" in version.actor


def test_who_may_only_look_has_no_button_and_who_may_nothing_no_report(site: Site, driver: Any) -> None:
    vera = Screen(driver, site, "vera")
    vera.open("/qlora-retrain/models/parcels")
    vera.find("body", "0.8300")
    assert not driver.find_elements("css selector", "form[method=post]")

    Screen(driver, site, "nora")
    for path in ("/qlora-retrain/models/parcels", "/qlora-retrain/runs/letters/x"):
        driver.get(site.airflow.url + path)
        assert "0.8300" not in driver.page_source
        assert not driver.find_elements("css selector", "form")
