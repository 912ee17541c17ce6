"""Time and memory of one call, and what is measured of a machine, for the benchmarks."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable

import psutil
import torch


def _return_free_pages() -> None:
    """Give what earlier calls freed back to the system, so that a call's pages count as its own."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakMemory:
    """What is added inside the block to this process's resident memory, or to the GPU's allocations, in MiB."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mib = 0.0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return self
        _return_free_pages()
        self.process = psutil.Process()
        self.base = self.process.memory_info().rss
        self.peak, self.running = self.base, True

        def watch() -> None:
            while self.running:
                self.peak = max(self.peak, self.process.memory_info().rss)
                time.sleep(0.001)

        self.thread = threading.Thread(target=watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.mib = (torch.cuda.max_memory_allocated() - self.base) / 2**20
            return
        self.running = False
        self.thread.join()
        self.mib = (self.peak - self.base) / 2**20


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The middle of ``repeats`` timings, after one that warms up."""
    values = []
    for number in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        if number:
            values.append(time.perf_counter() - started)
    return statistics.median(values)


def copied_bytes_per_second(device: torch.device, mib: int, repeats: int) -> float:
    """Bytes read and written a second by a copy within the device's memory."""
    source = torch.ones(mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device, max(5, repeats))


def hardware(device: torch.device | str | None = None) -> str:
    """One line about a device and torch; by default the GPU where there is one."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
