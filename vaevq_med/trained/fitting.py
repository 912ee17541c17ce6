"""How single tensors of trained weights become those of a network, and which networks' tensors may.

What is adapted, and nothing else:

- The image channels of the first and of the last convolution. An image whose M channels are alike is to give what one
  whose N channels are alike gave: each new input kernel is the sum of the old ones over M, each new output kernel the
  mean of the old ones. Three channels to one are so the sum of the first convolution's kernels; one to four are
  repeated there and divided by four.
- The convolution before the quantizer, between a point and a posterior: the kernels of the mean are those of the point.
  A posterior's log variance that the weights do not have keeps its own start.
- Kernels of slices become kernels of volumes, see :mod:`vaevq_med.trained.inflation`.

Weights of the same shapes may still be another network's: those of steps down that pad otherwise, or of another
quantizer. What a definition says is compared where it is known of both.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vaevq_med.core.components import ComponentError, resolve
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.trained.inflation import halving_kernels, inflated_kernel, is_flat_of

FITTING = ("encoder", "decoder")
"""Parts whose tensors all have to fit."""
_OWN = "vaevq_med.networks"
_ELSEWHERE = ("in_channels", "out_channels", "image_size", "attention_resolutions", "dropout", "spatial_dims")
"""Arguments that may differ: channels are adapted; where attention is the tensors say; dropout is training's alone."""


def adapted_channels(kernel: Tensor, channels: int, axis: int) -> Tensor:
    """A convolution's kernels, or its bias, for another number of image channels.

    Args:
        kernel: ``[out, in, ...]``, or a bias ``[out]``.
        channels: M, what the axis is to have.
        axis: 1 for what comes in, whose kernels are summed and shared out; 0 for what goes out, whose mean is repeated.

    Examples:
        >>> rgb = torch.tensor([[[[0.25]], [[0.5]], [[0.25]]]])
        >>> adapted_channels(rgb, 1, axis=1).flatten().tolist()
        [1.0]
        >>> adapted_channels(torch.ones(1, 1, 1, 1), 4, axis=1).flatten().tolist()
        [0.25, 0.25, 0.25, 0.25]
        >>> adapted_channels(torch.tensor([1.0, 2.0, 3.0]), 2, axis=0).tolist()
        [2.0, 2.0]
    """
    whole = kernel.sum(dim=axis, keepdim=True) / channels if axis else kernel.mean(dim=axis, keepdim=True)
    return whole.repeat_interleave(channels, dim=axis)


class Fit:
    """How given tensors become those of a network."""

    def __init__(self, network: nn.Module, weights: Mapping[str, Tensor], halving: str) -> None:
        self.own = network.state_dict()
        self.weights = weights
        self.halved = halving_kernels(network) if halving == "mean" else set()
        self.channels = dict(_image_channels(network))
        own, known = _latent_channels(self.own), _latent_channels(weights)
        self.latent = (known, own) if own and known else None

    def __call__(self, name: str) -> tuple[Tensor, str, str] | None:
        """The tensor, whether it is ``loaded``, ``adapted`` or ``inflated``, and what was adapted; None: no fit."""
        like, given = self.own[name], self.weights.get(name)
        if given is None:
            return None
        kind, told, axis = "loaded", "", self.channels.get(name)
        if axis is not None and given.ndim > axis and given.shape[axis] != like.shape[axis]:
            told = f"from {given.shape[axis]} to {like.shape[axis]} channels"
            kind, given = "adapted", adapted_channels(given, like.shape[axis], axis)
        elif name.startswith("quant_conv.") and self.latent is not None:
            if self.latent[0] != self.latent[1]:
                return None  # a posterior of D has the shape of a point of 2 D
            if given.shape[0] == 2 * like.shape[0]:
                kind, told, given = "adapted", "the mean's half of a posterior", given[: like.shape[0]]
            elif 2 * given.shape[0] == like.shape[0] and given.shape[1:] == like.shape[1:]:
                kind, told = "adapted", "the mean's half, the log variance left new"
                given = torch.cat([given.to(like), like[given.shape[0] :]])
        if given.shape != like.shape and is_flat_of(given, like):
            kind = kind if kind == "adapted" else "inflated"
            given = inflated_kernel(given, like.shape[2], pairs=name in self.halved)
        return (given, kind, told) if given.shape == like.shape else None

    def why(self, name: str) -> str:
        """Why a tensor does not fit."""
        given = self.weights.get(name)
        if given is not None and given.shape == self.own[name].shape and self.latent is not None:
            return "is of {} latent channels there, {} here".format(*self.latent)
        return "not there" if given is None else f"is {list(given.shape)} there, {list(self.own[name].shape)} here"


