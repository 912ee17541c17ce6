"""The interface of a loss term."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from vaevq_med.errors import VaevqMedError
from vaevq_med.outputs import TokenizerOutput

PATH_REDUCTIONS = ("sum", "mean")


class LossTerm(nn.Module, ABC):
    """A scalar of the target and a tokenizer's output; unweighted, its reduction stated by the class."""

    @abstractmethod
    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        """The term for images ``target`` ``[B, C, H, W]`` in [-1, 1], a scalar."""


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value``, or raise a VaevqMedError that names the choices."""
    if value not in choices:
        raise VaevqMedError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
    return value


def paths(output: TokenizerOutput) -> list[Tensor]:
    """The reconstructions of an output: the quantized path, and the continuous one where there is one."""
    if output.reconstruction_continuous is None:
        return [output.reconstruction]
    return [output.reconstruction, output.reconstruction_continuous]


def combine(values: list[Tensor], path_reduction: str) -> Tensor:
    """Sum or mean of one scalar a path."""
    stacked = torch.stack(values)
    return stacked.sum() if path_reduction == "sum" else stacked.mean()
