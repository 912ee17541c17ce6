"""Messages on their way to a server: a thread sends them in order, and a file keeps them while the server is away."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vaevq_med.core.files import atomic_write_bytes

Message = Mapping[str, Any]
logger = logging.getLogger(__name__)
FILE, COPIES = "messages.jsonl", "files"
_PAUSES = (1.0, 60.0)
"""Seconds after a first failure, and at most; each further failure doubles them."""
_RATE = 1e6
"""Bytes a second that a large file is sent at in the worst case."""


def _is_message(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


class RefusedError(Exception):
    """The server answered, and will never take this message."""


class Outbox:
    """Messages to a server, sent one after the other by a thread, so that nobody waits for it.

    After a failure there is a pause, which grows from a second to a minute, and what is not sent goes to a file; once
    the server answers, all of it is sent in order. A file that an earlier process left is sent first. A message is sent
    at least once: one whose answer was lost, or that a killed process had sent, is sent again.

    Args:
        send: sends a message, and raises an exception where that fails: :class:`RefusedError` where it is of no use to
            try again. The thread alone calls it.
        folder: of the file; it is made when it is needed, and gone when all is sent. None keeps messages in memory.
        on_failure: called with the error when the server begins to fail, and with None when it answers again.
        limit: messages in memory at most; beyond it they go to the file, or, without one, the oldest are lost.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        send: Callable[[Message], None],
        folder: Path | None = None,
        *,
        on_failure: Callable[[Exception | None], None] = lambda error: None,
        limit: int = 1000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.lost = 0
        self._send, self._on_failure, self._limit, self._clock = send, on_failure, limit, clock
        # A forked worker of a data loader may inherit it locked, and never asks for it.
        self._changed = threading.Condition()
        self._memory: deque[bytes] = deque()
        self._file = None if folder is None else folder / FILE
        self._begin, self._filed = 0, self._left()
        self._sent, self._failures, self._retry_at = 0, 0, -math.inf
        self._sending: tuple[float, float] | None = None
        self._stopped, self._unwritable = False, False
        self._thread: threading.Thread | None = None

    def _left(self) -> int:
        """Whole messages in the file of an earlier process."""
        if self._file is None or not self._file.is_file():
            return 0
        lines = self._file.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if _is_message(line)]
        if len(whole) < len(lines):  # of a process that was killed while it wrote
            atomic_write_bytes(self._file, b"".join(whole))
        return len(whole)

    def __len__(self) -> int:
        """Messages that are not sent."""
        return self._filed + len(self._memory)

    def messages(self) -> Iterator[Message]:
        """Those that are not sent, in order."""
        with self._changed:
            filed = self._file.read_bytes()[self._begin :] if self._file is not None and self._first_filed() else b""
            lines = [*filed.splitlines(), *self._memory]
        yield from map(json.loads, lines)

    def start(self) -> None:
        """Begin to send; without it nothing is, but by :meth:`step`."""
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Leave a message of JSON's values, which is copied as it is now; nothing waits for the server."""
        line = json.dumps(message, default=str).encode() + b"\n"
        with self._changed:
            self._memory.append(line)
            if len(self._memory) > self._limit:
                self._spill()
            if len(self._memory) > self._limit:
                del self._memory[1]  # the first may be under way
                self.lost += 1
            self._changed.notify_all()

    def copied(self, path: Path) -> Path:
        """A copy of a file as it is now, for a message to name as its ``copy``: it goes when that is sent.

        Raises:
            OSError: it cannot be copied.
        """
        if self.folder is None:
            return path
        place = self.folder / COPIES / uuid.uuid4().hex / path.name
        with self._changed:
            place.parent.mkdir(parents=True)
            shutil.copyfile(path, place)
        return place

    def wait(self, seconds: float | None) -> bool:
        """Whether all is sent, as soon as it is, or the server fails, or so many seconds are over (None: no limit)."""
        with self._changed:
            self._changed.wait_for(lambda: not len(self) or self._failures > 0, seconds)
            return not len(self)

    def close(self, seconds: float) -> int:
        """Send what can be sent, keep the rest in the file, and end.

        Args:
            seconds: to go on while nothing gets sent; a third of them where the server fails already, and a second more
                for each megabyte of a file that is under way.

        Returns:
            Messages that are not sent.
        """
        with self._changed:
            self._retry_at = -math.inf
            self._changed.notify_all()
            moved, sent = self._clock(), self._sent
            while len(self) and self._thread is not None:
                begun, weight = self._sending or (moved, 0.0)
                patience = seconds / 3 if self._failures else seconds + weight / _RATE
                left = (moved if self._failures else max(moved, begun)) + patience - self._clock()
                idle = self._sending is None and self._retry_at - self._clock() > left
                if left <= 0 or idle:
                    break
                self._changed.wait(left)
                if self._sent != sent:
                    moved, sent = self._clock(), self._sent
            self._stopped = True
            self._spill()
            self._shorten()
            if self.folder is not None and not len(self):
                shutil.rmtree(self.folder, ignore_errors=True)
            self._changed.notify_all()
        return len(self)

    def _run(self) -> None:
        while not self._stopped:
            pause = self.step()
            with self._changed:
                if pause is None and not self._memory:
                    self._changed.wait_for(lambda: self._memory or self._stopped)
                elif pause:
                    # Whatever is put meanwhile goes to the file: step does that.
                    self._changed.wait(pause)

    def step(self) -> float | None:
        """Send the first message, if it is time to.

        Returns:
            Seconds until the next one may be sent; None where there is none.
        """
        with self._changed:
            if self._failures:
                self._spill()
            line = self._first()
            if line is None or self._stopped:
                return None
            pause = self._retry_at - self._clock()
            if pause > 0:
                return pause
            message = json.loads(line)
            self._sending = self._clock(), float(message.get("bytes", 0))
        error: Exception | None = None
        try:
            self._send(message)
        except RefusedError as refusal:
            logger.warning("%s", refusal)
        except Exception as failure:
            error = failure
        with self._changed:
            self._sending = None
            if self._stopped:  # it has been kept, and is sent again
                return None
            began, ended = error is not None and not self._failures, error is None and self._failures > 0
            if error is None:
                self._failures = 0
                self._sent += 1
                self._remove_first(message)
            else:
                self._retry_at = self._clock() + min(_PAUSES[1], _PAUSES[0] * 2**self._failures)
                self._failures += 1
                self._spill()
        if began or ended:
            self._on_failure(error)
        with self._changed:
            self._changed.notify_all()
        return 0.0 if error is None else max(0.0, self._retry_at - self._clock())

    def _first(self) -> bytes | None:
        return self._first_filed() or (self._memory[0] if self._memory else None)

    def _first_filed(self) -> bytes:
        """The first message of the file; empty where there is none."""
        if self._file is None or not self._filed:
            return b""
        try:
            with self._file.open("rb") as file:
                file.seek(self._begin)
                line, why = file.readline(), "it is shorter than it was"
        except OSError as error:
            line, why = b"", str(error.strerror)
        if not line:
            logger.warning("%s: %d messages in it are lost (%s)", self._file, self._filed, why)
            self.lost += self._filed
            self._begin, self._filed = 0, 0
        return line

    def _remove_first(self, message: Message) -> None:
        if self._file is not None and self._filed:
            line = self._first_filed()
            if line:
                self._begin, self._filed = self._begin + len(line), self._filed - 1
            if not self._filed:
                self._file.unlink(missing_ok=True)
                self._begin = 0
        elif self._memory:
            self._memory.popleft()
        if "copy" in message:
            shutil.rmtree(Path(message["copy"]).parent, ignore_errors=True)

    def _spill(self) -> None:
        """Move what is in memory to the file, if there is room for it."""
        if self._file is None or not self._memory:
            return
        size: int | None = None
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as file:
                size = file.tell()
                file.writelines(self._memory)
        except OSError as error:
            with contextlib.suppress(OSError):
                if size is not None:
                    os.truncate(self._file, size)
            if not self._unwritable:
                logger.warning("%s cannot be written (%s): messages stay in memory", self._file, error.strerror)
            self._unwritable = True
            return
        self._unwritable = False
        self._filed += len(self._memory)
        self._memory.clear()

    def _shorten(self) -> None:
        """Leave only what is not sent in the file."""
        if self._file is not None and self._filed and self._begin:
            try:
                atomic_write_bytes(self._file, self._file.read_bytes()[self._begin :])
                self._begin = 0
            except OSError:
                logger.warning("%s keeps messages that were sent, which will be sent again", self._file)
