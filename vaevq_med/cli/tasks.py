"""Commands of downstream tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vaevq_med.cli.codec import done_line, end, run_job
from vaevq_med.cli.flags import with_flags
from vaevq_med.tasks.options import SegmentOptions


@with_flags(SegmentOptions)
def segment(
    source: Annotated[Path, typer.Argument(metavar="CASES", help="Folder of cases, under any nesting.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of a label map for each case.")],
    options: SegmentOptions,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what other settings made.")] = False,
) -> None:
    """Segment tumors in whole scans: a NIfTI label map on each case's own grid, and scores where it has a segmentation.

    Exit code 0: all is done; 1: done, but cases were skipped; 2: nothing could be done; 130: interrupted, the same
    command goes on.
    """
    from vaevq_med.codec.job import Job
    from vaevq_med.tasks.segment import Segment, segmented, summary_lines

    job = Job(Segment.of(source, output, options), output, options.workers, overwrite)
    done = segmented(job, run_job(job, "cases"))
    typer.echo(done_line(done.report, "cases segmented"))
    for line in summary_lines(done.summary):
        typer.echo(f"  {line}")
    if done.scores is not None:
        typer.echo(f"  scores: {done.scores}")
    end(done.report)
