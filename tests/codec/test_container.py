"""The container of compressed cases: what is changed in it is found, and named where it can be."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load

from vaevq_med.codec.container import FORMAT, SEAL, overhead, pack, unpack
from vaevq_med.codec.errors import CodecError

RNG = np.random.default_rng(0)
PARTS = {
    "description": RNG.bytes(500),
    "headers": RNG.bytes(90),
    "masks": RNG.bytes(300),
    **{f"tokens/{number}": RNG.bytes(2000) for number in range(4)},
}


def test_what_was_packed_comes_back_and_another_reader_of_safetensors_finds_it() -> None:
    content = pack(PARTS)
    assert unpack("a.vvq", content) == PARTS
    found = load(content)
    assert {name: found[name].tobytes() for name in PARTS} == PARTS
    assert set(found) == {*PARTS, SEAL}
    assert pack(dict(reversed(PARTS.items()))) == content


def test_every_change_of_one_byte_is_refused() -> None:
    content = pack(PARTS)
    rng = np.random.default_rng(1)
    places = [*range(700), *range(len(content) - 100, len(content)), *rng.integers(0, len(content), 1000)]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        with pytest.raises(CodecError, match=r"^a\.vvq: found [^\n]*$"):
            unpack("a.vvq", bytes(changed))


def test_the_damaged_part_is_named() -> None:
    content = pack(PARTS)
    for name in PARTS:
        place = content.index(PARTS[name]) + 7
        changed = content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]
        with pytest.raises(CodecError, match=f"found its part '{name}' damaged"):
            unpack("a.vvq", changed)
    with pytest.raises(CodecError, match="checksums damaged"):
        unpack("a.vvq", content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("length", [0, 5, 8, 100, 600, 3000, -1])
def test_a_truncated_file_is_refused(length: int) -> None:
    content = pack(PARTS)
    with pytest.raises(CodecError):
        unpack("a.vvq", content[:length])


def test_truncation_and_additions_are_told_as_such() -> None:
    content = pack(PARTS)
    with pytest.raises(CodecError, match=f"found 3000 bytes of {len(content)}: the file is truncated"):
        unpack("a.vvq", content[:3000])
    with pytest.raises(CodecError, match="something was added"):
        unpack("a.vvq", content + b"x")
    with pytest.raises(CodecError, match="another kind"):
        unpack("a.vvq", b"\x89PNG" + bytes(1000))


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(CodecError, match=f"found format {FORMAT + 1}, expected at most {FORMAT}"):
        unpack("a.vvq", pack(PARTS, version=FORMAT + 1))


def test_the_container_takes_less_than_a_hundredth_of_a_typical_case() -> None:
    parts = {**PARTS, **{f"tokens/{number}": bytes(22_000) for number in range(4)}}
    content = pack(parts)
    assert overhead(content) == len(content) - sum(map(len, parts.values())) < 0.01 * len(content)
