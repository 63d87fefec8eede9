"""Status numbers of DIMSE responses and Failure Reasons of storage commitment, by name.

Hides nothing: the one list for who sends and who receives. Sources: PS3.7 annex C for all services, PS3.4 table B.2-1
for C-STORE, PS3.3 C.14.1.1 for Failure Reason (0008,1197).
"""

from __future__ import annotations

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
DUPLICATE_SOP_INSTANCE = 0x0111
NO_SUCH_OBJECT_INSTANCE = 0x0112
NO_SUCH_EVENT_TYPE = 0x0113
INVALID_ARGUMENT = 0x0115
INVALID_OBJECT_INSTANCE = 0x0117
CLASS_INSTANCE_CONFLICT = 0x0119
SOP_CLASS_NOT_SUPPORTED = 0x0122
NO_SUCH_ACTION = 0x0123
NOT_AUTHORISED = 0x0124
DUPLICATE_TRANSACTION = 0x0131
RESOURCE_LIMITATION = 0x0213

# C-STORE alone (PS3.4 table B.2-1). A700 to A7FF and B000 to BFFF are ranges; those of C000 to CFFF are ours to choose.
OUT_OF_RESOURCES = 0xA700
ANY_OUT_OF_RESOURCES = range(0xA700, 0xA800)
DATA_SET_MISMATCH = 0xA900  # data set does not match SOP class
COERCED = 0xB000
DISCARDED = 0xB006
STORED_MISMATCH = 0xB007
WARNINGS = range(0xB000, 0xC000)
NOT_UNDERSTOOD = 0xC100
CONFLICTING_DUPLICATE = 0xC101
NOT_SUPPORTED = 0xC102
UNEXPECTED = 0xC110

STORE_TEXT = {  # what a destination may answer to C-STORE, for an operator
    COERCED: "stored; the destination coerced data elements",
    DISCARDED: "stored; the destination discarded data elements",
    STORED_MISMATCH: "stored; the data set does not match its SOP class",
    DUPLICATE_SOP_INSTANCE: "the destination already holds this instance",
    PROCESSING_FAILURE: "processing failure",
    INVALID_OBJECT_INSTANCE: "invalid SOP instance",
    SOP_CLASS_NOT_SUPPORTED: "SOP class not supported",
    NOT_AUTHORISED: "not authorised",
    RESOURCE_LIMITATION: "resource limitation",
}
COMMITMENT_TEXT = {  # of a response to N-ACTION, and of Failure Reason
    PROCESSING_FAILURE: "processing failure",
    NO_SUCH_OBJECT_INSTANCE: "no such object instance",
    CLASS_INSTANCE_CONFLICT: "class and instance do not fit",
    SOP_CLASS_NOT_SUPPORTED: "SOP class not supported",
    DUPLICATE_TRANSACTION: "duplicate transaction UID",
    RESOURCE_LIMITATION: "resource limitation",
}


def in_words(status: int, texts: dict[int, str]) -> str:
    """`0x0110 processing failure`; the number alone where `texts` does not know it."""
    return f"0x{status:04X} {texts.get(status, '')}".strip()
