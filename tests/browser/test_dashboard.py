"""The operator's pages in headless Chromium, over a real server, ledger and spool."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from service.core.errors import Reason
from service.core.job import JobOptions, Stage, State
from service.core.ledger import Delivery, DeliveryStatus, Ledger
from service.core.queue import make_celery
from service.core.settings import Settings
from service.core.spool import Spool
from service.intake import Intake
from service.objects import from_file
from service.web.api.app import create_app
from service.web.dashboard.views import BANNER
from tests.factories import encode, make_pair, uid
from tests.peers import MR_IMAGE_STORAGE, wait_until

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
)


class Site:
    """A served dashboard and what it shows."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(data_dir=folder)
        self.ledger = Ledger.open(self.settings.ledger_url)
        self.spool = Spool(self.settings.spool_dir)
        self.queue = make_celery(self.settings)
        self.intake = Intake(self.settings, self.ledger, self.spool, self.queue)
        app = create_app(self.settings, self.ledger, self.spool, self.queue)
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._door.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._door]})

    def __enter__(self) -> Site:
        self._thread.start()
        wait_until(lambda: self._server.started, what="the server's start")
        return self

    def __exit__(self, *_: object) -> None:
        self.go_away()
        self.ledger.close()

    def go_away(self) -> None:
        """Stop serving, as when the machine is restarted."""
        self._server.should_exit = True
        self._thread.join()
        self._door.close()

    def receive(self, seed: int) -> str:
        """A study that has arrived and waits; its UID."""
        for dataset in make_pair(seed=seed, slices=8, rows=8, columns=8).all:
            self.intake.admit(from_file(encode(dataset)), "dimse:SKYRA3T")
        return uid(seed, "study")

    def job(self, seed: int = 0) -> str:
        job, _ = self.intake.start(self.receive(seed), JobOptions(destinations=("pacs",)), "dimse:SKYRA3T")
        return job.id

    def run(self, job_id: str, stage: Stage, progress: float) -> int:
        """A worker is at it; the attempt."""
        running = self.ledger.jobs.claim(job_id, "worker:gpu1", 60)
        assert running is not None
        assert self.ledger.jobs.heartbeat(running, stage, progress, lease_seconds=60)
        return running.attempt

    def finish(self, job_id: str, attempt: int, instances: int) -> None:
        with self.spool.publish(job_id) as folder:
            (folder / "report.json").write_text("{}")
        rows = [Delivery("pacs", uid(job_id, n), "sd", f"sd/{n:04}.dcm", MR_IMAGE_STORAGE) for n in range(instances)]
        report = {"acquisition": {"dose_mmol_per_kg": {"value": 0.025, "source": "tag (0018,1041)"}}}
        assert self.ledger.jobs.finish(job_id, attempt, actor="worker:gpu1", report=report, deliveries=rows)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Site(tmp_path) as served:
        yield served


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium and its driver are not installed")
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(chromium: Chrome) -> Iterator[Chrome]:
    """The browser. Whatever the page complained about on its console fails the test."""
    chromium.get_log("browser")
    yield chromium
    complaints = [entry["message"] for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
    chromium.get("about:blank")
    assert [line for line in complaints if "ERR_CONNECTION_REFUSED" not in line] == []


def expect_shown(page: Chrome, text: str) -> None:
    waiting = WebDriverWait(page, 20, ignored_exceptions=[StaleElementReferenceException])
    waiting.until(lambda _: text in main(page).text, f"{text!r} was never shown")


def main(page: Chrome) -> WebElement:
    return page.find_element(By.TAG_NAME, "body")


def test_a_job_is_shown_and_the_page_follows_the_ledger_by_itself(site: Site, page: Chrome) -> None:
    job_id = site.job()
    page.get(site.url)
    page.execute_script("window.neverReloaded = true")
    expect_shown(page, "Waiting for a worker")
    assert job_id[:8] in main(page).text
    attempt = site.run(job_id, Stage.INFER, 0.62)
    expect_shown(page, "Computing enhancement")
    assert "62 %" in main(page).text
    site.ledger.jobs.move(
        job_id, [State.RUNNING], State.NEEDS_REVIEW, actor="worker", reason=Reason.UNKNOWN_DOSE, attempt=attempt
    )
    expect_shown(page, Reason.UNKNOWN_DOSE.text)
    assert page.execute_script("return window.neverReloaded") is True


def test_a_study_that_is_being_received_is_shown_until_its_job_starts(site: Site, page: Chrome) -> None:
    study_uid = site.receive(0)
    page.get(site.url)
    expect_shown(page, "Being received")
    assert study_uid[-12:] in main(page).text
    site.intake.start(study_uid, JobOptions(), "dimse:SKYRA3T")
    WebDriverWait(page, 20).until(lambda _: "Being received" not in main(page).text)


def test_the_buttons_of_a_job_do_what_they_say(site: Site, page: Chrome) -> None:
    job_id = site.job()
    page.get(f"{site.url}/jobs/{job_id}")
    page.find_element(By.ID, "do-cancel").click()
    expect_shown(page, "Stopped; nothing more will happen")
    page.find_element(By.ID, "do-rerun").click()
    expect_shown(page, "Waiting for a worker")
    assert [step.to_state for step in site.ledger.jobs.history(job_id)] == [State.QUEUED, State.CANCELLED, State.QUEUED]
    assert site.ledger.jobs.history(job_id)[1].actor == "dashboard:127.0.0.1"


def test_a_click_that_comes_too_late_is_explained(site: Site, page: Chrome) -> None:
    job_id = site.job()
    page.get(f"{site.url}/jobs/{job_id}")
    page.execute_script("document.querySelector('form').action = arguments[0]", f"/jobs/{job_id}/resend")
    page.find_element(By.ID, "do-cancel").click()
    expect_shown(page, "The state QUEUED does not allow the action resend.")
    page.get_log("browser")  # the browser itself reports the status 409


def test_one_page_tells_everything_about_a_job(site: Site, page: Chrome) -> None:
    job_id = site.job()
    attempt = site.run(job_id, Stage.WRITE, 0.9)
    site.finish(job_id, attempt, instances=3)
    site.ledger.deliveries.record(job_id, "pacs", uid(job_id, 0), DeliveryStatus.SENT, attempt=attempt, dimse_status=0)
    refused = "0xA900 the data set does not match"
    site.ledger.deliveries.record(
        job_id, "pacs", uid(job_id, 1), DeliveryStatus.FAILED, attempt=attempt, dimse_status=0xA900, error=refused
    )
    page.get(f"{site.url}/jobs/{job_id}")
    expect_shown(page, "1 of 3 sent")
    text = main(page).text
    for shown in ("Dose (mmol/kg)", "0.025", "tag (0018,1041)", "1 refused", "by worker:gpu1", uid(0, "study")):
        assert shown in text
    page.find_element(By.CSS_SELECTOR, "#instances summary").click()
    expect_shown(page, refused)
    assert page.find_element(By.ID, "download").get_attribute("href").endswith(f"/api/v1/jobs/{job_id}/result")


def test_opened_details_and_the_keyboard_focus_survive_an_update(site: Site, page: Chrome) -> None:
    job_id = site.job()
    attempt = site.run(job_id, Stage.WRITE, 0.9)
    site.finish(job_id, attempt, instances=2)
    page.get(f"{site.url}/jobs/{job_id}")
    page.find_element(By.CSS_SELECTOR, "#instances summary").click()
    button = page.find_element(By.ID, "do-cancel")
    page.execute_script("arguments[0].focus()", button)
    site.ledger.deliveries.record(job_id, "pacs", uid(job_id, 0), DeliveryStatus.SENT, attempt=attempt, dimse_status=0)
    expect_shown(page, "1 of 2 sent")
    assert page.execute_script("return document.activeElement.id") == "do-cancel"
    assert page.execute_script("return document.getElementById('instances').open") is True


def test_a_lost_connection_is_told(site: Site, page: Chrome) -> None:
    page.get(site.url)
    expect_shown(page, "Live")
    site.go_away()
    expect_shown(page, "Connection lost, trying again")


def test_everything_can_be_reached_by_keyboard_and_is_announced(site: Site, page: Chrome) -> None:
    job_id = site.job()
    page.get(site.url)
    expect_shown(page, "Live")
    reached = set()
    for _ in range(20):
        page.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(page.execute_script("return document.activeElement.id || document.activeElement.className"))
    assert f"job-{job_id}" in reached
    assert "skip" in reached
    announcer = page.find_element(By.CSS_SELECTOR, "[role=status]")
    assert announcer.get_attribute("textContent") == "1 queued"
    site.run(job_id, Stage.READ, 0.1)
    WebDriverWait(page, 20).until(lambda _: announcer.get_attribute("textContent") == "1 running")


@pytest.mark.parametrize("path", ["/", "/?state=FAILED", "/jobs/unknown"])
def test_every_page_says_what_this_is_and_loads_nothing_from_elsewhere(site: Site, page: Chrome, path: str) -> None:
    page.get(site.url + path)
    assert BANNER in main(page).text
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded
    assert all(name.startswith(site.url) for name in loaded)
    if path == "/jobs/unknown":
        page.get_log("browser")  # the browser itself reports the status 404


def test_nothing_breaks_the_content_security_policy(site: Site, page: Chrome) -> None:
    job_id = site.job()
    for path in ("/", f"/jobs/{job_id}"):
        page.get(site.url + path)
        expect_shown(page, "Live")
        source = page.page_source
        assert " style=" not in source
        assert " onclick=" not in source
