"""Batches of image files, in a folder or in an uncompressed tar archive that is read in place."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vaevq_med.core.errors import DataError
from vaevq_med.prepare.job import Unit


@dataclass(frozen=True)
class Batch(Unit):
    """Image files that are read one after the other.

    Attributes:
        name: what its record is called.
        prefix: folder of the images below ``images/``; "" for none.
        source: folder of the files, or archive.
        split: of the folder or archive; None where it states none.
        class_name: of all images; None where each has its own, or none has.
        files: paths below ``source``.
        members: name, offset and size in the archive of each image.
        inner: offset and size of the archive inside the archive that holds the images.
    """

    prefix: str
    source: Path
    split: str | None
    class_name: str | None = None
    files: tuple[str, ...] = ()
    members: tuple[tuple[str, int, int], ...] = ()
    inner: tuple[int, int] | None = None

    @property
    def is_archive(self) -> bool:
        """Whether the images lie in an archive."""
        return self.inner is not None or bool(self.members)

    def path_of(self, name: str) -> str:
        """Path below the input of an image of this batch, by its name below :attr:`prefix`."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def names(self) -> Iterator[str]:
        """Each image's name below :attr:`prefix`.

        Raises:
            DataError: the archive is damaged.
        """
        yield from self.files
        yield from (name for name, _, _ in self._listed())

    def _listed(self) -> Iterable[tuple[str, int, int]]:
        return self.members if self.inner is None else list_archive(self.source, *self.inner)

    def contents(self) -> Iterator[tuple[str, Path | bytes]]:
        """Each image's name below :attr:`prefix`, with its file, or its bytes from the archive.

        Raises:
            DataError: the archive is damaged.
        """
        if not self.is_archive:
            yield from ((name, self.source / name) for name in self.files)
            return
        with self.source.open("rb") as stream:
            for name, offset, size in self._listed():
                stream.seek(offset)
                yield name, stream.read(size)


def list_archive(path: Path, offset: int = 0, size: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the files of an uncompressed tar archive, whose contents are not read.

    Args:
        path: the file.
        offset: where in it the archive starts.
        size: how long the archive is, or None for the rest of the file.

    Raises:
        DataError: it is damaged or compressed.
    """
    total = path.stat().st_size
    end = total if size is None else offset + size
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    if member.offset_data + member.size > min(end, total):
                        raise tarfile.ReadError("unexpected end of data")
                    if member.isfile() and not PurePosixPath(member.name).name.startswith("."):
                        yield PurePosixPath(member.name).name, member.offset_data, member.size
                    if archive.offset >= end:  # the next header is no longer this archive's
                        return
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path.name}: found a damaged or compressed archive ({error}), expected a whole tar") from None


def is_name(name: str) -> bool:
    """Whether a file can have this name on every disk: UTF-8, its parts of 240 bytes at most."""
    try:
        return all(len(part.encode()) <= 240 for part in name.split("/"))
    except UnicodeEncodeError:
        return False
