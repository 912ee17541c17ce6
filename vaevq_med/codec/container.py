"""One file a case: named parts in a safetensors file, which is closed by checksums, so that any damage is found.

Every part is a tensor of bytes. The last one, ``verification``, holds the CRC-32 of the file's header and of each part
before it, by which the damaged one is named, and then the SHA-256 of all the bytes before that, by which every change
is found. docs/codec.md has the format.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vaevq_med.codec.errors import CodecError

SUFFIX = ".vvq"
FORMAT = 2
"""Highest version of the format that is read; a file of a higher one is refused."""
KEY = "vaevq_med_codec"
"""The one entry of the file's ``__metadata__``; its value is the version."""
SEAL = "verification"
_CRC, _SHA = 4, 32
_LENGTH = 8
_MOST_HEADER = 2**20


def pack(parts: Mapping[str, bytes], version: int = 1) -> bytes:
    """The bytes of a file.

    Args:
        parts: by names that stand before ``verification`` in the alphabet.
        version: of the format.

    Examples:
        >>> unpack("a.vvq", pack({"description": b"ab", "masks": b""}))
        {'description': b'ab', 'masks': b''}
    """
    from safetensors.numpy import save

    if any(name >= SEAL for name in parts):
        raise ValueError(f"a part's name does not stand before {SEAL!r}")
    seal = bytes(_CRC * (len(parts) + 1) + _SHA)
    tensors = {name: np.frombuffer(content, np.uint8) for name, content in {**parts, SEAL: seal}.items()}
    content = save(tensors, metadata={KEY: str(version)})
    body = content[: -len(seal)]
    crcs = [body[: _body_start(body)], *(parts[name] for name in sorted(parts))]
    sealed = body + b"".join(struct.pack("<I", zlib.crc32(part)) for part in crcs)
    return sealed + hashlib.sha256(sealed).digest()


def unpack(name: str, content: bytes) -> dict[str, bytes]:
    """The parts of a file, none of which was changed since it was written.

    Args:
        name: of the file, for messages.
        content: all of it.

    Raises:
        CodecError: it is damaged, of a newer format, or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if len(content) < _SHA or hashlib.sha256(content[:-_SHA]).digest() != content[-_SHA:]:
        raise CodecError(f"{name}: {_damage(content)}")
    header = _header(content) or {}
    told = header.get("__metadata__", {})
    version = told.get(KEY) if isinstance(told, Mapping) else None
    if not (isinstance(version, str) and version.isascii() and version.isdecimal()):
        raise CodecError(f"{name}: found another kind of file, expected one that vaevq-med compress wrote")
    if int(version) > FORMAT:
        raise CodecError(
            f"{name}: found format {version}, expected at most {FORMAT}; a newer vaevq_med wrote it, which reads it"
        )
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise CodecError(f"{name}: found no safetensors file ({error}), expected one") from None
    return {part: tensor.tobytes() for part, tensor in tensors.items() if part != SEAL}


def overhead(content: bytes) -> int:
    """How many bytes of a file are the container's own: its header and the checksums.

    Args:
        content: a whole file.
    """
    return len(content) - sum(map(len, unpack("", content).values()))


def _body_start(content: bytes) -> int:
    """Where the parts begin."""
    return _LENGTH + int.from_bytes(content[:_LENGTH], "little")


def _header(content: bytes) -> dict[str, Any] | None:
    """What a safetensors file says of its parts, or None where that cannot be read."""
    end = _body_start(content)
    if not _LENGTH < end <= min(len(content), _LENGTH + _MOST_HEADER):
        return None
    try:
        found = json.loads(content[_LENGTH:end])
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _places(content: bytes) -> dict[str, tuple[int, int]] | None:
    """Where each part is, by the header of a file that may be damaged."""
    header, start = _header(content), _body_start(content)
    if header is None:
        return None
    places = {}
    for part, described in header.items():
        if part == "__metadata__":
            continue
        offsets = described.get("data_offsets") if isinstance(described, Mapping) else None
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(offset, int) for offset in offsets)):
            return None
        places[part] = (start + offsets[0], start + offsets[1])
    return dict(sorted(places.items(), key=lambda item: item[1]))


def _damage(content: bytes) -> str:
    """What is wrong with a file whose hash is not that of its bytes, as far as it can be told."""
    expected = "expected one that vaevq-med compress wrote, as it was written"
    if KEY.encode() not in content[: _LENGTH + _MOST_HEADER]:
        return f"found a file of another kind, or a damaged header, {expected}"
    places = _places(content)
    if places is None or SEAL not in places:
        short = len(content) < _body_start(content) <= _LENGTH + _MOST_HEADER
        return f"found a {'truncated file' if short else 'damaged header'}, {expected}"
    end = max(stop for _, stop in places.values())
    if len(content) < end:
        return f"found {len(content)} bytes of {end}: the file is truncated; {expected}"
    start, stop = places.pop(SEAL)
    checks = content[start : max(stop - _SHA, start)]
    parts = {"header": (0, _body_start(content)), **places}
    if stop != end or len(checks) != _CRC * len(parts):
        return f"found a damaged header, {expected}"
    stored = struct.unpack(f"<{len(parts)}I", checks)
    bad = [name for (name, (a, b)), crc in zip(parts.items(), stored, strict=True) if zlib.crc32(content[a:b]) != crc]
    if len(content) > end:
        return f"found {len(content)} bytes, expected {end}: something was added to the file"
    if len(bad) == 1:
        return f"found its {bad[0] if bad[0] == 'header' else 'part ' + repr(bad[0])} damaged, {expected}"
    if bad:
        return f"found {', '.join(map(repr, bad))} damaged, {expected}"
    return f"found its checksums damaged, {expected}"
