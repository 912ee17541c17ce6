"""The address that users know of :mod:`vaevq_med.networks.outputs`."""

from vaevq_med.networks.outputs import LossOutput, Posterior, QuantizerOutput, TokenizerOutput

__all__ = ["LossOutput", "Posterior", "QuantizerOutput", "TokenizerOutput"]
