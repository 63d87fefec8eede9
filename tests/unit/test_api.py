"""The REST interface, over a real ledger, spool and embedded broker."""

from __future__ import annotations

import io
import json
import re
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response
from pydicom.uid import DeflatedExplicitVRLittleEndian

from service.core.errors import Reason
from service.core.job import State
from service.core.ledger import Delivery, DeliveryStatus, Ledger
from service.core.queue import make_celery
from service.core.settings import Destination, Settings
from service.core.spool import Spool
from service.intake import Intake
from service.objects import from_wire
from service.web.api.app import create_app
from tests.conftest import Clock
from tests.factories import encode, make_pair, uid, write_study
from tests.peers import MR_IMAGE_STORAGE

SMALL: dict[str, Any] = {"slices": 8, "rows": 8, "columns": 8}
PAIR = make_pair(**SMALL)
FILES = [encode(dataset) for dataset in PAIR.all]

SD_SERIES = {
    "description": "AI SYNTH T1+C SD - NOT ACQUIRED",
    "sop_class_uid": "1.2.840.10008.5.1.4.1.1.4",
    "series_instance_uid": uid("derived", "series"),
    "instances": 1,
}


class Api:
    """The application and everything behind it."""

    def __init__(self, folder: Path, clock: Clock, **settings: Any) -> None:
        pacs = Destination(name="pacs", host="127.0.0.1", port=104, ae_title="PACS")
        defaults: dict[str, Any] = {"destinations": (pacs,), "default_destinations": ("pacs",), "disk_low_bytes": 0}
        self.settings = Settings(data_dir=folder, **(defaults | settings))
        self.ledger = Ledger.open(self.settings.ledger_url, clock)
        self.spool = Spool(self.settings.spool_dir, self.settings.disk_low_bytes)
        self.queue = make_celery(self.settings)
        self.app: FastAPI = create_app(self.settings, self.ledger, self.spool, self.queue)
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def upload(self, *files: bytes, name: str = "IM.dcm", **fields: str) -> Response:
        parts = [("files", (name, content)) for content in files]
        return self.client.post("/api/v1/studies", files=parts, data=fields)

    def job_id(self) -> str:
        return str(self.upload(*FILES).json()["id"])

    def computed(self) -> str:
        """A job with a result and something to deliver."""
        job_id = self.job_id()
        running = self.ledger.jobs.claim(job_id, "worker", 60)
        assert running is not None
        with self.spool.publish(job_id) as folder:
            (folder / "sd").mkdir()
            (folder / "sd" / "0001.dcm").write_bytes(b"x" * 700_000)
            (folder / "report.json").write_text("{}")
        rows = [Delivery("pacs", uid("derived"), "sd", "sd/0001.dcm", MR_IMAGE_STORAGE)]
        report = {"seconds": {}, "results": {"sd": SD_SERIES}}
        assert self.ledger.jobs.finish(job_id, running.attempt, actor="worker", report=report, deliveries=rows)
        return job_id

    def messages(self, task: str) -> int:
        return len(list(self.settings.broker_dir.glob(f"*.{task}.msg")))

    def leftovers(self) -> list[Path]:
        return [path for path in self.settings.spool_dir.rglob("*") if path.is_file()]


@pytest.fixture
def open_api(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Api]]:
    """Makes an application with settings of its own, in a folder of that name."""
    opened: list[Api] = []

    def make(name: str = "", **settings: Any) -> Api:
        opened.append(Api(tmp_path / name, clock, **settings))
        return opened[-1]

    yield make
    for api in opened:
        api.ledger.close()


@pytest.fixture
def api(open_api: Callable[..., Api]) -> Api:
    return open_api()


def zipped(files: list[bytes], names: str = "study/IM{:04}") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, content in enumerate(files):
            archive.writestr(names.format(number), content)
    return stream.getvalue()


def studies(folder: Path, *odd: str, **options: Any) -> list[bytes]:
    return [path.read_bytes() for path in write_study(folder, odd=odd, **(SMALL | options))]


def assert_refused(response: Response, reason: Reason, status: int = 422) -> None:
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (response.status_code, body["reason"], body["status"]) == (status, reason.name, status), body
    assert body["title"] == reason.text
    assert body["type"] == f"/problems#{reason.name}"
    assert body["detail"]


# --- uploads ----------------------------------------------------------------------------------------------------------


