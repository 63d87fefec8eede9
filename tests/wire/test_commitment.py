"""Storage commitment both ways, against Orthanc and against peers that do what a test wants."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pynetdicom import AE, build_role, evt
from pynetdicom.association import Association

from service.core.dicom.commitment import PUSH_MODEL, PUSH_MODEL_INSTANCE, Reference, Report, Request
from service.core.errors import Reason
from service.core.job import Job, Kind, State
from service.core.ledger import DeliveryStatus, Ledger
from service.core.settings import CommitmentRequestor
from service.core.spool import Spool
from service.dicom.commitment import CLAIM_SECONDS, MOST_TRIES, StorageCommitment
from service.dicom.listener import Listener
from service.intake import Intake
from tests.conftest import Clock
from tests.factories import uid, write_study
from tests.factories.reading import paired
from tests.factories.results import ALL, findings_of
from tests.peers import EXPLICIT_VR_LITTLE_ENDIAN, MR_IMAGE_STORAGE, free_port, running_orthanc, running_scp, wait_until
from tests.sites import PAIR, Site
from worker.compose.results import compose

COMMITTING = {"storage_commitment": True, "commitment_wait_seconds": 0}
HOUR = 3600.0


@contextmanager
def listening(site: Site, port: int = 0) -> Iterator[tuple[int, StorageCommitment]]:
    """The site's listener, in this process; gives its port."""
    intake = Intake(site.settings, site.ledger, site.spool, site.queue, site.clock)
    commitment = StorageCommitment(site.settings, site.ledger, site.spool, site.clock)
    settings = site.settings.model_copy(update={"listen_port": port})
    listener = Listener(settings, intake, site.spool, commitment)
    try:
        yield listener.start(), commitment
    finally:
        listener.stop(0.2)


@dataclass
class Archive:
    """Stores everything, and keeps what `reasons` does not give a Failure Reason for."""

    port: int
    received: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    kept_as: dict[str, str] = field(default_factory=dict)  # under another SOP class than it was sent with
    status: int = 0x0000  # of the answer to N-ACTION
    on_same_association: bool = False
    seconds: float = 0.1  # before it reports
    answers: list[int] = field(default_factory=list)  # what was answered to our reports

    def report(self, request: Request) -> Report:
        kept = tuple(item for item in request.references if item.sop_instance_uid not in self.reasons)
        lost = [item for item in request.references if item not in kept]
        named = (
            Reference(self.kept_as.get(item.sop_instance_uid, item.sop_class_uid), item.sop_instance_uid)
            for item in kept
        )
        failed = tuple((item, self.reasons[item.sop_instance_uid]) for item in lost)
        return Report(request.transaction_uid, tuple(named), failed)

    def store(self, event: Any) -> int:
        self.received.append(str(event.request.AffectedSOPInstanceUID))
        return 0x0000

    def act(self, event: Any) -> tuple[int, None]:
        request = Request.of(event.action_information)
        self.requests.append(request)
        if self.on_same_association and self.status == 0:
            threading.Timer(
                self.seconds, lambda: self.answers.append(send_report(event.assoc, self.report(request)))
            ).start()
        return self.status, None


def send_report(association: Association, report: Report) -> int:
    answer, _ = association.send_n_event_report(report.to_dataset(), report.event_type, PUSH_MODEL, PUSH_MODEL_INSTANCE)
    return int(answer.Status)


def call_with_report(port: int, report: Report, calling: str = "ARCHIVE") -> int:
    """What our listener answers to a report on a new association."""
    entity = AE(ae_title=calling)
    entity.add_requested_context(PUSH_MODEL)
    association = entity.associate(
        "127.0.0.1", port, ae_title="LOWGAD", ext_neg=[build_role(PUSH_MODEL, scp_role=True)]
    )
    assert association.is_established
    assert association.accepted_contexts[0].as_scp
    try:
        return send_report(association, report)
    finally:
        association.release()


@contextmanager
def running_archive(port: int | None = None, **how: Any) -> Iterator[Archive]:
    archive = Archive(port or free_port(), **how)
    entity = AE(ae_title="ARCHIVE")
    entity.add_supported_context(MR_IMAGE_STORAGE, EXPLICIT_VR_LITTLE_ENDIAN)
    entity.add_supported_context(PUSH_MODEL)
    handlers = [(evt.EVT_C_STORE, archive.store), (evt.EVT_N_ACTION, archive.act)]
    server = entity.start_server(("127.0.0.1", archive.port), block=False, evt_handlers=handlers)
    try:
        yield archive
    finally:
        server.shutdown()


