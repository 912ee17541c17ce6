"""A pretended GPU: what runs inside sees CUDA tensors of the true shapes and types that hold no numbers.

Torch's fake tensors know devices, so that a tensor that was left on the CPU is an error as on a GPU. Three things are
added: backward passes, for which autograd's engine asks for a driver otherwise; autocast; and a list of what a GPU
would make the host wait for. Where there is a GPU the same calls run on fake tensors without the detours.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration

import vaevq_med

_PACKAGE = str(Path(vaevq_med.__file__).parent)
_CUDA, _META = torch.device("cuda", 0), torch.device("meta")
aten = torch.ops.aten
_SYNCHRONIZING = {
    getattr(aten, name)
    for name in (
        # A result whose size depends on the values.
        "nonzero masked_select _unique2 unique_dim unique_consecutive unique_dim_consecutive bincount "
        # Checks of the values, and of the success of a decomposition.
        "equal multinomial _linalg_eigh _linalg_svd linalg_eig _linalg_check_errors"
    ).split()
}
"""What waits for a GPU inside, without a number that reaches Python."""


_INDEXING = {aten.index, aten.index_put, aten.index_put_}
_LOOKED_AT = _SYNCHRONIZING | _INDEXING | {aten._local_scalar_dense, aten._to_copy, aten.copy_}
CONTEXT = 2**29
"""Bytes of a card that the driver, the libraries and their kernels take; they are not counted, but assumed."""
_MOST_WAITS = 200


def our_line() -> str:
    """The innermost line of the package on the stack, as ``file:line``; of another caller where there is none."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    ours = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    if ours:
        return f"{Path(ours[-1].filename).relative_to(_PACKAGE).as_posix()}:{ours[-1].lineno}"
    others = [frame for frame in frames if "site-packages/torch/" not in frame.filename]
    return f"{Path(*Path(others[-1].filename).parts[-2:])}:{others[-1].lineno}"


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(map(_is_mask, indices))


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The indices with each mask as the positions of one element."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and _is_mask(index):
            found += [torch.zeros(1, dtype=torch.int64, device=index.device) for _ in range(index.dim())]
        else:
            found.append(index)
    return found


class FakeCuda(FakeTensorMode):
    """Fake tensors whose values may be read: a number read is 1, and read from the GPU it is a wait.

    Attributes:
        waits: how often a GPU would make the host wait, by the line of the package that asked, with the operation.
        peak: the most bytes of fake CUDA memory that were held at once ; set it to ``held`` to start anew.
        held: those that are held now.
    """

    def __init__(self, count_memory: bool = False) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._count_memory = count_memory
        self.waits: Counter[str] = Counter()
        self.in_backward = 0
        self.held, self.peak = 0, 0
        self._depth = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def avoid_device_init(self) -> bool:
        """Never ask for a real device, also where the pretended backend is registered."""
        return not torch.cuda.is_available()

    def _count(self, tensor: Any) -> None:
        """Count the memory of a result, once, until it is gone."""
        if not isinstance(tensor, FakeTensor) or tensor.fake_device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        # In the blocks of CUDA's allocator.
        size = -(-storage.nbytes() // 512) * 512

        def gone(_: Any) -> None:
            self.held -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, gone)
        self.held += size
        self.peak = max(self.peak, self.held)

    def wait(self, what: str) -> None:
        """Note that the host would wait.

        Raises:
            RuntimeError: it waits so often that a loop over values, which are none, may never end.
        """
        line = f"{our_line()} {what}"
        self.waits[line] += 1
        if self.waits[line] > _MOST_WAITS and "copy" not in what:
            raise RuntimeError(f"more than {_MOST_WAITS} waits: {line}")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what asks for a number, note what waits, and pass the rest on."""
        if func is torch.ops.prim.device.default:
            return _device_of(args[0])
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        if packet in _LOOKED_AT:
            answer, args = self._look_at(func, packet, args, kwargs)
            if answer is not None:
                return answer
        # In a backward pass autograd's own formulas ask for tensors on the device that it was told of.
        if self.in_backward and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = _CUDA
        self._depth += 1
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._depth -= 1
        # What an operation is made of, where torch knows its shapes by that, takes no memory on a GPU.
        if self._count_memory and self._depth == 0:
            for leaf in result if isinstance(result, tuple | list) else (result,):
                self._count(leaf)
        return result

    def _look_at(self, func: Any, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Note whether the operation waits; give the answer, if it is not to run, and the arguments to run it with."""
        if packet is aten._local_scalar_dense:
            if args[0].device.type == "cuda":
                self.wait("item")
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1), args
        if packet in (aten._to_copy, aten.copy_):
            # On a GPU a copy from memory that is not pinned waits too.
            if packet is aten._to_copy:
                source, target, not_blocking = args[0].device, kwargs.get("device"), kwargs.get("non_blocking")
            else:
                source, target = args[1].device, args[0].device
                not_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if target is not None and not not_blocking and torch.device(target).type != source.type:
                self.wait(f"copy to {torch.device(target).type}")
            return None, args
        if args[0].device.type != "cuda":
            return None, args
        if packet in _SYNCHRONIZING:
            self.wait(packet.__name__)
            # The walk goes on with one element, so that a single walk finds all that waits.
            with self:
                if packet is aten.nonzero:
                    return torch.zeros(1, args[0].dim(), dtype=torch.int64, device=args[0].device), args
                if packet is aten.masked_select:
                    return args[0].flatten()[:1].clone(), args
        elif packet in _INDEXING and _has_mask(args[1]):
            # A single number is filled in where the mask is set, which needs no size.
            if packet is aten.index or args[2].dim():
                self.wait("index by a mask")
            if packet is aten.index:
                with self:
                    args = (args[0], _without_masks(args[1]), *args[2:])
        return None, args


