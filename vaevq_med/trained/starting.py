"""Trained weights as the start of a network: loaded, adapted or left new, part by part, and each of it told.

A tokenizer's parts are ``encoder``, ``decoder``, ``quantizer``, ``latent`` (the convolutions before and after the
quantizer) and whatever else it holds, by its name. Encoder and decoder have to fit: another width or depth is another
network, and is refused. The others are taken whole or left new, each of the two convolutions by itself: a codebook of
another size says nothing about this one.

What is adapted says :mod:`vaevq_med.trained.fitting`. A quantizer of another class is left new whatever its shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.names import listed
from vaevq_med.networks.processes import rank
from vaevq_med.networks.ranges import check_choice
from vaevq_med.trained.definition import known_definition
from vaevq_med.trained.fitting import FITTING, Fit, check_definitions, check_values, other_class
from vaevq_med.trained.inflation import HALVINGS
from vaevq_med.trained.network import StoredNetwork
from vaevq_med.trained.patients import HASHES, NAMES, STARTED_FROM

logger = logging.getLogger(__name__)

_LATENT = ("quant_conv", "post_quant_conv")
_NAMED = 3
"""Tensors that a line names."""

Network = TypeVar("Network", bound=nn.Module)


def is_given(init_from: Any) -> bool:
    """Whether a setting names something to start from; MONAI's command line has no plain ``None``."""
    return init_from not in (None, "", "null", "None")


def part_of(name: str) -> str:
    """The part of a tokenizer that a parameter, buffer or module belongs to.

    >>> part_of("encoder.layers.0.weight"), part_of("post_quant_conv.bias"), part_of("quantizer.embedding")
    ('encoder', 'latent', 'quantizer')
    """
    first = name.partition(".")[0]
    return "latent" if first in _LATENT else first


def parts_of(network: nn.Module) -> list[str]:
    """The parts of a network that hold tensors, in its order."""
    return list(dict.fromkeys(map(part_of, network.state_dict())))


def check_parts(option: str, wanted: Any, network: nn.Module) -> list[str]:
    """The parts that a setting names.

    Raises:
        VaevqMedError: the network has no such part.
    """
    names, known = [str(name) for name in listed(wanted)], parts_of(network)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise VaevqMedError(f"{option}: found {unknown[0]!r}, expected some of {', '.join(known)}")
    return names


@dataclass
class PartStart:
    """What became of a part.

    Attributes:
        asked: whether it was to be loaded.
        loaded: names of tensors that were taken as they are.
        adapted: names of those whose channels changed, with what changed.
        inflated: names of those that became 3D kernels.
        new: names of those that kept their own start, with why.
        units: what was loaded as a whole, the part or one of its convolutions.
    """

    asked: bool = True
    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    inflated: list[str] = field(default_factory=list)
    new: dict[str, str] = field(default_factory=dict)
    units: list[str] = field(default_factory=list)

    @property
    def is_loaded(self) -> bool:
        """Whether anything of it was."""
        return bool(self.loaded or self.adapted or self.inflated)

    def __str__(self) -> str:
        if not self.asked:
            return f"left new, not asked for ({len(self.new)} tensors)"
        words = [f"{len(self.loaded)} tensors loaded"] if self.loaded else []
        if self.adapted:
            words.append(f"{len(self.adapted)} adapted ({_some(self.adapted)})")
        if self.inflated:
            words.append(f"{len(self.inflated)} kernels inflated")
        if self.new:
            words.append(f"{len(self.new)} left new ({_some(self.new)})")
        return ", ".join(words)


