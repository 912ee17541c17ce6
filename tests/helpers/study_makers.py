"""Studies made of the flags of the commands that stand for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vaevq_med.cli import makers
from vaevq_med.study.command import RunStudy

KINDS = {kind.command: kind for kind in (makers.Compare, makers.Ablate, makers.Sweep, makers.CompareGeneration)}


def make(
    kind: str,
    output: Path,
    *,
    on_update: Callable[[Any], None] = lambda states: None,
    overlays: Sequence[str] = (),
    assignments: Sequence[str] = (),
    **flags: Any,
) -> RunStudy:
    """The study of a command's flags, ready to run."""
    flags = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    maker = KINDS[kind](output_dir=output, overlay=list(overlays), assignments=list(assignments), **flags)
    return RunStudy(maker.study(), on_update)
