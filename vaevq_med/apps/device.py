"""The device that a command's ``--device`` names."""

from vaevq_med.engines import named_device

__all__ = ["named_device"]