def test_a_study_of_single_files_becomes_a_job_at_once(api: Api) -> None:
    answer = api.upload(*FILES)
    job = answer.json()
    assert (answer.status_code, job["state"], job["source"]) == (202, "QUEUED", "rest")
    assert job["destinations"] == ["pacs"]
    assert answer.headers["location"] == f"/api/v1/jobs/{job['id']}"
    assert len(api.ledger.jobs.inputs(job["id"])) == len(FILES)
    assert api.messages("process") == 1


def test_a_zip_gives_the_same_job_as_the_single_files(api: Api) -> None:
    first, again = api.upload(*FILES), api.upload(zipped(FILES), name="study.zip")
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["id"] == again.json()["id"]


def test_a_study_that_already_came_over_dicom_is_not_computed_twice(api: Api) -> None:
    intake = Intake(api.settings, api.ledger, api.spool, api.queue)
    for content in FILES:
        dataset = pydicom.dcmread(io.BytesIO(content))
        offset = content.index(b"\x08\x00\x05\x00")  # (0008,0005) opens the data set
        intake.admit(from_wire(content[offset:], dataset.file_meta.TransferSyntaxUID), "dimse:MR")
    answer = api.upload(*FILES)
    assert answer.status_code == 202
    assert {item.source for item in api.ledger.jobs.inputs(answer.json()["id"])} == {"dimse:MR"}


def test_options_of_the_form_reach_the_job(api: Api) -> None:
    pre, low = uid(0, "pre"), uid(0, "low")
    job = api.upload(*FILES, engine="linear", pre_series_uid=pre, low_series_uid=low).json()
    assert (job["engine"], job["pre_series_uid"], job["low_series_uid"]) == ("linear", pre, low)


@pytest.mark.parametrize("fields", [{"engine": "magic"}, {"pre_series_uid": "../x"}, {"egnine": "linear"}])
def test_form_fields_that_cannot_be_meant_are_refused_without_quoting_them(api: Api, fields: dict[str, str]) -> None:
    answer = api.upload(*FILES, **fields)
    assert (answer.status_code, answer.json()["reason"]) == (422, "INVALID_REQUEST")
    assert next(iter(fields)) in answer.json()["detail"]
    assert next(iter(fields.values())) not in answer.text
    assert api.leftovers() == []


def test_the_preamble_of_an_upload_is_not_kept(api: Api) -> None:
    hostile = [b"MZ" + b"\x90" * 126 + content[128:] for content in FILES]
    job_id = api.upload(*hostile).json()["id"]
    stored = [api.spool.path(item.sha256).read_bytes() for item in api.ledger.jobs.inputs(job_id)]
    assert {content[:132] for content in stored} == {bytes(128) + b"DICM"}


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ("two_patients", Reason.TWO_PATIENTS),
        ("two_studies", Reason.TWO_STUDIES),
        ("not_mr", Reason.NOT_MR),
        ("not_dicom", Reason.UNREADABLE_FILE),
        ("empty_file", Reason.UNREADABLE_FILE),
    ],
)
@pytest.mark.parametrize("as_zip", [False, True])
def test_what_is_wrong_is_refused_at_the_door(api: Api, tmp_path: Path, odd: str, reason: Reason, as_zip: bool) -> None:
    files = studies(tmp_path / "odd", odd)
    answer = api.upload(zipped(files), name="a.zip") if as_zip else api.upload(*files)
    assert_refused(answer, reason)
    assert api.leftovers() == []
    assert api.ledger.received.waiting() == []


def test_objects_of_other_kinds_beside_the_images_are_set_aside(api: Api, tmp_path: Path) -> None:
    answer = api.upload(*studies(tmp_path / "odd", "ct_beside"))
    assert answer.status_code == 202
    assert len(api.ledger.jobs.inputs(answer.json()["id"])) == len(FILES)


def test_a_deflated_file_is_refused_without_being_inflated(api: Api) -> None:
    dataset = pydicom.dcmread(io.BytesIO(FILES[0]))
    dataset.add_new(0x00091001, "OB", bytes(50_000_000))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    content = stream.getvalue()
    tracemalloc.start()
    try:
        assert_refused(api.upload(content), Reason.UNSUPPORTED_OBJECT)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10_000_000


@pytest.mark.parametrize("name", ["notes.txt", "DICOMDIR", ".hidden"])
def test_an_upload_without_dicom_is_refused(api: Api, name: str) -> None:
    assert_refused(api.upload(b"hello", name=name), Reason.EMPTY_UPLOAD)


