"""What commands show on a terminal: progress bars, sizes and counts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.progress import Progress


def split_counts(patients: dict[str, int], slices: dict[str, int] | None = None) -> Iterator[str]:
    """Patients of each split, and slices, a line a split."""
    for split, count in patients.items():
        tail = "" if slices is None else f", {slices[split]} slices"
        yield f"  {split}: {count} patient{'s' if count != 1 else ''}{tail}"


def readable_size(count: int) -> str:
    """Bytes for a reader."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def progress_bar(*, passing: bool = False) -> Progress:
    """A bar on standard error that counts items and says how long they still take.

    Args:
        passing: it leaves nothing behind, also where standard error is a file.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True, highlight=False), transient=passing)


@contextlib.contextmanager
def interruptible(left: str) -> Iterator[None]:
    """An interrupt ends with exit code 130 and one line.

    Args:
        left: what is left of the work, e.g. ``nothing was written``.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"vaevq-med: interrupted; {left}", err=True)
        raise typer.Exit(130) from None


@contextlib.contextmanager
def counted(*, passing: bool = False) -> Iterator[dict[str, Callable[[int], None]]]:
    """A progress bar over images, as ``on_start`` and ``on_images`` of what reads them; see :func:`progress_bar`."""
    bar = progress_bar(passing=passing)

    def start(total: int) -> None:
        bar.add_task("images", total=total)
        bar.start()  # not before, since its thread keeps a pool of processes from being forked

    try:
        yield {"on_start": start, "on_images": lambda count: bar.advance(bar.task_ids[0], count)}
    finally:
        if bar.live.is_started:
            bar.stop()


@contextlib.contextmanager
def watched(kind: str, jobs: str) -> Iterator[tuple[Progress, Callable[[int], None], Callable[[str, str], None]]]:
    """A progress bar, what starts it, and what reports something skipped; an interrupt ends with exit code 130.

    Args:
        kind: what is skipped, e.g. ``case``.
        jobs: what the bar counts.
    """
    bar = progress_bar()

    def start(total: int) -> None:
        bar.add_task(jobs, total=total)
        bar.start()

    def skip(name: str, reason: str) -> None:
        line = f"vaevq-med: {kind} {name}: {reason}; skipped"
        bar.console.print(line, soft_wrap=True, markup=False, emoji=False)

    def stop() -> None:
        if bar.live.is_started:
            bar.stop()

    with interruptible(f"finished {jobs} are kept, and the same command goes on"):
        try:
            yield bar, start, skip
        finally:
            stop()
