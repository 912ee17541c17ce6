"""What an iteration gave: numbers that stay on the device until somebody looks at them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Terms(Mapping[str, float]):
    """Numbers by name; those on a device are read all at once, when one of them is first asked for.

    Args:
        values: scalars, on a device or not.

    >>> terms = Terms({"loss": torch.tensor(0.5), "rate": 1.0})
    >>> terms["loss"], dict(terms)
    (0.5, {'loss': 0.5, 'rate': 1.0})
    """

    def __init__(self, values: Mapping[str, Tensor | float]) -> None:
        self._values = dict(values)

    def _read(self) -> dict[str, float]:
        waiting = {name: value for name, value in self._values.items() if isinstance(value, Tensor)}
        if waiting:
            numbers = torch.stack([value.detach().float().reshape(()) for value in waiting.values()]).tolist()
            self._values |= zip(waiting, numbers, strict=True)
        return self._values  # type: ignore[return-value]

    def __getitem__(self, name: str) -> float:
        """The number of that name."""
        return self._read()[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is one; nothing is read."""
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        """The names; nothing is read."""
        return iter(self._values)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._values)
