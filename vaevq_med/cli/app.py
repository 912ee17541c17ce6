"""The ``vaevq-med`` command line: flags to commands, expected errors to one line and exit code 2.

Each command imports what it runs when it runs, so that ``--help`` is instant.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vaevq_med.cli import makers
from vaevq_med.cli import study as studies
from vaevq_med.cli.flags import with_flags
from vaevq_med.cli.overlays import overlays
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.evaluation.options import CodebookOptions, EvaluateOptions
from vaevq_med.tokens.options import EncodeOptions

if TYPE_CHECKING:
    from rich.progress import Progress

    from vaevq_med.prepare.job import Plan, Prepare, Report

app = typer.Typer(
    name="vaevq-med",
    help="Discrete visual tokenizers for medical images, around VAEVQ (arXiv 2511.06863), on MONAI.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from vaevq_med import __version__

        typer.echo(f"vaevq-med {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
    trusted: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PACKAGE",
            help="A package whose networks a checkpoint may name, beside this one and those that are installed as "
            "components of it; repeatable, before the command. Its code runs.",
        ),
    ] = None,
) -> None:
    from vaevq_med.core.components import trust

    trust(trusted or ())


# --- data preparation -------------------------------------------------------------------------------


class SliceFormat(StrEnum):
    """How slices are stored."""

    png = "png"
    png16 = "png16"
    npy = "npy"


def _counts(patients: dict[str, int], slices: dict[str, int] | None = None) -> Iterator[str]:
    for split, count in patients.items():
        tail = "" if slices is None else f", {slices[split]} slices"
        yield f"  {split}: {count} patient{'s' if count != 1 else ''}{tail}"


@app.command("slice-extract")
def slice_extract(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Folder of cases, under any nesting.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the data set.")],
    recipe: Annotated[
        str, typer.Option(help="A recipe of preprocessing/, or a .json file of your own.")
    ] = "brats24/axial_256",
    size: Annotated[int | None, typer.Option(help="Side of the slices in pixels, in place of the recipe's.")] = None,
    image_format: Annotated[
        SliceFormat | None,
        typer.Option("--format", help="8- or 16-bit PNG, or float32 .npy, in place of the recipe's."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a core.")] = None,
    split_file: Annotated[
        Path | None, typer.Option(help="JSON {patient: split} or CSV patient,split, in place of the recipe's rule.")
    ] = None,
    cases: Annotated[
        Path | None, typer.Option(help="CSV case,[patient,]t1n,t1c,t2w,t2f[,seg] of paths, for other layouts.")
    ] = None,
    label_map: Annotated[
        str | None,
        typer.Option(help="What the segmentations' values mean: brats2021, brats2024, brats2024-ped or decathlon."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and the space it takes.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace slices that another recipe made.")] = False,
) -> None:
    """Turn volumes (BraTS 2017-2024, Decathlon, or a CSV of paths) into a data set of 2D slices, split by patient.

    Exit code 0: all is done; 1: done, but cases were skipped; 2: nothing could be done; 130: interrupted, the same
    command goes on.
    """
    from vaevq_med.prepare.job import Prepare
    from vaevq_med.prepare.recipes import Recipe
    from vaevq_med.prepare.volumes.source import VolumeSource

    chosen = Recipe.load(recipe).changed(size=size, format=image_format)
    volumes = VolumeSource(source, chosen, split_file=split_file, cases=cases, label_map=label_map)
    command = Prepare(volumes, output, workers, overwrite)

    def would(plan: Plan) -> Iterator[str]:
        estimate = plan.estimate
        yield f"{output}: would slice {plan.units} cases; {plan.reused} are done already"
        yield from _counts(estimate.facts["patients"])
        if (case := estimate.facts["measured_on"]) is not None:
            size, free = _size(estimate.bytes), _size(plan.free_bytes)
            yield f"  about {estimate.images:,} images, {size} (as {case} takes); {free} free"

    def did(report: Report) -> Iterator[str]:
        skipped = len(report.skipped)
        yield f"{report.output}: {report.written} cases sliced, {report.reused} were done, {skipped} skipped"
        yield from _counts(report.facts["patients"], report.facts["slices"])

    _prepare(command, dry_run, "case", "cases", would, did)


@app.command("imagenet-prepare")
def imagenet_prepare(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Folder of train/ and val/, of the archives, or of any images.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the data set.")],
    recipe: Annotated[
        str, typer.Option(help="A recipe of preprocessing/, or a .json file of your own.")
    ] = "imagenet/original",
    resize: Annotated[
        int | None, typer.Option(help="Shrink to this shorter side, e.g. 256 or 288, in place of the recipe's.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Keep these classes: a number, a file with one a line, or names with commas.")
    ] = None,
    val_labels: Annotated[
        Path | None, typer.Option(help="Classes of flat validation images: the devkit, or another list; see the docs.")
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(help="Share of the training images to validate on; the validation images become the test split."),
    ] = None,
    no_classes: Annotated[
        bool, typer.Option("--no-classes", help="Subfolders of a folder without train/ are no classes.")
    ] = False,
    patients: Annotated[
        Path | None,
        typer.Option(help="CSV file,patient[,case] of whom each image shows: no patient in two splits."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and the space it takes.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace images that another recipe made.")] = False,
) -> None:
    """Turn ImageNet (class folders or ILSVRC2012 archives), or any folder of images, into a data set with a datalist.

    Exit code 0: all is done; 1: done, but images were skipped; 2: nothing could be done; 130: interrupted, the same
    command goes on.
    """
    from vaevq_med.prepare.job import Prepare
    from vaevq_med.prepare.pictures.source import PictureSource
    from vaevq_med.prepare.recipes import ImageRecipe

    chosen = ImageRecipe.load(recipe).changed(resize=resize, holdout=holdout)
    pictures = PictureSource(
        source, chosen, classes=classes, val_labels=val_labels, use_classes=not no_classes, patients=patients
    )
    command = Prepare(pictures, output, workers, overwrite)

    def would(plan: Plan) -> Iterator[str]:
        estimate, facts = plan.estimate, plan.estimate.facts
        yield f"{output}: would read {plan.units} batches of images; {plan.reused} are done already"
        if plan.units:
            tail = ", which links to the input's files where the disk is the same" if facts["linked"] else ""
            yield (
                f"  about {estimate.images:,} images, {_size(estimate.bytes)}{tail}; {_size(plan.free_bytes)} free; "
                f"{facts['classes']} classes"
            )

    def did(report: Report) -> Iterator[str]:
        skipped = len(report.skipped)
        yield f"{report.output}: {report.written:,} images written, {report.reused:,} were done, {skipped} skipped"
        patients = report.facts["patients"]
        for split, count in report.facts["images"].items():
            yield f"  {split}: {count:,} images" + (f" of {patients[split]:,} patients" if patients else "")
        yield f"  {report.facts['classes']} classes"
        yield from (f"  unusual: {found['count']:,} {kind}" for kind, found in report.facts["unusual"].items())

    _prepare(command, dry_run, "image", "batches", would, did)


@app.command()
def prepare(
    kind: Annotated[str, typer.Argument(metavar="SOURCE", help="Name of an installed source, e.g. volumes.")],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="What it reads.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the data set.")],
    recipe: Annotated[str, typer.Option(help="A recipe of preprocessing/, or a .json file of your own.")],
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and the space it takes.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what another recipe made.")] = False,
) -> None:
    """Make a data set of what an installed package reads: a source that it publishes in vaevq_med.sources.

    Exit code 0: all is done; 1: done, but something was skipped; 2: nothing could be done; 130: interrupted, the same
    command goes on.
    """
    from vaevq_med.prepare.job import Prepare, published

    chosen = published(kind)
    command = Prepare(chosen(source, chosen.recipes.load(recipe)), output, workers, overwrite)

    def would(plan: Plan) -> Iterator[str]:
        yield f"{output}: would write {plan.units} of {chosen.unit}; {plan.reused} are done already"
        size, free = _size(plan.estimate.bytes), _size(plan.free_bytes)
        yield f"  about {plan.estimate.images:,} images, {size}; {free} free"

    def did(report: Report) -> Iterator[str]:
        skipped = len(report.skipped)
        yield f"{report.output}: {report.written:,} written, {report.reused:,} were done, {skipped} skipped"

    _prepare(command, dry_run, chosen.item, chosen.unit, would, did)


def _prepare(
    command: Prepare[Any, Any],
    dry_run: bool,
    item: str,
    units: str,
    would: Callable[[Plan], Iterator[str]],
    did: Callable[[Report], Iterator[str]],
) -> None:
    """Make a data set, or say what that would take.

    Args:
        command: the job.
        dry_run: write nothing.
        item: what is skipped, e.g. ``case``.
        units: what the progress bar counts.
        would: lines about a plan.
        did: lines about a report.
    """
    found: Plan | Report
    if dry_run:
        found = plan = command.plan()
        for name, reason in plan.skipped:
            typer.echo(f"vaevq-med: {item} {name}: {reason}; skipped", err=True)
        lines = would(plan)
    else:
        with _watched(item, units) as (progress, start, skip):
            found = report = command.run(
                on_start=start, on_unit=lambda name: progress.advance(progress.task_ids[0]), on_skip=skip
            )
        lines = did(report)
    for line in lines:
        typer.echo(line)
    for note in found.notes:
        typer.echo(f"  note: {note}")
    raise typer.Exit(1 if found.skipped else 0)


@app.command("audit-split")
def audit_split(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of dataset.json.")],
) -> None:
    """Fail, with exit code 1, when a patient stands in two splits of a data set."""
    from vaevq_med.prepare.audit import AuditSplit

    report = AuditSplit(dataset).run()
    for leak in report.leaks:
        typer.echo(f"vaevq-med: {leak}", err=True)
    for line in _counts(report.patients, report.slices):
        typer.echo(line)
    for note in report.notes:
        typer.echo(f"  note: {note}")
    typer.echo(
        f"{dataset}: {len(report.leaks)} leaks" if report.leaks else f"{dataset}: no patient stands in two splits"
    )
    raise typer.Exit(1 if report.leaks else 0)


@contextlib.contextmanager
def _watched(kind: str, jobs: str) -> Iterator[tuple[Progress, Callable[[int], None], Callable[[str, str], None]]]:
    """A progress bar, what starts it, and what reports something skipped; an interrupt ends with exit code 130.

    Args:
        kind: what is skipped, e.g. ``case``.
        jobs: what the bar counts.
    """
    progress = _progress()

    def start(total: int) -> None:
        progress.add_task(jobs, total=total)
        progress.start()

    def skip(name: str, reason: str) -> None:
        line = f"vaevq-med: {kind} {name}: {reason}; skipped"
        progress.console.print(line, soft_wrap=True, markup=False, emoji=False)

    def stop() -> None:
        if progress.live.is_started:
            progress.stop()

    try:
        yield progress, start, skip
    except KeyboardInterrupt:
        stop()
        typer.echo(f"vaevq-med: interrupted; finished {jobs} are kept, and the same command goes on", err=True)
        raise typer.Exit(130) from None
    finally:
        stop()


def _size(count: int) -> str:
    """Bytes for a reader."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True, highlight=False))


