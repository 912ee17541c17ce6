"""What can be wrong with a compressed file."""

from __future__ import annotations

from vaevq_med.core.errors import VaevqMedError


class CodecError(VaevqMedError):
    """A compressed file is damaged, of a newer format, or of another tokenizer."""