@pytest.fixture
def make_site(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Site]]:
    opened: list[Site] = []

    def make(port: int = 104, **settings: Any) -> Site:
        settings = {"destination": COMMITTING | settings.pop("destination", {}), **settings}
        opened.append(Site(tmp_path / "site", clock, port, **settings))
        return opened[-1]

    yield make
    for site in opened:
        site.ledger.close()


def delivered(site: Site) -> str:
    """The id of a job whose result was sent, and whose destination was asked once."""
    job_id = site.new_job("pacs")
    site.worker.process(job_id)
    site.worker.deliver(job_id)
    return job_id


def later(site: Site, job_id: str, seconds: float) -> State:
    """Let time pass, and let the worker look at the job again; the sweep must agree that it is time."""
    site.clock.advance(seconds)
    assert [job.id for job in site.ledger.jobs.due(0)] == [job_id]
    site.worker.deliver(job_id)
    return site.job(job_id).state


# --- as SCU -----------------------------------------------------------------------------------------------------------


def test_orthanc_commits_itself_to_every_kind_of_result_on_an_association_of_its_own(
    tmp_path: Path, make_site: Callable[..., Site]
) -> None:
    port = free_port()
    with running_orthanc(tmp_path / "orthanc", DicomModalities={"lowgad": ["LOWGAD", "127.0.0.1", port]}) as orthanc:
        site = make_site(orthanc.dicom_port, destination={"ae_title": "ORTHANC"})
        site.computation.series = compose(findings_of(paired(tmp_path / "in")), ALL)
        with listening(site, port):
            job_id = delivered(site)
            wait_until(lambda: site.job(job_id).state is State.COMMITTED, what="the commitment")
        rows = site.ledger.deliveries.of_job(job_id)
        assert orthanc.sop_instance_uids() == {row.sop_instance_uid for row in rows}
    assert {(row.kind, row.commitment.value) for row in rows} == {(kind.value, "COMMITTED") for kind in Kind}
    assert site.states(job_id)[-2:] == [State.DELIVERED, State.COMMITTED]
    assert site.ledger.jobs.history(job_id)[-1].actor == "dimse:ORTHANC"
    assert site.ledger.jobs.due(0) == []


def test_a_report_on_the_association_of_the_request_is_taken(make_site: Callable[..., Site]) -> None:
    with running_archive(on_same_association=True) as archive:
        site = make_site(archive.port, destination={"commitment_wait_seconds": 10})
        job_id = delivered(site)
    assert (site.job(job_id).state, archive.answers) == (State.COMMITTED, [0x0000])
    [request] = archive.requests
    assert {item.sop_instance_uid for item in request.references} == set(archive.received)
    assert {item.sop_class_uid for item in request.references} == {MR_IMAGE_STORAGE}


def test_a_delivery_with_storage_commitment_asks_the_ledger_six_times_and_once_for_every_instance(
    make_site: Callable[..., Site],
) -> None:
    with running_archive(on_same_association=True) as archive:
        site = make_site(archive.port, destination={"commitment_wait_seconds": 10})
        job_id = site.new_job("pacs")
        site.worker.process(job_id)
        site.counted.calls.clear()
        site.worker.deliver(job_id)
    assert site.job(job_id).state is State.COMMITTED
    calls = site.asked_of_the_ledger()
    assert calls.pop("deliveries.record") == len(archive.received) == 4
    del calls["commitments.get"]  # once a second, while an answer may come on another association
    assert calls == {
        "deliveries.claim": 1,
        "deliveries.finish": 1,
        "commitments.claim": 1,
        "commitments.ask": 1,
        "commitments.answer": 1,
        "deliveries.of_job": 1,
    }


def test_an_answer_on_another_association_ends_the_waiting(make_site: Callable[..., Site]) -> None:
    with running_archive() as archive:
        site = make_site(archive.port, destination={"commitment_wait_seconds": 60})
        job_id = site.new_job("pacs")
        site.worker.process(job_id)
        waiting = threading.Thread(target=site.worker.deliver, args=(job_id,))
        waiting.start()
        wait_until(lambda: archive.requests, what="the request")
        with listening(site) as (port, _):
            assert call_with_report(port, archive.report(archive.requests[0])) == 0x0000
        waiting.join(20)
        assert not waiting.is_alive()
    assert (site.job(job_id).state, site.job(job_id).detail) == (State.COMMITTED, "")


