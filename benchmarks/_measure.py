"""Time and memory of one call, for the benchmarks."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time

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
