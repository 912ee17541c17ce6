"""Many independent jobs on a pool of processes that survives interrupts, full disks and killed workers."""

from __future__ import annotations

import contextlib
import errno
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vaevq_med.core.errors import DataError, HaltError

_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_MAX_WORKERS = 512
T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """Why a job gave nothing.

    Attributes:
        reason: one line.
        fatal: whether the other jobs would fail alike.
        lasting: whether the same command would find it again.
    """

    reason: str
    fatal: bool = False
    lasting: bool = False


def check_workers(workers: int | None, *, least: int = 1) -> None:
    """Refuse a number of processes out of range.

    Args:
        workers: found; None is what suits the machine.
        least: 0 where this process can do the work by itself.

    Raises:
        DataError: ``workers`` is neither None nor ``least`` to 512.
    """
    if workers is not None and not least <= workers <= _MAX_WORKERS:
        raise DataError(f"workers: found {workers}, expected {least} to {_MAX_WORKERS}")


def attempt(work: Callable[..., T], kind: str, *arguments: Any) -> T | Problem:
    """Do a job; what went wrong comes back as a line.

    Args:
        work: the job.
        kind: what a job is called, e.g. ``case``.
        *arguments: of the job.
    """
    try:
        return work(*arguments)
    except HaltError as error:
        return Problem(str(error), fatal=True, lasting=True)
    except DataError as error:
        return Problem(str(error))
    except OSError as error:
        if error.errno in _FATAL:
            reason = f"found no room or no permission to write ({error.strerror}), expected a disk with free space"
            return Problem(reason, fatal=True)
        return Problem(
            f"found a file that cannot be read or written ({error.strerror or error}), expected access to it"
        )
    except (MemoryError, RuntimeError) as error:  # torch raises the latter where memory lacks
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        return Problem(f"found a {kind} that cannot be computed ({lines[0][:160]}), expected one that fits into memory")


def run_jobs(
    work: Callable[..., T],
    jobs: Mapping[str, tuple[Any, ...]],
    *,
    kind: str,
    workers: int | None,
    on_start: Callable[[int], None] = lambda total: None,
) -> Generator[tuple[str, T | Problem], None, None]:
    """Run jobs, each in one thread, and yield their names and results as they get done.

    Args:
        work: called with a job's arguments; a module's function, so that it can be sent to a process.
        jobs: name to arguments.
        kind: what a job is called, e.g. ``case``.
        workers: processes, or None for one a core; 1 runs in this process.
        on_start: called once with the number of jobs.

    Raises:
        DataError: the disk is full, or a worker was killed; finished jobs are kept.
    """
    do = functools.partial(attempt, work, kind)
    workers = min(workers or usable_cores(), len(jobs))
    if workers <= 1:
        import torch  # see _start_worker

        on_start(len(jobs))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for name, arguments in jobs.items():
                yield name, _check(do(*arguments), kind, name)
        finally:
            torch.set_num_threads(threads)
        return
    # A fork costs nothing and is safe while this is the only thread, which is so on the command line.
    fork = sys.platform == "linux" and threading.active_count() == 1
    context = multiprocessing.get_context("fork" if fork else "spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),))
    try:
        futures: dict[Future[T | Problem], str] = {
            pool.submit(do, *arguments): name for name, arguments in jobs.items()
        }
        on_start(len(jobs))
        for future in as_completed(futures):
            yield futures[future], _check(future.result(), kind, futures[future])
    except BrokenProcessPool:
        raise DataError(
            f"found a worker killed, probably for want of memory; try fewer --workers. The finished {_plural(kind)} "
            "are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def do_jobs(
    work: Callable[..., T],
    jobs: Mapping[str, tuple[Any, ...]],
    *,
    kind: str,
    workers: int | None,
    lost: Callable[[T], Iterable[tuple[str, str]]] = lambda result: (),
    on_start: Callable[[int], None] = lambda total: None,
    on_unit: Callable[[str], None] = lambda name: None,
    on_skip: Callable[[str, str], None] = lambda name, reason: None,
) -> dict[str, str]:
    """Run jobs that write what they make; what cannot be done is skipped, the others go on.

    Args:
        work: see :func:`run_jobs`.
        jobs: likewise.
        kind: likewise.
        workers: likewise.
        lost: of a result, the names of what of it was left out, and why.
        on_start: see :func:`run_jobs`.
        on_unit: called with the name of each job that is done with.
        on_skip: called with the name of what is skipped, and the reason.

    Returns:
        Names of what was skipped, and why.

    Raises:
        DataError: as :func:`run_jobs`.
    """
    skipped: dict[str, str] = {}
    with contextlib.closing(run_jobs(work, jobs, kind=kind, workers=workers, on_start=on_start)) as outcomes:
        for name, outcome in outcomes:
            for item, reason in [(name, outcome.reason)] if isinstance(outcome, Problem) else lost(outcome):
                skipped[item] = reason
                on_skip(item, reason)
            on_unit(name)
    return skipped


def _plural(kind: str) -> str:
    return f"{kind}es" if kind.endswith("h") else f"{kind}s"


def _check(outcome: T | Problem, kind: str, name: str) -> T | Problem:
    if isinstance(outcome, Problem) and outcome.fatal:
        again = "" if outcome.lasting else ", the same command goes on from there"
        raise DataError(f"{kind} {name}: {outcome.reason}; the finished {_plural(kind)} are kept{again}")
    return outcome


def usable_cores(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its affinity, which a cluster's scheduler sets, and its control group's quota.

    Args:
        group: where the control group is mounted, version 2 or 1.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quotas = (
        lambda: (group / "cpu.max").read_text().split(),
        lambda: [(group / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")],
    )
    for read in quotas:
        try:
            quota, period = map(int, read())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if quota > 0 and period > 0:
            cores = min(cores, max(1, quota // period))
    return cores


def _start_worker(parent: int) -> None:
    """Leave interrupts to the parent, use one thread, and end when the parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Only here, so that who starts no worker does not wait for its import.
    import torch

    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
