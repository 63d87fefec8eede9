"""Which figure stops a study, which error of the models does, and under which named reason.

Hides how the gates of `models.quality` and the errors of the models become reasons of ours. Must never let a study go
on that a figure refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from models.brain import NoBrainError
from models.quality import Figure, Gate, refused
from models.registration import RegistrationError
from models.runtime import OutputError, UnknownDoseError
from service.core.errors import Permanent, Reason

_REASON_OF_GATE = {
    Gate.PAIR: Reason.PAIR_NOT_COMPARABLE,
    Gate.ORDER: Reason.SERIES_SWAPPED,
    Gate.CONDITIONS: Reason.OUTSIDE_TRAINING,
    Gate.OUTPUT: Reason.OUTPUT_INVALID,
}


def refuse(figures: Sequence[Figure], witnesses: Sequence[str] = (), *, where: str = "") -> None:
    """Stop where a figure refuses; who said which series is which is told where that is in question.

    Args:
        figures: all that were measured until now.
        witnesses: what they said of the order of the pair.
        where: what the figures are of, in front of the detail.

    Raises:
        Permanent: with the reason of the first gate that is shut, and all figures as its report.
    """
    shut = refused(figures)
    if shut:
        gate, said = shut
        detail = "; ".join([said, *(witnesses if gate is Gate.ORDER else ())])
        report = {"quality": [figure.row() for figure in figures]}
        raise Permanent(_REASON_OF_GATE[gate], f"{where}{detail}", report=report)


@contextmanager
def named_reasons(where: str = "") -> Iterator[None]:
    """Inside, what the models raise of this study becomes Permanent; `where` stands in front of the detail.

    Raises:
        Permanent: REGISTRATION_FAILED, UNKNOWN_DOSE, OUTPUT_INVALID.
    """
    try:
        yield
    except (NoBrainError, RegistrationError) as error:
        raise Permanent(Reason.REGISTRATION_FAILED, f"{where}{error}") from error
    except UnknownDoseError as error:
        raise Permanent(Reason.UNKNOWN_DOSE, f"{where}{error}") from error
    except OutputError as error:
        raise Permanent(Reason.OUTPUT_INVALID, f"{where}{error}") from error