def test_without_storage_commitment_delivered_is_final(make_site: Callable[..., Site]) -> None:
    with running_archive() as archive:
        site = make_site(archive.port, destination={"storage_commitment": False})
        job_id = delivered(site)
    assert (site.job(job_id).state, site.job(job_id).due_at, archive.requests) == (State.DELIVERED, None, [])
    site.clock.advance(HOUR * 100)
    assert site.ledger.jobs.due(0) == []


def test_a_destination_that_does_not_know_storage_commitment_is_an_error_that_says_so(
    make_site: Callable[..., Site],
) -> None:
    with running_scp() as scp:
        job_id = delivered(site := make_site(scp.port))
    job = site.job(job_id)
    assert (job.state, job.reason) == (State.FAILED, Reason.COMMITMENT_REFUSED)
    assert "no presentation context accepted for Storage Commitment Push Model" in job.detail
    assert [row.dimse_status for row in site.ledger.deliveries.of_job(job_id)] == [0x0000] * 4


def test_an_archive_that_never_answers_is_asked_again_in_new_transactions_and_at_last_is_an_error(
    make_site: Callable[..., Site],
) -> None:
    with running_archive() as archive:
        site = make_site(archive.port, commitment_limit_seconds=3 * HOUR, commitment_timeout_seconds=HOUR)
        job_id = delivered(site)
        until = "until 2031-05-04 06:02 UTC"
        assert site.job(job_id).detail == f"pacs: storage commitment of 4 instances asked for 1 times, {until}"
        site.clock.advance(HOUR - 1)
        assert site.ledger.jobs.due(0) == []
        assert [later(site, job_id, seconds) for seconds in (1, HOUR)] == [State.DELIVERED] * 2
        assert later(site, job_id, HOUR) is State.FAILED
    assert site.job(job_id).reason is Reason.COMMITMENT_TIMEOUT
    assert len({request.transaction_uid for request in archive.requests}) == 3
    with listening(site) as (port, _):
        assert call_with_report(port, archive.report(archive.requests[0])) == 0x0000
    assert site.job(job_id).state is State.COMMITTED  # late, and true all the same


@pytest.mark.parametrize("status", [0x0000, 0x0110])
def test_an_archive_that_fails_again_and_again_is_asked_for_as_long_as_one_that_is_silent(
    make_site: Callable[..., Site], status: int
) -> None:
    with running_archive(status=status) as archive:
        site = make_site(archive.port)
        job_id, began = delivered(site), site.clock.now
        while (job := site.job(job_id)).state is State.DELIVERED:
            assert job.due_at is not None
            later(site, job_id, (job.due_at - site.clock.now).total_seconds())
    assert (job.state, job.reason) == (State.FAILED, Reason.COMMITMENT_TIMEOUT)
    assert 24 * HOUR <= (site.clock.now - began).total_seconds() < 25 * HOUR
    assert 24 <= len(archive.requests) < 50


