"""A quantizer's own losses, as terms of the objective."""

from __future__ import annotations

from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.base import LossTerm
from vaevq_med.networks.outputs import TokenizerOutput


class QuantizerLoss(LossTerm):
    """The scalar that the quantizer publishes under a name, such as ``codebook`` or ``commitment``.

    Args:
        name: key of ``QuantizerOutput.losses``; its reduction is the quantizer's.
    """

    def __init__(self, *, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        """The scalar.

        Raises:
            VaevqMedError: the quantizer has no loss of that name.
        """
        if self.name not in output.quantizer.losses:
            found = ", ".join(output.quantizer.losses) or "none"
            raise VaevqMedError(
                f"the quantizer has no loss {self.name!r}; found {found}. Set its weight in objective.weights to 0"
            )
        return output.quantizer.losses[self.name]
