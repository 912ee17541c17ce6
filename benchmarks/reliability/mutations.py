"""Damage real files in many ways and see how the commands that read them end.

    python benchmarks/reliability/mutations.py mutations.json --folder work --trials 500 --seed 0

Each trial damages one file (a volume, a mask, a CSV file, a manifest, a checkpoint, a configuration), by its bytes or
by its meaning, and runs the command that reads it in a process of its own. Right is success, or one line and an exit
code; a traceback, a process that dies, takes more than a minute or more than 6 GiB is a fault. A traceback of MONAI's
parser, which reads a bundle's configuration before any code of the toolkit runs, is counted apart. ``--trial N`` shows
one again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import io
import json
import os
import random
import resource
import runpy
import shutil
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import vaevq_med.cli.app
from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.resources import bundle_path

LIMIT_SECONDS = 60
LIMIT_BYTES = 6 * 2**30
ODD: list[Any] = [
    *(None, "", " ", -1, 0, 1, 2**63, -(2**40), 1e308, -1e-300, float("nan"), float("inf"), True, [], {}, [[]]),
    *({"a": 1}, "../../outside", "/etc/hostname", "a\nb", "é" * 40, "x" * 5000, "nan", "1e400", "$1/0", "@nothing"),
    *("%nothing", [None], [1, "a"]),
]
ODD_CELLS = [
    "",
    " ",
    "-1",
    "nan",
    "1e400",
    "../../outside",
    "/etc/hostname",
    'a"b',
    "é" * 40,
    "x" * 5000,
    "training",
    "\0",
    "a\nb",
    "0.5",
]


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip, cut, insert, zero, repeat or swap some bytes."""
    data = bytearray(content)
    kind = draw.choice(["flip", "flip", "cut", "insert", "zero", "repeat", "swap", "empty"])
    if kind == "empty" or not data:
        return b""
    at = draw.randrange(len(data))
    length = min(draw.choice([1, 4, 64, 4096]), len(data) - at)
    if kind == "flip":
        for _ in range(draw.choice([1, 3, 30])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = draw.randbytes(length)
    elif kind == "zero":
        data[at : at + length] = bytes(length)
    elif kind == "repeat":
        data[at:at] = data[at : at + length]
    else:
        other = draw.randrange(len(data) - length + 1)
        data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
    return bytes(data)


# Offset and struct format of what a NIfTI-1 header holds that a reader believes.
_HEADER = {
    **{"sizeof_hdr": (0, "<i"), "dim0": (40, "<h"), "dim1": (42, "<h"), "dim2": (44, "<h"), "dim3": (46, "<h")},
    **{"dim4": (48, "<h"), "datatype": (70, "<h"), "bitpix": (72, "<h"), "pixdim0": (76, "<f"), "pixdim1": (80, "<f")},
    **{"pixdim3": (88, "<f"), "vox_offset": (108, "<f"), "scl_slope": (112, "<f"), "scl_inter": (116, "<f")},
    **{"xyzt_units": (123, "<b"), "qform_code": (252, "<h"), "sform_code": (254, "<h"), "quatern_b": (256, "<f")},
    **{"qoffset_x": (268, "<f"), "srow_x0": (280, "<f"), "srow_y1": (300, "<f"), "srow_z2": (320, "<f")},
    "magic": (344, "<i"),
}


def damage_nifti(content: bytes, draw: random.Random) -> bytes:
    """Give one field of a gzipped NIfTI-1 header, or some voxels, another value."""
    data = bytearray(gzip.decompress(content))
    if draw.random() < 0.25:
        for _ in range(draw.choice([1, 100])):
            data[draw.randrange(352, len(data))] = draw.randrange(256)
    else:
        offset, form = _HEADER[draw.choice(sorted(_HEADER))]
        if form == "<f":
            values = [0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), 2.5]
        else:
            values = [0, 1, 2, -1, 3, 4, 7, 16, 64, 128, 511, 2048, 32767, -32768]
            values = [value if form != "<b" else value % 128 for value in values]
        struct.pack_into(form, data, offset, draw.choice(values))
    return gzip.compress(bytes(data), 1)


