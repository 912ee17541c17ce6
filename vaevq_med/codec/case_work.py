"""A work on the cases of an input, each of which writes its files side by side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vaevq_med.codec.job import Work
from vaevq_med.trained.device import named_device

if TYPE_CHECKING:
    from vaevq_med.prepare.recipes import Recipe
    from vaevq_med.prepare.volumes.case import Case


@dataclass(frozen=True)
class CaseWork(Work):
    """What is done to each case of an input.

    Attributes:
        options: of the command; they say the device.
        recipe: with the network's contrasts.
        cases: by name.
        settings: what every file depends on.
        found_problems: cases that lack something, and what.
        found_notes: remarks on the input and the network.
    """

    options: Any
    recipe: Recipe
    cases: Mapping[str, Case]
    settings: Mapping[str, Any]
    found_problems: Sequence[tuple[str, str]] = ()
    found_notes: Sequence[str] = ()

    @property
    def mark(self) -> str:
        """Hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    @property
    def problems(self) -> Sequence[tuple[str, str]]:
        """Cases that lack something."""
        return self.found_problems

    @property
    def notes(self) -> Sequence[str]:
        """Remarks on the input and the network."""
        return self.found_notes

    @property
    def device_type(self) -> str:
        """Where the network runs."""
        return named_device(self.options.device).type

    def units(self) -> Sequence[str]:
        """Names of the cases."""
        return [*self.cases]

    def place(self, unit: str, file: str) -> str:
        """Side by side."""
        return file
