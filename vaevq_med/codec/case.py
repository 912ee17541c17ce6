"""What a compressed file says of a case, and the indices that it holds, without any network.

The description is JSON; docs/codec.md goes through its fields.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.coders.registry import known_coders, make_coder
from vaevq_med.codec.container import pack, unpack
from vaevq_med.codec.errors import CodecError
from vaevq_med.codec.geometry import Turn, live_layers, live_positions
from vaevq_med.codec.masks import decode_masks, encode_masks
from vaevq_med.codec.originals import Original

DESCRIPTION, HEADERS, MASKS = "description", "headers", "masks"
_STREAM = "tokens"
_LEVEL = 9


@dataclass(frozen=True)
class Contrast:
    """One contrast of a case.

    Attributes:
        name: e.g. ``t1c``.
        file: number of the file that it is in.
        channel: along the fourth axis of that file, or None.
        window: intensities of black and white, in the file's own unit.
        background: intensity of what is no foreground, likewise.
        mask: foreground of its upright slices, bool ``[N, rows, columns]``.
    """

    name: str
    file: int
    channel: int | None
    window: tuple[float, float]
    background: float
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Stream:
    """The indices of one contrast, or of all of them where the tokenizer stacks them.

    Attributes:
        contrasts: numbers of them.
        fill: index of each codebook at the positions that are not coded, ``[G]``.
        indices: int64 ``[slices that are coded, h, w, G]``, of a tokenizer of volumes ``[1, d, h, w, G]``; 0 at those
            positions.
    """

    contrasts: tuple[int, ...]
    fill: tuple[int, ...]
    indices: NDArray[np.int64]


@dataclass(frozen=True)
class CompressedCase:
    """A case between its voxels and its bytes.

    Attributes:
        name: of the case.
        tokenizer: what is said of it, see :func:`vaevq_med.codec.model.describe`.
        interpolation: by which slices were resized, and are brought back.
        shape: of the volumes, ``[X, Y, Z]``.
        turn: from a volume to upright slices.
        files: that the contrasts came from.
        contrasts: in the order of the recipe.
        streams: in the order in which they are coded.
        cell: side of the cells that the masks are made of, see :func:`vaevq_med.codec.masks.covering`.
    """

    name: str
    tokenizer: Mapping[str, Any]
    interpolation: str
    shape: tuple[int, int, int]
    turn: Turn
    files: Sequence[Original]
    contrasts: Sequence[Contrast]
    streams: Sequence[Stream]
    cell: int = 1

    @property
    def slices(self) -> NDArray[np.int64]:
        """Numbers of the slices that are coded, see :func:`coded_slices`."""
        return coded_slices([contrast.mask for contrast in self.contrasts], self.tokenizer)

    def live(self, contrasts: Sequence[int]) -> NDArray[np.bool_]:
        """Which positions show foreground of one of some contrasts, see :func:`live_of`."""
        masks = [self.contrasts[number].mask for number in contrasts]
        return live_of(masks, self.slices, self.tokenizer, self.interpolation)

    def filled(self, stream: Stream) -> NDArray[np.int64]:
        """Indices of a stream as the decoder is given them, of the shape that the stream's have."""
        live = self.live(stream.contrasts)[..., None]
        return np.where(live, stream.indices, np.asarray(stream.fill, np.int64))

    def to_bytes(self, coder: IndexCoder) -> tuple[bytes, dict[str, int]]:
        """The file's content, and how many bytes each part of it takes.

        Args:
            coder: of the indices.
        """
        masks, told = encode_masks([contrast.mask for contrast in self.contrasts], self.cell)
        parts, streams = {}, []
        for number, (stream, layout) in enumerate(_layouts(self, [stream.indices for stream in self.streams])):
            parts[f"{_STREAM}/{number}"] = coder.encode(stream.indices, layout)
            told_of = {"contrasts": list(stream.contrasts), "fill": list(stream.fill), "crc": _crc(stream.indices)}
            streams.append(told_of)
        headers = b"".join(file.header for file in self.files)
        description = {
            "case": self.name,
            "tokenizer": dict(self.tokenizer),
            "coder": {"name": coder.name, "settings": dict(coder.settings)},
            "shape": list(self.shape),
            "axes": list(self.turn.axes),
            "flips": list(self.turn.flips),
            "interpolation": self.interpolation,
            **({} if self.cell == 1 else {"cell": self.cell}),
            "files": [file.to_dict() for file in self.files],
            "contrasts": [
                {
                    "name": contrast.name,
                    "file": contrast.file,
                    **({} if contrast.channel is None else {"channel": contrast.channel}),
                    "window": list(contrast.window),
                    "background": contrast.background,
                    "mask": mask,
                }
                for contrast, mask in zip(self.contrasts, told, strict=True)
            ],
            "streams": streams,
        }
        text = json.dumps(description, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        parts |= {DESCRIPTION: zlib.compress(text, _LEVEL), HEADERS: zlib.compress(headers, _LEVEL), MASKS: masks}
        content = pack(parts, format_of(self.tokenizer, self.cell))
        sizes = {name: len(part) for name, part in parts.items() if not name.startswith(_STREAM)}
        tokens = sum(len(part) for name, part in parts.items() if name.startswith(_STREAM))
        own = len(content) - sum(map(len, parts.values()))
        return content, {"tokens": tokens, **sizes, "container": own}

    @classmethod
    def from_bytes(cls, name: str, content: bytes, *, model: Path | None = None) -> CompressedCase:
        """Read a file's content.

        Args:
            name: of the file, for messages.
            content: all of it.
            model: file of the entropy coder's model, where it needs one.

        Raises:
            CodecError: it is damaged, of a newer format, of another kind, or coded with another model.
        """
        return _decoded(name, *_opened(name, content), model)


def read_description(name: str, content: bytes) -> dict[str, Any]:
    """What a file says of itself, once its checksums were found right.

    Args:
        name: of the file, for messages.
        content: all of it.

    Raises:
        CodecError: it is damaged, of a newer format, or of another kind.
    """
    return _opened(name, content)[0]


def check_names(names: Iterable[str]) -> None:
    """Refuse files that could not stand side by side in a folder, or would lead out of it.

    Args:
        names: of the files of a case.

    Raises:
        CodecError: naming the first such one.
    """
    seen = set[str]()
    for name in names:
        if Path(name).name != name or name.startswith(".") or "\0" in name:
            raise CodecError(f"found a volume called {name!r}, expected the name of a file that is not hidden")
        if name in seen:
            raise CodecError(f"found two volumes called {name!r}, expected other names: they come back side by side")
        seen.add(name)


def format_of(tokenizer: Mapping[str, Any], cell: int) -> int:
    """The lowest version of the format that a file needs: 2 of a tokenizer of volumes or of coarse masks, else 1.

    Args:
        tokenizer: what a file says of it.
        cell: side of the cells that masks are made of.
    """
    return 1 if "patch_depth" not in tokenizer and cell == 1 else 2


def coded_slices(masks: Sequence[NDArray[np.bool_]], tokenizer: Mapping[str, Any]) -> NDArray[np.int64]:
    """Numbers of the slices that are coded: those with any foreground; for volumes also all between them.

    Args:
        masks: of all contrasts, ``[N, rows, columns]`` each.
        tokenizer: what a file says of it.
    """
    found = np.flatnonzero(np.any([mask.any(axis=(1, 2)) for mask in masks], axis=0))
    return np.arange(found[0], found[-1] + 1) if "patch_depth" in tokenizer and len(found) else found


def live_of(
    masks: Sequence[NDArray[np.bool_]], slices: NDArray[np.int64], tokenizer: Mapping[str, Any], interpolation: str
) -> NDArray[np.bool_]:
    """Which positions of some slices show foreground of any of some masks.

    Args:
        masks: ``[N, rows, columns]`` each.
        slices: numbers of the coded slices.
        tokenizer: what a file says of it.
        interpolation: by which slices are resized.

    Returns:
        ``[n, h, w]``; of a tokenizer of volumes ``[1, d, h, w]``.

    Raises:
        CodecError: a position has no slices.
    """
    union = masks[0][slices]
    for mask in masks[1:]:
        union = union | mask[slices]
    live = live_positions(
        union, size=int(tokenizer["image_size"]), patch=int(tokenizer["patch"]), interpolation=interpolation
    )
    return on_grid(live, tokenizer)


def on_grid(live: NDArray[np.bool_], tokenizer: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Which positions of a tokenizer's grid are live.

    Args:
        live: those of each coded slice, ``[n, h, w]``.
        tokenizer: what a file says of it.

    Returns:
        The same; of a tokenizer of volumes ``[1, d, h, w]``.

    Raises:
        CodecError: a position has no slices.
    """
    depth = tokenizer.get("patch_depth")
    if depth is None:
        return live
    if depth < 1:
        raise CodecError(f"found positions of {depth} slices, expected 1 or more")
    return live_layers(live, int(depth))[None]


def layout_of(
    tokenizer: Mapping[str, Any],
    live: NDArray[np.bool_],
    slices: NDArray[np.int64],
    contrasts: Sequence[str],
    reference: NDArray[np.int64] | None,
) -> Layout:
    """What a coder knows of a stream before its first index.

    Args:
        tokenizer: what a file says of it.
        live: positions that are coded, see :func:`live_of`.
        slices: numbers of the coded slices; a volume goes by that of its first.
        contrasts: names of those that the stream shows.
        reference: indices of the stream before it, 0 where they are not coded.
    """
    return Layout(
        live=live,
        slices=slices[: len(live)],
        num_embeddings=int(tokenizer["num_embeddings"]),
        num_codebooks=int(tokenizer["num_codebooks"]),
        contrast=contrasts[0] if len(contrasts) == 1 else "",
        reference=reference,
    )


def _crc(indices: NDArray[np.int64]) -> int:
    """CRC-32 of indices, 0 where they are not coded, as 32-bit little-endian integers."""
    return zlib.crc32(np.ascontiguousarray(indices, "<i4").tobytes())


def _opened(name: str, content: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    parts = unpack(name, content)
    try:
        description = json.loads(zlib.decompress(parts[DESCRIPTION]))
    except (KeyError, ValueError, zlib.error) as error:
        raise CodecError(f"{name}: found no description ({error}), expected one") from None
    return description, parts


def _layouts(case: CompressedCase, indices: list[NDArray[np.int64]]) -> Any:
    """Each stream, with what its coder knows before it: of the indices, those before it have to be there by then."""
    slices = case.slices
    for number, stream in enumerate(case.streams):
        names = [case.contrasts[contrast].name for contrast in stream.contrasts]
        reference = indices[number - 1] if number else None
        yield stream, layout_of(case.tokenizer, case.live(stream.contrasts), slices, names, reference)


def _decoded(name: str, told: Mapping[str, Any], parts: Mapping[str, bytes], model: Path | None) -> CompressedCase:
    try:
        coding = told["coder"]
        coder_model = model if known_coders()[coding["name"]].needs_model else None
        coder = make_coder(coding["name"], told["tokenizer"], coder_model, settings=coding["settings"])
        turn = Turn(tuple(told["axes"]), tuple(told["flips"]))
        shape = tuple(told["shape"])
        headers, start, files = zlib.decompress(parts[HEADERS]), 0, []
        for file in told["files"]:
            length = file.get("header", 0)
            files.append(Original.from_dict(file, headers[start : start + length]))
            start += length
        stacked = [shape[axis] for axis in turn.axes]
        cell = told.get("cell", 1)
        entries = [contrast["mask"] for contrast in told["contrasts"]]
        masks = decode_masks(parts[MASKS], entries, (stacked[0], stacked[1], stacked[2]), cell)
        contrasts = [
            Contrast(
                name=contrast["name"],
                file=contrast["file"],
                channel=contrast.get("channel"),
                window=(contrast["window"][0], contrast["window"][1]),
                background=contrast["background"],
                mask=mask,
            )
            for contrast, mask in zip(told["contrasts"], masks, strict=True)
        ]
        empty = np.zeros(0, np.int64)
        streams = [Stream(tuple(one["contrasts"]), tuple(one["fill"]), empty) for one in told["streams"]]
        case = CompressedCase(
            told["case"], told["tokenizer"], told["interpolation"], shape, turn, files, contrasts, streams, cell
        )
        indices: list[NDArray[np.int64]] = []
        found = []
        for number, (stream, layout) in enumerate(_layouts(case, indices)):
            indices.append(coder.decode(parts[f"{_STREAM}/{number}"], layout))
            if _crc(indices[-1]) != told["streams"][number]["crc"]:
                raise CodecError(
                    f"found the indices of stream {number} other than those that were coded, expected the same: the "
                    f"coder {coder.name} computes otherwise on this machine"
                )
            found.append(Stream(stream.contrasts, stream.fill, indices[-1]))
    except CodecError as error:
        raise CodecError(f"{name}: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError, zlib.error) as error:
        what = f"found a description that cannot be followed ({error!r}), expected that of a case"
        raise CodecError(f"{name}: {what}") from None
    return replace(case, streams=found)