def damage_tree(tree: Any, draw: random.Random) -> Any:
    """Replace, remove, rename or repeat one node of nested dictionaries and lists."""
    tree = copy.deepcopy(tree)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(tree)
    # A manifest has thousands of entries and a few keys: every depth is as likely as any other.
    if not places or draw.random() < 0.02:
        return draw.choice(ODD)
    top = [place for place in places if place[0] is tree]
    node, key = draw.choice(top if draw.random() < 0.4 else places)
    kind = draw.choice(["replace", "replace", "replace", "remove", "rename", "repeat"])
    if kind == "remove":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        node[f"{key}s"] = node.pop(key)
    elif kind == "repeat" and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    else:
        node[key] = draw.choice(ODD)
    return tree


def damage_json(content: bytes, draw: random.Random) -> bytes:
    """Another value somewhere, or other bytes."""
    if draw.random() < 0.25:
        return damage_bytes(content, draw)
    return json.dumps(damage_tree(json.loads(content), draw)).encode()


def damage_csv(content: bytes, draw: random.Random) -> bytes:
    """Another cell, row, separator or encoding, or other bytes."""
    if draw.random() < 0.3:
        return damage_bytes(content, draw)
    rows = list(csv.reader(io.StringIO(content.decode())))
    row = draw.choice(rows)
    kind = draw.choice(["cell", "cell", "cell", "short", "long", "twice", "header", "separator", "encoding", "bom"])
    if kind == "cell":
        row[draw.randrange(len(row))] = draw.choice(ODD_CELLS)
    elif kind == "short":
        row.pop()
    elif kind == "long":
        row.append(draw.choice(ODD_CELLS))
    elif kind == "twice":
        rows.append(list(row))
    elif kind == "header":
        rows[0][draw.randrange(len(rows[0]))] = draw.choice([*ODD_CELLS, rows[0][0]])
    stream = io.StringIO()
    csv.writer(stream, delimiter=";" if kind == "separator" else ",").writerows(rows)
    if kind == "encoding":
        return stream.getvalue().encode("utf-16")
    return (b"\xef\xbb\xbf" if kind == "bom" else b"") + stream.getvalue().encode()


def damage_checkpoint(content: bytes, draw: random.Random) -> bytes:
    """Another value or tensor somewhere, or other bytes."""
    if draw.random() < 0.4:
        return damage_bytes(content, draw)
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    tensors: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            if isinstance(value, torch.Tensor):
                tensors.append((node, key))
            elif isinstance(value, dict | list):
                walk(value)

    if draw.random() < 0.5:
        walk(state)
        node, key = draw.choice(tensors)
        value = node[key]
        changed = [value.reshape(-1), value[None], value.double(), value.to(torch.int64), torch.zeros(0), "text", None]
        if value.is_floating_point():
            changed.append(torch.full_like(value, float("nan")))
        node[key] = draw.choice(changed)
    else:
        # Tensors are copied with everything else: a checkpoint of this size is small.
        state = damage_tree(state, draw)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class Target:
    """A file that is damaged, and the command that reads it.

    Attributes:
        name: for the table.
        kind: of the six of the issue.
        file: the file, below the folder of the trial.
        damage: how.
        command: its arguments, where the first is ``vaevq-med`` or ``monai.bundle``; takes the folder of the trial.
        inputs: what is copied into the folder of the trial first.
    """

    name: str
    kind: str
    file: str
    damage: Callable[[bytes, random.Random], bytes]
    command: Callable[[Path], list[str]]
    inputs: tuple[str, ...]


def targets(base: Path) -> list[Target]:
    """What is damaged; ``base`` holds whole inputs."""
    case = sorted(path.name for path in (base / "cases").iterdir() if path.is_dir())[0]
    slices, best = str(base / "slices"), str(base / "run" / "checkpoints" / "best.pt")

    def extract(*more: str) -> Callable[[Path], list[str]]:
        return lambda folder: [
            *(
                "vaevq-med",
                "slice-extract",
                str(folder / "cases"),
                str(folder / "out"),
                "--size",
                "32",
                "--workers",
                "1",
            ),
            *(part.replace("FOLDER", str(folder)) for part in more),
        ]

    def training(folder: Path, epochs: int = 1, length: int = 1) -> list[str]:
        files = [str(bundle_path("brats") / "train.json"), str(folder / "small.json")]
        return [
            *("monai.bundle", "run", "training", "--config_file", str(files), "--dataset_dir", str(folder / "slices")),
            *("--output_dir", str(folder / "run"), "--max_epochs", str(epochs)),
            *("--epoch_length", str(length), "--tracking_uri", "none"),
        ]

    def bytes_or_header(content: bytes, draw: random.Random) -> bytes:
        return (damage_bytes if draw.random() < 0.4 else damage_nifti)(content, draw)

    def overlay(content: bytes, draw: random.Random) -> bytes:
        # A bundle's configuration is MONAI's to parse: only what it says is damaged.
        return json.dumps(damage_tree(json.loads(content), draw)).encode()

    def encode(folder: Path, checkpoint: str | None = None, data: str | None = None) -> list[str]:
        return [
            *("vaevq-med", "encode-tokens", checkpoint or str(folder / "run" / "checkpoints" / "best.pt")),
            *(data or str(folder / "slices"), str(folder / "tokens")),
        ]

    def audit(folder: Path) -> list[str]:
        return ["vaevq-med", "audit-split", str(folder / "slices")]

    def study(folder: Path) -> list[str]:
        return ["vaevq-med", "study", str(folder / "study.yaml"), "--set", f"output={folder / 'study'}", "--dry-run"]

    volume, mask = (f"cases/{case}/{case}-{name}.nii.gz" for name in ("t1n", "seg"))
    cases, manifest = f"cases/{case}", "slices/dataset.json"
    weights, last = (f"run/checkpoints/{name}.pt" for name in ("best", "last"))
    listed = ("--cases", "FOLDER/cases.csv", "--label-map", "brats2024")
    dealt, chosen = ("--split-file", "FOLDER/split.csv"), ("--recipe", "FOLDER/recipe.json")
    resumed = partial(training, epochs=13, length=10)
    return [
        Target("volume", "volumes", volume, bytes_or_header, extract(), (cases,)),
        Target("mask", "masks", mask, bytes_or_header, extract(), (cases,)),
        Target("cases.csv", "CSV", "cases.csv", damage_csv, extract(*listed), ("cases.csv", cases)),
        Target("split.csv", "CSV", "split.csv", damage_csv, extract(*dealt), ("split.csv", cases)),
        Target("dataset.json, audit", "manifests", manifest, damage_json, audit, ("slices",)),
        Target(
            "dataset.json, encode", "manifests", manifest, damage_json, partial(encode, checkpoint=best), ("slices",)
        ),
        Target("dataset.json, training", "manifests", manifest, damage_json, training, ("slices", "small.json")),
        Target(
            "checkpoint, encode", "checkpoints", weights, damage_checkpoint, partial(encode, data=slices), (weights,)
        ),
        Target("checkpoint, resume", "checkpoints", last, damage_checkpoint, resumed, ("run", "slices", "small.json")),
        Target("overlay", "configurations", "small.json", overlay, training, ("slices", "small.json")),
        Target("recipe", "configurations", "recipe.json", damage_json, extract(*chosen), ("recipe.json", cases)),
        Target("study", "configurations", "study.yaml", damage_json, study, ("study.yaml",)),
    ]


