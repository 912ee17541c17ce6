"""Events of a training run that ignite does not know."""

from ignite.engine import EventEnum


class RunEvents(EventEnum):
    """What handlers can listen for.

    Attributes:
        ALREADY_FINISHED: a run was started that had all of its epochs; nothing is trained.
    """

    ALREADY_FINISHED = "already_finished"