# --- synthetic subjects -----------------------------------------------------------------------------


@app.command()
def phantom(
    output: Annotated[Path, typer.Argument(help="Folder to write the cases into.")],
    subjects: Annotated[int, typer.Option(help="Patients to make; every third has two timepoints.")] = 6,
    seed: Annotated[int, typer.Option(help="Another seed makes other patients.")] = 0,
    shape: Annotated[str, typer.Option(help="Voxels of a volume; fewer are larger ones.")] = "182,218,182",
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a core.")] = None,
) -> None:
    """Write synthetic brains with a tumor, in BraTS 2024 layout and naming."""
    from vaevq_med.prepare.phantom.subjects import PhantomConfig, plan_cases, write_phantoms

    edges = shape.replace("x", ",").split(",")
    if len(edges) != 3 or not all(edge.strip().isdecimal() for edge in edges):
        raise VaevqMedError(f"--shape {shape!r}: expected three whole numbers, as 182,218,182")
    config = PhantomConfig.read({"shape": [*map(int, edges)], "seed": seed})
    with _progress() as progress:
        task = progress.add_task("synthetic cases", total=len(plan_cases(subjects)))
        cases = write_phantoms(
            output, subjects, config, workers=workers, on_case=lambda name: progress.update(task, advance=1)
        )
    typer.echo(f"{output}: cases {len(cases)}, subjects {subjects}")


