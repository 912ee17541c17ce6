"""The main job on one GPU, in one process: train, resume, evaluate, encode, generate; and how fast all of that is.

Each line is printed when it is known, and the JSON file is written again after each, so that a run that is killed
leaves what it had. An error of a part is a line, and the next part follows; a part that takes too long is cut off::

    python benchmarks/gpu/check.py --seconds 480 --data slices.npz   # random blobs without --data
    python benchmarks/gpu/check.py --only machine training           # some parts alone
    python benchmarks/gpu/check.py --small                           # about a minute on a CPU
    python benchmarks/gpu/check.py --pack FOLDER                     # what a machine without a registry lacks
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from _measure import copied_bytes_per_second, hardware
from _record import Line, Record, cell, table
from _setting import Setting


def machine(setting: Setting) -> None:
    """The card, its memory, and its rates of bf16 products and of copies."""
    # A CPU without bf16 emulates it, a thousand times slower.
    size, dtype = (8192, torch.bfloat16) if setting.on_gpu else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=setting.device, dtype=dtype) for _ in range(2))
    setting.rate = None

    def products() -> None:
        for _ in range(10):
            a @ b

    rate = 10 * 2 * size**3 / setting.seconds_of(products)
    setting.copy_rate = copied_bytes_per_second(setting.device, 1024 if setting.on_gpu else 64, 5)
    figures: dict[str, Any] = {"gigabytes_a_second": setting.copy_rate / 1e9}
    if setting.on_gpu:
        setting.rate = rate
        figures |= {"bf16_tflops": rate / 1e12, "memory_gib": torch.cuda.mem_get_info()[1] / 2**30}
    else:
        figures |= {"fp32_tflops": rate / 1e12}
    setting.record.say("machine", hardware=hardware(setting.device), **figures)


def _machine_parts(setting: Setting) -> list[SimpleNamespace]:
    return [SimpleNamespace(name="machine", run=machine, at_most=30, needs=2)]


def _job_parts(setting: Setting) -> list[SimpleNamespace]:
    import _job

    return _job.PARTS


def _training_parts(setting: Setting) -> list[SimpleNamespace]:
    import _speed

    return [part for part in _speed.training_parts(setting) if "compiled" not in part.name]


def _step_parts(setting: Setting) -> list[SimpleNamespace]:
    import _step

    return _step.PARTS


def _search_parts(setting: Setting) -> list[SimpleNamespace]:
    import _pieces

    return _pieces.SEARCH_PARTS


def _sampling_parts(setting: Setting) -> list[SimpleNamespace]:
    import _pieces

    return _pieces.sampling_parts(setting)


def _evaluation_parts(setting: Setting) -> list[SimpleNamespace]:
    import _speed

    return _speed.evaluation_parts(setting)


def _compiled_parts(setting: Setting) -> list[SimpleNamespace]:
    import _speed

    return [part for part in _speed.training_parts(setting) if "compiled" in part.name]


PARTS: dict[str, Callable[[Setting], list[SimpleNamespace]]] = {
    "machine": _machine_parts,
    "job": _job_parts,
    "training": _training_parts,
    "step": _step_parts,
    "search": _search_parts,
    "sampling": _sampling_parts,
    "evaluation": _evaluation_parts,
    "compiled": _compiled_parts,
}
"""What is run, in this order: first that it works, last what takes minutes before it says anything."""


def goals(record: Record, judged: bool) -> list[Line]:
    """Each goal with what was found, and whether it is met.

    Args:
        record: with its lines.
        judged: whether the goals are those of this machine and size; else the figures stand without a verdict.
    """
    find = record.find
    best = [
        line["images_a_second"]
        for line in record.lines
        if line["part"].startswith("evaluation: ") and "images_a_second" in line
    ]
    single, many = (find(f"sampling: LlamaGen-B, batch {batch}", "tokens_a_second") for batch in (1, 32))
    default, authors = (find(f"training: {name}", "images_a_second") for name in ("default", "the authors' way, fp32"))
    ours, theirs = (find(f"training: {name}", "peak_gib") for name in ("bf16, 8 at once", "the authors' way, fp32"))
    found: list[tuple[str, float | None, str, float, bool]] = [
        (
            "training step of the default, share of the bf16 rate",
            *(find("training: default", "share_of_bf16_rate"), "0.35 or more", 0.35, True),
        ),
        (
            "search and losses without a network, share of the step",
            *(find("step: sum of the parts", "share_of_search_and_losses"), "0.1 or less", 0.1, False),
        ),
        ("synchronizations in a step", find("step: synchronizations", "count"), "0", 0, False),
        ("evaluation, images/s", max(best, default=None), "400 or more", 400, True),
        (
            "LlamaGen-B at batch 1, share of the memory's bound",
            *(find("sampling: LlamaGen-B, batch 1", "share_of_memory_bound"), "0.5 or more", 0.5, True),
        ),
        (
            "LlamaGen-B at batch 32, tokens/s over batch 1",
            *(many / single if many and single else None, "20 or more", 20, True),
        ),
        (
            "training, images/s over the authors' way",
            *(default / authors if default and authors else None, "3 or more", 3, True),
        ),
        (
            "training, 8 at once, memory over the authors' way",
            *(ours / theirs if ours and theirs else None, "0.25 or less", 0.25, False),
        ),
    ]
    lines: list[Line] = []
    for name, value, wanted, limit, at_least in found:
        met = None if value is None else (value >= limit if at_least else value <= limit)
        state = "not measured" if met is None else "met" if met else "not met"
        state = state if judged or met is None else "not judged: the goals are for a GPU at full size"
        lines.append({"part": name, "goal": wanted, "found": value, "state": state})
    return lines


def report(record: Record) -> str:
    """A Markdown table a part, then the goals."""
    blocks = []
    for name in PARTS:
        lines = [line for line in record.lines if line["part"].split(":")[0] == name]
        if lines:
            blocks.append(f"## {name}\n\n{table(lines)}")
    rows = ["| goal | wanted | found | |", "| --- | ---: | ---: | --- |"]
    rows += [f"| {g['part']} | {g['goal']} | {cell(g['found'])} | {g['state']} |" for g in record.heading["goals"]]
    return "\n\n".join([*blocks, "## goals\n\n" + "\n".join(rows)])


def arguments_of() -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="when everything has to be over")
    parser.add_argument("--data", type=Path, help="packed slices (.npz) of tokenizer_study.py --pack; else blobs")
    parser.add_argument("--small", action="store_true", help="64 pixels and small networks: for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder of check.json; by default $OUT, or the working directory")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="pack what a machine lacks, and stop")
    arguments = parser.parse_args()
    if arguments.seconds <= 0:
        parser.error(f"--seconds: found {arguments.seconds:g}, expected more than 0")
    if arguments.data is not None and not arguments.data.is_file():
        parser.error(f"--data: found no file {arguments.data}, expected one of tokenizer_study.py --pack")
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: found {arguments.device} without a CUDA device, expected cpu")
    return arguments


def main() -> None:
    """Run the parts, then print the tables."""
    arguments = arguments_of()
    if arguments.pack is not None:
        from _pack import pack

        pack(arguments.pack)
        return
    folder = arguments.output or Path(os.environ.get("OUT", "."))
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    heading = {"hardware": hardware(arguments.device), "small": arguments.small, "started": started, "goals": []}
    record = Record(folder / "check.json", arguments.seconds, heading)
    record.watch()
    setting = Setting(arguments, record)
    for name in arguments.only or PARTS:
        if record.remaining <= 0:
            record.say(name, skipped="the time is up")
            continue
        try:
            parts = PARTS[name](setting)
        except Exception as error:  # what a part imports is missing or broken
            record.say(name, error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
            continue
        for part in parts:
            run = functools.partial(part.run, setting)
            record.run(part.name, run, at_most=part.at_most, needs=part.needs)
            record.heading["goals"] = goals(record, judged=setting.on_gpu and not setting.small)
            record.store()
    record.say("end", lines=len(record.lines), seconds=record.elapsed)
    print("\n" + report(record), flush=True)


if __name__ == "__main__":
    main()
