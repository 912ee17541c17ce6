"""Batches of image files to a data set: each image checked, then linked, copied or shrunk.

A batch's record, written last, is what says that it is done. Whatever interrupts a run leaves either a finished batch
or nothing, but for files that the next run writes again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from vaevq_med.core.errors import DataError
from vaevq_med.core.folder import OutputFolder
from vaevq_med.images.pixels import plain, upright
from vaevq_med.prepare.job import Record
from vaevq_med.prepare.pictures.batches import Batch, is_name
from vaevq_med.prepare.recipes import ImageRecipe

ODDITIES = {
    "gray": "gray, read as three equal channels",
    "cmyk": "CMYK, read as RGB",
    "palette": "palette or bilevel, read as RGB or gray",
    "alpha": "transparent, laid on white",
    "16 bit": "16 bit",
    "rotated": "turned as EXIF says",
    "frames": "several frames, the first is read",
    "suffix": "the suffix is another format's",
}
"""What is unusual about a file but no reason to leave it out."""
_FORMATS = {
    ".jpeg": {"JPEG", "MPO"},
    ".jpg": {"JPEG", "MPO"},
    ".png": {"PNG"},
    ".tif": {"TIFF"},
    ".tiff": {"TIFF"},
    ".bmp": {"BMP"},
    ".webp": {"WEBP"},
}
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class BatchRecord(Record):
    """What is known of a finished batch; its digest is over the names and bytes of the images, in order.

    Attributes:
        images: each written image, by its path below the data set's folder, to its size in bytes.
        sources: the name each had in the batch, in the same order.
        skipped: file and what is wrong with it.
        odd: what is unusual, one of :data:`ODDITIES`, to the images.
    """

    images: dict[str, int] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    odd: dict[str, list[str]] = field(default_factory=dict)

    @property
    def lost(self) -> Sequence[tuple[str, str]]:  # noqa: D102
        return self.skipped

    @property
    def amount(self) -> int:  # noqa: D102
        return len(self.images)


@dataclass(frozen=True)
class _Checked:
    """An image that can be used.

    Attributes:
        content: bytes to write, or None to keep the file's.
        suffix: of the file that is written.
        odd: what is unusual about it.
    """

    content: bytes | None
    suffix: str
    odd: tuple[str, ...]


def batch_fingerprint(batch: Batch, recipe: ImageRecipe) -> str:
    """What a finished batch depends on: the recipe, and names, sizes and times of the input files.

    Raises:
        DataError: a file has gone.
    """
    files: list[object] = [batch.members, batch.inner]
    for path in [batch.source] if batch.is_archive else [batch.source / name for name in batch.files]:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: found no readable file ({error.strerror}), expected an image") from None
        files.append([path.name, status.st_size, status.st_mtime_ns])
    content = [recipe.image_hash, batch.name, batch.prefix, files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_batch_record(folder: OutputFolder, batch: str) -> BatchRecord | None:
    """The record of a finished batch whose images are all there, or None."""
    try:
        values = folder.record(batch) or {}
        record = BatchRecord(**values | {"skipped": [(name, reason) for name, reason in values["skipped"]]})
        return record if all((folder.path / p).stat().st_size == size for p, size in record.images.items()) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def check_image(source: Path | bytes, suffix: str, recipe: ImageRecipe) -> _Checked:
    """Decode an image, and shrink it if the recipe says so.

    Args:
        source: its file or bytes.
        suffix: of its name.
        recipe: what to do.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data, and of large images
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                odd = tuple(_oddities(image, suffix))
                if recipe.resize is None or min(image.size) <= recipe.resize:
                    # The decoder reads the whole file at an eighth of the size too.
                    image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
                    image.load()
                    if image.mode == "F" or image.mode.startswith("I"):
                        plain(image)
                    return _Checked(None, suffix, odd)
                return _Checked(*_shrink(plain(upright(image)), recipe), odd)
    except DataError:
        raise
    except Exception as error:  # PIL's decoders raise whatever a damaged file makes them stumble over
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, Image.UnidentifiedImageError):
            lines = ["no image format is recognized"]
        raise DataError(f"found an unreadable image ({lines[0][:120]}), expected a whole one") from None


