"""``vaevq-med phantom``: write synthetic multi-contrast subjects in BraTS 2024 layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.jobs import usable_cores
from vaevq_med.prepare.phantom.subjects import PhantomConfig, plan_cases, write_phantoms


@dataclass(frozen=True)
class PhantomReport:
    """What a run wrote.

    Attributes:
        output: the folder.
        subjects: number of patients.
        cases: names of the cases, ordered; a patient with two timepoints has two.
    """

    output: Path
    subjects: int
    cases: tuple[str, ...]


@dataclass(frozen=True)
class Phantom:
    """Write synthetic subjects.

    Attributes:
        output: folder to write into; made where absent.
        subjects: number of patients.
        config: how they are made.
        workers: processes, or None for one a core.
    """

    output: Path
    subjects: int = 6
    config: PhantomConfig = field(default_factory=PhantomConfig)
    workers: int | None = None

    @property
    def num_cases(self) -> int:
        """Number of cases that ``run`` will write."""
        return len(plan_cases(self.subjects))

    def run(self, on_case: Callable[[str], None] | None = None) -> PhantomReport:
        """Write the subjects.

        Args:
            on_case: called with the name of each case that is done.

        Returns:
            What was written.

        Raises:
            VaevqMedError: an option is out of its range, or the output cannot be written.
        """
        workers = usable_cores() if self.workers is None else self.workers
        folders = write_phantoms(self.output, self.subjects, self.config, workers=workers, on_case=on_case)
        return PhantomReport(self.output, self.subjects, tuple(folder.name for folder in folders))


def parse_shape(text: str) -> tuple[int, int, int]:
    """Read a shape as a user writes it.

    Args:
        text: three whole numbers, separated by commas or by ``x``.

    Returns:
        The shape.

    Raises:
        VaevqMedError: the text is something else.

    Examples:
        >>> parse_shape("91,109,91")
        (91, 109, 91)
    """
    try:
        first, second, third = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise VaevqMedError(f"--shape {text!r}: expected three whole numbers, as 182,218,182") from None
    return first, second, third
