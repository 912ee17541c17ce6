"""Files that hold either the old or the whole new content, and their hashes."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from vaevq_med.core.errors import VaevqMedError


@contextmanager
def atomic_binary_writer(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends well, and vanishes when it does not.

    Until then it is ``.NAME.part``. A writer that is killed leaves that behind, and the next one of ``path`` uses it.

    Args:
        path: in a folder that exists.
        durable: wait until the disk has it, so that a power failure leaves the old or the new file; to be left out
            where there are many small files, each of which can be made again.

    Raises:
        OSError: it cannot be written; the error names ``path``, also where a library made another one of it.
    """
    with _named(path):
        with _partial(path, durable) as file:
            yield file


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, OSError):
            found = found.__context__  # torch.save raises an error of its own over that of the file
        own = found is not None and (
            found.filename is None or Path(str(found.filename)).name.startswith(f".{path.name}.")
        )
        if found is None or not own:
            raise
        found.filename = str(path)
        raise found from None


@contextmanager
def _partial(path: Path, durable: bool) -> Iterator[BinaryIO]:
    partial = path.with_name(f".{path.name}.part")
    lock = _claim(partial)
    if lock is None:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        partial = Path(name)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # what went wrong first is told
            partial.unlink()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _claim(partial: Path) -> int | None:
    """Make a file, or take one that was left behind; None where another writer has it, or there are no locks."""
    try:
        import fcntl

        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The writer that had the lock may have put the file in its place, or removed it, since it was opened here.
        if os.path.samestat(os.fstat(handle), os.stat(partial)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # a disk without locks, on which nobody else has it
        partial.unlink(missing_ok=True)
    os.close(handle)
    return None


def is_temporary_of(found: str, names: Iterable[str]) -> bool:
    """Whether a file's name is that of a temporary of a file of one of these names, of today's code or before."""
    known = "|".join(map(re.escape, names))
    return re.fullmatch(rf"\.({known})\.([a-z0-9_]{{8}}|part|[a-z0-9_]{{8}}\.part)", found) is not None


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


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse a file's place where something is.

    Args:
        path: of the file that is to be written.
        overwrite: whether a file there may be replaced.

    Raises:
        VaevqMedError: something is there that may not be replaced.
    """
    if path.exists() and not (overwrite and path.is_file()):
        raise VaevqMedError(f"output {path}: found something there, expected nothing; --overwrite replaces a file")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
