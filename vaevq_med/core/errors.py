"""Errors that a user can act on: one line, without a traceback, from the command line."""

import errno
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV)
_MEMORY = "lower the batch size or the number of workers, or end other programs"
_SIGNS = (
    (r"CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED", "the memory of the GPU is full", "room for this work", _MEMORY),
    (r"</torch_.*\(28\)", "the shared memory of the workers is full", "room in it", "lower --num_workers"),
    (
        r"out of memory|[Cc]an(no|')t allocate memory",
        "the memory of this machine is full",
        "room for this work",
        _MEMORY,
    ),
    (
        r"DataLoader worker .*(killed by signal|exited unexpectedly)|process pool was terminated abruptly",
        "a worker process was killed, perhaps for want of memory",
        "it to last",
        "lower the number of workers; none of a loader, 0, reads the data in the program itself",
    ),
    (
        r"gloo/transport|NCCL .*(remote process|connection)",
        "another process of this run has ended",
        "all of them to go on",
        "see what it said",
    ),
)
"""What libraries say, in an error that has no class of its own, where the machine lacks something."""


class VaevqMedError(Exception):
    """An expected failure; its message says what was found and what was expected, in one line."""


class MissingWeightsError(VaevqMedError):
    """The weights of a feature network are not on this machine."""


class DataError(VaevqMedError):
    """A data set, or a file of one, is not what was expected."""


class HaltError(DataError):
    """What is wrong with one of many units of work puts the others in doubt, so that none is gone on with."""


class ItemError(DataError):
    """An item of a data set cannot be read, in this process or in one that a ``DataLoader`` started.

    Of an error in a worker, PyTorch keeps the class and the text of the traceback, and calls the class with that text:
    the message is what the text ends with.

    Args:
        message: what was found and expected, or the text of a traceback that ends with it.
    """

    def __init__(self, message: str) -> None:
        _, _, said = message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")
        super().__init__(" ".join(said.split("\n")).strip())


@contextmanager
def as_item_error() -> Iterator[None]:
    """A foreseen error inside, also one that MONAI wrapped, becomes an :class:`ItemError` of its line."""
    try:
        yield
    except Exception as error:
        line = foreseen(error)
        if line is not None:
            raise ItemError(line) from None
        raise


@contextmanager
def dispensable(what: str) -> Iterator[None]:
    """Where the system does not let something be written that the work can do without, it is warned of, and left out.

    Args:
        what: e.g. ``the pictures of this validation``.
    """
    try:
        yield
    except OSError as error:
        logging.getLogger(__name__).warning("%s; the work goes on without %s", foreseen(error), what)


def foreseen(error: BaseException) -> str | None:
    """The line for an error that the input or the machine explains; None for a fault of the code.

    Those are the errors of this package, what the operating system refuses (a full disk, a folder that is closed or
    gone), memory that runs out, and processes that were killed. What was noted on the error is told after it.

    Args:
        error: as it was caught; its explicit causes count too, since MONAI wraps what a configuration raises.

    Examples:
        >>> print(foreseen(PermissionError(13, "Permission denied", "run/last.pt")))
        run/last.pt is closed to this command (Permission denied); expected leave to read and write there
        >>> foreseen(KeyError("a"))
    """
    package = root_cause(error)
    told = package if isinstance(package, VaevqMedError) else error
    for one in causes(told):
        if (line := _line(one)) is not None:
            return "; ".join([line, *getattr(one, "__notes__", ())])
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _line(error: BaseException) -> str | None:
    if isinstance(error, VaevqMedError):
        return str(error)
    said = " ".join(str(error).split())[:160].strip()
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return f"the memory of this machine is full{said and f' ({said})'}; expected room for this work: {_MEMORY}"
    if isinstance(error, OSError):
        return _refused(error, said)
    for sign, found, expected, advice in _SIGNS if isinstance(error, RuntimeError) else ():
        if re.search(sign, " ".join(str(error).split())):
            return f"{found} ({said}); expected {expected}: {advice}"
    return None


def _refused(error: OSError, said: str) -> str:
    path = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else ""
    where, why = os.fsdecode(path) or "a file or a connection", error.strerror or said
    if error.errno in _FULL:
        return f"{where} is not written ({why}); expected room on its disk: free some and run the same command again"
    if error.errno in _CLOSED:
        return f"{where} is closed to this command ({why}); expected leave to read and write there"
    if error.errno in _GONE:
        return f"{where} is not there ({why}); expected it to be there all the time"
    return f"{where} cannot be used ({why}); expected access to it"


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain of causes, or the first of this package on the way to it."""
    while True:
        if isinstance(error, VaevqMedError):
            return error
        cause = error.__cause__ or error.__context__
        if cause is None:
            return error
        error = cause
