"""How many items of a batch go through a network at once: chosen by memory, halved where it runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError

logger = logging.getLogger(__name__)
AUTO = "auto"
# Over what autograd keeps, an item needs room for gradients and for what a layer holds while it computes.
_TRANSIENT = 1.5
# Of the memory that is free, what a step may be planned to take; the rest is for libraries and fragmentation.
_SHARE = {"cuda": 0.9, "cpu": 0.6}
# Held whatever the batch: the codebook search's tiles, workspaces of convolutions.
_WORKSPACE = 2**30


def check_micro_batch_size(value: int | str | None, batch_size: int | None = None) -> int | str | None:
    """The setting, if it is one.

    Args:
        value: ``"auto"``, a number of items, or None for the whole batch.
        batch_size: of the batches that it cuts, where that is known.

    Raises:
        VaevqMedError: it is neither None nor ``"auto"`` nor a whole number from 1 to the batch size.
    """
    if value is None:
        return None
    valid = value == AUTO or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)
    if not valid or (batch_size is not None and value != AUTO and int(value) > batch_size):
        most = "" if batch_size is None else f" to the batch_size, {batch_size}"
        raise VaevqMedError(f"micro_batch_size: found {value!r}, expected 'auto' or a whole number from 1{most}")
    return value


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of a GPU or of the CPU, had too little."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass of a call, each piece of memory once.

    Args:
        forward: makes a graph, and returns what holds it.

    >>> x = torch.ones(8, requires_grad=True)
    >>> saved_bytes(lambda: x.exp().exp())
    64
    """
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # A fake tensor's memory has no address.
        sizes[storage._cdata] = storage.nbytes()
        # Kept as it is, a layer's own result would hold the layer that keeps it, and neither would ever be freed.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward()
    del held
    return sum(sizes.values())


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still take on a device: on the CPU, within the limit of its control group too."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / name for name in ("memory.max", "memory.current"))
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return free


def training_state_bytes(parameters: Iterable[Tensor]) -> int:
    """Gradients and Adam's two averages of parameters, in fp32."""
    return 12 * sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def fitting(batch_size: int, constant: int, per_item: int, free: int) -> int:
    """The size of the fewest equal parts of a batch that fit.

    Args:
        batch_size: items of the batch.
        constant: bytes held whatever the part.
        per_item: bytes that autograd keeps for an item.
        free: bytes to be had.

    >>> fitting(32, 0, 2**30, 20 * 2**30), fitting(32, 0, 2**30, 2**20)
    (11, 1)
    """
    fits = int(max(0, free - constant - _WORKSPACE) / (_TRANSIENT * max(1, per_item)))
    parts = -(-batch_size // max(1, min(batch_size, fits)))
    return -(-batch_size // parts)


def planned(forward: Callable[[int], Any], batch_size: int, parameters: Iterable[Tensor], device: torch.device) -> int:
    """The micro-batch that ``"auto"`` starts with: what autograd keeps, counted once, against the free memory.

    Args:
        forward: makes the graph of the first so many items of a batch, and leaves no trace.
        batch_size: items of the batch.
        parameters: that take gradients.
        device: where it runs.
    """
    if batch_size == 1:
        return 1
    free = int(_SHARE.get(device.type, _SHARE["cpu"]) * free_bytes(device))
    state = training_state_bytes(parameters)
    with torch.compiler.set_stance("force_eager"):
        one = saved_bytes(lambda: forward(1))
        if fitting(2, state, one, free) < 2:  # a second item is not even tried
            return 1
        two = saved_bytes(lambda: forward(2))
    per_item = max(1, two - one)
    constant = max(0, one - per_item) + state
    size = fitting(batch_size, constant, per_item, free)
    logger.debug("%d bytes an item, %d besides, %d free: %d of %d at once", per_item, constant, free, size, batch_size)
    return size


class Snapshot:
    """Random generators, and the buffers of a module, as they are now.

    Args:
        device: whose generator counts beside the CPU's.
        module: whose running averages a forward pass moves, or None.
    """

    def __init__(self, device: torch.device, module: nn.Module | None) -> None:
        self.device, self.module = device, module
        self._random = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._buffers = [] if module is None else [buffer.clone() for buffer in module.buffers()]

    def restore(self) -> None:
        """Put all of them back."""
        torch.set_rng_state(self._random)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self.device)
        if self.module is not None:
            for buffer, value in zip(self.module.buffers(), self._buffers, strict=True):
                buffer.copy_(value)
