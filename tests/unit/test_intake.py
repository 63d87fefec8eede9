from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from service.core.dicom.site_rules import SiteRule
from service.core.errors import Reason
from service.core.job import Job, JobOptions, State
from service.core.ledger import Added, Ledger
from service.core.queue import make_celery
from service.core.settings import Destination, Settings
from service.core.spool import Spool
from service.intake import Intake
from service.objects import DicomObject, from_file
from tests.conftest import Clock
from tests.factories import encode, make_pair, uid

STUDY = uid(0, "study")


def objects(datasets: list[Dataset]) -> list[DicomObject]:
    return [from_file(encode(dataset)) for dataset in datasets]


PAIR = make_pair(rows=8, columns=8)
PRE, LOW = objects(PAIR.pre), objects(PAIR.low)
T2 = objects(make_pair(rows=8, columns=8, low_changes={"EchoTime": "90", "SeriesInstanceUID": uid("t2")}).low)
T2 = [replace(item, sop_instance_uid=f"{item.sop_instance_uid[:60]}9", series_uid=uid("t2")) for item in T2]


class Site:
    """Everything that intake works with, on SQLite and the embedded broker, and a clock."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.clock = clock
        pacs = Destination(name="pacs", host="127.0.0.1", port=104, ae_title="PACS")
        self.settings = Settings(data_dir=folder, destinations=(pacs,), default_destinations=("pacs",))
        self.ledger = Ledger.open(self.settings.ledger_url, clock)
        self.spool = Spool(self.settings.spool_dir)
        self.intake = self.restarted()

    def restarted(self) -> Intake:
        return Intake(self.settings, self.ledger, self.spool, make_celery(self.settings), self.clock)

    def receive(self, received: list[DicomObject], seconds_between: float = 0.1) -> None:
        for item in received:
            self.clock.advance(seconds_between)
            self.intake.admit(item, "dimse:MODALITY")

    def sweep_after(self, seconds: float) -> list[Job]:
        self.clock.advance(seconds)
        self.intake.sweep()
        return self.ledger.jobs.page()

    def messages(self) -> list[str]:
        files = sorted(self.settings.broker_dir.glob("*.process.msg"))
        return [json.loads(path.read_text())["headers"]["argsrepr"] for path in files]

    def lose_messages(self) -> None:
        for path in self.settings.broker_dir.glob("*.msg"):
            path.unlink()

    def input_series(self, job: Job) -> set[str]:
        return {item.series_uid for item in self.ledger.jobs.inputs(job.id)}


@pytest.fixture
def site(tmp_path: Path, clock: Clock) -> Iterator[Site]:
    opened = Site(tmp_path, clock)
    yield opened
    opened.ledger.close()


def test_a_whole_pair_starts_seconds_after_its_last_slice(site: Site) -> None:
    site.receive(PRE + LOW)
    assert site.sweep_after(site.settings.settle_seconds / 2) == []
    [job] = site.sweep_after(site.settings.settle_seconds)
    assert (job.state, job.study_uid, job.source) == (State.QUEUED, STUDY, "dimse:MODALITY")
    assert job.options == JobOptions(engine="network", destinations=("pacs",))
    assert site.messages() == [f"['{job.id}']"]


def test_while_slices_are_still_arriving_nothing_starts(site: Site) -> None:
    site.receive(PRE + LOW[:-1])
    assert site.sweep_after(site.settings.quiet_seconds / 2) == []
    site.receive(LOW[-1:])
    [job] = site.sweep_after(site.settings.settle_seconds)
    assert len(site.ledger.jobs.inputs(job.id)) == len(PRE + LOW)


def test_series_that_arrive_interleaved_start_once(site: Site) -> None:
    for pre, low in zip(PRE, LOW, strict=True):
        site.receive([pre, low], seconds_between=1.0)
        site.intake.sweep()
    [job] = site.sweep_after(site.settings.settle_seconds)
    assert len(site.ledger.jobs.inputs(job.id)) == len(PRE + LOW)


def test_a_study_that_stays_unclear_starts_after_the_quiet_time(site: Site) -> None:
    site.receive(PRE)
    assert site.sweep_after(site.settings.quiet_seconds - 1) == []
    [job] = site.sweep_after(1)
    assert len(site.ledger.jobs.inputs(job.id)) == len(PRE)


def test_a_restart_loses_no_deadline(site: Site) -> None:
    site.receive(PRE)
    site.clock.advance(site.settings.quiet_seconds)
    site.restarted().sweep()
    assert len(site.ledger.jobs.page()) == 1


def test_two_sweeps_at_work_start_a_study_once(site: Site) -> None:
    site.receive(PRE + LOW)
    site.clock.advance(site.settings.settle_seconds)
    for intake in (site.restarted(), site.restarted()):
        intake.sweep()
    assert len(site.ledger.jobs.page()) == 1


def test_a_study_sent_again_makes_no_second_job(site: Site) -> None:
    site.receive(PRE + LOW)
    site.sweep_after(site.settings.settle_seconds)
    site.receive(PRE + LOW)
    assert len(site.sweep_after(site.settings.quiet_seconds)) == 1


def test_other_series_beside_the_pair_are_no_input_and_make_no_second_job(site: Site) -> None:
    site.receive(PRE + LOW)
    site.sweep_after(site.settings.settle_seconds)
    site.receive(T2)
    [job] = site.sweep_after(site.settings.quiet_seconds)
    assert site.input_series(job) == {PRE[0].series_uid, LOW[0].series_uid}
    assert site.ledger.received.waiting() == []


def test_a_late_slice_makes_a_new_job_and_supersedes_the_one_that_lacked_it(site: Site) -> None:
    site.receive(PRE + LOW[:-1])
    [old] = site.sweep_after(site.settings.quiet_seconds)
    site.receive(LOW[-1:])
    new, old = site.sweep_after(site.settings.settle_seconds)
    assert (new.state, old.state) == (State.QUEUED, State.CANCELLED)
    assert (old.superseded_by, old.detail) == (new.id, f"superseded by job {new.id}: more images arrived")
    assert site.ledger.jobs.history(new.id)[0].detail == f"re-opens job {old.id} (QUEUED): more images arrived"


def test_an_upload_that_looked_before_the_last_slice_came_does_not_cancel_the_job_that_has_it(site: Site) -> None:
    site.receive(PRE + LOW[:-1])
    early = site.ledger.received.of_study(STUDY)
    site.receive(LOW[-1:])
    [whole] = site.sweep_after(site.settings.settle_seconds)
    told, created = site.ledger.jobs.create(
        STUDY, early, whole.options, "rest"
    )  # as an upload that was a moment slower
    assert (told.id, created) == (whole.id, False)
    assert [job.state for job in site.ledger.jobs.page()] == [State.QUEUED]


def test_the_site_file_tells_the_pair_apart_where_contrast_attributes_do_not(site: Site) -> None:
    rules = [
        SiteRule(name="a", series_description="*_sag", role="pre"),
        SiteRule(name="b", station_name="*", agent="gadobutrol"),
    ]
    site.settings = site.settings.model_copy(update={"protocols": tuple(rules)})
    site.intake = site.restarted()
    entered = make_pair(rows=8, columns=8, pre_changes={"ContrastBolusAgent": "Gadovist"})
    site.receive(objects(entered.all))
    [job] = site.sweep_after(site.settings.settle_seconds)
    assert len(site.ledger.jobs.inputs(job.id)) == len(entered.all)


def test_without_a_site_file_agents_entered_for_the_whole_examination_wait_for_the_quiet_time(site: Site) -> None:
    site.receive(objects(make_pair(rows=8, columns=8, pre_changes={"ContrastBolusAgent": "Gadovist"}).all))
    assert site.sweep_after(site.settings.settle_seconds) == []
    assert len(site.sweep_after(site.settings.quiet_seconds)) == 1


def test_our_own_results_coming_back_from_the_archive_start_nothing(site: Site) -> None:
    site.receive(PRE + LOW)
    site.sweep_after(site.settings.settle_seconds)
    derived = objects(make_pair(rows=8, columns=8, low_changes={"SyntheticData": "YES"}).low)
    site.receive(
        [replace(item, sop_instance_uid=uid(item.sop_instance_uid, "own"), series_uid="2.25.7") for item in derived]
    )
    assert len(site.sweep_after(site.settings.quiet_seconds)) == 1
    assert site.ledger.received.waiting() == []


def test_an_upload_starts_without_waiting(site: Site) -> None:
    site.receive(PRE + LOW)
    job, created = site.intake.start(STUDY, JobOptions(), "rest")
    assert created
    assert site.intake.start(STUDY, JobOptions(), "rest") == (site.ledger.jobs.get(job.id), False)
    assert site.messages() == [f"['{job.id}']"]


def test_series_that_were_named_are_the_input(site: Site) -> None:
    site.receive(PRE + T2 + LOW)
    options = JobOptions(pre_series_uid=PRE[0].series_uid, low_series_uid=T2[0].series_uid)
    job, _ = site.intake.start(STUDY, options, "rest")
    assert site.input_series(job) == {PRE[0].series_uid, T2[0].series_uid}


def test_an_object_is_durable_and_known_when_it_is_admitted(site: Site) -> None:
    assert site.intake.admit(PRE[0], "rest") is Added.NEW
    assert site.intake.admit(PRE[0], "rest") is Added.DUPLICATE
    [known] = site.ledger.received.of_study(STUDY)
    assert site.spool.path(known.sha256).read_bytes() == b"".join(PRE[0].chunks)


def test_messages_that_were_lost_are_sent_again(site: Site) -> None:
    site.receive(PRE + LOW)
    [job] = site.sweep_after(site.settings.settle_seconds)
    site.lose_messages()
    site.sweep_after(site.settings.requeue_seconds / 2)
    assert site.messages() == []
    site.sweep_after(site.settings.requeue_seconds)
    assert site.messages() == [f"['{job.id}']"]


def test_a_job_whose_worker_died_is_tried_again_after_a_pause_and_fails_at_last(site: Site) -> None:
    site.receive(PRE + LOW)
    [job] = site.sweep_after(site.settings.settle_seconds)
    for attempt in range(1, site.settings.max_attempts + 1):
        claimed = site.ledger.jobs.claim(job.id, "worker", site.settings.lease_seconds)
        assert claimed is not None
        assert claimed.attempt == attempt
        site.lose_messages()
        [seen] = site.sweep_after(site.settings.lease_seconds)
        assert site.messages() == []
        site.sweep_after(1000)
    assert (seen.state, seen.reason) == (State.FAILED, Reason.ATTEMPTS_EXHAUSTED)
    assert site.messages() == []


def test_however_often_its_worker_is_lost_a_job_is_tried_again_within_minutes(site: Site) -> None:
    site.settings = site.settings.model_copy(update={"max_attempts": 12})
    site.intake, pauses = site.restarted(), []
    site.receive(PRE + LOW)
    [job] = site.sweep_after(site.settings.settle_seconds)
    for _ in range(10):
        assert site.ledger.jobs.claim(job.id, "worker", site.settings.lease_seconds) is not None
        [seen] = site.sweep_after(site.settings.lease_seconds)
        assert seen.due_at is not None
        pauses.append((seen.due_at - site.clock.now).total_seconds())
        site.clock.advance(pauses[-1])
    assert pauses[0] <= site.settings.retry_seconds < pauses[2]
    assert max(pauses) <= 600


def test_old_studies_are_forgotten_with_their_bytes_and_results(site: Site, tmp_path: Path) -> None:
    site.receive(PRE + LOW)
    [job] = site.sweep_after(site.settings.settle_seconds)
    with site.spool.publish(job.id) as folder:
        (folder / "report.json").write_text("{}")
    site.ledger.jobs.cancel(job.id, "operator")
    assert len(site.sweep_after(3600)) == 1
    assert site.sweep_after(site.settings.retention_days * 86400 + 1) == []
    assert site.ledger.received.of_study(STUDY) == []


def test_a_study_under_way_is_never_forgotten(site: Site) -> None:
    site.receive(PRE + LOW)
    site.sweep_after(site.settings.settle_seconds)
    assert len(site.sweep_after(site.settings.retention_days * 86400 + 1)) == 1
