"""What lowgad takes in: which objects, in which encoding, and which files of an export may be images.

Hides nothing: the one list for listener, uploads and worker, so that a study is judged alike through every door.
"""

from __future__ import annotations

import struct
from pathlib import PurePath

from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import (
    JPEG2000,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
    RLELossless,
)

# What pydicom and the decoders raise on damaged or hostile bytes. RuntimeError: sequences nested without end, too.
DAMAGE = (
    InvalidDicomError,
    BytesLengthException,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
)

SOP_CLASSES = (MRImageStorage, EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage)
# Neither deflated (a small file inflates without bound) nor big endian (retired). Uncompressed first.
TRANSFER_SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    JPEG2000Lossless,
    JPEG2000,
    RLELossless,
)
HEAD_BYTES = 132  # preamble and prefix (PS3.10 section 7.1)
_SUFFIXES = {"", ".dcm", ".dicom", ".ima"}
_SIDECARS = {"LICENSE", "LOCKFILE", "README", "VERSION"}  # in exports, beside images without suffix


def may_be_image(name: PurePath, head: bytes) -> bool:
    """Whether a file of an export has to be looked at.

    One counts when it has the DICM prefix or a name as if it should (.dcm, .dicom, .ima, digits as in UIDs, no suffix),
    so that a damaged image is refused instead of overlooked. Hidden files, DICOMDIR and files of other kinds do not.

    Args:
        name: inside the export.
        head: its first HEAD_BYTES bytes.
    """
    if any(part.startswith(".") or part == "__MACOSX" for part in name.parts) or name.name.upper() == "DICOMDIR":
        return False
    is_named_so = name.suffix.lower() in _SUFFIXES or name.suffix[1:].isdigit()
    return head[128:HEAD_BYTES] == b"DICM" or (is_named_so and name.name.upper() not in _SIDECARS)