def test_an_empty_zip_is_refused(api: Api) -> None:
    assert_refused(api.upload(zipped([]), name="a.zip"), Reason.EMPTY_UPLOAD)


def test_a_zip_inside_a_zip_is_not_followed(api: Api) -> None:
    assert_refused(api.upload(zipped([zipped(FILES)], names="inner.zip"), name="a.zip"), Reason.EMPTY_UPLOAD)


def test_a_path_outside_the_zip_is_refused(api: Api) -> None:
    assert_refused(api.upload(zipped(FILES, names="../{}.dcm"), name="a.zip"), Reason.ARCHIVE_UNSAFE_PATH)
    assert api.leftovers() == []


def test_a_damaged_zip_is_refused(api: Api) -> None:
    assert_refused(api.upload(zipped(FILES)[:-30], name="a.zip"), Reason.ARCHIVE_UNREADABLE)


def test_a_zip_bomb_is_refused(api: Api) -> None:
    assert_refused(api.upload(zipped([bytes(40 << 20)]), name="a.zip"), Reason.ARCHIVE_TOO_LARGE, 413)
    assert api.leftovers() == []


def test_another_image_under_a_known_uid_is_refused_and_the_first_one_kept(api: Api) -> None:
    job_id = api.job_id()
    changed = bytearray(FILES[3])
    changed[-1] ^= 1
    before = {item.sha256 for item in api.ledger.jobs.inputs(job_id)}
    assert_refused(api.upload(*FILES[:3], bytes(changed)), Reason.INSTANCE_CONFLICT, 409)
    assert {item.sha256 for item in api.ledger.received.of_study(uid(0, "study"))} == before


def test_a_study_that_holds_the_uid_of_an_image_of_another_study_is_refused_and_nothing_of_it_kept(api: Api) -> None:
    api.job_id()
    before = api.leftovers()
    other = make_pair(**SMALL).all
    for number, dataset in enumerate(other):
        dataset.StudyInstanceUID = uid("another study")
        if number < len(other) - 1:
            dataset.SOPInstanceUID = uid("another study", number)
    assert_refused(api.upload(*map(encode, other)), Reason.INSTANCE_CONFLICT, 409)
    assert api.ledger.received.of_study(uid("another study")) == []
    assert api.leftovers() == before


def test_two_contents_under_one_uid_in_one_upload_are_refused(api: Api) -> None:
    changed = bytearray(FILES[0])
    changed[-1] ^= 1
    assert_refused(api.upload(*FILES, bytes(changed)), Reason.INSTANCE_CONFLICT, 409)
    assert api.leftovers() == []


def test_an_upload_beyond_the_limits_is_refused(open_api: Callable[..., Api]) -> None:
    few = open_api("few", max_upload_files=3)
    assert_refused(few.upload(*FILES), Reason.UPLOAD_TOO_LARGE, 413)
    small = open_api("small", max_upload_bytes=5000)
    assert_refused(small.upload(*FILES), Reason.UPLOAD_TOO_LARGE, 413)
    assert few.leftovers() == small.leftovers() == []


