"""The address that users' configurations know of :mod:`vaevq_med.core.resources`."""

from vaevq_med.core.resources import bundle_path, recipe_path

__all__ = ["bundle_path", "recipe_path"]
