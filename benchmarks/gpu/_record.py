"""Lines of figures that are printed and stored when they are known, and parts that cannot take more than their time."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

Line = dict[str, Any]
_HIDDEN = ("part", "at_seconds", "traceback")
_GRACE = 30.0
"""Seconds after the end of the whole time at which a process that still hangs is ended."""


def process_age() -> float:
    """Seconds since this process started, which imports have taken most of."""
    return time.time() - psutil.Process().create_time()


def write_atomically(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON so that ``path`` holds either the old or the whole new record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


class TimeUpError(BaseException):
    """A part has had its time. No ``Exception``, so that no library's handler keeps it."""


class NotNeededError(Exception):
    """Raised by a part that has nothing to do here; the message says why."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`TimeUpError` inside the block after so many seconds, where the system has alarms.

    It comes between two steps of Python: a single long call into a library is waited for.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeUpError

    started = time.monotonic()
    before = signal.signal(signal.SIGALRM, ring)
    pending, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if pending:  # an alarm of somebody else, which is late at most
            signal.setitimer(signal.ITIMER_REAL, max(0.01, pending - (time.monotonic() - started)))


class Record:
    """Lines of figures in a JSON file, which is whole after each.

    Args:
        path: the file.
        seconds: since the process started, after which no part starts and a running one is cut off.
        heading: what stands beside the lines.
    """

    def __init__(self, path: Path, seconds: float, heading: Mapping[str, Any]) -> None:
        self.path, self.seconds, self.heading = path, seconds, dict(heading)
        self.lines: list[Line] = []
        self._started = time.monotonic() - process_age()

    def watch(self) -> None:
        """End this process when the time has been up for a while: for a call into a library that never returns."""
        watch = threading.Timer(max(0.0, self.remaining) + _GRACE, self._give_up)
        watch.daemon = True
        watch.start()

    def _give_up(self) -> None:
        print(f"ended: a part did not return {_GRACE:.0f} s after the time was up", flush=True)
        os._exit(3)

    @property
    def elapsed(self) -> float:
        """Seconds since the process started."""
        return time.monotonic() - self._started

    @property
    def remaining(self) -> float:
        """Seconds that are left."""
        return self.seconds - self.elapsed

    def say(self, part: str, **figures: Any) -> Line:
        """Store all lines, then print the new one: what was read on the screen is in the file."""
        line = {"part": part, **figures, "at_seconds": round(self.elapsed, 1)}
        self.lines.append(line)
        self.store()
        shown = {key: value for key, value in figures.items() if key != "traceback" and value is not None}
        print(f"{part}: {', '.join(f'{key} {_short(value)}' for key, value in shown.items())}", flush=True)
        return line

    def store(self) -> None:
        """Write what there is."""
        write_atomically(self.path, {**self.heading, "lines": self.lines})

    def find(self, part: str, key: str) -> Any:
        """A figure of a part's line, or None."""
        return next((line[key] for line in self.lines if line["part"] == part and line.get(key) is not None), None)

    def run(self, name: str, part: Callable[[], object], *, at_most: float, needs: float) -> bool:
        """Run a part for at most so many seconds; whatever ends it is a line, and whether it came to its end is told.

        Args:
            name: of the line that says what went wrong.
            part: says its own lines.
            at_most: seconds after which it is cut off.
            needs: seconds under which it is not started.
        """
        if self.remaining < needs:
            self.say(name, skipped=f"{max(0.0, self.remaining):.0f} s are left, and it takes {needs:.0f} or more")
            return False
        limit = min(at_most, self.remaining)
        try:
            with time_limit(limit):
                part()
            return True
        except NotNeededError as reason:
            self.say(name, skipped=str(reason))
        except TimeUpError:
            self.say(name, error=f"cut off after {limit:.0f} s", traceback=traceback.format_exc())
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            self.say(name, error=f"{type(error).__name__}: {text}", traceback=traceback.format_exc())
        finally:
            # The graph of what failed hangs on its exception, which is gone by now.
            gc.collect()
            _empty_cache()
        return False


def _empty_cache() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a context that an error has spoiled
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return str(value)


def cell(value: Any) -> str:
    """A figure in a table; ``–`` for none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return _short(value).replace("|", "/")


def table(lines: list[Line]) -> str:
    """Lines as Markdown: a column for each figure that half of them or more have, the others in one.

    >>> print(table([{"part": "a", "n": 1, "at_seconds": 0.1}, {"part": "b", "n": 2.5}, {"part": "c", "error": "no"}]))
    | part | n | further |
    | --- | ---: | --- |
    | a | 1 | |
    | b | 2.5 | |
    | c | – | error no |
    """
    kept = [{k: v for k, v in line.items() if k not in _HIDDEN and v is not None} for line in lines]
    names = dict.fromkeys(key for line in kept for key in line)
    columns = [name for name in names if 2 * sum(name in line for line in kept) >= len(kept)]
    further = any(key not in columns for line in kept for key in line)
    head = ["part", *(name.replace("_", " ") for name in columns), *(["further"] if further else [])]
    rows = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * len(columns) + (" --- |" if further else "")]
    for line, figures in zip(lines, kept, strict=True):
        cells = [line["part"], *(cell(figures.get(name)) for name in columns)]
        rest = ", ".join(f"{key.replace('_', ' ')} {cell(v)}" for key, v in figures.items() if key not in columns)
        rows.append(f"| {' | '.join(cells)} |" + (f" {rest} |".replace("  |", " |") if further else ""))
    return "\n".join(rows)