@dataclass
class StartReport:
    """What became of a network's tensors and of the given ones.

    Attributes:
        parts: by name.
        unused: names of the given tensors that the network has no place for, of the parts that were asked for.
    """

    parts: dict[str, PartStart] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A line a part, and one of what was not used."""
        lines = [f"{name}: {part}" for name, part in self.parts.items()]
        if self.unused:
            lines.append(f"not used: {len(self.unused)} tensors ({_some(dict.fromkeys(self.unused, ''))})")
        return lines

    def record(self) -> dict[str, Any]:
        """Plain values, by part: its counts of tensors, what was adapted, the units loaded, and the line."""
        return {
            name: {
                "loaded": len(part.loaded),
                "adapted": dict(part.adapted),
                "inflated": len(part.inflated),
                "new": len(part.new),
                "units": list(part.units),
                "told": str(part),
            }
            for name, part in self.parts.items()
        }


def _some(names: Mapping[str, str]) -> str:
    told = [f"{name} {why}".strip() for name, why in list(names.items())[:_NAMED]]
    return ", ".join(told) + (", ..." if len(names) > _NAMED else "")


def unit_of(name: str) -> str:
    """What is taken whole or not at all, beside a part that has to fit: a convolution about the latent, or the part."""
    return name.partition(".")[0]


@torch.no_grad()
def take_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    parts: Sequence[str] | None = None,
    halving: str = "mean",
    given: Any = None,
    own: Any = None,
) -> StartReport:
    """Start a network by the weights of another one.

    Args:
        network: to start, e.g. a ``VisualTokenizer``.
        weights: a state dictionary.
        parts: which parts are taken; None for all.
        halving: ``mean`` or ``center``, see :mod:`vaevq_med.trained.inflation`.
        given: definition of the network that the weights are of, plain values, where it is known.
        own: that of ``network``, likewise.

    Raises:
        VaevqMedError: encoder or decoder are asked for and do not fit or compute something else, a tensor is not
            finite or not of floats, the network has no such part, or nothing was left to take. The network is then as
            it was.
    """
    check_choice("halving", halving, HALVINGS)
    wanted = parts_of(network) if parts is None else check_parts("init_parts", parts, network)
    fit, report, chosen = Fit(network, weights, halving), StartReport(), {}
    units: dict[str, list[str]] = {}
    for name in fit.own:
        units.setdefault(unit_of(name), []).append(name)
    for unit, names in units.items():
        part_name = part_of(unit)
        part = report.parts.setdefault(part_name, PartStart(asked=part_name in wanted))
        if not part.asked:
            part.new |= dict.fromkeys(names, "")
            continue
        was = other_class(unit, given, network) if unit == "quantizer" else None
        if was is not None:
            part.new |= dict.fromkeys(names, f"was {was}")
            continue
        fitted = {name: fit(name) for name in names}
        lacking = [name for name, found in fitted.items() if found is None]
        if part_name in FITTING:
            surplus = sorted(n for n in weights.keys() - fit.own.keys() if part_of(n) == part_name)
            if lacking or surplus:
                raise VaevqMedError(_misfit((lacking or surplus)[0], fit, part_name))
            check_definitions(part_name, given, own)
        for name, found in fitted.items():
            if lacking or found is None:
                part.new[name] = fit.why(name) if name in lacking else ""
                continue
            chosen[name], kind, told = found
            check_values(name, fit.weights[name], fit.own[name])
            if kind == "adapted":
                part.adapted[name] = told
            else:
                getattr(part, kind).append(name)
        if not lacking:
            part.units.append(unit)
        part.new = dict(sorted(part.new.items(), key=lambda item: not item[1]))  # those that say why come first
    if not chosen:
        raise VaevqMedError(
            f"found nothing to take of {', '.join(wanted) or 'no part'} ({'; '.join(report.lines())}), expected some "
            "weights that fit"
        )
    report.unused = sorted(n for n in weights.keys() - fit.own.keys() if parts is None or part_of(n) in wanted)
    for name, value in chosen.items():
        fit.own[name].copy_(value)
    return report


def _misfit(name: str, fit: Fit, part: str) -> str:
    given, like = fit.weights.get(name), fit.own.get(name)
    found = "nothing" if given is None else f"shape {list(given.shape)}"
    expected = "no such tensor" if like is None else str(list(like.shape))
    if like is not None and like.ndim == 5:
        expected += f" or the same without z, {[*like.shape[:2], *like.shape[3:]]}"
    return (
        f"{name}: found {found} in the weights to start from, expected {expected}: the {part} has to be "
        "the same but for image channels and z; name the other parts in init_parts to leave it new"
    )


def read_start(init_from: str | Path) -> tuple[Mapping[str, Tensor], Any, dict[str, Any]]:
    """Weights to start from, the averaged ones where there are some, and where they come from.

    Args:
        init_from: a checkpoint, a packed bundle or its weights, see :func:`vaevq_med.trained.packed.read_trained`.

    Returns:
        The state dictionary; the definition of its network, None where that is not known; and ``file``, ``sha256``,
        ``weights``, ``iteration`` and the ``data`` that it was trained on, which says in ``started_from`` what that
        training started from.

    Raises:
        VaevqMedError: there is no such file, or it is no checkpoint.
    """
    stored = StoredNetwork(init_from)
    told = ("split_hash", "content_hash", NAMES, HASHES, STARTED_FROM)
    return (
        stored.tensors,
        known_definition(stored.config, stored.path),
        {
            "file": stored.path.name,
            "sha256": stored.sha256,
            "weights": stored.kept,
            "iteration": stored.iteration,
            "data": {name: stored.data[name] for name in told if name in stored.data},
        },
    )


def start_network(
    network: nn.Module,
    init_from: str | Path,
    *,
    parts: Sequence[str] | None = None,
    halving: str = "mean",
    own: Any = None,
    say: Callable[..., None] = logger.warning,
) -> dict[str, Any]:
    """Start a network as a file has it, by :func:`take_weights`, and say what became of each part in a line.

    Args:
        network: to start.
        init_from: see :func:`read_start`.
        parts: which parts are taken; None for all.
        halving: as for :func:`take_weights`.
        own: likewise.
        say: takes a format and its values.

    Returns:
        What :func:`read_start` says of the file, with ``parts``, what became of each.

    Raises:
        VaevqMedError: there is no such file, or its network is another.
    """
    weights, given, source = read_start(init_from)
    try:
        report = take_weights(network, weights, parts=parts, halving=halving, given=given, own=own)
    except VaevqMedError as error:
        raise VaevqMedError(f"init_from {init_from}: {error}") from None
    if rank() == 0:
        say("Starting from %s (sha256 %s...)", init_from, source["sha256"][:12])
        for line in report.lines():
            say("  %s", line)
    return {**source, "parts": report.record()}


def started_from(
    network: Network, init_from: str | Path | None, *, parts: Sequence[str] | None = None, halving: str = "mean"
) -> Network:
    """A network that starts as that of a file, see :func:`start_network`; as it is where none is given."""
    if is_given(init_from):
        start_network(network, str(init_from), parts=parts, halving=halving)
    return network
