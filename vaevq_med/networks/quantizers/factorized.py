"""The address that checkpoints know of :class:`vaevq_med.networks.quantizers.grouped.FactorizedQuantizer`."""

from vaevq_med.networks.quantizers.grouped import FactorizedQuantizer

__all__ = ["FactorizedQuantizer"]
