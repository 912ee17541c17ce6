"""The commands of ``vaevq-med``."""