def test_the_association_stays_open_for_as_long_as_a_report_is_waited_for(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.deliver.committing.ANSWER_SECONDS", 1.0)  # a minute in earnest
    with running_archive(on_same_association=True, seconds=2.0) as archive:
        site = make_site(archive.port, destination={"commitment_wait_seconds": 10})
        job_id = delivered(site)
    assert (site.job(job_id).state, archive.answers) == (State.COMMITTED, [0x0000])


def test_what_the_archive_says_it_does_not_have_is_sent_again(make_site: Callable[..., Site]) -> None:
    with running_archive(on_same_association=True) as archive:
        site = make_site(archive.port, destination={"commitment_wait_seconds": 10})
        lost = uid("derived", "sd", 0)
        archive.reasons[lost] = 0x0112
        job_id = delivered(site)
        assert site.job(job_id).state is State.DELIVERED
        archive.reasons.clear()
        assert later(site, job_id, site.settings.delivery_retry_seconds) is State.DELIVERING
        assert "took instances and does not have them" in site.ledger.jobs.history(job_id)[-1].detail
        assert later(site, job_id, 0) is State.COMMITTED
    assert archive.received[4:] == [lost]
    assert [len(request.references) for request in archive.requests] == [4, 1]


def test_an_archive_that_will_never_keep_an_instance_is_an_error_at_once(make_site: Callable[..., Site]) -> None:
    with running_archive(on_same_association=True) as archive:
        archive.reasons = {uid("derived", "sd", 0): 0x0122}
        site = make_site(archive.port, destination={"commitment_wait_seconds": 10})
        job_id = delivered(site)
        assert later(site, job_id, site.settings.delivery_retry_seconds) is State.FAILED
    assert site.job(job_id).reason is Reason.COMMITMENT_REFUSED
    assert site.job(job_id).detail == "pacs: 1 instances not committed: 0x0122 SOP class not supported"


@pytest.mark.parametrize(("status", "state"), [(0x0110, State.DELIVERED), (0x0124, State.FAILED)])
def test_a_request_that_is_refused_is_tried_again_only_where_that_may_help(
    make_site: Callable[..., Site], status: int, state: State
) -> None:
    with running_archive(status=status) as archive:
        job_id = delivered(site := make_site(archive.port))
        assert site.job(job_id).state is state
        archive.status = 0x0000
        if state is State.DELIVERED:
            later(site, job_id, site.settings.delivery_retry_seconds)
            assert len(archive.requests) == 2


def test_an_archive_that_restarts_between_sending_and_asking_is_asked_when_it_is_back(
    make_site: Callable[..., Site],
) -> None:
    site = make_site(port := free_port())
    job_id = site.new_job("pacs")
    site.worker.process(job_id)
    job, rows = site.ledger.deliveries.claim(job_id, "ends before it asks", 5)
    for row in rows:
        site.ledger.deliveries.record(
            job_id, "pacs", row.sop_instance_uid, DeliveryStatus.SENT, attempt=job.attempt, dimse_status=0
        )
    assert site.ledger.deliveries.finish(job_id, job.attempt, actor="worker:0", committing={"pacs": True}) is not None
    assert later(site, job_id, 0) is State.DELIVERED
    with running_archive(port, on_same_association=True):
        patient = site.settings.destinations[0].model_copy(update={"commitment_wait_seconds": 10})
        site.restart_worker(destinations=(patient,))
        assert later(site, job_id, site.settings.delivery_retry_seconds) is State.COMMITTED


def test_a_destination_whose_name_does_not_resolve_for_now_is_tried_again(make_site: Callable[..., Site]) -> None:
    job_id = delivered(site := make_site(destination={"host": "no-such-host.invalid"}))
    assert site.job(job_id).state is State.DELIVERING


def test_a_restart_between_request_and_report_loses_nothing(make_site: Callable[..., Site]) -> None:
    with running_archive() as archive:
        before = make_site(archive.port)
        job_id = delivered(before)
        before.ledger.close()
        after = make_site(archive.port)
        with listening(after) as (port, _):
            assert call_with_report(port, archive.report(archive.requests[0])) == 0x0000
            assert call_with_report(port, archive.report(archive.requests[0])) == 0x0000  # its answer was lost
    assert after.job(job_id).state is State.COMMITTED


def test_a_report_of_an_unknown_transaction_or_from_somebody_else_changes_nothing(
    make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    with running_archive() as archive:
        site = make_site(archive.port)
        job_id = delivered(site)
        true = archive.report(archive.requests[0])
        forged = Report("2.25.1", true.committed)
        foreign = Report(true.transaction_uid, (Reference(MR_IMAGE_STORAGE, "1.2.3"),))
        with listening(site) as (port, _):
            assert call_with_report(port, forged) == 0x0115
            assert call_with_report(port, true, calling="MALLORY") == 0x0115
            assert call_with_report(port, foreign) == 0x0000
    assert site.job(job_id).state is State.DELIVERED
    assert all(row.is_open for row in site.ledger.deliveries.of_job(job_id))
    logged = [record.getMessage() for record in caplog.records]
    assert "unknown transaction" in logged
    assert "a report of what another destination was asked" in logged


def test_a_destination_reports_on_what_it_was_asked_alone(
    make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    with running_archive() as asked, running_archive(on_same_association=True) as forging:
        forging.report = lambda _: asked.report(asked.requests[0])  # type: ignore[method-assign]
        site = make_site(asked.port)
        [pacs] = site.settings.destinations
        second = {"name": "second", "port": forging.port, "commitment_wait_seconds": 0.5}
        destinations = (pacs, pacs.model_copy(update=second))
        site.restart_worker(destinations=destinations)
        job_id = site.new_job("pacs", "second")
        site.worker.process(job_id)
        site.worker.deliver(job_id)
        wait_until(lambda: forging.answers, what="the answer to the report")
    assert forging.answers == [0x0115]
    assert site.job(job_id).state is State.DELIVERED
    assert all(row.is_open for row in site.ledger.deliveries.of_job(job_id))
    assert "a report of what another destination was asked" in [record.getMessage() for record in caplog.records]


def reported_while_another_is_waited_for(make_site: Callable[..., Site], reason: int | None) -> Job:
    """Two destinations are due; while the silent one is waited for, the other answers its first request.

    Args:
        make_site: the fixture.
        reason: Failure Reason for one instance of the other's; None: it commits itself to all.
    """
    with running_archive() as silent, running_archive() as late:
        site = make_site(silent.port, commitment_timeout_seconds=HOUR)
        [pacs] = site.settings.destinations
        second = pacs.model_copy(update={"name": "second", "port": late.port})
        site.settings = site.settings.model_copy(update={"destinations": (pacs, second)})
        site.restart_worker()
        job_id = site.new_job("pacs", "second")
        site.worker.process(job_id)
        site.worker.deliver(job_id)
        site.clock.advance(HOUR)
        site.restart_worker(destinations=(pacs.model_copy(update={"commitment_wait_seconds": 3}), second))
        asking = threading.Thread(target=site.worker.deliver, args=(job_id,))
        asking.start()
        wait_until(lambda: len(silent.requests) == 2, what="the second request")
        late.reasons |= {late.requests[0].references[0].sop_instance_uid: reason} if reason else {}
        with listening(site) as (port, _):
            assert call_with_report(port, late.report(late.requests[0])) == 0x0000
        asking.join()
    assert (len(silent.requests), len(late.requests)) == (2, 1)  # the other was not asked again
    return site.job(job_id)


def test_who_commits_itself_while_another_destination_is_waited_for_is_not_asked_again(
    make_site: Callable[..., Site],
) -> None:
    job = reported_while_another_is_waited_for(make_site, reason=None)
    assert job.detail.startswith("pacs: storage commitment of 4 instances asked for 2 times")


def test_who_refuses_for_good_while_another_destination_is_waited_for_is_not_asked_again(
    make_site: Callable[..., Site],
) -> None:
    assert reported_while_another_is_waited_for(make_site, reason=0x0119).reason is Reason.COMMITMENT_REFUSED


def test_an_instance_that_is_kept_under_another_class_is_not_committed(make_site: Callable[..., Site]) -> None:
    with running_archive(on_same_association=True) as archive:
        archive.kept_as = {uid("derived", "sd", 0): "1.2.840.10008.5.1.4.1.1.7"}
        site = make_site(archive.port, destination={"commitment_wait_seconds": 10})
        job_id = delivered(site)
        assert site.job(job_id).state is State.DELIVERED
        assert [row.is_open for row in site.ledger.deliveries.of_job(job_id)] == [True, False, False, False]
        assert later(site, job_id, site.settings.delivery_retry_seconds) is State.FAILED
    assert site.job(job_id).detail == "pacs: 1 instances not committed: 0x0119 class and instance do not fit"


def test_what_a_report_changed_is_logged_and_not_what_it_said(
    make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with running_archive() as archive:
        archive.kept_as = {uid("derived", "sd", 0): "1.2.840.10008.5.1.4.1.1.7"}
        site = make_site(archive.port)
        delivered(site)
        report = archive.report(archive.requests[0])
    with listening(site) as (port, _):
        assert [call_with_report(port, report) for _ in range(2)] == [0x0000, 0x0000]
    logged = [(record.getMessage(), getattr(record, "fields", {}).get("count")) for record in caplog.records]
    assert [line for line in logged if line[0].startswith("storage commit")] == [
        ("storage committed", 3),
        ("storage commitment refused", 1),
    ]


def test_a_result_is_kept_until_it_is_committed_however_old_it_is(make_site: Callable[..., Site]) -> None:
    with running_archive() as archive:
        site = make_site(archive.port)
        job_id = delivered(site)
        site.clock.advance(HOUR * 24 * 365)
        assert site.ledger.retention.forget(site.clock.now, {"pacs": True}) == 0
        site.ledger.jobs.move(job_id, [State.DELIVERED], State.FAILED, actor="t", reason=Reason.COMMITMENT_TIMEOUT)
        site.clock.advance(1)
        assert site.ledger.retention.forget(site.clock.now, {"pacs": True}) == 0
        with listening(site) as (port, _):
            call_with_report(port, archive.report(archive.requests[0]))
        site.clock.advance(1)
        assert site.ledger.retention.forget(site.clock.now, {"pacs": True}) == 1


def test_a_resend_asks_again_about_everything(make_site: Callable[..., Site]) -> None:
    with running_archive(on_same_association=True) as archive:
        site = make_site(archive.port, destination={"commitment_wait_seconds": 10})
        job_id = delivered(site)
        site.ledger.deliveries.resend(job_id, "operator")
        site.worker.deliver(job_id)
    assert site.job(job_id).state is State.COMMITTED
    assert [len(request.references) for request in archive.requests] == [4, 4]
    assert len(archive.received) == 8


def test_a_worker_that_waits_for_a_report_stops_when_the_job_is_run_again(make_site: Callable[..., Site]) -> None:
    with running_archive() as archive:
        site = make_site(archive.port, destination={"commitment_wait_seconds": 20})
        site.restart_worker(lease_seconds=0.2)
        job_id = site.new_job("pacs")
        site.worker.process(job_id)
        waiting = threading.Thread(target=site.worker.deliver, args=(job_id,))
        waiting.start()
        wait_until(lambda: archive.requests, what="the request")
        assert site.ledger.jobs.rerun(job_id, "operator") is not None
        waiting.join(5)
        assert not waiting.is_alive()
    assert site.job(job_id).state is State.QUEUED


def test_once_switched_off_nobody_is_waited_for(make_site: Callable[..., Site]) -> None:
    with running_archive() as archive:
        site = make_site(archive.port, commitment_timeout_seconds=HOUR)
        job_id = delivered(site)
        quiet = site.settings.destinations[0].model_copy(update={"storage_commitment": False})
        site.restart_worker(destinations=(quiet,))
        assert later(site, job_id, HOUR) is State.DELIVERED
    assert site.job(job_id).due_at is None
    assert not any(row.is_open for row in site.ledger.deliveries.of_job(job_id))


@pytest.mark.parametrize("end", [None, State.FAILED])
def test_once_switched_off_a_result_is_kept_no_longer_than_others(
    make_site: Callable[..., Site], end: State | None
) -> None:
    with running_archive() as archive:
        site = make_site(archive.port)
        job_id = delivered(site)
    if end:
        site.ledger.jobs.move(job_id, [State.DELIVERED], end, actor="worker", reason=Reason.COMMITMENT_TIMEOUT)
    site.clock.advance(site.settings.retention_days * 24 * HOUR + 1)
    Intake(site.settings, site.ledger, site.spool, site.queue, site.clock).sweep()
    assert site.ledger.jobs.get(job_id) is not None
    quiet = site.settings.destinations[0].model_copy(update={"storage_commitment": False})
    switched_off = site.settings.model_copy(update={"destinations": (quiet,)})
    Intake(switched_off, site.ledger, site.spool, site.queue, site.clock).sweep()
    assert site.ledger.jobs.get(job_id) is None


def test_a_destination_that_was_renamed_is_not_switched_off(make_site: Callable[..., Site]) -> None:
    with running_archive() as archive:
        site = make_site(archive.port, commitment_timeout_seconds=HOUR)
        job_id = delivered(site)
        renamed = site.settings.destinations[0].model_copy(update={"name": "archive"})
        site.restart_worker(destinations=(renamed,), default_destinations=())
        assert later(site, job_id, HOUR) is State.FAILED
    assert site.job(job_id).detail == "no destination is called pacs any more"
    site.clock.advance(HOUR * 24 * 365)
    assert site.ledger.retention.forget(site.clock.now, site.worker.settings.committing) == 0
    site.ledger.jobs.cancel(job_id, "operator")
    site.clock.advance(1)
    assert site.ledger.retention.forget(site.clock.now, site.worker.settings.committing) == 1


# --- as SCP -----------------------------------------------------------------------------------------------------------


REFERENCES = tuple(Reference(MR_IMAGE_STORAGE, str(dataset.SOPInstanceUID)) for dataset in PAIR.all)


@dataclass
class Modality:
    """Asks us, and takes our reports."""

    port: int
    reports: list[Report] = field(default_factory=list)

    def take(self, event: Any) -> tuple[int, None]:
        self.reports.append(Report.of(event.event_type, event.event_information))
        return 0x0000, None


@contextmanager
def running_modality(port: int | None = None) -> Iterator[Modality]:
    modality = Modality(port or free_port())
    entity = AE(ae_title="MODALITY")
    entity.add_supported_context(PUSH_MODEL, scu_role=False, scp_role=True)
    handlers = [(evt.EVT_N_EVENT_REPORT, modality.take)]
    server = entity.start_server(("127.0.0.1", modality.port), block=False, evt_handlers=handlers)
    try:
        yield modality
    finally:
        server.shutdown()


def ask(port: int, request: Request, calling: str = "MODALITY", instance: str = PUSH_MODEL_INSTANCE) -> int:
    entity = AE(ae_title=calling)
    entity.add_requested_context(PUSH_MODEL)
    association = entity.associate("127.0.0.1", port, ae_title="LOWGAD")
    assert association.is_established
    try:
        answer, _ = association.send_n_action(request.to_dataset(), 1, PUSH_MODEL, instance)
        return int(answer.Status)
    finally:
        association.release()


def receiving(make_site: Callable[..., Site], modality_port: int) -> Site:
    requestor = CommitmentRequestor(ae_title="MODALITY", host="127.0.0.1", port=modality_port)
    site = make_site(commitment_requestors=(requestor,))
    site.new_job()
    return site


def test_orthanc_is_told_which_of_its_images_are_safe_here(tmp_path: Path, make_site: Callable[..., Site]) -> None:
    port, orthanc_port = free_port(), free_port()
    modalities = {"lowgad": ["LOWGAD", "127.0.0.1", port]}
    with running_orthanc(tmp_path / "orthanc", DicomPort=orthanc_port, DicomModalities=modalities) as orthanc:
        requestor = CommitmentRequestor(ae_title="ORTHANC", host="127.0.0.1", port=orthanc_port)
        site = make_site(commitment_requestors=(requestor,))
        paths = write_study(tmp_path / "study")[:3]
        for path in paths:
            upload(orthanc.http_port, path)
        with listening(site, port) as (_, commitment):
            stored = orthanc.post("/modalities/lowgad/store", orthanc.get("/instances"))
            assert stored["FailedInstancesCount"] == 0
            known = [[str(dcmread(path).SOPClassUID), str(dcmread(path).SOPInstanceUID)] for path in paths]
            unknown = [MR_IMAGE_STORAGE, "2.25.99"]
            asked = orthanc.post("/modalities/lowgad/storage-commitment", {"DicomInstances": [*known, unknown]})
            commitment.report_due()
            wait_until(lambda: orthanc.get(asked["Path"])["Status"] != "Pending", what="the report")
            report = orthanc.get(asked["Path"])
    assert report["Status"] == "Failure"
    assert {item["SOPInstanceUID"] for item in report["Success"]} == {uid for _, uid in known}
    assert [(item["SOPInstanceUID"], item["FailureReason"]) for item in report["Failures"]] == [("2.25.99", 0x0112)]


def upload(http_port: int, path: Path) -> None:
    import urllib.request

    urllib.request.urlopen(f"http://127.0.0.1:{http_port}/instances", path.read_bytes(), timeout=30).close()


def test_only_what_ledger_and_spool_hold_whole_is_committed_to(make_site: Callable[..., Site]) -> None:
    with running_modality() as modality:
        site = receiving(make_site, modality.port)
        damaged = site.ledger.received.get(REFERENCES[0].sop_instance_uid)
        assert damaged is not None
        site.spool.path(damaged.sha256).write_bytes(b"cut off")
        request = Request(
            "2.25.5", (*REFERENCES, Reference("1.2.840.10008.5.1.4.1.1.2", REFERENCES[1].sop_instance_uid))
        )
        with listening(site) as (port, commitment):
            assert ask(port, request) == 0x0000
            commitment.report_due()
    [report] = modality.reports
    assert report.transaction_uid == "2.25.5"
    assert set(report.committed) == set(REFERENCES[1:])
    assert dict(report.failed) == {REFERENCES[0]: 0x0110, request.references[-1]: 0x0119}


def test_a_modality_that_is_away_is_told_when_it_is_back_even_after_a_restart(make_site: Callable[..., Site]) -> None:
    away = free_port()
    site = receiving(make_site, away)
    with listening(site) as (port, commitment):
        assert ask(port, Request("2.25.6", REFERENCES)) == 0x0000
        assert ask(port, Request("2.25.6", REFERENCES)) == 0x0000  # our answer was lost
        assert ask(port, Request("2.25.6", REFERENCES[:1])) == 0x0115
        commitment.report_due()
    site.ledger.close()
    site.clock.advance(site.settings.delivery_retry_seconds)
    with Ledger.open(site.settings.ledger_url, site.clock) as ledger, running_modality(away) as modality:
        StorageCommitment(site.settings, ledger, site.spool, site.clock).report_due()
        site.clock.advance(HOUR)
        StorageCommitment(site.settings, ledger, site.spool, site.clock).report_due()
    [report] = modality.reports
    assert (report.event_type, set(report.committed)) == (1, set(REFERENCES))


def test_a_modality_that_never_comes_back_is_given_up(make_site: Callable[..., Site]) -> None:
    site = receiving(make_site, free_port())
    site.ledger.requests.add("MODALITY", Request("2.25.7", REFERENCES))
    for _ in range(MOST_TRIES):
        StorageCommitment(site.settings, site.ledger, site.spool, site.clock).report_due()
        site.clock.advance(HOUR)
    assert site.ledger.requests.claim(1) is None


class Broken(Spool):
    """Does what nobody has foreseen, as often as `failures` says."""

    failures = 1

    def is_whole(self, sha256: str) -> bool:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("unforeseen")
        return super().is_whole(sha256)


def test_an_unforeseen_error_is_logged_and_ends_neither_the_reporting_nor_the_request(
    make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    with running_modality() as modality:
        site = receiving(make_site, modality.port)
        site.ledger.requests.add("MODALITY", Request("2.25.9", REFERENCES))
        settings, stop = site.settings.model_copy(update={"sweep_seconds": 0.02}), threading.Event()
        commitment = StorageCommitment(settings, site.ledger, Broken(site.settings.spool_dir), site.clock)
        reporting = threading.Thread(target=commitment.report_until, args=(stop,))
        reporting.start()
        wait_until(lambda: any(record.exc_info for record in caplog.records), what="the error in the log")
        site.clock.advance(CLAIM_SECONDS)
        wait_until(lambda: modality.reports, what="the report")
        stop.set()
        reporting.join()
    assert set(modality.reports[0].committed) == set(REFERENCES)


def test_a_request_that_always_ends_in_an_unforeseen_error_is_given_up(make_site: Callable[..., Site]) -> None:
    site = receiving(make_site, free_port())
    site.ledger.requests.add("MODALITY", Request("2.25.9", REFERENCES))
    broken = Broken(site.settings.spool_dir)
    broken.failures = 2 * MOST_TRIES
    for _ in range(MOST_TRIES):
        with pytest.raises(RuntimeError, match="unforeseen"):
            StorageCommitment(site.settings, site.ledger, broken, site.clock).report_due()
        site.clock.advance(CLAIM_SECONDS)
    StorageCommitment(site.settings, site.ledger, broken, site.clock).report_due()
    site.clock.advance(CLAIM_SECONDS)
    assert site.ledger.requests.claim(1) is None


def test_a_modality_that_was_given_up_is_told_when_it_asks_again(make_site: Callable[..., Site]) -> None:
    site = receiving(make_site, away := free_port())
    site.ledger.requests.add("MODALITY", Request("2.25.8", REFERENCES))
    for _ in range(MOST_TRIES):
        StorageCommitment(site.settings, site.ledger, site.spool, site.clock).report_due()
        site.clock.advance(HOUR)
    assert site.ledger.requests.add("MODALITY", Request("2.25.8", REFERENCES[::-1]))
    with running_modality(away) as modality:
        StorageCommitment(site.settings, site.ledger, site.spool, site.clock).report_due()
    assert [set(report.committed) for report in modality.reports] == [set(REFERENCES)]


def test_who_is_not_named_in_the_site_file_may_not_ask(make_site: Callable[..., Site]) -> None:
    site = receiving(make_site, free_port())
    with listening(site) as (port, _):
        assert ask(port, Request("2.25.8", REFERENCES), calling="MALLORY") == 0x0124
        assert ask(port, Request("2.25.8", ())) == 0x0115
        assert ask(port, Request("2.25.8", REFERENCES), instance="1.2.3") == 0x0112
    assert site.ledger.requests.claim(1) is None


def test_where_nobody_is_asked_and_nobody_asks_it_is_not_negotiated(make_site: Callable[..., Site]) -> None:
    site = make_site(destination={"storage_commitment": False})
    entity = AE(ae_title="MODALITY")
    entity.add_requested_context(PUSH_MODEL)
    with listening(site) as (port, _):
        assert not entity.associate("127.0.0.1", port, ae_title="LOWGAD").is_established
