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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
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
        peak: the most bytes of fake CUDA memory that were held at once since :meth:`reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: Counter[str] = Counter()
        self.in_backward = 0

    @property
    def avoid_device_init(self) -> bool:
        """Never ask for a real device, also where the pretended backend is registered."""
        return not torch.cuda.is_available()

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
        kwargs = dict(kwargs or {})
        on_gpu = any(isinstance(leaf, FakeTensor) and leaf.fake_device.type == "cuda" for leaf in pytree.tree_leaves(args))
        if func is aten._local_scalar_dense.default:
            if on_gpu:
                self.wait("item")
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        if on_gpu and func.overloadpacket in _SYNCHRONIZING:
            self.wait(func.overloadpacket.__name__)
            # The walk goes on with one element, so that a single walk finds all that waits.
            if func is aten.nonzero.default:
                with self:
                    return torch.zeros(1, args[0].dim(), dtype=torch.int64, device=args[0].device)
            if func is aten.masked_select.default:
                with self:
                    return args[0].flatten()[:1].clone()
        if on_gpu and func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and _has_mask(args[1]):
            # With a single number the GPU fills where the mask is set, which needs no size.
            if func.overloadpacket is aten.index or args[2].dim():
                self.wait("index by a mask")
            if func.overloadpacket is aten.index:
                with self:
                    args = (args[0], _without_masks(args[1]), *args[2:])
        # In a backward pass autograd's own formulas ask for tensors on the device that it was told of.
        if self.in_backward and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = _CUDA
        target = kwargs.get("device")
        if func is aten._to_copy.default and target is not None and not kwargs.get("non_blocking"):
            if torch.device(target).type != args[0].device.type:
                self.wait(f"copy to {torch.device(target).type}")
        if func is aten.copy_.default and not (len(args) > 2 and args[2] or kwargs.get("non_blocking")):
            if args[0].device.type != args[1].device.type:
                self.wait(f"copy to {args[0].device.type}")
        return super().__torch_dispatch__(func, types, args, kwargs)


def _device_of(tensor: FakeTensor) -> torch.device:
    """What C++ is told of a fake tensor's device.

    In a backward pass a fake CUDA tensor is on the meta device, for which autograd's engine needs no stream; before,
    it has to be on the GPU, or autocast would leave it as it is.
    """
    mode = tensor.fake_mode
    in_backward = isinstance(mode, FakeCuda) and mode.in_backward and tensor.fake_device.type == "cuda"
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
def _register_backend() -> None:
    """An accelerator without devices: autograd's engine asks it, not CUDA's driver, for current streams."""
    backend_registration._setup_privateuseone_for_python_backend("pretended", _NoBackend(), _NoHook())


@contextlib.contextmanager
def fake_cuda(free: int = 24 * 2**30) -> Iterator[FakeCuda]:
    """Inside, tensors are fake, and ``cuda`` is a device of compute capability 8.0 with so many bytes free."""
    mode = FakeCuda()
    dispatch = FakeTensor.__torch_dispatch__
    run_backward = torch.autograd._engine_run_backward

    def dispatched(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return _device_of(args[0])
        return dispatch.__func__(cls, func, types, args, kwargs or {})

    def backward(*args: Any, **kwargs: Any) -> Any:
        mode.in_backward += 1
        try:
            with torch.autograd.set_multithreading_enabled(False):
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

    real_to_list: Callable[[Tensor], Any] = Tensor.tolist
    values: dict[str, Any] = {
        "get_device_capability": lambda *_: (8, 0),
        "mem_get_info": lambda *_: (free, free),
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
            stack.enter_context(mock.patch.object(torch, name, lambda *_: None))
        stack.enter_context(mock.patch.object(Tensor, "tolist", to_list))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
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
