"""The text headers of MetaImage and NRRD: what of one is kept, what comes back otherwise, and an NRRD's own.

ITK writes an NRRD's geometry anew, as products of directions and spacings of which it reads others back, by a rounding,
and knows a part of the fields only. So the fields of an original that say its size and place are kept as they are, and
the rest of the header is written here (format: https://teem.sourceforge.net/nrrd/format.html).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

TEXT_BYTES = 2**16
"""As much of a file is searched for its header."""
_COMPRESSED = {"metaimage": rb"^CompressedData\s*=\s*[Tt1]", "nrrd": rb"^encoding:\s*(gz|gzip|bz2|bzip2)\s*$"}
_END = {"metaimage": rb"^ElementDataFile", "nrrd": rb"^\r?$"}
_KEPT = re.compile(
    rb"^(dimension|sizes|space|space ?dimension|space ?units|space ?origin|space ?directions|measurement ?frame|"
    rb"spacings|thicknesses|axis ?mins|axis ?maxs|centers|centerings|kinds|units):(?!=)[^\r\n]*",
    re.MULTILINE | re.IGNORECASE,
)
# What any file has, or what this codec or ITK writes anew.
_OWN = {
    "metaimage": re.compile(
        rb"\s*$|(ObjectType|NDims|BinaryData|BinaryDataByteOrderMSB|ElementByteOrderMSB|CompressedData|"
        rb"CompressedDataSize|CompressionLevel|TransformMatrix|Rotation|Orientation|Offset|Position|Origin|"
        rb"CenterOfRotation|AnatomicalOrientation|ElementSpacing|ElementSize|DimSize|HeaderSize|"
        rb"ElementNumberOfChannels|ElementType|Modality\s*=\s*MET_MOD_UNKNOWN)\s*(=|$)"
    ),
    "nrrd": re.compile(
        rb"\s*$|NRRD000|# Complete NRRD file format|# http://teem\.|"
        rb"(type|endian|encoding|block ?size|data ?file|line ?skip|byte ?skip):(?!=)",
        re.IGNORECASE,
    ),
}
_BIG = {"metaimage": rb"^(BinaryData|Element)ByteOrderMSB\s*=\s*[Tt1]", "nrrd": rb"^endian:\s*big"}
_AS_TEXT = {"metaimage": rb"^BinaryData\s*=\s*[Ff0]", "nrrd": rb"^encoding:\s*(ascii|text|txt|hex)"}
_BZIP2 = rb"^encoding:\s*(bz2|bzip2)"
_TYPES = {"float32": "float", "float64": "double"}


def _has(text: bytes, line: bytes) -> bool:
    return re.search(line, text, re.MULTILINE | re.IGNORECASE) is not None


def header_of(kind: str, start: bytes) -> bytes:
    """The header of a file, without its voxels.

    Args:
        kind: ``metaimage`` or ``nrrd``.
        start: first bytes of the file.
    """
    return re.split(_END[kind], start, maxsplit=1, flags=re.MULTILINE)[0]


def is_compressed(kind: str, header: bytes) -> bool:
    """Whether the voxels are.

    Args:
        kind: ``metaimage`` or ``nrrd``.
        header: see :func:`header_of`.
    """
    return _has(header, _COMPRESSED[kind])


def changes(kind: str, header: bytes, dtype: np.dtype) -> Iterator[str]:
    """What will be otherwise in the file that is written.

    Args:
        kind: ``metaimage`` or ``nrrd``.
        header: see :func:`header_of`.
        dtype: of the voxels.
    """
    lines = re.split(rb"\r?\n", header)
    if not all(_OWN[kind].match(line) or (kind == "nrrd" and _KEPT.match(line)) for line in lines):
        yield "the further fields of its header are left out, since they may hold a patient's name"
    if _has(header, _AS_TEXT[kind]):
        yield "its voxels, which are written as text, come back as bytes"
    elif dtype.itemsize > 1 and _has(header, _BIG[kind]):
        yield "its voxels, which are big-endian, come back little-endian"
    if kind == "nrrd" and _has(header, _BZIP2):
        yield "its voxels, which are compressed by bzip2, come back compressed by gzip"


def kept_fields(header: bytes) -> tuple[str, ...]:
    """The fields of an NRRD's header that say its size and place, in order.

    Args:
        header: see :func:`header_of`.
    """
    return tuple(match[0].decode("latin-1") for match in _KEPT.finditer(header))


def nrrd_header(dtype: np.dtype, fields: Sequence[str], *, compressed: bool) -> bytes:
    """The header of an NRRD file, with the empty line after it.

    Args:
        dtype: of the voxels, little-endian.
        fields: see :func:`kept_fields`.
        compressed: whether the voxels are, by gzip.
    """
    version = 5 if any(field.lower().startswith("measurement") for field in fields) else 4
    lines = [
        f"NRRD000{version}",
        "# Complete NRRD file format specification at:",
        "# http://teem.sourceforge.net/nrrd/format.html",
        f"type: {_TYPES.get(dtype.name, dtype.name)}",
        *fields,
        "endian: little",
        f"encoding: {'gzip' if compressed else 'raw'}",
    ]
    return "".join(f"{line}\n" for line in [*lines, ""]).encode("latin-1")
