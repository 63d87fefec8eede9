from __future__ import annotations

import contextlib
import itertools
import sqlite3
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import TypeVar

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, event, text
from sqlalchemy.pool import Pool

from service.core.dicom.commitment import Reference, Report
from service.core.errors import Reason
from service.core.job import TRANSITIONS, Job, JobOptions, Stage, State
from service.core.ledger import (
    Added,
    Delivery,
    DeliveryStatus,
    Instance,
    Ledger,
    LedgerError,
    LedgerUnavailableError,
    Noted,
    schema,
)
from tests.conftest import Clock
from tests.peers import MR_IMAGE_STORAGE, free_port, wait_until

T = TypeVar("T")


def an_instance(number: int = 1, study: str = "1.2.3", **changes: object) -> Instance:
    plain = Instance(
        sop_instance_uid=f"{study}.9.{number}",
        study_uid=study,
        series_uid=f"{study}.1",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.4",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        sha256=f"{number:064x}",
        size=1000,
        received_at=Clock().now,
        source="dimse:MODALITY",
        summary={"rows": 256},
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def a_job(ledger: Ledger, number: int = 1) -> Job:
    instance = an_instance(number)
    ledger.received.add(instance)
    return ledger.jobs.create(instance.study_uid, [instance], JobOptions(), "rest")[0]


def a_result(ledger: Ledger, *deliveries: Delivery) -> Job:
    job = a_job(ledger)
    running = ledger.jobs.claim(job.id, "worker", 60)
    assert running is not None
    done = ledger.jobs.finish(job.id, running.attempt, actor="worker", report={"ok": True}, deliveries=deliveries)
    assert done is not None
    return done


def at_the_same_time(count: int, action: Callable[[int], T]) -> list[T]:
    barrier = Barrier(count)

    def wait_and_act(number: int) -> T:
        barrier.wait()
        return action(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(wait_and_act, range(count)))


def behind_a_lock(url: str, query: str, *actions: Callable[[], object]) -> list[object]:
    """Let the actions begin while somebody else locks the rows of `query`, and let them go when all have to wait."""
    plain, waiting = url.replace("+psycopg", ""), "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with psycopg.connect(plain) as other, psycopg.connect(plain, autocommit=True) as onlooker:
        other.execute(f"{query} FOR UPDATE")  # type: ignore[arg-type,unused-ignore]  the words are ours
        with ThreadPoolExecutor(len(actions)) as pool:
            begun = []
            for number, action in enumerate(actions, start=1):
                begun.append(pool.submit(action))
                wait_until(lambda number=number: onlooker.execute(waiting).fetchone() == (number,), what="a lock")  # type: ignore[misc]
            other.rollback()
            return [future.result(30) for future in begun]


def asked(ledger: Ledger, *names: str) -> Job:
    """A job with a result that was sent to these destinations, and which each was asked to keep as `2.25.<name>`."""
    job = a_result(ledger, *[replace(row, destination=name) for name in names for row in deliveries("1")])
    sending = ledger.deliveries.claim(job.id, "worker", 60)
    assert sending is not None
    for name in names:
        ledger.deliveries.record(
            job.id, name, "2.25.1", DeliveryStatus.SENT, attempt=sending.job.attempt, dimse_status=0
        )
    ledger.deliveries.finish(job.id, sending.job.attempt, actor="worker", committing=dict.fromkeys(names, True))
    asking = ledger.commitments.claim(job.id, "worker", 60, dict.fromkeys(names, True))
    assert asking is not None
    for name in names:
        ledger.commitments.ask(job.id, asking.job.attempt, name, f"2.25.{name}", 60)
    return asking.job


def committed_by(ledger: Ledger, name: str) -> Noted:
    return ledger.commitments.answer(
        Report(f"2.25.{name}", (Reference(MR_IMAGE_STORAGE, "2.25.1"),)), {name}, actor=name
    )


def states(ledger: Ledger, job: Job) -> list[State]:
    return [step.to_state for step in ledger.jobs.history(job.id)]


def deliveries(*names: str) -> list[Delivery]:
    return [Delivery("pacs", f"2.25.{name}", "sd", f"sd/{name}.dcm", MR_IMAGE_STORAGE) for name in names]


# --- tables -----------------------------------------------------------------------------------------------------------


def test_migrations_build_exactly_the_tables_that_the_code_uses(ledger: Ledger, database_url: str) -> None:
    engine = create_engine(database_url)
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), schema.metadata)
    engine.dispose()
    assert differences == []


