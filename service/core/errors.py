"""The named reasons for which a study ends without a result, and the two kinds of error that carry them.

Hides how a failure becomes an outcome: every reason knows the job state it leads to, the exit code of the command line
and the sentence that an operator reads at night. Must never carry patient data: `detail` holds counts, tags and
numbers, not values that identify somebody.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any


class Outcome(Enum):
    """How a study that gives no result ends. The value is the exit code of the command line."""

    FAILED = 1
    NEEDS_REVIEW = 3
    REJECTED = 4


class Reason(Enum):
    """Why there is no result. The value is (outcome, what the operator reads)."""

    # The study cannot be what we process.
    ONE_SERIES_ONLY = (
        Outcome.REJECTED,
        "Only one usable T1 series arrived. A pre-contrast and a low-dose series are needed; send the missing one.",
    )
    NOT_MR = (Outcome.REJECTED, "The objects are not MR images. Route only brain MRI studies to this destination.")
    UNSUPPORTED_OBJECT = (
        Outcome.REJECTED,
        "The objects are MR but of a kind, transfer syntax or size that is not supported; the detail says which.",
    )
    OTHER_BODY_PART = (
        Outcome.REJECTED,
        "The images show another body part than the head. Route only brain MRI studies to this destination.",
    )
    TWO_PATIENTS = (Outcome.REJECTED, "The upload mixes patients. Nothing was processed; upload one patient at a time.")
    TWO_STUDIES = (Outcome.REJECTED, "The upload mixes studies. Nothing was processed; upload one study at a time.")
    MISSING_SLICES = (
        Outcome.REJECTED,
        "A series has gaps or fewer slices than its partner. Re-send the series from the modality.",
    )
    IRREGULAR_GEOMETRY = (
        Outcome.REJECTED,
        "A series is not one regular volume (mixed orientations, duplicated positions or unequal spacing).",
    )
    UNREADABLE_FILE = (Outcome.REJECTED, "At least one file is not readable DICOM or its pixel data is incomplete.")
    OWN_OUTPUT = (
        Outcome.REJECTED,
        "All images are synthetic, made by lowgad or its like. They are never used as input.",
    )
    STANDARD_DOSE = (
        Outcome.REJECTED,
        "The post-contrast series was acquired at about the standard dose; there is nothing to synthesise.",
    )
    EMPTY_UPLOAD = (Outcome.REJECTED, "The upload or folder holds no DICOM file.")
    INSTANCE_CONFLICT = (
        Outcome.REJECTED,
        "An image with the same SOP Instance UID and other content arrived before. The first one was kept.",
    )
    UPLOAD_TOO_LARGE = (
        Outcome.REJECTED,
        "The upload is larger than the limits (bytes or number of files). Nothing was kept; send the study alone.",
    )
    ARCHIVE_UNREADABLE = (Outcome.REJECTED, "The zip archive is damaged or encrypted.")
    ARCHIVE_TOO_LARGE = (
        Outcome.REJECTED,
        "The zip archive expands beyond the limits (size, number of files or compression ratio). Nothing was unpacked.",
    )
    ARCHIVE_UNSAFE_PATH = (
        Outcome.REJECTED,
        "The zip archive names a path outside itself or holds a link. Nothing was unpacked.",
    )

    # A person has to look: we could process it, but might be wrong.
    AMBIGUOUS_SERIES = (
        Outcome.NEEDS_REVIEW,
        "The pre-contrast and low-dose series cannot be told apart with certainty. Name them by Series Instance UID.",
    )
    SEVERAL_TIMEPOINTS = (
        Outcome.NEEDS_REVIEW,
        "Series of more than one visit to the scanner are never mixed. Name the two of one by Series Instance UID.",
    )
    UNKNOWN_FIELD_STRENGTH = (Outcome.NEEDS_REVIEW, "Magnetic Field Strength (0018,0087) is missing or implausible.")
    UNKNOWN_AGENT = (Outcome.NEEDS_REVIEW, "The contrast agent is missing or not recognised in the header.")
    UNKNOWN_DOSE = (
        Outcome.NEEDS_REVIEW,
        "The injected dose (mmol/kg) cannot be computed from the header or is implausible.",
    )
    PAIR_NOT_COMPARABLE = (
        Outcome.NEEDS_REVIEW,
        "Pre-contrast and low-dose images do not look like the same sequence of the same head.",
    )
    OUTSIDE_TRAINING = (
        Outcome.NEEDS_REVIEW,
        "The acquisition lies far outside what the network was trained on; the detail says in what.",
    )
    SERIES_SWAPPED = (
        Outcome.NEEDS_REVIEW,
        "The series taken as low dose is darker where contrast should be: the two series may have changed places.",
    )
    REGISTRATION_FAILED = (
        Outcome.NEEDS_REVIEW,
        "The series could not be aligned with each other or no brain was found.",
    )

    # We could not do our work.
    MODEL_INVALID = (Outcome.FAILED, "The model folder is damaged, altered or made for another version of lowgad.")
    OUTPUT_INVALID = (Outcome.FAILED, "The result did not pass its own checks and was discarded.")
    STORAGE_FULL = (Outcome.FAILED, "The disk of the spool is full. Free space, then re-run the job.")
    INPUT_LOST = (Outcome.FAILED, "The stored input of this job is no longer complete. Send the study again.")
    RESULT_LOST = (Outcome.FAILED, "The stored result of this job is no longer complete. Re-run the job.")
    DESTINATION_UNREACHABLE = (
        Outcome.FAILED,
        "The destination could not be reached in all attempts. Check it, then re-send the job.",
    )
    DESTINATION_REFUSED = (
        Outcome.FAILED,
        "The destination refused the association or the images; re-sending will not help before it is configured.",
    )
    COMMITMENT_REFUSED = (
        Outcome.FAILED,
        "The destination took the images and does not commit itself to keep them. Check it, then re-send the job.",
    )
    COMMITMENT_TIMEOUT = (
        Outcome.FAILED,
        "The images were sent, but no storage commitment came. Does the destination know our listener's address?",
    )
    ATTEMPTS_EXHAUSTED = (Outcome.FAILED, "The job was started several times and never finished; see the log.")
    INTERNAL_ERROR = (Outcome.FAILED, "An unexpected error; the log has the trace under the job id.")

    @property
    def outcome(self) -> Outcome:
        """The outcome this reason leads to."""
        return self.value[0]

    @property
    def text(self) -> str:
        """The sentence that the operator reads."""
        return self.value[1]


class LowgadError(Exception):
    """An error with a named reason.

    `detail` is for the operator, `report` what was measured until then (plain values); neither holds patient data.
    """

    def __init__(self, reason: Reason, detail: str = "", report: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{reason.name}: {detail or reason.text}")
        self.reason = reason
        self.detail = detail
        self.report = dict(report or {})


class Permanent(LowgadError):  # noqa: N818  a kind of outcome, read as an adjective at the call site
    """Trying again gives the same result: the job ends at once, in the state its reason leads to."""


class Retryable(LowgadError):  # noqa: N818
    """Trying again later may help: back off, and end with `reason` only when the attempts are used up."""
