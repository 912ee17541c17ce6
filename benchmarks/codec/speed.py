"""Seconds and memory of compressing and decompressing one case, and the network's share of them.

``compress`` and ``decompress`` run as a user runs them, each in a process of its own, on so many cores; the memory is
the largest that the process and its workers held together, seen every 20 ms. What the report says of the network's
share is of the work alone, without the start of Python and its imports::

    python benchmarks/codec/speed.py scans/BraTS-GLI-00005-100 --checkpoint best.pt --workers 1 2 --output speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from vaevq_med.codec.case import read_description
from vaevq_med.core.files import atomic_write_text


def measured(words: Sequence[object], workers: int) -> dict[str, float]:
    """A command's wall-clock seconds, the seconds of the processor that it had, and its memory in MiB."""
    command = [sys.executable, "-m", "vaevq_med.cli.app", *map(str, words), "--workers", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(workers)}
    before = os.times()
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            try:
                held = sum(one.memory_info().rss for one in [watched, *watched.children(recursive=True)])
            except psutil.NoSuchProcess:
                continue
            peak = max(peak, held)
            time.sleep(0.02)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: exit code {process.returncode}")
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": round(seconds, 2), "processor_seconds": round(spent, 2), "peak_mib": round(peak / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", type=Path, help="folder of one case")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--coder", default="adaptive")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    model = [] if args.model is None else ["--model", args.model]
    rows: list[dict[str, Any]] = []
    described: dict[str, Any] = {}
    for workers in args.workers:
        with tempfile.TemporaryDirectory() as name:
            small, back = Path(name) / "small", Path(name) / "back"
            words = ["--checkpoint", args.checkpoint, *model]
            runs = {
                "compress": (small, ["compress", args.case, small, *words, "--coder", args.coder, "--any-contrast"]),
                "decompress": (back, ["decompress", small, back, *words]),
            }
            for command, (output, line) in runs.items():
                found = measured(line, workers)
                ((case, figures),) = json.loads((output / "report.json").read_text())["units"].items()
                share = round(figures["network_seconds"] / figures["seconds"], 3)
                told = {"work_seconds": figures["seconds"], "network_share": share}
                rows.append({"command": command, "workers": workers, **found, **told})
                print(json.dumps(rows[-1]), flush=True)
            content = (small / f"{case}.vvq").read_bytes()
            description = read_description("", content)
            described = {"case": case, "bytes": len(content), "shape": description["shape"]} | {
                "contrasts": len(description["contrasts"]),
                "tokenizer": description["tokenizer"],
            }
    load = [round(one, 1) for one in os.getloadavg()]
    told_all = {"coder": args.coder, **described, "cores": os.cpu_count(), "load_at_the_end": load, "rows": rows}
    atomic_write_text(args.output, json.dumps(told_all, indent=1) + "\n")


if __name__ == "__main__":
    main()
