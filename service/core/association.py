"""Application entities and the associations that we open, made in one place (PS3.8 section 9.3, PS3.7 annex D).

Hides pynetdicom's settings for the whole process, time-outs, PDU sizes and what a refusal means: something that may
pass, or something that a person has to change. Whatever secures a connection belongs here. Must never log a part of a
message, and never leave an association open behind a failed block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, _config, build_role
from pynetdicom.association import Association
from pynetdicom.events import EventHandlerType
from pynetdicom.presentation import build_context

from service.core.errors import Permanent, Reason, Retryable

# pynetdicom keeps these for the whole process: nothing of a message is logged, and nothing unknown is stored.
_config.LOG_HANDLER_LEVEL = "none"
_config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False
_config.UNRESTRICTED_STORAGE_SERVICE = False
_config.STORE_RECV_CHUNKED_DATASET = False

VERIFICATION = "1.2.840.10008.1.1"  # SOP class, PS3.4 annex A
PLAIN_SYNTAXES = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 60.0  # a busy archive may take long to answer one C-STORE-RQ
ASSOCIATION_SECONDS = 30.0  # of who calls us: ARTIM (PS3.8 section 9.1.5), and silence between two messages
PDU_BYTES = 131_072  # what we offer to receive at once (PS3.8 annex D.1)
REJECTED_TRANSIENT = 2  # PS3.8 section 9.3.4, Result

Offer = tuple[str, Sequence[str]]  # abstract syntax, transfer syntaxes: one presentation context


class Called(Protocol):
    """Whom we call."""

    @property
    def host(self) -> str:
        """Name or address."""

    @property
    def port(self) -> int:
        """TCP port."""

    @property
    def ae_title(self) -> str:
        """Called AE title."""


@contextmanager
def associated(
    called: Called,
    offers: Sequence[Offer],
    *,
    calling_ae_title: str,
    as_provider_of: Sequence[str] = (),
    handlers: Sequence[EventHandlerType] = (),
    connect_seconds: float = CONNECT_SECONDS,
    answer_seconds: float = ANSWER_SECONDS,
) -> Iterator[Association]:
    """An established association; released at the end, aborted if the block fails.

    Args:
        called: whom to call.
        offers: what we want to talk about.
        calling_ae_title: who we say we are.
        as_provider_of: SOP classes in which we propose the role of SCP (PS3.7 annex D.3.3.4).
        handlers: of pynetdicom, for what the other side asks of us.
        connect_seconds: for the connection, and for the answer to our request.
        answer_seconds: for the answer to each message.

    Raises:
        Retryable: DESTINATION_UNREACHABLE.
        Permanent: DESTINATION_REFUSED.
    """
    entity = AE(ae_title=calling_ae_title)
    entity.connection_timeout = entity.acse_timeout = connect_seconds
    entity.dimse_timeout = entity.network_timeout = answer_seconds
    try:
        association = entity.associate(
            called.host,
            called.port,
            contexts=[build_context(abstract, list(syntaxes)) for abstract, syntaxes in offers],
            ae_title=called.ae_title,
            max_pdu=PDU_BYTES,
            ext_neg=[build_role(UID(uid), scp_role=True) for uid in as_provider_of],
            evt_handlers=list(handlers),
        )
    except OSError as error:  # the name does not resolve, now
        raise Retryable(Reason.DESTINATION_UNREACHABLE, f"{called.ae_title}: {error}") from error
    if not association.is_established:
        raise _refusal(association)
    with ExitStack() as interrupted:
        interrupted.callback(association.abort)
        yield association
        interrupted.pop_all()
    association.release()


def accepting_entity(
    ae_title: str, offers: Sequence[Offer], *, allowed_calling_aes: Sequence[str], max_associations: int
) -> AE:
    """An entity that is called: it answers to its own title alone, and admits these callers (none named: anybody)."""
    entity = AE(ae_title=ae_title)
    entity.maximum_pdu_size = PDU_BYTES
    entity.maximum_associations = max_associations
    entity.acse_timeout = entity.network_timeout = ASSOCIATION_SECONDS
    entity.require_called_aet = True
    entity.require_calling_aet = list(allowed_calling_aes)
    entity.supported_contexts = [build_context(abstract, list(syntaxes)) for abstract, syntaxes in offers]
    return entity


def _refusal(association: Association) -> Permanent | Retryable:
    """Why there is no association: a final refusal, or something that may pass."""
    answer: Any = association.acceptor.primitive
    if association.is_rejected and answer is not None:
        words = f"association rejected: {answer.reason_str} ({answer.source_str}, {answer.result_str})"
        if answer.result == REJECTED_TRANSIENT:
            return Retryable(Reason.DESTINATION_UNREACHABLE, words)
        return Permanent(Reason.DESTINATION_REFUSED, words)
    if association.rejected_contexts:
        names = sorted({UID(context.abstract_syntax or "").name for context in association.rejected_contexts})
        return Permanent(Reason.DESTINATION_REFUSED, f"no presentation context accepted for {', '.join(names)}")
    return Retryable(Reason.DESTINATION_UNREACHABLE, "no connection, or the association was aborted")
