"""Masks of whole volumes to bytes and back: every voxel by its neighbors in its slice and in the two below.

The idea is that of JBIG's adaptive arithmetic coding (ITU-T T.82), in three dimensions: the voxels already coded around
a voxel are its context, and how often a voxel was in the mask after the same context is its probability. Three contexts
of growing size are held; the estimate of each is the prior of the next, so that a context never seen costs little. The
greater two are looked at only where the smallest is not all 0 or all 1, which most voxels' is: that is for speed.

The voxels are coded in the order of the planes ``x + 3 y + 7 z``. All that a context looks at lies in an earlier plane,
so a plane is coded at once, and the counts learn after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.coders.range_coder import PRECISION, TOTAL, RangeDecoder, RangeEncoder
from vaevq_med.codec.errors import CodecError

STEP = (7, 3, 1)
"""How far a voxel further in z, y and x lies behind in the order."""

TEMPLATES = (
    # (z, y, x) of what is looked at, lowest bit first; each context has those before it too
    ((0, 0, -1), (0, 0, -2), (0, -1, -1), (0, -1, 0), (0, -1, 1), (-1, 0, 0), (-1, 0, 1), (-1, 1, 0), (-1, 0, -1)),
    ((-1, -1, 0), (-1, 1, 1), (-1, 1, -1), (0, -1, 2), (-2, 0, 0)),
    ((-2, 0, 1), (-2, 1, 0), (-2, -1, 0), (-2, 0, -1), (-1, 0, 2), (-1, 2, 0), (0, -2, 0)),
)
WEIGHT = 3
"""Voxels that the estimate of a smaller context counts for."""

_BOX = np.dtype("<u2")
_MARGIN = 3


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """The bytes of a mask: nothing where it is empty, else its bounding box and the range-coded voxels in that.

    Args:
        mask: bool ``[Z, Y, X]``, or with fewer or more axes, of which the first ones are taken as one.

    Raises:
        CodecError: an axis is longer than 65,535.
    """
    volume = np.asarray(mask, bool).reshape(_shape(mask.shape))
    places = [np.flatnonzero(volume.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    if not len(places[0]):
        return b""
    box = np.array([[found[0], found[-1] + 1] for found in places])
    coder = RangeEncoder()
    walk = _Walk(tuple(box[:, 1] - box[:, 0]))
    truth = walk.padded(volume[tuple(slice(*ends) for ends in box)])
    for where, frequencies in walk.planes():
        bits = truth[where]
        coder.encode(bits.astype(np.int64), frequencies)
        walk.learn(bits)
    return box.astype(_BOX).tobytes() + coder.finish()


def decode_mask(data: bytes, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The mask of bytes.

    Args:
        data: as :func:`encode_mask` gave them.
        shape: of the mask.

    Raises:
        CodecError: the bytes are not those of a mask of this shape.
    """
    volume = np.zeros(_shape(shape), bool)
    if data:
        head = 6 * _BOX.itemsize
        if len(data) < head:
            raise CodecError(f"mask: found {len(data)} bytes, expected at least the {head} of a bounding box")
        box = np.frombuffer(data[:head], _BOX).reshape(3, 2).astype(np.int64)
        if (box[:, 0] >= box[:, 1]).any() or (box[:, 1] > volume.shape).any():
            raise CodecError(f"mask: found the bounding box {box.tolist()}, expected one in {list(volume.shape)}")
        coder = RangeDecoder(data[head:])
        walk = _Walk(tuple(box[:, 1] - box[:, 0]))
        for _, frequencies in walk.planes():
            walk.learn(coder.decode(frequencies).astype(np.uint8))
        coder.finish()
        volume[tuple(slice(*ends) for ends in box)] = walk.found()
    return volume.reshape(shape)


def _shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Three axes."""
    full = (1,) * (3 - len(shape)) + tuple(shape)
    full = (math.prod(full[:-2]), *full[-2:])
    if max(full) >= 2**16:
        raise CodecError(f"mask: found an axis of {max(full)}, expected at most {2**16 - 1}")
    return full  # type: ignore[return-value]


class _Walk:
    """Both sides' way through a box, plane after plane, with what they have learned on it.

    Args:
        shape: of the box.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.room = tuple(size + 2 * _MARGIN for size in shape)
        self.known = np.zeros(math.prod(self.room), np.uint8)
        strides = (self.room[1] * self.room[2], self.room[2], 1)
        self.offsets = [[sum(o * s for o, s in zip(off, strides, strict=True)) for off in part] for part in TEMPLATES]
        sizes = np.cumsum([len(part) for part in TEMPLATES])
        # How often a voxel was 0 or 1 in each context, at twice its number.
        self.counts = [np.zeros(2 << int(size), np.int32) for size in sizes]
        self.contexts: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = []
        self.where = np.zeros(0, np.int64)

    def padded(self, box: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """The box in the flat array with a margin that the walk goes through."""
        return np.pad(box.astype(np.uint8), _MARGIN).ravel()

    def found(self) -> NDArray[np.bool_]:
        """The box."""
        inner = tuple(slice(_MARGIN, -_MARGIN) for _ in range(3))
        return self.known.reshape(self.room)[inner].astype(bool)

    def planes(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Each plane's places, in row-major order, and their frequencies ``[n, 2]``; :meth:`learn` is to follow."""
        z, y, x = np.ogrid[tuple(slice(0, size) for size in self.shape)]
        plane = (STEP[0] * z + STEP[1] * y + STEP[2] * x).ravel()
        flat = (((z + _MARGIN) * self.room[1] + y + _MARGIN) * self.room[2] + x + _MARGIN).ravel()
        order = np.argsort(plane.astype(np.uint16) if plane[-1] < 2**16 else plane, kind="stable")
        for self.where in np.split(flat[order], np.cumsum(np.bincount(plane))[:-1]):
            self.contexts = []
            chosen = np.arange(len(self.where))
            context = np.zeros(len(self.where), np.int32)
            estimate = np.full(len(self.where), TOTAL // 2)
            place = 0
            for offsets, counts in zip(self.offsets, self.counts, strict=True):
                where = self.where[chosen]
                for offset in offsets:
                    context += self.known[where + offset].astype(np.int32) << place
                    place += 1
                doubled = 2 * context
                zeros, ones = counts[doubled].astype(np.int64), counts[doubled + 1].astype(np.int64)
                estimate[chosen] = ((ones << PRECISION) + WEIGHT * estimate[chosen]) // (zeros + ones + WEIGHT)
                self.contexts.append((chosen, doubled))
                if len(self.contexts) == 1:
                    mixed = np.flatnonzero((context > 0) & (context < (1 << place) - 1))
                    chosen, context = chosen[mixed], context[mixed]
            ones = np.clip(estimate, 1, TOTAL - 1)
            yield self.where, np.stack([TOTAL - ones, ones], axis=1)

    def learn(self, bits: NDArray[np.uint8]) -> None:
        """Take note of the values of a plane."""
        self.known[self.where] = bits
        for counts, (chosen, doubled) in zip(self.counts, self.contexts, strict=True):
            np.add.at(counts, doubled + bits[chosen], 1)
