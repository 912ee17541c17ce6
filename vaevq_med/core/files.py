"""Files that hold either the old or the whole new content, and their hashes."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO


@contextmanager
def atomic_binary_writer(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends well, and vanishes when it does not.

    Args:
        path: in a folder that exists.
        durable: wait until the disk has it, so that a power failure leaves the old or the new file; to be left out
            where there are many small files, each of which can be made again.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """The same for text: UTF-8, with line ends as they are written."""
    with atomic_binary_writer(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        yield text
        text.detach()


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file so that it holds either the old or the whole new text."""
    with atomic_writer(path) as file:
        file.write(text)


def atomic_write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file so that it holds either the old or the whole new content; see :func:`atomic_binary_writer`."""
    with atomic_binary_writer(path, durable=durable) as file:
        file.write(content)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
