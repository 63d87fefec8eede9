"""Forgetting: everything about a study in which nothing has happened for long, out of all books at once.

Guarantees: one transaction for each study, so none is half forgotten; a study that wakes up in the meantime stays
(it is asked again once its jobs are held); an instance that arrives in the same moment was answered for, and stays.
Must never forget what is under way, or a result that a destination still owes its storage commitment for.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, or_, select

from service.core.job import State
from service.core.ledger import schema
from service.core.ledger.database import Database, one_at_a_time
from service.core.ledger.deliveries import OPEN_VALUES, switched

UNDER_WAY = (State.QUEUED, State.RUNNING, State.DELIVERING)


class Retention:
    """See the head of this module."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def forget(self, before: datetime, committing: Mapping[str, bool]) -> int:
        """Delete everything about studies in which nothing has happened since, and nothing is under way.

        A result whose destination is asked for storage commitment is under way until it is COMMITTED or a person
        cancels it: until then ours may be the only copy. Their bytes become the janitor's (`Spool.sweep_up`).

        Args:
            before: what was touched since stays.
            committing: whether each destination is asked now; a site may have switched it off since a job was made. One
                that is not named was renamed or removed, which switches nothing off.

        Returns:
            How many studies were forgotten.
        """
        job, instance, asked = schema.jobs.c, schema.instances.c, schema.commitment_requests
        under_way = job.state.in_([state.value for state in UNDER_WAY])
        busy = select(job.study_uid).where(or_(job.updated_at >= before, under_way, _lacks_commitment(committing)))
        recent = select(instance.study_uid).where(or_(instance.received_at >= before, instance.job_id.is_(None)))
        query = select(job.study_uid).where(job.study_uid.not_in(busy), job.study_uid.not_in(recent)).distinct()
        with self._database.begin() as connection:
            connection.execute(delete(asked).where(asked.c.received_at < before))
        forgotten = 0
        for study_uid in [row.study_uid for row in self._database.read(query)]:
            with self._database.begin() as connection:
                one_at_a_time(connection, study_uid)
                connection.execute(select(job.id).where(job.study_uid == study_uid).with_for_update())
                # Asked again: something may have happened while others were deleted.
                if connection.execute(query.where(job.study_uid == study_uid)).first():
                    _forget_study(connection, study_uid, before)
                    forgotten += 1
        return forgotten


def _lacks_commitment(committing: Mapping[str, bool]) -> ColumnElement[bool]:
    """Whether some destination, for which it is not switched off, owes storage commitment of the job."""
    table = schema.deliveries
    open_there = and_(table.c.commitment.in_(OPEN_VALUES), table.c.destination.not_in(switched(committing, on=False)))
    owed = exists().where(table.c.job_id == schema.jobs.c.id, open_there)
    return and_(owed, schema.jobs.c.state != State.CANCELLED.value)


def _forget_study(connection: Connection, study_uid: str, before: datetime) -> None:
    ids, old = select(schema.jobs.c.id).where(schema.jobs.c.study_uid == study_uid), schema.instances.c
    # An image that arrives at this moment was answered for and stays; it has no job that could be deleted under it.
    connection.execute(delete(schema.instances).where(old.study_uid == study_uid, old.received_at < before))
    for table in (schema.job_inputs, schema.transitions, schema.deliveries, schema.commitments):
        connection.execute(delete(table).where(table.c.job_id.in_(ids)))
    connection.execute(delete(schema.jobs).where(schema.jobs.c.study_uid == study_uid))