def test_results_that_were_sent_before_they_had_a_class_get_the_one_of_their_kind(database_url: str) -> None:
    with Ledger.open(database_url) as ledger:
        job = a_result(ledger, *deliveries("1"))
    engine, config = create_engine(database_url), Config()
    config.set_main_option("script_location", "service.core.ledger:migrations")
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0003")
    engine.dispose()
    with Ledger.open(database_url) as ledger:
        assert [row.sop_class_uid for row in ledger.deliveries.of_job(job.id)] == [MR_IMAGE_STORAGE]


def test_several_processes_may_open_an_empty_database_at_the_same_time(database_url: str) -> None:
    opened = at_the_same_time(4, lambda _: Ledger.open(database_url))
    assert [sum(ledger.jobs.counts().values()) for ledger in opened] == [0, 0, 0, 0]
    for ledger in opened:
        ledger.close()


def test_a_ledger_opened_again_still_knows_everything(database_url: str) -> None:
    with Ledger.open(database_url) as first:
        job = a_job(first)
    with Ledger.open(database_url) as second:
        assert second.jobs.get(job.id) == job


@pytest.mark.parametrize("mode", [None, 0o644, 0o666])
def test_the_file_of_the_ledger_is_for_its_owner_alone_whatever_it_was_before(tmp_path: Path, mode: int | None) -> None:
    url, files = f"sqlite:///{tmp_path / 'ledger.sqlite'}", ["ledger.sqlite", "ledger.sqlite-shm", "ledger.sqlite-wal"]
    with Ledger.open(url) as earlier:
        a_job(earlier)
        if mode is not None:
            for file in files:
                (tmp_path / file).chmod(mode)
        with Ledger.open(url) as ledger:
            a_job(ledger, 2)
            assert sorted(path.name for path in tmp_path.iterdir()) == files
            assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_database_that_is_away_is_told_from_one_that_refuses(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailableError):
        Ledger.open(f"postgresql+psycopg://nobody@127.0.0.1:{free_port()}/lowgad")
    (tmp_path / "ledger.sqlite").mkdir()
    with pytest.raises(LedgerUnavailableError):
        Ledger.open(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    with pytest.raises(LedgerError) as refused:
        Ledger.open("no-such-database://")
    assert not isinstance(refused.value, LedgerUnavailableError)


def test_an_error_of_the_database_names_its_kind_and_quotes_nothing(ledger: Ledger) -> None:
    with pytest.raises(LedgerError) as caught:
        ledger.received.add(an_instance(series_uid=None, source="Doe^Jane"))
    assert type(caught.value) is LedgerError
    assert str(caught.value) == "IntegrityError"


# --- instances --------------------------------------------------------------------------------------------------------


def test_an_instance_that_arrives_twice_is_kept_once(ledger: Ledger) -> None:
    assert ledger.received.add(an_instance()) is Added.NEW
    assert ledger.received.add(an_instance()) is Added.DUPLICATE
    assert ledger.received.of_study("1.2.3") == [an_instance()]


def test_other_bytes_under_a_known_uid_are_a_conflict_and_the_first_are_kept(ledger: Ledger) -> None:
    ledger.received.add(an_instance())
    assert ledger.received.add(an_instance(sha256="f" * 64)) is Added.CONFLICT
    assert ledger.received.of_study("1.2.3") == [an_instance()]


def test_the_same_object_in_another_transfer_syntax_is_a_duplicate(ledger: Ledger) -> None:
    ledger.received.add(an_instance())
    compressed = an_instance(sha256="f" * 64, transfer_syntax_uid="1.2.840.10008.1.2.4.70")
    assert ledger.received.add(compressed) is Added.DUPLICATE


def test_eight_associations_sending_the_same_instance_leave_one_row(ledger: Ledger) -> None:
    answers = at_the_same_time(8, lambda _: ledger.received.add(an_instance()))
    assert sorted(answer.value for answer in answers) == ["duplicate"] * 7 + ["new"]


def test_a_study_waits_until_a_job_covers_all_of_it(ledger: Ledger, clock: Clock) -> None:
    first, late = an_instance(1), an_instance(2, received_at=clock.now + timedelta(seconds=5))
    ledger.received.add(first)
    ledger.jobs.create("1.2.3", [first], JobOptions(), "rest")
    assert ledger.received.waiting() == []
    ledger.received.add(late)
    [waiting] = ledger.received.waiting()
    assert (waiting.study_uid, waiting.instances, waiting.last_received_at) == ("1.2.3", 2, late.received_at)


def test_instances_that_were_considered_and_not_chosen_stop_waiting(ledger: Ledger) -> None:
    chosen, other = an_instance(1), an_instance(2)
    ledger.received.add(chosen)
    ledger.received.add(other)
    job, _ = ledger.jobs.create("1.2.3", [chosen], JobOptions(), "rest", considered=[other])
    assert ledger.received.waiting() == []
    assert ledger.jobs.inputs(job.id) == [chosen]


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_the_same_input_and_options_give_the_same_job(ledger: Ledger) -> None:
    one, two = an_instance(1), an_instance(2)
    for instance in (one, two):
        ledger.received.add(instance)
    job, created = ledger.jobs.create("1.2.3", [one, two], JobOptions(), "rest")
    assert created
    assert ledger.jobs.create("1.2.3", [two, one], JobOptions(), "dimse:X") == (job, False)
    assert ledger.jobs.create("1.2.3", [one, two], JobOptions(engine="linear"), "rest")[1]


def test_eight_requests_for_the_same_job_make_one(ledger: Ledger) -> None:
    instance = an_instance()
    ledger.received.add(instance)
    answers = at_the_same_time(8, lambda _: ledger.jobs.create("1.2.3", [instance], JobOptions(), "rest"))
    assert sum(created for _, created in answers) == 1
    assert len({job.id for job, _ in answers}) == 1
    assert states(ledger, answers[0][0]) == [State.QUEUED]


def test_the_job_made_from_more_of_a_study_wins_whoever_comes_first(ledger: Ledger) -> None:
    early, late = an_instance(1), an_instance(2)
    for instance in (early, late):
        ledger.received.add(instance)
    larger, created = ledger.jobs.create("1.2.3", [early, late], JobOptions(), "sweep")
    assert created
    assert ledger.jobs.create("1.2.3", [early], JobOptions(), "rest") == (larger, False)
    assert [job.id for job in ledger.jobs.page()] == [larger.id]
    assert ledger.received.waiting() == []


def test_of_jobs_made_at_the_same_moment_the_one_from_the_whole_study_stays(ledger: Ledger) -> None:
    instances = [an_instance(number) for number in range(8)]
    for instance in instances:
        ledger.received.add(instance)
    at_the_same_time(8, lambda n: ledger.jobs.create("1.2.3", instances[: n + 1], JobOptions(), "rest"))
    *_, whole = sorted(ledger.jobs.page(), key=lambda job: len(ledger.jobs.inputs(job.id)))
    assert (len(ledger.jobs.inputs(whole.id)), whole.state, whole.superseded_by) == (8, State.QUEUED, None)
    others = [job for job in ledger.jobs.page() if job.id != whole.id]
    assert all(job.state is State.CANCELLED and job.superseded_by for job in others)


@pytest.mark.parametrize("end", [State.REJECTED, State.NEEDS_REVIEW, State.FAILED])
def test_a_late_instance_re_opens_a_study_that_had_ended_and_both_jobs_say_so(ledger: Ledger, end: State) -> None:
    old, late = a_job(ledger, 1), an_instance(2)
    ledger.jobs.claim(old.id, "worker", 60)
    ledger.jobs.move(old.id, [State.RUNNING], end, actor="worker")
    ledger.received.add(late)
    new, created = ledger.jobs.create("1.2.3", [an_instance(1), late], JobOptions(), "rest")
    assert created
    assert ledger.jobs.history(new.id)[0].detail == f"re-opens job {old.id} ({end.value}): more images arrived"
    known = ledger.jobs.get(old.id)
    assert known is not None
    assert (known.superseded_by, new.superseded_by) == (new.id, None)
    assert known.state is (State.CANCELLED if end is State.NEEDS_REVIEW else end)


def test_a_job_that_was_superseded_and_is_wanted_again_runs_again(ledger: Ledger) -> None:
    first, disturbing = an_instance(1), an_instance(2)
    old = a_job(ledger, 1)
    ledger.received.add(disturbing)
    between, _ = ledger.jobs.create("1.2.3", [first, disturbing], JobOptions(), "rest")
    ledger.received.add(an_instance(3))
    again, created = ledger.jobs.create("1.2.3", [first], JobOptions(), "rest", [disturbing, an_instance(3)])
    assert (again.id, again.state, again.superseded_by, created) == (old.id, State.QUEUED, None, True)
    outdated = ledger.jobs.get(between.id)
    assert outdated is not None
    assert (outdated.state, outdated.superseded_by) == (State.CANCELLED, old.id)


def test_a_job_with_other_options_is_not_superseded(ledger: Ledger) -> None:
    old, late = a_job(ledger, 1), an_instance(2)
    ledger.received.add(late)
    ledger.jobs.create("1.2.3", [an_instance(1), late], JobOptions(engine="linear"), "rest")
    assert ledger.jobs.get(old.id) == old


def test_jobs_are_listed_newest_first_in_pages(ledger: Ledger, clock: Clock) -> None:
    made = []
    for number in range(5):
        made.append(a_job(ledger, number).id)
        clock.advance(number % 2)  # some share their moment of creation
    first = ledger.jobs.page(limit=2)
    second = ledger.jobs.page(limit=2, before=first[-1].id)
    third = ledger.jobs.page(limit=2, before=second[-1].id)
    listed = [job.id for job in first + second + third]
    assert sorted(listed) == sorted(made)
    assert listed[0] == made[-1]
    moments = [job.created_at for job in first + second + third]
    assert moments == sorted(moments, reverse=True)


def test_jobs_can_be_listed_by_state_and_study(ledger: Ledger) -> None:
    job, other = a_job(ledger, 1), a_job(ledger, 2)
    ledger.jobs.cancel(other.id, "operator")
    assert [found.id for found in ledger.jobs.page(states=[State.QUEUED])] == [job.id]
    assert ledger.jobs.page(study_uid="9.9") == []
    assert ledger.jobs.counts()[State.CANCELLED] == 1
    assert set(ledger.jobs.counts()) == set(State)


# --- state changes ----------------------------------------------------------------------------------------------------


def test_of_eight_workers_that_claim_a_job_one_wins(ledger: Ledger) -> None:
    job = a_job(ledger)
    answers = at_the_same_time(8, lambda number: ledger.jobs.claim(job.id, f"worker-{number}", 60))
    [winner] = [answer for answer in answers if answer]
    assert (winner.state, winner.attempt) == (State.RUNNING, 1)
    assert ledger.jobs.history(job.id)[-1].actor == winner.worker


def test_of_eight_workers_that_claim_a_delivery_one_wins(ledger: Ledger) -> None:
    job = a_result(ledger, *deliveries("1"))
    answers = at_the_same_time(8, lambda number: ledger.deliveries.claim(job.id, f"worker-{number}", 60))
    assert sum(answer is not None for answer in answers) == 1


def test_a_delivery_whose_worker_died_can_be_claimed_again(ledger: Ledger, clock: Clock) -> None:
    job = a_result(ledger, *deliveries("1"))
    first = ledger.deliveries.claim(job.id, "dies", 60)
    clock.advance(61)
    second = ledger.deliveries.claim(job.id, "lives", 60)
    assert first is not None
    assert second is not None
    assert second.job.attempt == first.job.attempt + 1
    done = [State.DELIVERING], State.DELIVERED
    assert ledger.jobs.move(job.id, *done, actor="dies", attempt=first.job.attempt) is None
    assert ledger.jobs.move(job.id, *done, actor="lives", attempt=second.job.attempt) is not None


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_only_the_table_of_transitions_allows_a_change(before: State, after: State) -> None:
    with Ledger.open("sqlite://") as ledger:
        if after in TRANSITIONS[before]:
            assert ledger.jobs.move("no such job", [before], after, actor="test") is None
        else:
            with pytest.raises(ValueError, match="no transition"):
                ledger.jobs.move("no such job", [before], after, actor="test")


def test_a_result_of_an_older_attempt_changes_nothing(ledger: Ledger, clock: Clock) -> None:
    job = a_job(ledger)
    old = ledger.jobs.claim(job.id, "slow", 10)
    assert old is not None
    clock.advance(11)
    [expired] = ledger.jobs.expired()
    ledger.jobs.move(job.id, [State.RUNNING], State.QUEUED, actor="sweep", attempt=expired.attempt)
    new = ledger.jobs.claim(job.id, "fresh", 10)
    assert new is not None
    assert not ledger.jobs.heartbeat(old, lease_seconds=10)
    assert ledger.jobs.finish(job.id, old.attempt, actor="slow", report={}) is None
    assert ledger.jobs.heartbeat(new, Stage.INFER, 0.5, lease_seconds=10)
    assert ledger.jobs.get(job.id) == replace(new, stage=Stage.INFER, progress=0.5)


def test_heartbeats_keep_a_lease_alive(ledger: Ledger, clock: Clock) -> None:
    job = a_job(ledger)
    running = ledger.jobs.claim(job.id, "worker", 10)
    assert running is not None
    clock.advance(9)
    assert ledger.jobs.heartbeat(running, lease_seconds=10)
    clock.advance(9)
    assert ledger.jobs.expired() == []
    clock.advance(2)
    assert [expired.id for expired in ledger.jobs.expired()] == [job.id]


def test_a_worker_learns_at_its_next_heartbeat_that_the_job_was_cancelled(ledger: Ledger) -> None:
    job = a_job(ledger)
    running = ledger.jobs.claim(job.id, "worker", 10)
    assert running is not None
    cancelled = ledger.jobs.cancel(job.id, "operator", "wrong patient position")
    assert cancelled is not None
    assert not ledger.jobs.heartbeat(running, lease_seconds=10)
    assert ledger.jobs.finish(job.id, 1, actor="worker", report={}) is None


def test_a_last_heartbeat_does_not_take_back_a_job_that_was_handed_on(ledger: Ledger) -> None:
    job = a_job(ledger)
    running = ledger.jobs.claim(job.id, "worker", 60)
    assert running is not None
    ledger.jobs.finish(job.id, running.attempt, actor="worker", report={}, deliveries=deliveries("1"))
    assert not ledger.jobs.heartbeat(running, lease_seconds=60)
    sending = ledger.deliveries.claim(job.id, "worker", 60)
    assert sending is not None
    ledger.deliveries.postpone(sending.job, ledger.now(), Reason.DESTINATION_UNREACHABLE, "", actor="worker")
    assert not ledger.jobs.heartbeat(sending.job, lease_seconds=60)
    assert ledger.deliveries.claim(job.id, "worker", 60) is not None


def test_who_was_sending_when_a_person_sent_again_has_lost_the_job(ledger: Ledger) -> None:
    job = a_result(ledger, *deliveries("1"))
    old = ledger.deliveries.claim(job.id, "worker", 60)
    assert old is not None
    ledger.jobs.move(job.id, [State.DELIVERING], State.FAILED, actor="sweep", reason=Reason.ATTEMPTS_EXHAUSTED)
    ledger.deliveries.resend(job.id, "operator")
    assert not ledger.jobs.heartbeat(old.job, lease_seconds=60)
    assert not ledger.deliveries.record(job.id, "pacs", "2.25.1", DeliveryStatus.FAILED, attempt=old.job.attempt)
    assert ledger.deliveries.finish(job.id, old.job.attempt, actor="worker", committing={}) is None
    assert [row.status for row in ledger.deliveries.of_job(job.id)] == [DeliveryStatus.PENDING]


def test_a_reason_and_its_detail_reach_the_job_and_its_history(ledger: Ledger) -> None:
    job = a_job(ledger)
    ledger.jobs.claim(job.id, "worker", 10)
    reason, detail = Reason.UNKNOWN_DOSE, "(0018,1041) missing"
    moved = ledger.jobs.move(
        job.id, [State.RUNNING], State.NEEDS_REVIEW, actor="worker", reason=reason, detail=detail, attempt=1
    )
    assert moved is not None
    last = ledger.jobs.history(job.id)[-1]
    assert (moved.reason, moved.detail) == (last.reason, last.detail) == (reason, detail)
    rerun = ledger.jobs.rerun(job.id, "operator")
    assert rerun is not None
    assert (rerun.reason, rerun.detail) == (None, "")


def test_a_rerun_counts_its_tries_afresh_but_never_its_attempts(ledger: Ledger) -> None:
    job = a_job(ledger)
    for attempt in (1, 2):
        claimed = ledger.jobs.claim(job.id, "worker", 10)
        assert claimed is not None
        assert (claimed.attempt, claimed.tries) == (attempt, attempt)
        ledger.jobs.move(job.id, [State.RUNNING], State.QUEUED, actor="worker", attempt=attempt)
    ledger.jobs.cancel(job.id, "operator")
    ledger.jobs.rerun(job.id, "operator")
    claimed = ledger.jobs.claim(job.id, "worker", 10)
    assert claimed is not None
    assert (claimed.attempt, claimed.tries) == (3, 1)


# --- results and deliveries -------------------------------------------------------------------------------------------


def test_a_result_without_destinations_is_final(ledger: Ledger) -> None:
    job = a_result(ledger)
    assert (job.state, job.report, job.progress) == (State.COMPUTED, {"ok": True}, 1.0)
    assert ledger.jobs.due(0) == []
    assert ledger.deliveries.resend(job.id, "operator") is None


def test_a_result_with_destinations_goes_on_to_delivery_in_one_step(ledger: Ledger) -> None:
    job = a_result(ledger, *deliveries("1", "2"))
    assert job.state is State.DELIVERING
    assert states(ledger, job) == [State.QUEUED, State.RUNNING, State.COMPUTED, State.DELIVERING]
    assert [found.id for found in ledger.jobs.due(60)] == [job.id]
    assert [row.status for row in ledger.deliveries.of_job(job.id)] == [DeliveryStatus.PENDING] * 2


def test_what_a_destination_said_is_kept_per_instance(ledger: Ledger) -> None:
    job = a_result(ledger, *deliveries("1", "2"))
    ledger.deliveries.record(job.id, "pacs", "2.25.1", DeliveryStatus.SENT, attempt=job.attempt, dimse_status=0)
    for _ in range(2):
        ledger.deliveries.record(
            job.id, "pacs", "2.25.2", DeliveryStatus.FAILED, attempt=job.attempt, dimse_status=0xA900, error="refused"
        )
    sent, failed = ledger.deliveries.of_job(job.id)
    assert (sent.status, sent.dimse_status, sent.attempts) == (DeliveryStatus.SENT, 0, 1)
    assert (failed.status, failed.dimse_status, failed.attempts) == (DeliveryStatus.FAILED, 0xA900, 2)


def test_after_a_failure_only_what_is_missing_is_sent_again(ledger: Ledger) -> None:
    job = a_result(ledger, *deliveries("1", "2"))
    claimed = ledger.deliveries.claim(job.id, "worker", 60)
    assert claimed is not None
    ledger.deliveries.record(job.id, "pacs", "2.25.1", DeliveryStatus.SENT, attempt=claimed.job.attempt, dimse_status=0)
    ledger.jobs.move(job.id, [State.DELIVERING], State.FAILED, actor="worker", reason=Reason.DESTINATION_UNREACHABLE)
    again = ledger.deliveries.resend(job.id, "operator")
    assert again is not None
    assert (again.state, again.tries) == (State.DELIVERING, 0)
    assert [row.status for row in ledger.deliveries.of_job(job.id)] == [DeliveryStatus.SENT, DeliveryStatus.PENDING]


def test_a_delivered_job_can_be_sent_again_in_full_and_elsewhere(ledger: Ledger) -> None:
    job = a_result(ledger, *deliveries("1"))
    ledger.deliveries.record(job.id, "pacs", "2.25.1", DeliveryStatus.SENT, attempt=job.attempt, dimse_status=0)
    ledger.jobs.move(job.id, [State.DELIVERING], State.DELIVERED, actor="worker")
    assert (
        ledger.deliveries.resend(job.id, "operator", [replace(row, destination="archive") for row in deliveries("1")])
        is not None
    )
    rows = [(row.destination, row.status) for row in ledger.deliveries.of_job(job.id)]
    assert rows == [("archive", DeliveryStatus.PENDING), ("pacs", DeliveryStatus.PENDING)]


def test_a_refused_resend_leaves_no_trace(ledger: Ledger) -> None:
    job = a_job(ledger)
    assert ledger.deliveries.resend(job.id, "operator", deliveries("1")) is None
    assert ledger.deliveries.of_job(job.id) == []


def test_a_postponed_delivery_is_due_at_its_moment_and_not_before(ledger: Ledger, clock: Clock) -> None:
    job = a_result(ledger, *deliveries("1"))
    claimed = ledger.deliveries.claim(job.id, "worker", 600)
    assert claimed is not None
    later = clock.now + timedelta(seconds=30)
    postponed = ledger.deliveries.postpone(
        claimed.job, later, Reason.DESTINATION_UNREACHABLE, "connection refused", actor="worker"
    )
    assert postponed is not None
    assert ledger.jobs.due(0) == []
    clock.advance(30)
    assert [found.id for found in ledger.jobs.due(0)] == [job.id]


def test_a_delivery_that_failed_and_is_postponed_stands_in_the_history(ledger: Ledger, clock: Clock) -> None:
    job = a_result(ledger, *deliveries("1"))
    claimed = ledger.deliveries.claim(job.id, "worker", 600)
    assert claimed is not None
    why = Reason.DESTINATION_UNREACHABLE, "connection refused"
    ledger.deliveries.postpone(claimed.job, clock.now, *why, actor="worker:1", progress=0.0)
    last = ledger.jobs.history(job.id)[-1]
    assert (last.from_state, last.to_state) == (State.DELIVERING, State.DELIVERING)
    assert (last.reason, last.detail) == why
    assert (last.actor, last.attempt) == ("worker:1", claimed.job.attempt)
    ledger.deliveries.postpone(replace(claimed.job, attempt=0), clock.now, *why, actor="given up")
    assert ledger.jobs.history(job.id)[-1] == last


def test_what_was_said_of_a_cancelled_delivery_is_kept_and_tells_to_stop(ledger: Ledger) -> None:
    job = a_result(ledger, *deliveries("1", "2"))
    claimed = ledger.deliveries.claim(job.id, "worker", 60)
    assert claimed is not None
    ledger.jobs.cancel(job.id, "operator")
    assert not ledger.deliveries.record(
        job.id, "pacs", "2.25.1", DeliveryStatus.SENT, attempt=claimed.job.attempt, dimse_status=0
    )
    assert [row.status for row in ledger.deliveries.of_job(job.id)] == [DeliveryStatus.SENT, DeliveryStatus.PENDING]


def test_a_claim_brings_every_row_of_the_delivery_along(ledger: Ledger) -> None:
    job = a_result(ledger, *deliveries("1", "2"))
    claimed = ledger.deliveries.claim(job.id, "worker", 60)
    assert claimed is not None
    assert claimed.deliveries == ledger.deliveries.of_job(job.id)


def test_the_progress_of_a_job_is_true_when_it_is_delivered_and_when_it_waits_again(ledger: Ledger) -> None:
    job = a_result(ledger, *deliveries("1"))
    claimed = ledger.deliveries.claim(job.id, "worker", 60)
    assert claimed is not None
    assert ledger.jobs.heartbeat(claimed.job, Stage.DELIVER, 0.98, lease_seconds=60)
    done = ledger.deliveries.finish(job.id, claimed.job.attempt, actor="worker", committing={})
    again = ledger.deliveries.resend(job.id, "operator")
    ledger.jobs.move(job.id, [State.DELIVERING], State.DELIVERED, actor="worker")
    anew = ledger.jobs.rerun(job.id, "operator")
    assert done is not None
    assert again is not None
    assert anew is not None
    assert (done.progress, again.progress, anew.progress) == (1.0, 0.0, 0.0)


def test_leases_are_kept_by_the_clock_of_the_server(postgres_url: str) -> None:
    """The server is made to be an hour ahead of us, as when one of several machines has the wrong time."""
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    ahead = "$$ SELECT pg_catalog.clock_timestamp() + interval '1 hour' $$"
    with engine.connect() as connection:
        connection.execute(text("CREATE SCHEMA ahead"))
        connection.execute(text(f"CREATE FUNCTION ahead.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS {ahead}"))
        connection.execute(text(f"ALTER DATABASE {engine.url.database} SET search_path = public, ahead, pg_catalog"))
    engine.dispose()
    with Ledger.open(postgres_url) as ledger:
        assert timedelta(minutes=59) < ledger.now() - datetime.now(UTC) < timedelta(minutes=61)
        job = a_job(ledger)
        assert ledger.jobs.claim(job.id, "worker", 60) is not None
        assert ledger.jobs.expired() == []
    with Ledger.open(postgres_url, lambda: datetime.now(UTC) + timedelta(hours=1, seconds=61)) as later:
        assert [found.id for found in later.jobs.expired()] == [job.id]


# --- storage commitment -----------------------------------------------------------------------------------------------


def test_of_two_destinations_that_commit_themselves_at_the_same_moment_none_is_overlooked(postgres_url: str) -> None:
    with Ledger.open(postgres_url) as ledger:
        job = asked(ledger, "one", "two")
        answers = [lambda name=name: committed_by(ledger, name) for name in ("one", "two")]
        behind_a_lock(postgres_url, "SELECT * FROM jobs", *answers)
        assert states(ledger, job)[-1] is State.COMMITTED


def test_a_commitment_that_comes_while_the_job_is_sent_again_stops_neither(postgres_url: str) -> None:
    with Ledger.open(postgres_url) as ledger:
        job = asked(ledger, "one")
        noted, again = behind_a_lock(
            postgres_url,
            "SELECT * FROM deliveries",
            lambda: committed_by(ledger, "one"),
            lambda: ledger.deliveries.resend(job.id, "operator"),
        )
        assert noted == Noted(job.id, committed=1)
        assert again is not None
        assert states(ledger, job)[-2:] == [State.COMMITTED, State.DELIVERING]


# --- the sweep --------------------------------------------------------------------------------------------------------


def test_a_job_whose_message_was_lost_becomes_due_again(ledger: Ledger, clock: Clock) -> None:
    job = a_job(ledger)
    assert [found.id for found in ledger.jobs.due(60)] == [job.id]
    ledger.jobs.mark_enqueued(job.id)
    assert ledger.jobs.due(60) == []
    clock.advance(60)
    assert [found.id for found in ledger.jobs.due(60)] == [job.id]


def test_a_job_that_backs_off_is_due_at_its_moment(ledger: Ledger, clock: Clock) -> None:
    job = a_job(ledger)
    ledger.jobs.mark_enqueued(job.id)
    ledger.jobs.claim(job.id, "worker", 10)
    later = clock.now + timedelta(seconds=20)
    ledger.jobs.move(job.id, [State.RUNNING], State.QUEUED, actor="worker", attempt=1, due_at=later)
    assert ledger.jobs.due(0) == []
    clock.advance(20)
    assert [found.id for found in ledger.jobs.due(0)] == [job.id]


def test_only_studies_in_which_nothing_happens_any_more_are_forgotten(ledger: Ledger, clock: Clock) -> None:
    done = a_result(ledger, *deliveries("1"))
    ledger.jobs.move(done.id, [State.DELIVERING], State.DELIVERED, actor="worker")
    busy, waiting = an_instance(2, study="1.2.4"), an_instance(3, study="1.2.5")
    for instance in (busy, waiting):
        ledger.received.add(instance)
    queued, _ = ledger.jobs.create("1.2.4", [busy], JobOptions(), "rest")
    assert ledger.retention.forget(clock.now, {}) == 0
    clock.advance(1)
    assert ledger.retention.forget(clock.now, {}) == 1
    assert not ledger.deliveries.record(done.id, "pacs", "2.25.1", DeliveryStatus.SENT, attempt=done.attempt)
    assert (ledger.jobs.get(done.id), ledger.received.of_study("1.2.3"), ledger.deliveries.of_job(done.id)) == (
        None,
        [],
        [],
    )
    assert not ledger.received.holds(an_instance(1).sha256)
    assert ledger.jobs.get(queued.id) == queued
    assert ledger.received.of_study("1.2.5") == [waiting]


def test_a_study_that_wakes_up_while_it_is_being_forgotten_stays(
    ledger: Ledger, clock: Clock, database_url: str
) -> None:
    ledger.received.add(an_instance())
    job, _ = ledger.jobs.create("1.2.3", [an_instance()], JobOptions(), "rest")
    ledger.jobs.cancel(job.id, "operator")
    clock.advance(1)
    with Ledger.open(database_url, clock) as other:
        wake_up = iter([lambda: other.jobs.rerun(job.id, "operator")])

        def between_two_statements(*_: object) -> None:
            next(wake_up, lambda: None)()

        event.listen(Pool, "checkin", between_two_statements)
        try:
            assert ledger.retention.forget(clock.now, {}) == 0
        finally:
            event.remove(Pool, "checkin", between_two_statements)
    assert len(ledger.jobs.inputs(job.id)) == 1


@settings(deadline=None)  # opening a ledger takes as long as it takes
@given(st.datetimes(timezones=st.timezones()))
def test_moments_come_back_in_utc_whatever_zone_they_came_in(moment: datetime) -> None:
    with Ledger.open("sqlite://") as ledger:
        ledger.received.add(an_instance(received_at=moment))
        [stored] = ledger.received.of_study("1.2.3")
    # Between zones, Python calls a moment in the gap or overlap of a clock change unequal to every other (PEP 495).
    assert stored.received_at == moment.astimezone(UTC)
    assert stored.received_at.utcoffset() == timedelta(0)


def test_a_moment_without_a_zone_is_refused() -> None:
    with Ledger.open("sqlite://") as ledger, pytest.raises(ValueError, match="timezone"):
        ledger.received.add(an_instance(received_at=datetime(2031, 1, 1)))  # noqa: DTZ001  the point of the test


def test_a_ledger_of_a_later_version_is_a_named_error(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    Ledger.open(url).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'of a later version'")
        connection.commit()
    with pytest.raises(LedgerError, match="CommandError"):
        Ledger.open(url)
