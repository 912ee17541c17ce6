"""Tensors of a foreign file by name: read without running code, and taken one by one so that none is overlooked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaevq_med.foreign.errors import ForeignError
from vaevq_med.networks.weight_file import read_weight_file

_EXPECTED = "a file of weights: tensors by name alone (TorchScript programs are of the kind torchscript)"


def read_content(path: Path) -> Any:
    """What a file of weights holds, see :func:`vaevq_med.networks.weight_file.read_weight_file`.

    Raises:
        ForeignError: it is missing, a pointer of Git LFS, damaged, or a pickle that holds more than data.
    """
    return read_weight_file(path, _EXPECTED, ForeignError)


def is_tensors(value: Any) -> bool:
    """Whether a value holds tensors by name, and perhaps a number or a text beside them."""
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


class Tensors:
    """The tensors of a file.

    Args:
        path: the file, for messages.
        tensors: by name.
        expected: whose tensors they should be, e.g. ``VQGAN of taming-transformers``.
        names: those of the file, where they were changed.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, Tensor], expected: str, names: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self.expected = expected
        self._tensors = dict(tensors)
        self._names = dict(names or {})
        self._taken: set[str] = set()

    @classmethod
    def read(cls, path: Path, expected: str, places: Sequence[str] = ("state_dict", "model")) -> Tensors:
        """Of a file.

        Args:
            path: the file.
            expected: as for the class.
            places: entries of the file that may hold the tensors, the preferred one first; else the file itself does.

        Raises:
            ForeignError: see :func:`read_content`; or there are no tensors by name.
        """
        content = read_content(path)
        held = content if isinstance(content, Mapping) else {}
        found: Any = next((held[place] for place in places if is_tensors(held.get(place))), content)
        if not is_tensors(found):
            what = ", ".join(map(str, [*held][:4])) or type(content).__name__
            raise ForeignError(f"{path}: found no tensors by name ({what}), expected the weights of {expected}")
        return cls(path, {str(name): value for name, value in found.items() if isinstance(value, Tensor)}, expected)

    def renamed(self, rules: Iterable[tuple[str, str]]) -> Tensors:
        """With names changed by regular expressions, each in turn."""
        names = {name: name for name in self._tensors}
        for pattern, new in rules:
            names = {name: re.sub(pattern, new, current) for name, current in names.items()}
        found = Tensors(self.path, {names[name]: value for name, value in self._tensors.items()}, self.expected)
        found._names = {new: self._names.get(old, old) for old, new in names.items()}
        return found

    def below(self, prefix: str) -> Tensors:
        """Those whose names begin with a prefix, without it."""
        part = {name[len(prefix) :]: value for name, value in self._tensors.items() if name.startswith(prefix)}
        return Tensors(self.path, part, self.expected)

    def with_tensors(self, further: Mapping[str, Tensor], *, without: Sequence[str] = ()) -> Tensors:
        """With others, which take the place of those of their names, and without those of some beginnings."""
        kept = {name: value for name, value in self._tensors.items() if not name.startswith(tuple(without))}
        return Tensors(self.path, {**kept, **further}, self.expected)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def names(self) -> list[str]:
        """Of all."""
        return [*self._tensors]

    def numbers(self, pattern: str) -> list[int]:
        """The numbers, rising, that stand for the group of a regular expression that some names begin with."""
        return sorted({int(match[1]) for name in self._tensors if (match := re.match(pattern, name))})

    def shape(self, name: str, *expected: int | None) -> tuple[int, ...]:
        """The shape of a tensor.

        Args:
            name: which.
            *expected: sizes that it has to have, None for any; none of them leaves it open.

        Raises:
            ForeignError: there is no such tensor, or it has another shape.
        """
        if name not in self._tensors:
            there = ", ".join([*self._tensors][:3])
            raise ForeignError(
                f"{self.path}: found no tensor {name!r} among {len(self._tensors)} ({there}, ...), expected those of "
                f"{self.expected}"
            )
        shape = tuple(self._tensors[name].shape)
        fits = len(shape) == len(expected) and all(b in (None, a) for a, b in zip(shape, expected, strict=True))
        if expected and not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            raise ForeignError(f"{self.path}: found {name!r} of shape {list(shape)}, expected [{wanted}]")
        return shape

    def take(self, name: str) -> Tensor:
        """A tensor in fp32.

        Raises:
            ForeignError: there is none.
        """
        self.shape(name)
        self._taken.add(name)
        value = self._tensors[name]
        return value.detach().to(torch.float32 if value.is_floating_point() else value.dtype).clone()

    def check_all_taken(self, spare: Sequence[str] = ()) -> None:
        """Refuse tensors that nothing took.

        Args:
            spare: beginnings of names that are not needed: of losses, averages, counters.

        Raises:
            ForeignError: naming some.
        """
        left = [name for name in self._tensors if name not in self._taken and not name.startswith(tuple(spare))]
        if left:
            some = ", ".join([self._names.get(name, name) for name in left[:3]] + ["..."] * (len(left) > 3))
            raise ForeignError(
                f"{self.path}: found {len(left)} tensors without a place ({some}), expected those of {self.expected}"
            )