def test_nothing_is_taken_in_when_the_disk_is_low(open_api: Callable[..., Api]) -> None:
    full = open_api(disk_low_bytes=1 << 62)
    assert_refused(full.upload(*FILES), Reason.STORAGE_FULL, 507)


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "application/json"}, b"{}", 415),
        ({"content-type": "multipart/form-data"}, b"--x", 415),
        ({}, b"", 415),
        ({"content-type": "multipart/form-data; boundary=x"}, b"garbage", 400),
        (
            {"content-type": "multipart/form-data; boundary=x"},
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.dcm"\r\n\r\nhalf',
            400,
        ),
    ],
)
def test_a_malformed_body_is_a_problem_and_leaves_nothing(
    api: Api, headers: dict[str, str], body: bytes, status: int
) -> None:
    answer = api.client.post("/api/v1/studies", content=body, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert api.leftovers() == []


# --- jobs -------------------------------------------------------------------------------------------------------------


def jobs_of(api: Api, clock: Clock, count: int) -> list[str]:
    ids = []
    for seed in range(count):
        clock.advance(1)
        answer = api.upload(*[encode(dataset) for dataset in make_pair(seed=seed, **SMALL).all])
        ids.append(answer.json()["id"])
    return ids[::-1]


def test_jobs_are_listed_newest_first_page_by_page(api: Api, clock: Clock) -> None:
    ids, seen, query = jobs_of(api, clock, 3), [], {"limit": "2"}
    while True:
        page = api.client.get("/api/v1/jobs", params=query).json()
        seen.append([job["id"] for job in page["jobs"]])
        if page["next"] is None:
            break
        query["before"] = page["next"]
    assert seen == [ids[:2], ids[2:]]


def test_jobs_can_be_filtered_by_several_states(api: Api, clock: Clock) -> None:
    ids = jobs_of(api, clock, 3)
    api.ledger.jobs.cancel(ids[0], "test")
    api.ledger.jobs.claim(ids[1], "worker", 60)
    page = api.client.get("/api/v1/jobs?state=CANCELLED&state=RUNNING").json()
    assert [(job["id"], job["state"]) for job in page["jobs"]] == [(ids[0], "CANCELLED"), (ids[1], "RUNNING")]


@pytest.mark.parametrize("query", ["state=SLEEPING", "limit=0", "limit=501", "limit=many"])
def test_a_query_that_cannot_be_meant_is_a_problem(api: Api, query: str) -> None:
    answer = api.client.get(f"/api/v1/jobs?{query}")
    assert (answer.status_code, answer.json()["reason"]) == (422, "INVALID_REQUEST")
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_job_tells_its_reason_in_words_and_its_report(api: Api) -> None:
    job_id = api.job_id()
    api.ledger.jobs.claim(job_id, "worker", 60)
    api.ledger.jobs.move(
        job_id, [State.RUNNING], State.REJECTED, actor="worker", reason=Reason.MISSING_SLICES, detail="7 of 8"
    )
    job = api.client.get(f"/api/v1/jobs/{job_id}").json()
    assert (job["state"], job["reason"], job["detail"]) == ("REJECTED", "MISSING_SLICES", "7 of 8")
    assert job["reason_text"] == Reason.MISSING_SLICES.text
    assert job["report"] == {}
    assert job["results"] == []


def test_a_job_lists_the_series_that_it_made(api: Api) -> None:
    job = api.client.get(f"/api/v1/jobs/{api.computed()}").json()
    assert job["results"] == [{"kind": "sd", **SD_SERIES}]


def test_the_history_tells_who_did_what(api: Api) -> None:
    job_id = api.job_id()
    api.client.post(f"/api/v1/jobs/{job_id}/cancel")
    steps = api.client.get(f"/api/v1/jobs/{job_id}/history").json()
    assert [(step["from_state"], step["to_state"]) for step in steps] == [(None, "QUEUED"), ("QUEUED", "CANCELLED")]
    assert steps[1]["actor"] == "rest:testclient"


def test_a_cancelled_job_can_be_run_again_and_a_worker_is_told(api: Api) -> None:
    job_id = api.job_id()
    assert api.client.post(f"/api/v1/jobs/{job_id}/cancel").json()["state"] == "CANCELLED"
    answer = api.client.post(f"/api/v1/jobs/{job_id}/rerun")
    assert (answer.status_code, answer.json()["state"]) == (202, "QUEUED")
    assert api.messages("process") == 2


def test_a_delivered_job_can_be_sent_again(api: Api) -> None:
    job_id = api.computed()
    job = api.ledger.jobs.get(job_id)
    assert job is not None
    api.ledger.deliveries.record(
        job_id, "pacs", uid("derived"), DeliveryStatus.SENT, attempt=job.attempt, dimse_status=0
    )
    api.ledger.jobs.move(job_id, [State.DELIVERING], State.DELIVERED, actor="worker")
    assert api.client.post(f"/api/v1/jobs/{job_id}/resend").json()["state"] == "DELIVERING"
    assert api.messages("deliver") == 1
    assert [row.status for row in api.ledger.deliveries.of_job(job_id)] == [DeliveryStatus.PENDING]


def test_a_job_is_run_again_with_the_series_that_a_person_names(api: Api) -> None:
    first = api.upload(*FILES).json()
    named = {"pre_series_uid": uid(0, "pre"), "low_series_uid": uid(0, "low")}
    answer = api.client.post(f"/api/v1/jobs/{first['id']}/rerun", json=named)
    again = answer.json()
    assert answer.status_code == 202
    assert again["id"] != first["id"]
    assert {key: again[key] for key in named} == named
    assert (again["study_uid"], again["destinations"]) == (first["study_uid"], first["destinations"])
    assert api.client.post("/api/v1/jobs/nowhere/rerun", json=named).status_code == 404
    assert api.client.post(f"/api/v1/jobs/{first['id']}/rerun", json={"pre_series_uid": "../x"}).status_code == 422


def test_a_job_whose_series_a_person_names_once_more_runs_again_and_its_history_says_who_asked(api: Api) -> None:
    first, named = api.job_id(), {"pre_series_uid": uid(0, "pre"), "low_series_uid": uid(0, "low")}
    rerun = f"/api/v1/jobs/{first}/rerun"
    job_id = api.client.post(rerun, json=named).json()["id"]
    assert [step.actor for step in api.ledger.jobs.history(job_id)] == ["rest:testclient"]
    under_way = api.client.post(rerun, json=named)
    assert (under_way.status_code, under_way.json()["reason"]) == (409, "CONFLICT")
    assert job_id in under_way.json()["detail"]
    api.ledger.jobs.claim(job_id, "worker", 60)
    api.ledger.jobs.move(job_id, [State.RUNNING], State.FAILED, actor="worker", reason=Reason.STORAGE_FULL)
    again = api.client.post(rerun, json=named)
    assert (again.status_code, again.json()["id"], again.json()["state"]) == (202, job_id, "QUEUED")
    assert api.ledger.jobs.history(job_id)[-1].actor == "rest:testclient"
    assert api.messages("process") == 3


@pytest.mark.parametrize("action", ["rerun", "resend"])
def test_an_action_that_the_state_does_not_allow_is_a_conflict(api: Api, action: str) -> None:
    answer = api.client.post(f"/api/v1/jobs/{api.job_id()}/{action}")
    assert (answer.status_code, answer.json()["reason"]) == (409, "CONFLICT")
    assert "QUEUED" in answer.json()["detail"]


def test_two_clicks_on_cancel_cancel_once(api: Api) -> None:
    job_id = api.job_id()
    statuses = [api.client.post(f"/api/v1/jobs/{job_id}/cancel").status_code for _ in range(2)]
    assert statuses == [202, 409]


def test_a_result_is_downloaded_as_a_zip_with_everything_in_it(api: Api) -> None:
    job_id = api.computed()
    answer = api.client.get(f"/api/v1/jobs/{job_id}/result")
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"] == f'attachment; filename="lowgad-{job_id}.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["report.json", "sd/0001.dcm"]
        assert archive.read("sd/0001.dcm") == b"x" * 700_000


def test_a_job_without_result_has_nothing_to_download(api: Api) -> None:
    assert api.client.get(f"/api/v1/jobs/{api.job_id()}/result").status_code == 404


# --- errors, health, description --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        ("GET", "/api/v1/nothing", 404, "NOT_FOUND"),
        ("GET", "/nothing", 404, "NOT_FOUND"),
        ("GET", "/api/v1/jobs/unknown", 404, "NOT_FOUND"),
        ("GET", "/api/v1/jobs?before=unknown", 404, "NOT_FOUND"),
        ("POST", "/api/v1/jobs/unknown/cancel", 404, "NOT_FOUND"),
        ("GET", "/api/v1/jobs/unknown/result", 404, "NOT_FOUND"),
        ("GET", "/api/v1/jobs/..%2f..%2fetc/result", 404, "NOT_FOUND"),
        ("DELETE", "/api/v1/jobs", 405, "METHOD_NOT_ALLOWED"),
    ],
)
def test_every_error_is_a_problem(api: Api, method: str, path: str, status: int, reason: str) -> None:
    answer = api.client.request(method, path)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert (answer.json()["status"], answer.json()["reason"]) == (status, reason)


