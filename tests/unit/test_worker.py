"""What the two tasks do to a job, over a real ledger, spool and embedded broker; the computation is a stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from service.core.errors import Permanent, Reason, Retryable
from service.core.job import Kind, Stage, State
from service.core.ledger import DeliveryStatus, LedgerUnavailableError
from tests.conftest import Clock
from tests.factories import uid
from tests.peers import StorageScp, free_port, running_scp, wait_until
from tests.sites import PAIR, Site
from worker.pipeline import Progress


@pytest.fixture
def site(tmp_path: Path, clock: Clock) -> Iterator[Site]:
    opened = Site(tmp_path, clock)
    yield opened
    opened.ledger.close()


@pytest.fixture
def sending(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Site]]:
    """Makes a site whose archive listens at a port."""
    opened: list[Site] = []

    def make(scp: StorageScp, **settings: Any) -> Site:
        opened.append(Site(tmp_path, clock, scp.port, **settings))
        return opened[0]

    yield make
    for site in opened:
        site.ledger.close()


def raising(error: BaseException) -> Callable[[Progress], None]:
    def fail(_: Progress) -> None:
        raise error

    return fail


# --- process ----------------------------------------------------------------------------------------------------------


def test_a_job_is_computed_from_exactly_its_inputs_and_published(site: Site) -> None:
    job_id = site.new_job()
    site.worker.process(job_id)
    job, folder = site.job(job_id), site.spool.result_dir(job_id)
    assert (job.state, job.progress, job.report) == (State.COMPUTED, 1.0, {"seconds": {"read": 0.1}})
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.dcm")) == [
        "sd/0001.dcm",
        "sd/0002.dcm",
        "sd_plus/0001.dcm",
        "sd_plus/0002.dcm",
    ]
    assert json.loads((folder / "report.json").read_text()) == job.report
    received = {str(pydicom.dcmread(path).SOPInstanceUID) for path in site.computation.paths}
    assert received == {str(dataset.SOPInstanceUID) for dataset in PAIR.all}


def test_a_message_that_comes_twice_computes_once(site: Site) -> None:
    job_id = site.new_job()
    site.worker.process(job_id)
    site.worker.process(job_id)
    site.worker.process("0" * 32)
    assert site.computation.calls == 1
    assert site.states(job_id) == [State.QUEUED, State.RUNNING, State.COMPUTED]


def test_a_second_worker_does_not_touch_a_job_that_is_running(site: Site) -> None:
    job_id = site.new_job()
    site.computation.before = lambda _: site.another_worker("worker:2").process(job_id)
    site.worker.process(job_id)
    assert site.computation.calls == 1
    assert {step.actor for step in site.ledger.jobs.history(job_id)} == {"dimse:MR", "worker:1"}


def test_the_engine_is_loaded_once(site: Site) -> None:
    job_id = site.new_job()
    site.worker.process(job_id)
    site.ledger.jobs.rerun(job_id, "test")
    site.worker.process(job_id)
    assert (site.computation.calls, site.engines_loaded) == (2, ["network"])


def test_stage_and_progress_can_be_followed_in_the_ledger(site: Site) -> None:
    job_id, seen = site.new_job(), []

    def look(progress: Progress) -> None:
        progress(Stage.PREPROCESS, 0.3)
        seen.append((site.job(job_id).stage, site.job(job_id).progress))

    site.computation.before = look
    site.worker.process(job_id)
    assert seen == [(Stage.PREPROCESS, 0.3)]


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        (Reason.MISSING_SLICES, State.REJECTED),
        (Reason.UNKNOWN_DOSE, State.NEEDS_REVIEW),
        (Reason.OUTPUT_INVALID, State.FAILED),
    ],
)
def test_a_permanent_error_ends_the_job_in_the_state_of_its_reason(site: Site, reason: Reason, state: State) -> None:
    job_id = site.new_job("pacs")
    site.computation.before = raising(Permanent(reason, "series 4"))
    site.worker.process(job_id)
    job = site.job(job_id)
    assert (job.state, job.reason, job.detail) == (state, reason, "series 4")
    assert not site.spool.result_dir(job_id).exists()
    assert site.ledger.deliveries.of_job(job_id) == []


def test_a_retryable_error_backs_off_and_ends_when_the_attempts_are_used_up(site: Site) -> None:
    job_id, waits = site.new_job(), []
    site.computation.before = raising(Retryable(Reason.STORAGE_FULL, "no space"))
    for _ in range(site.settings.max_attempts):
        site.worker.process(job_id)
        if due_at := site.job(job_id).due_at:
            waits.append((due_at - site.clock.now).total_seconds())
    job, first = site.job(job_id), site.settings.retry_seconds
    assert (job.state, job.reason, job.attempt) == (State.FAILED, Reason.STORAGE_FULL, site.settings.max_attempts)
    assert len(waits) == site.settings.max_attempts - 1
    assert first / 2 <= waits[0] <= first <= waits[1] <= 2 * first


@pytest.mark.parametrize("error", [MemoryError(), ValueError("Doe^Jane"), RecursionError(), OSError(5, "I/O")])
def test_an_unexpected_error_fails_the_job_without_quoting_it(
    site: Site, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = site.new_job()
    site.computation.before = raising(error)
    site.worker.process(job_id)
    job = site.job(job_id)
    assert (job.state, job.reason, job.detail) == (State.FAILED, Reason.INTERNAL_ERROR, type(error).__name__)
    traces = [record for record in caplog.records if record.exc_info]
    assert len(traces) == 1
    assert traces[0].__dict__["fields"]["job_id"] == job_id


def test_a_database_that_was_away_for_a_moment_costs_an_attempt_and_not_the_job(site: Site) -> None:
    job_id = site.new_job()
    site.computation.before = raising(LedgerUnavailableError(ConnectionError()))
    site.worker.process(job_id)
    assert site.job(job_id).state is State.QUEUED
    site.computation.before = lambda _: None
    site.worker.process(job_id)
    assert site.job(job_id).state is State.COMPUTED


def test_a_full_disk_has_its_own_reason(site: Site) -> None:
    job_id = site.new_job()
    site.computation.before = raising(OSError(28, "No space left on device"))
    site.worker.process(job_id)
    assert (site.job(job_id).state, site.job(job_id).reason) == (State.FAILED, Reason.STORAGE_FULL)


def test_input_that_has_gone_is_named(site: Site) -> None:
    job_id = site.new_job()
    site.spool.remove(site.ledger.jobs.inputs(job_id)[0].sha256)
    site.worker.process(job_id)
    job = site.job(job_id)
    assert (job.state, job.reason, job.detail) == (State.FAILED, Reason.INPUT_LOST, "1 of 16 instances are gone")


def test_a_cancelled_job_stops_at_its_next_stage_and_leaves_no_result(site: Site) -> None:
    job_id, reached = site.new_job("pacs"), []

    def cancel(progress: Progress) -> None:
        site.ledger.jobs.cancel(job_id, "operator")
        progress(Stage.PREPROCESS, 0.2)
        reached.append("beyond")

    site.computation.before = cancel
    site.worker.process(job_id)
    assert reached == []
    assert site.job(job_id).state is State.CANCELLED
    assert not site.spool.result_dir(job_id).exists()


def test_a_cancel_after_the_last_stage_still_wins(site: Site) -> None:
    job_id = site.new_job()
    derived = site.computation.derived

    def cancel_then_derive(kind: str) -> list[Dataset]:
        site.ledger.jobs.cancel(job_id, "operator")
        return derived(kind)

    site.computation.derived = cancel_then_derive  # type: ignore[method-assign]  the moment between two stages
    site.worker.process(job_id)
    assert site.job(job_id).state is State.CANCELLED
    assert not site.spool.result_dir(job_id).exists()


def test_a_worker_that_was_given_up_does_not_overwrite_its_successor(site: Site) -> None:
    job_id = site.new_job()

    def lose_the_lease(_: Progress) -> None:
        site.computation.before = lambda _: None
        site.ledger.jobs.move(job_id, [State.RUNNING], State.QUEUED, actor="intake")
        site.another_worker("worker:2").process(job_id)

    site.computation.before = lose_the_lease
    site.worker.process(job_id)
    finished = [step for step in site.ledger.jobs.history(job_id) if step.to_state is State.COMPUTED]
    assert [(step.actor, step.attempt) for step in finished] == [("worker:2", 2)]


def test_the_heartbeat_keeps_a_long_stage_alive(tmp_path: Path, clock: Clock) -> None:
    site = Site(tmp_path, clock)
    site.restart_worker(lease_seconds=0.2)
    job_id = site.new_job()

    def outlast_the_lease(_: Progress) -> None:
        clock.advance(10)
        assert [job.id for job in site.ledger.jobs.expired()] == [job_id]
        wait_until(lambda: site.ledger.jobs.expired() == [], what="a heartbeat")

    site.computation.before = outlast_the_lease
    site.worker.process(job_id)
    assert site.job(job_id).state is State.COMPUTED
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lease-")]
    site.ledger.close()


def test_a_computation_that_hangs_inside_a_library_ends_its_process_with_a_trace() -> None:
    hang = "import ctypes; from worker.app import ended_when_hung\n"
    hang += "with ended_when_hung(0.5): ctypes.PyDLL(None).sleep(60)"  # holds the interpreter's lock
    done = subprocess.run([sys.executable, "-c", hang], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 1
    assert "most recent call first" in done.stderr


# --- deliver ----------------------------------------------------------------------------------------------------------


def test_a_result_is_sent_and_every_answer_kept(sending: Callable[..., Site]) -> None:
    with running_scp(statuses=[0x0000, 0xB000]) as scp:
        site = sending(scp)
        job_id = site.new_job("pacs")
        site.worker.process(job_id)
        assert site.job(job_id).state is State.DELIVERING
        assert len(list(site.settings.broker_dir.glob("*.deliver.msg"))) == 1
        site.worker.deliver(job_id)
        site.worker.deliver(job_id)
    rows = site.ledger.deliveries.of_job(job_id)
    assert site.job(job_id).state is State.DELIVERED
    assert sorted(scp.received) == sorted(uid("derived", kind, n) for kind in ("sd", "sd_plus") for n in range(2))
    assert [row.dimse_status for row in rows] == [0x0000, 0xB000, 0x0000, 0x0000]
    assert [bool(row.last_error) for row in rows] == [False, True, False, False]


def test_a_destination_is_sent_the_kinds_that_it_takes(sending: Callable[..., Site]) -> None:
    with running_scp() as scp:
        site = sending(scp)
        pacs = site.settings.destinations[0].model_copy(update={"results": (Kind.SD_PLUS,)})
        site.restart_worker(destinations=(pacs,))
        job_id = site.new_job("pacs")
        site.worker.process(job_id)
        site.worker.deliver(job_id)
    assert site.job(job_id).state is State.DELIVERED
    assert sorted(scp.received) == sorted(uid("derived", "sd_plus", n) for n in range(2))


@pytest.mark.parametrize("content", [None, b"not DICOM"])
def test_a_result_that_has_gone_is_named_and_not_sent_in_parts(
    sending: Callable[..., Site], content: bytes | None
) -> None:
    with running_scp() as scp:
        site = sending(scp)
        job_id = site.new_job("pacs")
        site.worker.process(job_id)
        file = site.spool.result_dir(job_id) / "sd" / "0002.dcm"
        file.unlink()
        if content:
            file.write_bytes(content)
        site.worker.deliver(job_id)
        job = site.job(job_id)
        assert (job.state, job.reason) == (State.FAILED, Reason.RESULT_LOST)
        assert job.detail == "1 of 4 files to send are gone or damaged"
        assert scp.received == []
        site.ledger.jobs.rerun(job_id, "operator")
        site.worker.process(job_id)
        site.worker.deliver(job_id)
    assert site.job(job_id).state is State.DELIVERED


def test_only_what_the_archive_could_not_take_is_sent_again(sending: Callable[..., Site]) -> None:
    with running_scp(statuses=[0x0000, 0xA700, 0x0000, 0xA700]) as scp:
        site = sending(scp)
        job_id = site.new_job("pacs")
        site.worker.process(job_id)
        site.worker.deliver(job_id)
        job = site.job(job_id)
        assert (job.state, job.reason) == (State.DELIVERING, Reason.DESTINATION_UNREACHABLE)
        assert job.due_at is not None
        assert job.due_at > site.clock.now
        site.worker.deliver(job_id)
    assert site.job(job_id).state is State.DELIVERED
    assert scp.received[4:] == [scp.received[1], scp.received[3]]
    assert [row.attempts for row in site.ledger.deliveries.of_job(job_id)] == [1, 2, 1, 2]


def test_an_archive_that_is_down_is_tried_again_until_the_attempts_are_used_up(tmp_path: Path, clock: Clock) -> None:
    site = Site(tmp_path, clock, free_port(), delivery_max_attempts=2)
    job_id = site.new_job("pacs")
    site.worker.process(job_id)
    site.worker.deliver(job_id)
    assert site.job(job_id).state is State.DELIVERING
    site.worker.deliver(job_id)
    job = site.job(job_id)
    assert (job.state, job.reason) == (State.FAILED, Reason.DESTINATION_UNREACHABLE)
    assert job.detail.startswith("try 2 of 2: 0 of 4 instances sent")
    site.ledger.close()


def test_one_delivery_asks_the_ledger_twice_and_once_for_every_instance(sending: Callable[..., Site]) -> None:
    with running_scp() as scp:
        site = sending(scp)
        job_id = site.new_job("pacs")
        site.worker.process(job_id)
        site.counted.calls.clear()
        site.worker.deliver(job_id)
    assert site.job(job_id).state is State.DELIVERED
    calls = site.asked_of_the_ledger()
    assert calls.pop("deliveries.record") == len(scp.received) == 4
    assert calls == {"deliveries.claim": 1, "deliveries.finish": 1}


def test_the_progress_of_a_delivery_that_failed_says_how_much_was_sent(sending: Callable[..., Site]) -> None:
    with running_scp(statuses=[0x0000, 0xC001]) as scp:
        site = sending(scp)
        job_id = site.new_job("pacs")
        site.worker.process(job_id)
        site.worker.deliver(job_id)
    assert (site.job(job_id).state, site.job(job_id).progress) == (State.FAILED, 0.75)


def test_tries_are_counted_for_the_operator_and_not_called_attempts(tmp_path: Path, clock: Clock) -> None:
    site = Site(tmp_path, clock, free_port(), delivery_max_attempts=4)
    job_id = site.new_job("pacs")
    site.worker.process(job_id)
    for _ in range(4):
        site.worker.deliver(job_id)
    failed = site.ledger.jobs.history(job_id)[-4:]
    assert [step.to_state for step in failed] == [State.DELIVERING] * 3 + [State.FAILED]
    assert [step.detail.partition(":")[0] for step in failed] == [f"try {number} of 4" for number in (1, 2, 3, 4)]
    assert [step.attempt for step in failed] == [2, 3, 4, 5]  # the first one computed
    assert {step.reason for step in failed} == {Reason.DESTINATION_UNREACHABLE}
    assert "attempt" not in "".join(step.detail for step in failed)
    site.ledger.close()


def test_refused_instances_fail_the_job_and_a_resend_sends_only_them(sending: Callable[..., Site]) -> None:
    with running_scp(statuses=[0x0000, 0xC001]) as scp:
        site = sending(scp)
        job_id = site.new_job("pacs")
        site.worker.process(job_id)
        site.worker.deliver(job_id)
        job = site.job(job_id)
        assert (job.state, job.reason) == (State.FAILED, Reason.DESTINATION_REFUSED)
        assert job.detail == "3 of 4 instances sent; 0xC001"
        site.ledger.deliveries.resend(job_id, "operator")
        site.worker.deliver(job_id)
    assert site.job(job_id).state is State.DELIVERED
    assert scp.received[4:] == [scp.received[1]]


def test_an_archive_that_refuses_the_association_fails_the_job_at_once(sending: Callable[..., Site]) -> None:
    with running_scp(ae_title="OTHER", called_ae_required=True) as scp:
        site = sending(scp)
        job_id = site.new_job("pacs")
        site.worker.process(job_id)
        site.worker.deliver(job_id)
    assert (site.job(job_id).state, site.job(job_id).reason) == (State.FAILED, Reason.DESTINATION_REFUSED)
    assert set(site.statuses(job_id)) == {DeliveryStatus.FAILED}


def test_a_destination_that_was_taken_out_of_the_settings_is_refused(site: Site) -> None:
    job_id = site.new_job("pacs")
    site.worker.process(job_id)
    site.restart_worker(destinations=(), default_destinations=())
    site.worker.deliver(job_id)
    assert site.job(job_id).reason is Reason.DESTINATION_REFUSED
    assert "pacs" in site.job(job_id).detail


def test_a_cancelled_delivery_stops_between_two_instances(sending: Callable[..., Site]) -> None:
    with running_scp() as scp:
        site = sending(scp)
        job_id = site.new_job("pacs")
        site.worker.process(job_id)
        scp.on_received = lambda: site.ledger.jobs.cancel(job_id, "operator")
        site.worker.deliver(job_id)
    assert site.job(job_id).state is State.CANCELLED
    assert len(scp.received) < 4


def test_a_worker_that_lost_its_delivery_stops_and_leaves_it_to_the_other(sending: Callable[..., Site]) -> None:
    with running_scp() as scp:
        site = sending(scp)
        job_id = site.new_job("pacs")
        site.worker.process(job_id)

        def take_over() -> None:
            scp.on_received = lambda: None
            site.clock.advance(site.settings.lease_seconds)
            assert site.ledger.deliveries.claim(job_id, "worker:2", 60) is not None

        scp.on_received = take_over
        site.worker.deliver(job_id)
    assert len(scp.received) == 1
    assert (site.job(job_id).state, site.job(job_id).worker) == (State.DELIVERING, "worker:2")
    assert site.statuses(job_id) == [DeliveryStatus.PENDING] * 4


def test_a_run_that_gives_no_result_leaves_none_of_an_earlier_run_to_download_or_send(site: Site) -> None:
    job_id = site.new_job("pacs")
    site.worker.process(job_id)
    site.ledger.jobs.move(job_id, [State.DELIVERING], State.FAILED, actor="test", reason=Reason.DESTINATION_UNREACHABLE)
    site.ledger.jobs.rerun(job_id, "operator")
    site.computation.before = raising(Permanent(Reason.OUTPUT_INVALID))
    site.worker.process(job_id)
    assert site.job(job_id).state is State.FAILED
    assert not site.spool.result_dir(job_id).exists()
    assert site.ledger.deliveries.resend(job_id, "operator") is None


def test_a_result_that_was_computed_again_is_sent_again(sending: Callable[..., Site]) -> None:
    with running_scp() as scp:
        site = sending(scp)
        job_id = site.new_job("pacs")
        for _ in range(2):
            site.worker.process(job_id)
            site.worker.deliver(job_id)
            site.ledger.jobs.rerun(job_id, "operator")
    assert len(scp.received) == 8
    assert len(set(scp.received)) == 4
