"""The DICOM listener: C-ECHO, C-STORE and storage commitment (PS3.4 annexes A, B and J, PS3.7 section 9.1, PS3.8).

Hides associations: who may open one, what is negotiated, what each failure answers, and the bounds that keep one bad
peer from taking memory, threads or time from the others. An object is answered with success only once it is durable.
Must never decode pixels, write values of a data set to a log, or let C-ECHO wait for disk or database.
"""

from __future__ import annotations

import errno
import socket
import sys
import threading
import time
from collections.abc import Callable
from socketserver import BaseServer
from typing import Any, cast

from pydicom.dataset import Dataset
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.events import EventHandlerType
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from service.core import actor
from service.core.association import PLAIN_SYNTAXES, VERIFICATION, accepting_entity
from service.core.dicom.accepted import SOP_CLASSES, TRANSFER_SYNTAXES
from service.core.dicom.status import (
    CONFLICTING_DUPLICATE,
    DATA_SET_MISMATCH,
    NOT_SUPPORTED,
    NOT_UNDERSTOOD,
    OUT_OF_RESOURCES,
    SUCCESS,
    UNEXPECTED,
)
from service.core.errors import Permanent, Reason
from service.core.ledger import Added, LedgerError
from service.core.settings import Settings
from service.core.spool import Spool
from service.core.telemetry import Log, pseudonym
from service.dicom.commitment import StorageCommitment
from service.intake import Intake
from service.objects import DicomObject, from_wire

LOG = Log("listener")

LONGEST_PDU_BYTES = 1 << 20  # no honest PDU is longer: ours are bounded by the offer, a request by its contexts
READ_BYTES = 1 << 16
_OFFERS = [*((str(uid), TRANSFER_SYNTAXES) for uid in SOP_CLASSES), (VERIFICATION, PLAIN_SYNTAXES)]


class Listener:
    """A listener on its own threads, from `start` to `stop`.

    Args:
        settings: address, AE titles and bounds.
        intake: where objects go.
        spool: asked for free disk space.
        commitment: what is negotiated and done about storage commitment.
    """

    def __init__(self, settings: Settings, intake: Intake, spool: Spool, commitment: StorageCommitment) -> None:
        self._settings, self._intake, self._spool, self._commitment = settings, intake, spool, commitment
        self._server: _Server | None = None

    def start(self) -> int:
        """Listen.

        Returns:
            The port, which matters where the settings say 0.

        Raises:
            OSError: the address is taken or not ours.
        """
        handlers: list[EventHandlerType] = [
            (evt.EVT_C_ECHO, _answer_echo),
            (evt.EVT_C_STORE, self._answer_store),
            *self._commitment.handlers(),
        ]
        settings = self._settings
        entity = accepting_entity(
            settings.ae_title,
            _OFFERS,
            allowed_calling_aes=settings.allowed_calling_aes,
            max_associations=settings.max_associations,
        )
        self._commitment.negotiate(entity)
        address = (settings.listen_host, settings.listen_port)
        server = entity.make_server(
            address, evt_handlers=handlers, server_class=_Server, request_handler=_Connection, settings=settings
        )
        self._server = cast("_Server", server)
        threading.Thread(target=server.serve_forever, args=(0.1,), name="listener", daemon=True).start()
        return int(server.server_address[1])

    def stop(self, grace_seconds: float = 5.0) -> None:
        """Take no more associations, let the open ones finish for a while, then abort them."""
        if self._server is None:
            return
        self._server.stop_accepting()
        deadline = time.monotonic() + grace_seconds
        while any(item.is_established for item in self._server.active_associations) and time.monotonic() < deadline:
            time.sleep(0.05)
        for association in self._server.active_associations:
            if association.is_established:
                association.abort()
            elif association.dul.socket and association.dul.socket.socket:
                self._server.shutdown_request(association.dul.socket.socket)
        self._server = None

    def _answer_store(self, event: Any) -> int | Dataset:  # pynetdicom has no types
        peer = {"ae_title": str(event.assoc.requestor.ae_title).strip(), "peer": event.assoc.requestor.address}
        try:
            return self._store(event, actor.peer(peer["ae_title"]), **peer)
        except Permanent as error:
            status = NOT_SUPPORTED if error.reason is Reason.UNSUPPORTED_OBJECT else NOT_UNDERSTOOD
            LOG.warning("object refused", status=status, reason=error.reason.name, **peer)
            return _status(status, error.detail)
        except (OSError, LedgerError) as error:
            # Both pass: the sender keeps the object and comes again.
            LOG.failure("object not stored", error, status=OUT_OF_RESOURCES, **peer)
            is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            return _status(OUT_OF_RESOURCES, "disk full" if is_full else "storage is not available")
        except Exception as error:  # noqa: BLE001  an association must not end without an answer
            LOG.failure("unexpected error", error, status=UNEXPECTED, **peer)
            return _status(UNEXPECTED, "unexpected error; see the log")

    def _store(self, event: Any, source: str, *, ae_title: str, peer: str) -> int | Dataset:
        event.assoc.dul.socket.recv.message_ended()
        if self._spool.is_low():
            LOG.warning("object refused: disk is low", status=OUT_OF_RESOURCES, ae_title=ae_title, peer=peer)
            return _status(OUT_OF_RESOURCES, "disk is low")
        received = from_wire(event.encoded_dataset(include_meta=False), str(event.context.transfer_syntax))
        if not _is_as_announced(event, received):
            LOG.warning("object refused: command and data set differ", status=DATA_SET_MISMATCH, ae_title=ae_title)
            return _status(DATA_SET_MISMATCH, "UIDs of command and data set differ")
        added = self._intake.admit(received, source)
        study = pseudonym(received.study_uid)
        if added is Added.CONFLICT:
            LOG.warning("conflicting duplicate refused", status=CONFLICTING_DUPLICATE, study=study, ae_title=ae_title)
            return _status(CONFLICTING_DUPLICATE, "this SOP Instance UID is known with other content")
        size = sum(len(chunk) for chunk in received.chunks)
        LOG.info("object stored", state=added.value, study=study, size=size, ae_title=ae_title, peer=peer)
        return SUCCESS