# --- feature-network weights ------------------------------------------------------------------------


@app.command()
def weights() -> None:
    """Say which weights of feature networks are here, and where the others go; nothing is downloaded."""
    from vaevq_med.evaluation.weights import Weights

    command = Weights()
    for row in command.run():
        typer.echo(f"{row.network}: {row.purpose}")
        if row.found is not None and row.matches:
            typer.echo(f"  found {row.found}")
        elif row.found is not None:
            typer.echo(f"  found {row.found}, whose SHA-256 does not start with {row.sha256}")
        else:
            checksum = f"SHA-256 starts with {row.sha256}" if row.sha256 else "no SHA-256 published"
            typer.echo(f"  missing {row.file or row.source} ({row.source}; {checksum})")
    typer.echo(f"\nPut missing files into {command.folder}, or name a file in the configuration (feature_weights).")


@app.command("feature-codebook")
@with_flags(CodebookOptions)
def feature_codebook(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of dataset.json.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="File to write, .npz.")],
    options: CodebookOptions,
) -> None:
    """Cluster a feature network's features of the training images: the frozen codebook of VQGAN-LC."""
    from vaevq_med.evaluation.codebook import FeatureCodebook

    command = FeatureCodebook(dataset=dataset, output=output, **vars(options))
    with _progress() as progress:
        task = progress.add_task("images", total=None)
        report = command.run(
            on_start=lambda total: progress.update(task, total=total),
            on_images=lambda count: progress.update(task, advance=count),
        )
    typer.echo(f"{report.output}: {report.num_embeddings:,} codewords of {report.num_features} features")
    typer.echo(f"  clustered {report.features:,} features of {report.images:,} training images")
    if 0 < len(report.classes) <= 10:
        typer.echo(f"  by class: {', '.join(f'{name} {count:,}' for name, count in report.classes.items())}")
    if report.distinct < report.num_embeddings:
        typer.echo(f"  note: only {report.distinct:,} codewords are distinct; the images are too alike for so many")
    typer.echo(f"Use it with --features {report.output} --num_features {report.num_features} and vqgan_lc.json.")


