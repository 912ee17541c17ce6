"""Errors that a user can act on: one line, without a traceback, from the command line."""

from collections.abc import Iterator
from contextlib import contextmanager


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
    """An error of this package inside, also one that MONAI wrapped, becomes an :class:`ItemError` of its line."""
    try:
        yield
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, VaevqMedError):
            raise ItemError(str(cause)) from None
        raise


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain of causes, or the first of this package on the way to it."""
    while True:
        if isinstance(error, VaevqMedError):
            return error
        cause = error.__cause__ or error.__context__
        if cause is None:
            return error
        error = cause
