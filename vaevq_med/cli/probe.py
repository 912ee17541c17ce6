"""``probe`` on the command line: what a tokenizer's codes know, as a record and a line a head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vaevq_med.cli.flags import with_flags
from vaevq_med.cli.show import counted, interruptible
from vaevq_med.tasks.probe_options import ProbeOptions


@with_flags(ProbeOptions)
def probe(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of a trained tokenizer, or a packed bundle.")
    ],
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of dataset.json.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="JSON file that is written.")],
    options: ProbeOptions,
) -> None:
    """Ask linear and small heads what a frozen tokenizer's codes know: contrast, tumor in a slice, tumor by position.

    The heads learn from training patients and are judged on others; what guessing reaches stands beside them. Exit code
    0: done; 2: nothing could be done; 130: interrupted.
    """
    from vaevq_med.tasks.probes import Probe, lines

    command = Probe(checkpoint=checkpoint, dataset=dataset, output=output, **vars(options))
    with interruptible("nothing was written"), counted() as counting:
        report = command.run(**counting)
    for line in lines(report.record):
        typer.echo(line)
    typer.echo(f"{report.output}: written")
