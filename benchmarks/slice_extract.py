"""``vaevq-med slice-extract`` beside the MONAI pipeline that a user would write, and beside the floor.

All of them run in this process on the same cases, one after the other, imports left out; the middle of ``--repeats``
rounds counts. The *floor* decompresses the volumes, resizes the slices that the command keeps with one library call and
encodes them as PNG: what any implementation has to do. The *straightforward* pipeline is a ``Compose`` of MONAI's
dictionary transforms over whole volumes, a resize for each slice, and MONAI's PIL writer::

    python benchmarks/slice_extract.py FOLDER --size 256
    python benchmarks/slice_extract.py                      # synthetic subjects, made first
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.data import PILWriter
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    Resize,
    ScaleIntensityRangePercentilesd,
    ThresholdIntensityd,
)
from PIL import Image

from vaevq_med.prepare.job import Prepare
from vaevq_med.prepare.phantom.subjects import PhantomConfig, write_phantoms
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.case import Case
from vaevq_med.prepare.volumes.find import find_cases
from vaevq_med.prepare.volumes.source import VolumeSource

MIN_FOREGROUND = 0.05


def kept_slices(volumes: list[np.ndarray]) -> np.ndarray:
    """Indices along z whose share of nonzero pixels is at least the recipe's in every contrast."""
    shares = [(volume > 0).mean(axis=(0, 1)) for volume in volumes]
    return np.flatnonzero(np.min(shares, axis=0) >= MIN_FOREGROUND)


def floor(cases: list[Case], size: int, output: Path, kept: dict[str, np.ndarray]) -> None:
    """Decompress, resize what is kept, encode."""
    for case in cases:
        for name, source in case.images.items():
            content = source.path.read_bytes()
            content = gzip.decompress(content) if source.path.name.endswith(".gz") else content
            volume = np.asanyarray(nib.Nifti1Image.from_bytes(content).dataobj)
            stack = torch.from_numpy(np.ascontiguousarray(volume.T, dtype=np.float32))[
                torch.from_numpy(kept[case.name])
            ]
            stack = F.interpolate(stack[:, None], size=(size, size), mode="bilinear", antialias=True)[:, 0]
            pixels = stack.mul_(255 / stack.max()).to(torch.uint8).numpy()
            for number, slice_ in enumerate(pixels):
                Image.fromarray(slice_).save(output / f"{case.name}-{name}-{number}.png")


def straightforward(cases: list[Case], size: int, output: Path, kept: dict[str, np.ndarray]) -> None:
    """MONAI's own transforms and writer."""
    resize = Resize((size, size), mode="bilinear", anti_aliasing=True)
    for case in cases:
        keys = list(case.images)
        load = Compose(
            [
                LoadImaged(keys),
                EnsureChannelFirstd(keys),
                Orientationd(keys, axcodes="RAS", labels=None),
                ThresholdIntensityd(keys, threshold=0, above=True, cval=0),
                ScaleIntensityRangePercentilesd(keys, lower=0, upper=99.5, b_min=0, b_max=255, clip=True),
            ]
        )
        item = load({name: str(source.path) for name, source in case.images.items()})
        for name in keys:
            for z in range(item[name].shape[-1]):
                if min(float((item[k][..., z] > 0).float().mean()) for k in keys) < MIN_FOREGROUND:
                    continue
                writer = PILWriter(output_dtype=np.uint8, scale=None)
                writer.set_data_array(resize(item[name][..., z]), channel_dim=0)
                writer.set_metadata({"spatial_shape": (size, size)})
                writer.write(str(output / f"{case.name}-{name}-{z}.png"))


def command(source: Path, recipe: Recipe, output: Path, workers: int) -> None:
    """This package's."""
    Prepare(VolumeSource(source, recipe), output / "data", workers).run()


def timed(run: Callable[[Path], None]) -> float:
    """Seconds of one call into a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            run(Path(folder))
        return time.perf_counter() - started


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", type=Path, help="folder of cases; by default two synthetic ones")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.input
        if source is None:
            source = Path(folder)
            write_phantoms(source, 2, PhantomConfig(shape=(182, 218, 182)), workers=None)
        recipe = Recipe.load("brats24/axial_256").changed(size=arguments.size)
        cases = find_cases(source, recipe.modalities).units
        kept = {c.name: kept_slices([nib.load(s.path).get_fdata() for s in c.images.values()]) for c in cases}
        cores = os.cpu_count() or 1
        runs: dict[str, Callable[[Path], None]] = {
            "floor": lambda output: floor(cases, arguments.size, output, kept),
            "slice-extract, 1 core": lambda output: command(source, recipe, output, 1),
            f"slice-extract, {cores} cores": lambda output: command(source, recipe, output, cores),
            "straightforward MONAI": lambda output: straightforward(cases, arguments.size, output, kept),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                times[name].append(timed(run))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    slices = sum(len(v) for v in kept.values()) * len(recipe.modalities)
    print(f"{len(cases)} cases, {slices} slices of {arguments.size} pixels; {platform.machine()}, {cores} cores\n")
    print("| | seconds | times the floor | times faster than straightforward |\n| --- | ---: | ---: | ---: |")
    for name, value in seconds.items():
        base, plain = seconds["floor"], seconds["straightforward MONAI"]
        print(f"| {name} | {value:.2f} | {value / base:.2f} | {plain / value:.1f} |")
    if arguments.output:
        arguments.output.write_text(json.dumps({"cases": len(cases), "slices": slices, "seconds": times}, indent=2))


if __name__ == "__main__":
    main()