def test_an_unexpected_error_tells_the_client_nothing(api: Api) -> None:
    api.app.add_api_route("/api/v1/broken", lambda: json.loads("Doe^Jane"))
    answer = api.client.get("/api/v1/broken")
    assert (answer.status_code, answer.json()["reason"]) == (500, "INTERNAL_ERROR")
    assert "Doe" not in answer.text


def test_a_page_of_another_site_cannot_act(api: Api) -> None:
    path = f"/api/v1/jobs/{api.job_id()}/cancel"
    hostile = [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": "http://testserver"},
    ]
    assert [api.client.post(path, headers=headers).status_code for headers in hostile] == [403] * 4
    assert api.client.post(path, headers={"origin": "http://testserver"}).status_code == 202


def test_every_answer_forbids_what_browsers_should_not_do(api: Api) -> None:
    for path in ("/", "/api/v1/jobs", "/nothing", "/static/live.js"):
        headers = api.client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_the_process_is_alive_and_ready(api: Api) -> None:
    assert api.client.get("/healthz").json() == {"status": "alive"}
    answer = api.client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "ready")
    assert set(answer.json()["checks"]) == {"database", "spool", "disk", "broker"}


def test_a_broker_that_is_down_degrades_but_uploads_go_on(open_api: Callable[..., Api]) -> None:
    api = open_api(broker_url="redis://127.0.0.1:1/0")
    answer = api.client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert api.upload(*FILES).status_code == 202