# --- second stage -----------------------------------------------------------------------------------


@app.command("encode-tokens")
@with_flags(EncodeOptions)
def encode_tokens(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of a trained tokenizer.")],
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of dataset.json.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the token store.")],
    options: EncodeOptions,
    kind: Annotated[
        Literal["indices", "latents"],
        typer.Option(help="Indices, or latents before quantization (the posterior's mean)."),
    ] = "indices",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a token store of other settings.")] = False,
) -> None:
    """Write every image's indices or latents, with labels and the tokenizer's hash, for training a generator.

    Exit code 0: all is done; 2: nothing could be done, or an image could not be read; 130: interrupted. What is done is
    kept, and the same command goes on.
    """
    from vaevq_med.tokens.encode import EncodeTokens

    command = EncodeTokens(checkpoint, dataset, output, kind=kind, overwrite=overwrite, **vars(options))
    with _watched("image", "images") as (progress, start, _):
        report = command.run(on_start=start, on_images=lambda count: progress.advance(progress.task_ids[0], count))
    store = report.store
    height, width = store.grid
    tokenizer = store.tokenizer
    typer.echo(f"{store.root}: {report.written:,} images encoded, {report.reused:,} were done")
    for name in store.splits:
        array = store.array(name)
        views = len(store.views(name))
        typer.echo(
            f"  {name}: {len(array):,} images in {views} view{'s' if views != 1 else ''}, "
            f"{array.dtype.name}, {_size(array.nbytes)}"
        )
    typer.echo(
        f"  {store.kind} of {tokenizer['quantizer']}: grid {height}x{width}, K {tokenizer['num_embeddings']:,}, "
        f"G {tokenizer['num_codebooks']}, D {tokenizer['embedding_dim']}"
    )
    names = f" ({len(store.label_names):,})" if store.label_names else ""
    typer.echo(f"  labels: {store.content['label']['kind']}{names}")


