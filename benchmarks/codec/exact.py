"""Whether every scan comes back with its grid, its header and its background, in many forms: a row a volume.

Each case of each INPUT is written anew in each form, goes through ``reconstruct``, and what comes back is compared with
what went in: the header's bytes (nibabel), size, spacing, origin and direction (SimpleITK), the data type, and every
voxel of the background. The row is printed and the JSON written after each volume; the same command goes on from there.
Exit code 1 where anything differs::

    python benchmarks/codec/exact.py scans/ more/ --checkpoint outputs/f8/checkpoints/best.pt --output exact.json
    python benchmarks/codec/exact.py scans/ --checkpoint … --output exact.json --forms original PIR --cases 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch

from vaevq_med.codec.options import CompressOptions
from vaevq_med.codec.work import reconstruct
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.images.foreground import find_background
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.find import find_cases

Image = nib.Nifti1Image


def turned(codes: str) -> Callable[[Image], Image]:
    """The same volume with its axes pointing elsewhere."""

    def form(image: Image) -> Image:
        start, end = nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(codes))
        return image.as_reoriented(nib.orientations.ornt_transform(start, end))

    return form


def stored_as(image: Image, voxels: np.ndarray, *, endianness: str = "<", slope: float | None = None) -> Image:
    """Stored numbers under the header of an image, with another type, order of bytes, shape or scaling."""
    header = image.header.as_byteswapped(endianness)
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    made = nib.Nifti1Image(voxels, image.affine, header)
    made.header.set_slope_inter(slope, 0.0 if slope is not None else None)
    return made


def numbers(image: Image) -> np.ndarray:
    return np.asarray(image.dataobj.get_unscaled() if hasattr(image.dataobj, "get_unscaled") else image.dataobj)


FORMS: dict[str, Callable[[Image], Image]] = {
    "original": lambda image: image,
    "PIR": turned("PIR"),  # permuted, and two axes turned round
    "RAS": turned("RAS"),
    "LPS": turned("LPS"),
    "big_endian": lambda image: stored_as(image, numbers(image).astype(">i2"), endianness=">"),
    "scaled": lambda image: stored_as(image, numbers(image), slope=0.037),
    "4d_with_one": lambda image: stored_as(image, numbers(image)[..., None]),
    "float": lambda image: stored_as(image, numbers(image).astype(np.float32)),
}


def write(image: Image, path: Path) -> None:
    """An image whose stored numbers are given, without nibabel choosing a scaling of its own."""
    header = image.header.copy()
    slope, intercept = header.get_slope_inter()
    header["vox_offset"] = 352
    header["scl_slope"] = 1.0 if slope is None else slope
    header["scl_inter"] = 0.0 if intercept is None else intercept
    content = header.binaryblock + bytes(4) + numbers(image).astype(header.get_data_dtype()).tobytes(order="F")
    path.write_bytes(content)


def differences(before: Path, after: Path) -> list[str]:
    """What is not as it was."""
    first, second = nib.load(before), nib.load(after)
    found = []
    if first.header.binaryblock != second.header.binaryblock:
        found.append("header")
    if not (np.array_equal(first.affine, second.affine) and first.shape == second.shape):
        found.append("affine or shape (nibabel)")
    images = []
    for path in (before, after):
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        images.append(reader)
    for name in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection", "GetPixelID"):
        if getattr(images[0], name)() != getattr(images[1], name)():
            found.append(f"{name} (SimpleITK)")
    stored, back = (numbers(image) for image in (first, second))
    if stored.dtype != back.dtype:
        found.append("data type")
    background = find_background(stored.reshape(stored.shape[:3]))
    value = 0 if background is None else background.value
    if not np.array_equal(stored[stored == value], back[stored == value]):
        found.append("background")
    if before.stat().st_size != after.stat().st_size:
        found.append("bytes of the file")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, nargs="+", help="folders of cases")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, and to go on from")
    parser.add_argument("--forms", nargs="+", choices=[*FORMS], default=[*FORMS])
    parser.add_argument("--cases", type=int, help="the first ones of all inputs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    contrasts = Recipe.load("brats24/axial_256").modalities
    cases = [case for folder in args.input for case in find_cases(folder, contrasts).units][: args.cases]
    rows: list[dict[str, Any]] = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    done = {(row["case"], row["form"]) for row in rows}
    options = CompressOptions(checkpoint=args.checkpoint, workers=1, any_contrast=True)
    for form in args.forms:
        for case in cases:
            if (case.name, form) in done:
                continue
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as name:
                source, output = Path(name) / "in" / case.name, Path(name) / "out"
                source.mkdir(parents=True)
                files = {}
                for contrast in contrasts:
                    original = case.images[contrast].path
                    files[contrast] = source / f"{original.name.removesuffix('.gz')}"
                    write(FORMS[form](nib.load(original)), files[contrast])
                try:
                    reconstruct(source, output, options).run()
                    wrong = {c: differences(files[c], output / case.name / files[c].name) for c in contrasts}
                except VaevqMedError as error:
                    wrong = {contrast: [str(error).replace(name, "")] for contrast in contrasts}
            seconds = round((time.perf_counter() - started) / len(contrasts), 1)
            new = [{"case": case.name, "form": form, "contrast": c, "different": wrong[c]} for c in contrasts]
            for row in new:
                print(
                    f"{form:12} {case.name:24} {row['contrast']}  {', '.join(row['different']) or 'the same'}",
                    flush=True,
                )
            rows += new
            print(f"{seconds} s a volume", flush=True)
            told = {
                "command": "python benchmarks/codec/exact.py INPUT --checkpoint CHECKPOINT --output exact.json",
                "cases": len({row["case"] for row in rows}),
                "volumes": len(rows),
                "different": sum(bool(row["different"]) for row in rows),
                "forms": {name: sum(row["form"] == name for row in rows) for name in FORMS},
                "rows": rows,
            }
            atomic_write_text(args.output, json.dumps(told, indent=1) + "\n")
    raise SystemExit(any(row["different"] for row in rows))


if __name__ == "__main__":
    main()
