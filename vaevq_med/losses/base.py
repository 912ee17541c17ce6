"""The interface of a loss term."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import TokenizerOutput

PATHS = ("both", "continuous")
PATH_REDUCTIONS = ("sum", "mean")


class LossTerm(nn.Module, ABC):
    """A scalar of the target and a tokenizer's output; unweighted, its reduction stated by the class.

    Attributes:
        adaptive: multiply its weight by the ratio of the gradient norms of the reconstruction and perceptual loss and
            of this term, at the last convolution before the latent.
    """

    adaptive: bool = False

    @abstractmethod
    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        """The term for images ``target`` ``[B, C, H, W]`` in [-1, 1], a scalar."""

    def one_update(self) -> AbstractContextManager[None]:
        """Count the calls inside as parts of one batch; what steers the term moves once, and not after an error."""
        return nullcontext()

    def control(self) -> Tensor | None:
        """What steers the term, which a checkpoint carries: a buffer; None for most."""
        return None

    def load_control(self, stored: Tensor) -> None:
        """Take up what :meth:`control` gave; to be overridden where that is no buffer itself."""
        control = self.control()
        if control is not None:
            control.copy_(stored)

    def steered_factor(self) -> Tensor | None:
        """What the term multiplies itself by and steers, a scalar, for terms that follow it; None for most."""
        return None

    def figures(self) -> Mapping[str, Tensor]:
        """What is logged beside the term's value, under the term's name and these."""
        return {}


def no_continuous_path() -> VaevqMedError:
    """Of a term of the continuous path and a tokenizer that has none."""
    return VaevqMedError(
        "paths is 'continuous'; found a tokenizer with variational false, expected true, or paths 'both'"
    )


def paths(output: TokenizerOutput, which: str = "both") -> list[Tensor]:
    """The reconstructions of an output.

    Args:
        output: of the training forward pass.
        which: ``"both"``, the quantized path and, where there is one, the continuous path; or ``"continuous"``, that
            path alone.

    Raises:
        VaevqMedError: the continuous path is asked for and there is none.
    """
    if which == "both":
        return [path for path in (output.reconstruction, output.reconstruction_continuous) if path is not None]
    if output.reconstruction_continuous is None:
        raise no_continuous_path()
    return [output.reconstruction_continuous]


def combine(values: list[Tensor], path_reduction: str) -> Tensor:
    """Sum or mean of one scalar a path."""
    stacked = torch.stack(values)
    return stacked.sum() if path_reduction == "sum" else stacked.mean()
