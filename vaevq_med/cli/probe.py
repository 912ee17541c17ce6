"""``probe`` on the command line: what tokenizers' codes know, as a record, a table and a line a head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vaevq_med.cli.flags import with_flags
from vaevq_med.cli.show import counted, interruptible
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.tasks.probe_options import ProbeOptions


@with_flags(ProbeOptions)
def probe(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of dataset.json.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the record and the table.")],
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT...", help="Trained tokenizers, or packed bundles.")
    ],
    options: ProbeOptions,
) -> None:
    """Ask linear and small heads what frozen tokenizers' codes know: contrast, tumor in a slice, tumor by position.

    The heads learn from training patients and are judged on others; what guessing reaches stands beside them, and all
    tokenizers stand in one table. Exit code 0: done; 2: nothing could be done; 130: interrupted.
    """
    from vaevq_med.tasks.probe_report import lines
    from vaevq_med.tasks.probes import Probe

    if (output / "dataset.json").is_file() and not (dataset / "dataset.json").is_file():
        raise VaevqMedError(
            f"probe: found CHECKPOINT DATASET OUTPUT, the order of before ({output} is a data set); expected DATASET "
            "OUTPUT CHECKPOINT..., where OUTPUT is a folder"
        )
    command = Probe(dataset=dataset, output=output, checkpoints=checkpoints, **vars(options))
    with interruptible("nothing was written"), counted() as counting:
        report = command.run(**counting)
    for line in lines(report.record):
        typer.echo(line)
    typer.echo(f"{report.output}: written")
