"""What goes wrong with the file of a foreign tokenizer."""

from vaevq_med.core.errors import VaevqMedError


class ForeignError(VaevqMedError):
    """A foreign file is missing, damaged, or of something else than was said; found and expected in one line."""
