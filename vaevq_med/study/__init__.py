"""Several runs to one table; what a study cannot be is a ``VaevqMedError`` of one line everywhere."""