def _answer_echo(_event: Any) -> int:
    return SUCCESS


def _is_as_announced(event: Any, received: DicomObject) -> bool:
    announced = str(event.request.AffectedSOPClassUID), str(event.request.AffectedSOPInstanceUID)
    negotiated = str(event.context.abstract_syntax)
    return announced == (received.sop_class_uid, received.sop_instance_uid) and announced[0] == negotiated


def _status(code: int, comment: str) -> Dataset:
    answer = Dataset()
    answer.Status = code
    answer.ErrorComment = comment[:64]  # LO, PS3.7 annex C
    return answer


class _Server(ThreadedAssociationServer):
    """pynetdicom's server with a bound on connections, since each costs two threads before it has said a word."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any, settings: Settings, **kwargs: Any) -> None:
        self._most_connections = 2 * settings.max_associations
        self.settings = settings
        super().__init__(*args, **kwargs)

    def verify_request(self, _request: Any, client_address: Any) -> bool:
        """Whether to talk to a new connection at all."""
        if len(self.active_associations) < self._most_connections:
            return True
        LOG.warning("connection closed: too many", peer=client_address[0], count=self._most_connections)
        return False

    def handle_error(self, _request: Any, client_address: Any) -> None:
        """Called inside an except block; the original prints the exception."""
        LOG.failure("connection failed", sys.exc_info()[1] or RuntimeError(), peer=client_address[0])

    def stop_accepting(self) -> None:
        """Close the door; who is inside may stay."""
        BaseServer.shutdown(self)  # pynetdicom's own is for servers of `start_server`
        self.server_close()


class _Connection(RequestHandler):
    """pynetdicom's connection, reading through `_BoundedReader`."""

    def _create_association(self) -> Association:
        association = super()._create_association()
        connection, settings = cast("socket.socket", self.request), cast("_Server", self.server).settings

        def nothing_came() -> None:
            # Otherwise the thread waits for a request until its timer runs out, one for each probe of a load balancer.
            association.dul.to_user_queue.put(cast("Any", None))

        vars(association.dul.socket)["recv"] = _BoundedReader(connection, settings, nothing_came)
        return association


class _BoundedReader:
    """Reads a PDU as pynetdicom asks for it, but neither longer than it may be nor for ever (PS3.8 section 9.3.1).

    Without it the length that a peer announces is believed, and a peer that falls silent inside a PDU is waited for.
    """

    def __init__(self, connection: socket.socket, settings: Settings, when_nothing_came: Callable[[], None]) -> None:
        self._connection, self._seconds = connection, settings.receive_timeout_seconds
        self._longest_message_bytes, self._message_bytes = settings.max_object_bytes, 0
        self._is_first, self._when_nothing_came = True, when_nothing_came

    def message_ended(self) -> None:
        """A whole message was handled; the next one is counted from zero."""
        self._message_bytes = 0

    def __call__(self, count: int) -> bytearray:
        """Exactly `count` bytes, or fewer where the peer has closed.

        Raises:
            OSError: too long, or too slow. pynetdicom closes the connection.
        """
        self._message_bytes += count
        if count > LONGEST_PDU_BYTES or self._message_bytes > self._longest_message_bytes:
            LOG.warning("connection closed: a message is too long", size=max(count, self._message_bytes))
            raise OSError(errno.EMSGSIZE, "message too long")
        deadline, received = time.monotonic() + self._seconds, bytearray()
        while len(received) < count:
            self._connection.settimeout(max(deadline - time.monotonic(), 0.001))
            chunk = self._connection.recv(min(READ_BYTES, count - len(received)))
            if not chunk:
                break
            received += chunk
        if self._is_first and not received:
            self._when_nothing_came()
        self._is_first = False
        self._connection.settimeout(self._seconds)  # answers are sent over the same socket
        return received
