"""The address that users know of :mod:`vaevq_med.core.errors`."""

from vaevq_med.core.errors import *  # noqa: F403
