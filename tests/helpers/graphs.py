"""What stands in for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable


class Recorder:
    """Stands in for CUDA graphs: a capture notes the work and does nothing, a replay does it."""

    def __init__(self) -> None:
        self.warm_ups = 0
        self.captures = 0
        self.replays = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        self.warm_ups += 1
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay
