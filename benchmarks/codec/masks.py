"""Bytes of the masks of cases, exact and coarse, and the positions of a token grid that are coded under each.

No tokenizer is needed: masks do not depend on one, and the positions on its patch alone. A row is printed
as it is done, and the JSON written after each::

    python benchmarks/codec/masks.py scans/ more/ --split-file benchmarks/evidence/brats_13_3_7.json --output masks.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from vaevq_med.codec.case import coded_slices
from vaevq_med.codec.geometry import live_positions
from vaevq_med.codec.masks import CELLS, covering, encode_masks
from vaevq_med.core.files import atomic_write_text
from vaevq_med.images.foreground import foreground
from vaevq_med.prepare.recipes import Recipe
from vaevq_med.prepare.volumes.case import Case
from vaevq_med.prepare.volumes.find import find_cases
from vaevq_med.prepare.volumes.reading import CaseReader


def row_of(case: Case, recipe: Recipe, patches: list[int], cells: dict[str, int]) -> dict[str, Any]:
    reader = CaseReader(recipe)
    masks = [foreground(reader.contrast(case.images[name]).stack).numpy() for name in recipe.modalities]
    row: dict[str, Any] = {"case": case.name, "voxels": int(sum(mask.size for mask in masks))}
    for name, cell in cells.items():
        covers = [covering(mask, cell) for mask in masks]
        live = {}
        for patch in patches:
            slices = coded_slices(covers)
            found = [
                live_positions(c[slices], size=recipe.size, patch=patch, interpolation=recipe.interpolation)
                for c in covers
            ]
            live[str(patch)] = int(sum(np.count_nonzero(one) for one in found))
        row[name] = {
            "bytes": len(encode_masks(covers, cell)[0]),
            "covered": int(sum(np.count_nonzero(cover) for cover in covers)),
            "positions_by_patch": live,
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, nargs="+", help="folders of cases")
    parser.add_argument("--split-file", type=Path, help="JSON of patients and their splits; by default all are taken")
    parser.add_argument("--split", default="test")
    parser.add_argument("--patches", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--cells", type=int, nargs="*", default=[], help="further sides of cells")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    recipe = Recipe.load("brats24/axial_256")
    splits = None if args.split_file is None else json.loads(args.split_file.read_text())
    cases = [case for folder in args.input for case in find_cases(folder, recipe.modalities).units]
    cells = {**CELLS, **{f"cells_of_{cell}": cell for cell in args.cells}}
    rows = []
    for case in cases:
        if splits is not None and splits.get(case.patient) != args.split:
            continue
        rows.append(row_of(case, recipe, args.patches, cells))
        print(json.dumps(rows[-1]), flush=True)
        means = {
            name: {
                "bytes": round(float(np.mean([row[name]["bytes"] for row in rows]))),
                "positions_by_patch": {
                    str(patch): round(float(np.mean([row[name]["positions_by_patch"][str(patch)] for row in rows])))
                    for patch in args.patches
                },
            }
            for name in cells
        }
        command = "python benchmarks/codec/masks.py INPUT --split-file benchmarks/evidence/brats_13_3_7.json"
        told = {"command": command, "cases": len(rows), "mean_of_a_case": means, "rows": rows}
        atomic_write_text(args.output, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