def _oddities(image: Image.Image, suffix: str) -> Iterator[str]:
    modes = {"L": "gray", "CMYK": "cmyk", "P": "palette", "1": "palette", "PA": "palette"}
    if image.mode in modes:
        yield modes[image.mode]
    if image.mode.startswith("I"):
        yield "16 bit"
    if image.has_transparency_data:
        yield "alpha"
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        yield "rotated"
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        yield "frames"
    if image.format not in _FORMATS.get(suffix.lower(), {image.format}):
        yield "suffix"


def _shrink(image: Image.Image, recipe: ImageRecipe) -> tuple[bytes, str]:
    """Bicubic with a low-pass filter, so that the shorter side is the recipe's."""
    assert recipe.resize is not None
    short = min(image.size)
    size = (round(image.width * recipe.resize / short), round(image.height * recipe.resize / short))
    buffer = io.BytesIO()
    if image.mode == "I;16":
        wide = Image.fromarray(np.asarray(image, dtype=np.float32)).resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(wide).round().clip(0, 65535).astype(np.uint16)
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue(), ".png"
    shrunk = image.resize(size, Image.Resampling.BICUBIC)
    shrunk.info.clear()
    if recipe.format == "png":
        shrunk.save(buffer, "PNG")
        return buffer.getvalue(), ".png"
    shrunk.save(buffer, "JPEG", quality=recipe.quality, subsampling=0)
    return buffer.getvalue(), ".jpg"


def write_batch(batch: Batch, recipe: ImageRecipe, folder: OutputFolder, limit: int | None = None) -> BatchRecord:
    """Write a batch's images below ``images/``, all of them or none.

    Args:
        batch: what to read.
        recipe: what to do.
        folder: of the data set.
        limit: take the first images only, for an estimate.

    Returns:
        The record, which is written too.

    Raises:
        DataError: an archive is damaged, or a file has gone.
        OSError: the disk is full, or not writable.
    """
    record = BatchRecord(batch_fingerprint(batch, recipe), "")
    digest = hashlib.sha256()
    with folder.unit(batch.name) as partial:
        for name, source in islice(batch.contents(), limit):
            where = PurePosixPath("images", batch.prefix, name)
            if not is_name(name):  # of an archive
                record.skipped.append((ascii(batch.path_of(name)), "found a name that no file can have"))
                continue
            try:
                checked = check_image(source, where.suffix, recipe)
            except DataError as error:
                record.skipped.append((batch.path_of(name), str(error)))
                continue
            path = where.with_suffix(checked.suffix).as_posix()
            if path in record.images:
                record.skipped.append((batch.path_of(name), f"found another image of that name ({path})"))
                continue
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            content = source if checked.content is None else checked.content
            record.images[path] = _place(content, partial / path, digest, path)
            record.sources.append(name)
            for kind in checked.odd:
                record.odd.setdefault(kind, []).append(path)
        record = replace(record, digest=digest.hexdigest())
        # Images of an earlier record, which a change of the input has outdated, go.
        old = (folder.record(batch.name) or {}).get("images")
        outdated = old if isinstance(old, dict) else ()
        folder.commit(batch.name, asdict(record), {path: path for path in (*outdated, *record.images)})
    return record


def _place(source: Path | bytes, target: Path, digest: hashlib._Hash, name: str) -> int:
    """Write bytes, or link a file, or copy it where no link can be made; the size."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    if isinstance(source, Path):
        try:
            os.link(source.resolve(), target)
        except OSError:
            pass
        else:
            return len(content)
    target.write_bytes(content)
    return len(content)