def test_a_low_disk_or_a_lost_spool_is_not_ready(open_api: Callable[..., Api]) -> None:
    low = open_api("low", disk_low_bytes=1 << 62).client.get("/readyz")
    assert (low.status_code, low.json()["checks"]["disk"]["ok"]) == (503, False)
    lost = open_api("lost")
    shutil.rmtree(lost.settings.spool_dir / "unfinished")
    answer = lost.client.get("/readyz")
    assert (answer.status_code, answer.json()["checks"]["spool"]["ok"]) == (503, False)


def test_a_database_that_is_away_is_not_ready_and_a_problem(api: Api, tmp_path: Path) -> None:
    api.ledger.close()
    for path in tmp_path.glob("ledger.sqlite*"):
        path.unlink()
    (tmp_path / "ledger.sqlite").mkdir()
    assert api.client.get("/readyz").json()["checks"]["database"]["ok"] is False
    answer = api.client.get("/api/v1/jobs")
    assert (answer.status_code, answer.json()["reason"]) == (503, "DATABASE_UNAVAILABLE")


def test_every_reason_is_explained(api: Api) -> None:
    explained = {item["reason"]: item["text"] for item in api.client.get("/problems").json()}
    assert explained.items() >= {reason.name: reason.text for reason in Reason}.items()
    assert all(explained.values())


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/no/such/page", {}),
        ("GET", "/api/v1/jobs/unknown", {}),
        ("DELETE", "/api/v1/jobs", {}),
        ("POST", "/api/v1/studies", {"content-type": "text/plain"}),
        ("GET", "/api/v1/jobs?limit=0", {}),
        ("POST", "/api/v1/jobs/unknown/cancel", {"origin": "http://elsewhere.example"}),
    ],
)
def test_whatever_a_request_is_refused_for_is_explained(
    api: Api, method: str, path: str, headers: dict[str, str]
) -> None:
    explained = {item["reason"] for item in api.client.get("/problems").json()}
    answer = api.client.request(method, path, headers=headers)
    assert answer.status_code >= 400
    assert answer.json()["reason"] in explained


def test_a_job_that_ended_before_its_report_does_not_say_that_it_will_be_read(api: Api) -> None:
    job_id = api.upload(*FILES).json()["id"]
    assert "Not read yet." in api.client.get(f"/jobs/{job_id}").text
    api.client.post(f"/api/v1/jobs/{job_id}/cancel")
    page = api.client.get(f"/jobs/{job_id}").text
    assert "Not read yet." not in page
    assert "the job ended before it was written" in page


def test_every_operation_is_described_with_examples(api: Api) -> None:
    description = api.client.get("/api/v1/openapi.json").json()
    schemas = description["components"]["schemas"]
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            for status, response in operation["responses"].items():
                for media_type, content in response["content"].items():
                    assert has_example(content, schemas), (method, path, status, media_type)
            if "requestBody" in operation:
                assert all(has_example(content, schemas) for content in operation["requestBody"]["content"].values())
    assert {"/api/v1/studies", "/api/v1/jobs", "/api/v1/jobs/{job_id}/resend", "/readyz"} <= set(description["paths"])
    assert not re.search(r"\{(patient|study)", json.dumps(list(description["paths"])))


def has_example(content: dict[str, Any], schemas: dict[str, Any]) -> bool:
    if "example" in content or "examples" in content:
        return True
    schema = content["schema"]
    schema = schema.get("items", schema)
    return bool(schemas[schema["$ref"].rsplit("/", 1)[1]].get("examples"))
