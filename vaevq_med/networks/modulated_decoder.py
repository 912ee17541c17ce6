"""The address that checkpoints know of the modulated decoder in :mod:`vaevq_med.networks.decoder`."""

from vaevq_med.networks.decoder import ModulatedDecoder, ModulatedNorm

__all__ = ["ModulatedDecoder", "ModulatedNorm"]
