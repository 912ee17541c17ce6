"""Commands that make data sets and what is made of their images, and that check them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vaevq_med.cli.flags import with_flags
from vaevq_med.cli.show import counted, progress_bar, readable_size, split_counts, watched
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.prepare.options import CodebookOptions

if TYPE_CHECKING:
    from vaevq_med.prepare.job import Plan, Prepare, Report


class SliceFormat(StrEnum):
    """How slices are stored."""

    png = "png"
    png16 = "png16"
    npy = "npy"


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
        Path | None,
        typer.Option(help="CSV case,[patient,]t1n,t1c,t2w,t2f[,seg,label_map] of paths, for other layouts."),
    ] = None,
    label_map: Annotated[
        str | None,
        typer.Option(help="What the segmentations' values mean: brats2021, brats2024, brats2024-ped or decathlon."),
    ] = None,
    patients: Annotated[
        Path | None, typer.Option(help="CSV case,patient of whose cases are, in place of what their names say.")
    ] = None,
    assume_orientation: Annotated[
        str | None,
        typer.Option(help="Where the voxels' axes point to in files whose headers do not say it, e.g. RAS or LPS."),
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(metavar="LOSS", help="Go on although much is lost by background, clipping or saturation."),
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
    from vaevq_med.prepare.volumes.discarded import in_words
    from vaevq_med.prepare.volumes.source import VolumeSource

    chosen = Recipe.load(recipe).changed(size=size, format=image_format)
    volumes = VolumeSource(
        source,
        chosen,
        split_file=split_file,
        cases=cases,
        label_map=label_map,
        patients=patients,
        orientation=assume_orientation,
        accept=tuple(accept or ()),
    )
    command = Prepare(volumes, output, workers, overwrite)

    def would(plan: Plan) -> Iterator[str]:
        estimate = plan.estimate
        yield f"{output}: would slice {plan.units} cases; {plan.reused} are done already"
        yield from split_counts(estimate.facts["patients"])
        if (case := estimate.facts["measured_on"]) is not None:
            size, free = readable_size(estimate.bytes), readable_size(plan.free_bytes)
            yield f"  about {estimate.images:,} images, {size} (as {case} takes); {free} free"
            yield from (f"  {line}" for line in in_words(estimate.facts["discarded"]))
            yield from (f"  note: {note}" for note in estimate.facts["notes"])

    def did(report: Report) -> Iterator[str]:
        skipped = len(report.skipped)
        yield f"{report.output}: {report.written} cases sliced, {report.reused} were done, {skipped} skipped"
        yield from split_counts(report.facts["patients"], report.facts["slices"])
        yield from (f"  {line}" for line in in_words(report.facts["discarded"]))

    _prepare(command, dry_run, "case", "cases", would, did)


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
                f"  about {estimate.images:,} images, {readable_size(estimate.bytes)}{tail}; "
                f"{readable_size(plan.free_bytes)} free; {facts['classes']} classes"
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
        size, free = readable_size(plan.estimate.bytes), readable_size(plan.free_bytes)
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
        found = plan = command.plan(
            on_skip=lambda name, reason: typer.echo(f"vaevq-med: {item} {name}: {reason}; skipped", err=True)
        )
        lines = would(plan)
    else:
        with watched(item, units) as (bar, start, skip):
            found = report = command.run(
                on_start=start, on_unit=lambda name: bar.advance(bar.task_ids[0]), on_skip=skip
            )
        lines = did(report)
    for line in lines:
        typer.echo(line)
    for note in found.notes:
        typer.echo(f"  note: {note}")
    raise typer.Exit(1 if found.skipped else 0)


def audit_split(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of dataset.json.")],
    workers: Annotated[int | None, typer.Option(help="Processes that read images; by default one a core.")] = None,
) -> None:
    """Fail, with exit code 1, when a patient, or an image under any name, stands in two splits of a data set."""
    from vaevq_med.prepare.audit import AuditSplit

    with counted(passing=True) as counting:
        report = AuditSplit(dataset, workers).run(**counting)
    for leak in report.leaks:
        typer.echo(f"vaevq-med: {leak}", err=True)
    if report.patients:
        lines = split_counts(report.patients, report.slices)
    else:
        lines = (f"  {split}: {count:,} images" for split, count in report.slices.items())
    for line in lines:
        typer.echo(line)
    for note in report.notes:
        typer.echo(f"  note: {note}")
    found = f"{len(report.leaks)} leaks" if report.leaks else "no patient stands in two splits, and no image does"
    typer.echo(f"{dataset}: {found}")
    raise typer.Exit(1 if report.leaks else 0)


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
    with progress_bar() as bar:
        task = bar.add_task("synthetic cases", total=len(plan_cases(subjects)))
        cases = write_phantoms(
            output, subjects, config, workers=workers, on_case=lambda name: bar.update(task, advance=1)
        )
    typer.echo(f"{output}: cases {len(cases)}, subjects {subjects}")


def label_maps(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of dataset.json, with segmentations.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the data set of label maps.")],
    keep_empty: Annotated[bool, typer.Option("--keep-empty", help="Keep segmented slices that show no tumor.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace label maps of other images.")] = False,
) -> None:
    """Make images of a data set's segmentations, a channel a region: what a tokenizer of label maps is trained on."""
    from vaevq_med.prepare.label_maps import LabelMaps

    with counted() as counting:
        report = LabelMaps(dataset, output, keep_empty, overwrite).run(**counting)
    counts = ", ".join(f"{count:,} {split}" for split, count in report.images.items())
    typer.echo(f"{report.output}: label maps: {counts}")
    for reason, count in report.left_out.items():
        if count:
            typer.echo(f"  left out: {count:,} slices {reason}")
    typer.echo("Train on them with bundles/overlays/label_maps.json, see docs/label_maps.md.")


@with_flags(CodebookOptions)
def feature_codebook(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of dataset.json.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="File to write, .npz.")],
    options: CodebookOptions,
) -> None:
    """Cluster a feature network's features of the training images: the frozen codebook of VQGAN-LC."""
    from vaevq_med.prepare.codebook import FeatureCodebook

    command = FeatureCodebook(dataset=dataset, output=output, **vars(options))
    with counted() as counting:
        report = command.run(**counting)
    typer.echo(f"{report.output}: {report.num_embeddings:,} codewords of {report.num_features} features")
    typer.echo(f"  clustered {report.features:,} features of {report.images:,} training images")
    if 0 < len(report.classes) <= 10:
        typer.echo(f"  by class: {', '.join(f'{name} {count:,}' for name, count in report.classes.items())}")
    if report.distinct < report.num_embeddings:
        typer.echo(f"  note: only {report.distinct:,} codewords are distinct; the images are too alike for so many")
    typer.echo(f"Use it with --features {report.output} --num_features {report.num_features} and vqgan_lc.json.")
