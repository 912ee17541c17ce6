"""Errors that a user can act on: one line, without a traceback, from the command line."""


class VaevqMedError(Exception):
    """An expected failure; its message says what was found and what was expected, in one line."""


class MissingWeightsError(VaevqMedError):
    """The weights of a feature network are not on this machine."""


class DataError(VaevqMedError):
    """A data set, or a file of one, is not what was expected."""