def _device_of(tensor: FakeTensor) -> torch.device:
    """What C++ is told of a fake tensor's device.

    In a backward pass a fake CUDA tensor is on the meta device, for which autograd's engine needs no stream; before,
    and where a forward pass is repeated for its sake, it has to be on the GPU, or autocast would leave it as it is.
    """
    mode = tensor.fake_mode
    engine = isinstance(mode, FakeCuda) and mode.in_backward and not torch.is_grad_enabled()
    in_backward = engine and tensor.fake_device.type == "cuda"
    return _META if mode.in_kernel_invocation or in_backward else tensor.fake_device


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` by new parameters: torch swaps those of a tensor subclass, which fake tensors refuse."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    with torch.no_grad():
                        value = function(parameter)
                    same = value is parameter
                    moved[id(parameter)] = parameter if same else nn.Parameter(value, parameter.requires_grad)
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A copy of a fake tensor; torch's own copies the memory of its storage, which is none, and corrupts the heap."""
    if id(tensor) not in memo:
        with torch.no_grad():
            value = tensor.clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    return memo[id(tensor)]


class _NoBackend(backend_registration._DummyBackendModule):
    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0


class _NoHook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False

    def has_primary_context(self, dev_id: int) -> bool:
        return False


@functools.cache
def _register_backend() -> tuple[Any, ...]:
    """An accelerator without devices: autograd's engine asks it, not CUDA's driver, for current streams.

    It stays until the process ends; torch keeps pointers to what is returned here.
    """
    parts = _NoBackend(), _NoHook(), backend_registration._DummyDeviceGuard()
    backend_registration._setup_privateuseone_for_python_backend("pretended", *parts)
    return parts


@contextlib.contextmanager
def fake_cuda(card: int = 24 * 2**30, count_memory: bool = False) -> Iterator[FakeCuda]:
    """Inside, tensors are fake, and ``cuda`` is a card of compute capability 8.0.

    Args:
        card: its memory in bytes, of which the driver's context takes half a GiB.
        count_memory: keep ``held`` and ``peak``.
    """
    mode = FakeCuda(count_memory)
    dispatch = FakeTensor.__torch_dispatch__
    run_backward = torch.autograd._engine_run_backward

    def dispatched(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return _device_of(args[0])
        return dispatch.__func__(cls, func, types, args, kwargs or {})

    def backward(*args: Any, **kwargs: Any) -> Any:
        mode.in_backward += 1
        try:
            # The engine itself sets the mode no sooner than it has taken the first gradients.
            with torch.no_grad(), torch.autograd.set_multithreading_enabled(False):
                return run_backward(*args, **kwargs)
        finally:
            mode.in_backward -= 1

    def to_list(tensor: Tensor) -> Any:
        if not isinstance(tensor, FakeTensor):
            return real_to_list(tensor)
        if tensor.fake_device.type == "cuda":
            mode.wait("tolist")
        values: Any = 1.0 if tensor.dtype.is_floating_point else 1
        for size in reversed(tensor.shape):
            values = [values] * size
        return values

    def load(*args: Any, **kwargs: Any) -> Any:
        # Files hold numbers; unpickling them into fake storages has ended in a segmentation fault.
        with fake_tensor.unset_fake_temporarily():
            return real_load(*args, **kwargs)

    real_load = torch.load
    real_to_list: Callable[[Tensor], Any] = Tensor.tolist
    values: dict[str, Any] = {
        "get_device_capability": lambda *_: (8, 0),
        "mem_get_info": lambda *_: (card - CONTEXT - mode.held, card),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "empty_cache": lambda: None,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: mode.wait("synchronize"),
        "get_rng_state": lambda *_: None,
        "set_rng_state": lambda *_: None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name in ("get_rng_state", "set_rng_state"):
            stack.enter_context(mock.patch.object(torch, name, return_value=None))
        stack.enter_context(mock.patch.object(torch, "load", load))
        stack.enter_context(mock.patch.object(Tensor, "tolist", to_list))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", _deepcopy, create=True))
        if not torch.cuda.is_available():
            _register_backend()
            stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", bool))
            stack.enter_context(mock.patch.object(FakeTensor, "__torch_dispatch__", classmethod(dispatched)))
            handler = {torch.ops.prim.device.default: lambda args: _device_of(args[0])}
            stack.enter_context(mock.patch.dict(fake_tensor._DISPATCH_META_HANDLERS, handler))
            stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*fake.*")
        stack.enter_context(mode)
        yield mode