def _image_channels(network: nn.Module) -> list[tuple[str, int]]:
    """Names of the tensors with an axis of image channels, and that axis."""
    first = getattr(getattr(network, "encoder", None), "first_layer", None)
    last = getattr(network, "last_layer", None)
    found = []
    for name, parameter in network.named_parameters():
        if parameter is first:
            found.append((name, 1))
        if parameter is last:
            found += [(name, 0), (name.removesuffix("weight") + "bias", 0)]
    return found


def _latent_channels(weights: Mapping[str, Tensor]) -> int | None:
    """D, what the convolution after the quantizer takes."""
    codes = weights.get("post_quant_conv.weight")
    return None if codes is None or codes.ndim < 2 else int(codes.shape[1])


def check_values(name: str, given: Tensor, own: Tensor) -> None:
    """Refuse numbers that no training could have gone on from.

    Args:
        name: of the tensor.
        given: of the weights to start from.
        own: that it takes the place of.

    Raises:
        VaevqMedError: they are complex or integers where floats are due, or not finite where the network's own are.
    """
    if own.is_floating_point() and not given.is_floating_point():
        raise VaevqMedError(f"{name}: found {str(given.dtype)[6:]} in the weights to start from, expected floats")
    if given.is_floating_point() and not given.isfinite().all() and own.isfinite().all():
        raise VaevqMedError(f"{name}: found values that are not finite in the weights to start from, expected numbers")


def check_definitions(part: str, given: Any, own: Any) -> None:
    """Refuse an encoder or a decoder that computes something else with the same tensors.

    Args:
        part: of a network's definition.
        given: definition of the network that the weights are of; None where it is not known.
        own: that of the network that starts, likewise.

    Raises:
        VaevqMedError: naming the first argument that differs.
    """
    there, here = _of_part(given, part), _of_part(own, part)
    if there is None or here is None:
        return
    before, after = _arguments(there), _arguments(here)
    flat = before.get("spatial_dims") != after.get("spatial_dims")
    for arguments in (before, after):
        steps = arguments.pop("downsampling", None) or [[2, 2]] * (len(arguments.get("channel_mult") or ()) - 1)
        arguments["downsampling"] = [[*step][-2:] for step in steps]  # z may shrink otherwise
        for name in (*_ELSEWHERE, *(("within_slices",) if flat else ())):
            arguments.pop(name, None)
    for name in dict.fromkeys([*after, *before]):
        found, expected = before.get(name), after.get(name)
        if found != expected:
            raise VaevqMedError(
                f"{part}: found {name} {found!r} in the network to start from, expected {expected!r}: the {part} has "
                "to be the same but for image channels and z; name the other parts in init_parts to leave it new"
            )


def other_class(part: str, given: Any, network: nn.Module) -> str | None:
    """What a definition names for a part where that is another class than a network's own; None: the same, or unknown.

    Args:
        part: of the network.
        given: definition of the network that the weights are of; None where it is not known.
        network: that starts.
    """
    definition = _of_part(given, part)
    own = getattr(network, part, None)
    if definition is None or own is None:
        return None
    target = str(definition["_target_"])
    return None if _class(target) is type(own) else target.rpartition(".")[-1]


def _of_part(definition: Any, part: str) -> Mapping[str, Any] | None:
    found = definition.get(part) if isinstance(definition, Mapping) else None
    return found if isinstance(found, Mapping) and "_target_" in found else None


def _class(target: str) -> Any:
    try:
        return resolve(target, nn.Module, own=_OWN)
    except ComponentError:
        return target


def _arguments(definition: Mapping[str, Any]) -> dict[str, Any]:
    """What a definition says, and the defaults of what it does not, in the same form whether lists or tuples."""
    component = _class(str(definition["_target_"]))
    own = inspect.signature(component).parameters.values() if isinstance(component, type) else ()
    defaults = {one.name: one.default for one in own if one.default is not inspect.Parameter.empty}
    told = {name: value for name, value in definition.items() if not name.startswith("_")}
    values = {name: _as_lists(value) for name, value in {**defaults, **told}.items()}
    return {"_target_": component.__name__ if isinstance(component, type) else component, **values}


def _as_lists(value: Any) -> Any:
    return [_as_lists(one) for one in value] if isinstance(value, list | tuple) else value
