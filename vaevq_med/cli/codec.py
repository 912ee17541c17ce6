"""Commands that turn whole volumes into few bytes and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaevq_med.cli.flags import with_flags
from vaevq_med.cli.show import progress_bar, readable_size, watched
from vaevq_med.codec.options import CompressOptions, DecompressOptions, IndexModelOptions

if TYPE_CHECKING:
    from vaevq_med.codec.job import Job, Report

_Source = Annotated[
    Path, typer.Argument(metavar="INPUT", help="A volume, a case, or a folder of cases, as volumes or DICOM series.")
]
_Preview = Annotated[bool, typer.Option("--preview", help="Add a PNG of three planes: original, result and error.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what other settings made.")]


@with_flags(CompressOptions)
def compress(
    source: _Source,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A file *.vvq, or a folder of one for each case.")],
    options: CompressOptions,
    preview: _Preview = False,
    overwrite: _Overwrite = False,
) -> None:
    """Compress volumes by a trained tokenizer: one file a case, from which the same grid and header come back.

    Exit code 0: all is done; 1: done, but cases were skipped; 2: nothing could be done; 130: interrupted, the same
    command goes on.
    """
    from vaevq_med.codec import work

    report = run_job(work.compress(source, output, options, preview=preview, overwrite=overwrite), "cases")
    typer.echo(done_line(report, "cases compressed"))
    for line in compressed_lines(report.figures):
        typer.echo(f"  {line}")
    end(report)


@with_flags(DecompressOptions)
def decompress(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A file *.vvq, or a folder of them.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A folder; of a single volume also its file.")],
    options: DecompressOptions,
    overwrite: _Overwrite = False,
) -> None:
    """Write the volumes of compressed files: on the original grid, with the original header, in the original units.

    Exit code 0: all is done; 1: done, but files were skipped; 2: nothing could be done; 130: interrupted, the same
    command goes on.
    """
    from vaevq_med.codec import work

    report = run_job(work.decompress(source, output, options, overwrite=overwrite), "files")
    typer.echo(done_line(report, "files decompressed"))
    volumes = sum(found["volumes"] for found in report.figures.values())
    typer.echo(f"  {volumes} volumes; {_time(report.figures.values(), 'seconds', 'network_seconds')}")
    end(report)


@with_flags(CompressOptions)
def reconstruct(
    source: _Source,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A folder, of which each case gets one.")],
    options: CompressOptions,
    preview: _Preview = False,
    overwrite: _Overwrite = False,
) -> None:
    """Compress and decompress at once, and report what was lost: PSNR and SSIM in the brain, in report.json.

    A case's segmentation is copied as it is, so that slice-extract of OUTPUT has labels.

    Exit code 0: all is done; 1: done, but cases were skipped; 2: nothing could be done; 130: interrupted, the same
    command goes on.
    """
    from vaevq_med.codec import work

    report = run_job(work.reconstruct(source, output, options, preview=preview, overwrite=overwrite), "cases")
    typer.echo(done_line(report, "cases reconstructed"))
    for line in compressed_lines(report.figures):
        typer.echo(f"  {line}")
    spent = _time(report.figures.values(), "decompress_seconds", "decompress_network_seconds")
    typer.echo(f"  and back: {spent}")
    for line in quality_lines(report.figures):
        typer.echo(f"  {line}")
    end(report)


@with_flags(IndexModelOptions)
def index_model(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of dataset.json, of slice-extract.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="File to write, .safetensors.")],
    checkpoint: Annotated[
        Path, typer.Option(help="Checkpoint or packed bundle of the tokenizer whose indices it predicts.")
    ],
    options: IndexModelOptions,
) -> None:
    """Train a context model on the training patients' indices, for compress --coder context --model OUTPUT.

    Exit code 0: it is written; 2: nothing could be done; 130: interrupted, nothing is written.
    """
    from vaevq_med.codec.index_model import IndexModel

    with progress_bar() as bar:
        encoding = bar.add_task("contrasts of cases encoded", total=None)
        training = bar.add_task("training steps", total=None)
        report = IndexModel(dataset=dataset, output=output, checkpoint=checkpoint, **vars(options)).run(
            on_stack=lambda done: bar.update(encoding, completed=done),
            on_step=lambda step, steps, bits: bar.update(training, completed=step, total=steps),
        )
    typer.echo(f"{report.path}: {readable_size(report.path.stat().st_size)}")
    typer.echo(
        f"  {report.positions:,} positions of {report.stacks} contrasts of cases: {report.bits:.3f} bits an index"
    )


def run_job(job: Job, units: str) -> Report:
    """Run a job behind a progress bar.

    Args:
        job: what is done.
        units: what the bar counts.
    """
    with watched(job.work.kind, units) as (bar, start, skip):
        return job.run(on_start=start, on_unit=lambda name: bar.advance(bar.task_ids[0]), on_skip=skip)


def done_line(report: Report, what: str) -> str:
    """How much was done, in a line.

    Args:
        report: of a job.
        what: was done, e.g. ``cases compressed``.
    """
    return f"{report.output}: {report.written} {what}, {report.reused} were done, {len(report.skipped)} skipped"


def end(report: Report) -> None:
    """Say what a user should know, and end with the exit code of the report."""
    for note in report.notes:
        typer.echo(f"  note: {note}")
    raise typer.Exit(1 if report.skipped else 0)


def compressed_lines(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Bytes, bits a voxel and an index, and time, of all cases together.

    Args:
        figures: by case, as a report has them.
    """
    found = [*figures.values()]
    size, voxels = sum(one["bytes"] for one in found), sum(one["voxels"] for one in found)
    tokens, indices = sum(one["parts"]["tokens"] for one in found), sum(one["indices"] for one in found)
    yield f"{readable_size(size)}, {size:,} bytes: {8 * size / voxels:.4f} bits a voxel of {voxels:,}"
    if indices:
        yield f"{indices:,} indices of {8 * tokens / indices:.3f} bits: {readable_size(tokens)}"
    masks = sum(one["parts"]["masks"] for one in found)
    yield f"masks {readable_size(masks)}, the rest {readable_size(size - tokens - masks)}"
    yield _time(found, "seconds", "network_seconds")


def _time(found: Any, whole: str, network: str) -> str:
    found = [*found]
    seconds = sum(one[whole] for one in found)
    share = sum(one[network] for one in found) / seconds if seconds else 0.0
    return f"{seconds:.1f} s of work, {share:.0%} of it in the network"


def quality_lines(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The mean PSNR and SSIM of each contrast over the cases.

    Args:
        figures: by case, as a report has them.
    """
    by_contrast: dict[str, list[Mapping[str, float]]] = {}
    for one in figures.values():
        for name, quality in one["quality"].items():
            by_contrast.setdefault(name, []).append(quality)
    for name, found in by_contrast.items():
        ssim: Sequence[float] = [one["ssim_foreground"] for one in found if "ssim_foreground" in one]
        told = f", SSIM {sum(ssim) / len(ssim):.4f}" if ssim else ""
        yield f"{name}: PSNR {sum(one['psnr_foreground'] for one in found) / len(found):.2f} dB{told} in the foreground"