def run(command: list[str], log: Path) -> tuple[int, float]:
    """Run a command in a fork of this process, which has imported everything; its exit status and seconds."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(output, number)
            os.chdir(log.parent)
            os.setsid()
            resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
            signal.alarm(LIMIT_SECONDS)
            sys.argv = command
            try:
                if command[0] == "monai.bundle":
                    runpy.run_module("monai.bundle", run_name="__main__")
                else:
                    vaevq_med.cli.app.main()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start


def _lines(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()]


def _is_of_monai(row: dict[str, Any]) -> bool:
    return bool(row.get("traceback_of_monai"))


def trial(target: Target, base: Path, folder: Path, seed: str) -> dict[str, Any]:
    """Damage, run and judge; the folder stays where it is a fault."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in target.inputs:
        source, copied = base / name, folder / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copied)
        else:
            shutil.copy(source, copied)
    damaged = target.damage((base / target.file).read_bytes(), random.Random(seed))
    (folder / target.file).unlink(missing_ok=True)
    (folder / target.file).write_bytes(damaged)
    log = folder / "log.txt"
    code, seconds = run(target.command(folder), log)
    lines = _lines(log)
    said = [line for line in lines if line.startswith("vaevq-med: ")]
    traceback = any(line.startswith("Traceback (most recent call last)") for line in lines)
    usage = any("Usage:" in line for line in lines)
    right = not traceback and (code == 0 or (code in (1, 2) and (bool(said) or usage or code == 1)))
    # MONAI resolves references and expressions before any code of the toolkit runs.
    outside = traceback and not any("/vaevq_med/" in line for line in lines if line.lstrip().startswith("File "))
    right = right or outside
    row: dict[str, Any] = {"target": target.name, "kind": target.kind, "seed": seed, "exit_code": code}
    row |= {"traceback_of_monai": True} if outside else {}
    row |= {"seconds": round(seconds, 1), "right": right}
    if code or not right:
        row["said"] = (said or lines or [""])[-1][-400:]
    if right:
        shutil.rmtree(folder)
    return row


def make_inputs(base: Path) -> None:
    """CSV files and a recipe beside what ``kills.py`` prepared."""
    cases = sorted(path for path in (base / "cases").iterdir() if path.is_dir())
    case = cases[0].name
    names = ("t1n", "t1c", "t2w", "t2f", "seg")
    rows = [("case", "patient", *names), (case, "P1", *(f"{case}/{case}-{name}.nii.gz" for name in names))]
    with (base / "cases.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    with (base / "split.csv").open("w", newline="") as stream:
        patients = sorted({path.name.rsplit("-", 1)[0] for path in cases})
        splits = ("training", "validation", "test")
        csv.writer(stream).writerows([("patient", "split"), *((p, splits[n % 3]) for n, p in enumerate(patients))])
    recipe = json.loads((base / "slices" / "recipe.json").read_text())
    (base / "recipe.json").write_text(json.dumps(recipe))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON of the rows")
    parser.add_argument("--folder", type=Path, required=True, help="of kills.py, whose inputs are damaged")
    parser.add_argument("--trials", type=int, default=500, help="in all (default 500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", type=int, help="this one alone, and show what it said")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "COLUMNS": "200"}
    torch.set_num_threads(1)
    import monai.bundle  # noqa: F401  imported once, before the forks

    import vaevq_med.prepare.volumes.slices
    import vaevq_med.tokens.encode
    import vaevq_med.training.tokenizer  # noqa: F401

    base = arguments.folder.resolve() / "base"
    make_inputs(base)
    chosen = targets(base)
    rows: list[dict[str, Any]] = []
    for target in chosen:  # a whole file has to end well, else a trial says nothing
        whole = Target(target.name, target.kind, target.file, lambda c, d: c, target.command, target.inputs)
        row = trial(whole, base, base.parent / "mutations" / "whole", "")
        if row["exit_code"]:
            raise SystemExit(f"{target.name}: the whole file ends with {row['exit_code']}: {row.get('said')}")
    for number in range(arguments.trials) if arguments.trial is None else [arguments.trial]:
        target = chosen[number % len(chosen)]
        folder = base.parent / "mutations" / str(number)
        row = {"trial": number, **trial(target, base, folder, f"{arguments.seed}-{number}")}
        rows.append(row)
        if not row["right"] or arguments.trial is not None:
            print(json.dumps(row), flush=True)
        atomic_write_text(arguments.output, json.dumps({"seed": arguments.seed, "rows": rows}, indent=1) + "\n")
    for kind, count in Counter(row["kind"] for row in rows).items():
        mine = [row for row in rows if row["kind"] == kind]
        wrong = sum(not row["right"] for row in mine)
        read, outside = (sum(map(test, mine)) for test in (lambda row: not row["exit_code"], _is_of_monai))
        print(f"{kind}: {count} damaged, {read} read, {outside} refused by MONAI's parser, {wrong} faults")
    sys.exit(any(not row["right"] for row in rows))


if __name__ == "__main__":
    main()