@app.command("evaluate-samples")
@with_flags(EvaluateOptions)
def evaluate_samples(
    samples: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="Folder of PNG files; samples.csv (file,label) gives labels.")
    ],
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of dataset.json.")],
    output_dir: Annotated[Path, typer.Option(help="Folder of metrics.json, memorization.csv and memorization.png.")],
    options: EvaluateOptions,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Checkpoint that decoded the samples: look among training images as it reconstructs them."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what metrics.json holds, in place of a table.")
    ] = False,
) -> None:
    """Measure generated images (gFID, precision, recall) and find those that copy training images.

    Exit code 0: all is measured, whatever the figures; 2: nothing could be done; 130: interrupted. The features of the
    real images are kept for the next run.
    """
    import json

    from vaevq_med.evaluation.samples import EvaluateSamples, table

    command = EvaluateSamples(samples, dataset, output_dir, tokenizer=tokenizer, **vars(options))
    try:
        with _progress() as progress:
            task = progress.add_task("images", total=None)
            report = command.run(
                on_start=lambda total: progress.update(task, total=total),
                on_images=lambda count: progress.update(task, advance=count),
            )
    except KeyboardInterrupt:
        typer.echo("vaevq-med: interrupted; features of splits that were read whole are kept", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(report.record, indent=2))
        return
    typer.echo(f"{report.output}: {report.record['provenance']['n']:,} samples")
    for line in table(report.record):
        typer.echo(f"  {line}")


# --- bundles ----------------------------------------------------------------------------------------

bundle = typer.Typer(help="Work with the MONAI bundles.", no_args_is_help=True)
app.add_typer(bundle, name="bundle")


@bundle.command("pack")
def bundle_pack(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the bundle: brats or imagenet.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to make.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint of a training run; by default outputs/NAME/checkpoints/best.pt.")
    ] = None,
    weights: Annotated[str, typer.Option(help="'ema', the averaged weights, or 'network'.")] = "ema",
    metrics: Annotated[Path | None, typer.Option(help="An evaluation's metrics.json, for the metadata.")] = None,
) -> None:
    """Write a trained tokenizer in the layout of MONAI's model zoo: configs/, models/model.pt, docs/, LICENSE."""
    from vaevq_med.trained.pack import BundlePack

    trained = checkpoint or Path("outputs", name, "checkpoints", "best.pt")
    report = BundlePack(name, output, trained, weights, metrics).run()
    typer.echo(f"{report.output}: {len(report.files)} files")
    typer.echo(f"Use it with: cd {report.output} && python -m monai.bundle run --config_file configs/inference.json")


@bundle.command("path")
def bundle_where(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the bundle: brats or imagenet.")],
) -> None:
    """Print where an installed bundle is."""
    from vaevq_med.core.resources import bundle_path

    typer.echo(bundle_path(name))


# --- demo and bundles -------------------------------------------------------------------------------


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of everything that the demo writes.")] = Path("demo"),
    subjects: Annotated[int, typer.Option(min=3, help="Synthetic subjects to make.")] = 6,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs to train; by default the overlay's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the subjects and of the training.")] = 0,
) -> None:
    """Make synthetic brains, extract slices, train and evaluate a small VAEVQ: some minutes, no GPU."""
    from rich.console import Console

    from vaevq_med.cli.demo import Demo

    console = Console(highlight=False)

    def announce(title: str, command: str) -> None:
        console.print(f"\n[bold]{title}[/bold]\n  $ {command}", soft_wrap=True)

    report = Demo(output, subjects=subjects, epochs=epochs, seed=seed, announce=announce).run()
    console.print("\n[bold]Over the test subject[/bold]")
    for name, value in report.metrics.items():
        console.print(f"  {name:<28}{value:10.4f}")
    for picture in report.pictures:
        console.print(f"  picture: {picture}", soft_wrap=True)
    console.print("\nBrowse the run with:")
    console.print(f"  mlflow ui --backend-store-uri {report.tracking_uri}", soft_wrap=True)


# --- comparison -------------------------------------------------------------------------------------

app.command()(overlays)
app.command("study")(studies.study)
for _kind in (makers.Compare, makers.Ablate, makers.Sweep, makers.CompareGeneration):
    app.command(_kind.command)(studies.maker(_kind))


def main() -> None:
    """Run the command line; an expected error ends with one line on stderr and exit code 2."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        app()
    except VaevqMedError as error:
        typer.echo(f"vaevq-med: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        typer.echo(f"vaevq-med: {error.filename or 'the system'}: {error.strerror or error}", err=True)
        sys.exit(2)
    except RecursionError:
        typer.echo("vaevq-med: found a file nested too deeply to read", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
