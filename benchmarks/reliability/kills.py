"""Kill runs at random moments, go on, and compare with a run that nobody killed.

    python benchmarks/reliability/kills.py kills.json --folder work --trials 50 --seed 0

Each trial runs one command on small synthetic brains in a new folder, ends its whole process group with SIGKILL at a
moment drawn evenly between its first written file and its end, and then runs the same command again. Right is when
no file that the kill left is half (each is read whole by its kind; hidden temporaries do not count), the second run
ends with exit code 0, and what it leaves is what the unbroken run left, to the bit. A row is printed and stored after
each trial.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.resources import bundle_path

COMMAND = [sys.executable, "-m", "vaevq_med.cli.app"]
SMALL = {
    "image_size": 32,
    "num_embeddings": 64,
    "embedding_dim": 8,
    "max_epochs": 12,
    "epoch_length": 10,
    "batch_size": 8,
    "num_workers": 0,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "val_max_items": 8,
    "checkpoint_interval": 5,
    "val_interval": 1,
    "tracking_uri": "none",
    "objective#adversarial": None,
    "objective#weights#perceptual": 0.0,
    **{
        f"network_def#{part}#{key}": value
        for part in ("encoder", "decoder")
        for key, value in {
            "num_channels": 8,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [],
            "z_channels": 16,
        }.items()
    },
}


@dataclass(frozen=True)
class Scenario:
    """A command that is killed.

    Attributes:
        name: for the table.
        command: takes the folder of the trial.
        result: what has to be the same in the end; takes that folder.
        share: how many of the trials are its own, of all shares.
    """

    name: str
    command: Callable[[Path], list[str]]
    result: Callable[[Path], Any]
    share: int


def _files(folder: Path) -> Iterator[Path]:
    """Every file that a reader would take for finished."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in parts):
            yield path


def _read(path: Path) -> None:
    """Read a file whole by its kind; raises where it is half."""
    suffix = path.suffix
    if suffix == ".png":
        Image.open(path).load()
    elif suffix == ".npy":
        np.load(path, allow_pickle=False)
    elif suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                arrays[name]
    elif suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif suffix == ".pt":
        torch.load(path, map_location="cpu", weights_only=True)
    elif suffix in (".csv", ".jsonl") and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        raise ValueError("the last line is half")


def half_files(folder: Path) -> list[str]:
    """Files that cannot be read whole, with the reason."""
    found = []
    for path in _files(folder):
        try:
            _read(path)
        except Exception as error:  # whatever a half file makes its reader raise
            found.append(f"{path.relative_to(folder)}: {type(error).__name__}: {error}"[:200])
    return found


def _bytes_of(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """The hash of every finished file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in _files(folder)
        if path.name not in without
    }


def _tensors_of(value: Any) -> Any:
    """Tensors as hashes, so that nested states can be compared as JSON."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(
            value.contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        ).hexdigest()
    if isinstance(value, dict):
        return {str(key): _tensors_of(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_tensors_of(part) for part in value]
    return value


def _training_state(folder: Path) -> dict[str, Any]:
    """The last checkpoint, without its configuration, which names folders, and without what says how long it took."""
    state = torch.load(folder / "run" / "checkpoints" / "last.pt", map_location="cpu", weights_only=True)
    return _tensors_of({key: value for key, value in state.items() if key not in ("config", "extra")})


def _study_state(folder: Path) -> list[dict[str, str]]:
    """The rows of a study's table, without what a machine at other work changes."""
    with (folder / "study" / "table.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        del row["images_per_second"], row["peak_memory_bytes"]
    return rows


def scenarios(base: Path) -> list[Scenario]:
    """What is killed; ``base`` holds the inputs."""
    bundle = bundle_path("brats")
    training = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file"]
    training += [str([str(bundle / "train.json"), str(base / "small.json")]), "--dataset_dir", str(base / "slices")]
    return [
        Scenario(
            "training",
            lambda folder: [*training, "--output_dir", str(folder / "run")],
            _training_state,
            5,
        ),
        Scenario(
            "slice-extract",
            lambda folder: [*COMMAND, "slice-extract", str(base / "cases"), str(folder / "slices"), "--size", "64"],
            lambda folder: _bytes_of(folder / "slices", without=("report.json",)),
            4,
        ),
        Scenario(
            "encode-tokens",
            lambda folder: [
                *(*COMMAND, "encode-tokens", str(base / "run" / "checkpoints" / "best.pt")),
                *(str(base / "slices"), str(folder / "tokens"), "--batch-size", "8"),
            ],
            lambda folder: _bytes_of(folder / "tokens", without=("report.json",)),
            3,
        ),
        Scenario(
            "study",
            lambda folder: [*COMMAND, "study", str(base / "study.yaml"), "--set", f"output={folder / 'study'}"],
            _study_state,
            3,
        ),
    ]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True, env=_environment())


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else ""


def _run(command: list[str], log: Path) -> int:
    return _start(command, log).wait()


def prepare(base: Path) -> None:
    """Inputs of all scenarios: brains, slices, a trained tokenizer and a study file."""
    log = base / "prepare.log"
    base.mkdir(parents=True, exist_ok=True)
    small = {**SMALL}
    (base / "small.json").write_text(json.dumps(small))
    settings = {**small, "max_epochs": 3, "objective#adversarial": None}
    settings.pop("tracking_uri")
    settings.pop("epoch_length")
    settings.pop("max_epochs")
    study = {
        "study": "tokenizers",
        "name": "kills",
        "bundle": "brats",
        "output": "study",
        "dataset_dir": str(base / "slices"),
        "tracking_uri": "none",
        "seeds": [0],
        "budget": {"steps": 20},
        "set": {**settings, "split": "validation", "max_items": 16},
        "methods": ["coherent", "simvq"],
    }
    (base / "study.yaml").write_text(json.dumps(study))
    commands = []
    if not (base / "cases").exists():
        commands.append([*COMMAND, "phantom", str(base / "cases"), "--subjects", "6", "--shape", "45,54,45"])
    commands.append([*COMMAND, "slice-extract", str(base / "cases"), str(base / "slices"), "--size", "32"])
    commands.append(scenarios(base)[0].command(base))
    for command in commands:
        if _run(command, log):
            raise SystemExit(f"the preparation ended with an error: {_tail(log)}")


def _wait_for_a_file(process: subprocess.Popen[bytes], folder: Path, log: Path) -> None:
    while process.poll() is None and not any(path != log for path in folder.rglob("*")):
        time.sleep(0.02)


def unbroken(scenario: Scenario, folder: Path) -> tuple[float, Any]:
    """Run without a kill; the seconds from its first file to its end, and what it left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    process = _start(scenario.command(folder), log)
    _wait_for_a_file(process, folder, log)
    start = time.monotonic()
    if process.wait():
        raise SystemExit(f"{scenario.name}: the unbroken run ended with {process.returncode}: {_tail(log)}")
    return time.monotonic() - start, scenario.result(folder)


def trial(scenario: Scenario, folder: Path, seconds: float, expected: Any) -> dict[str, Any] | None:
    """Kill so many seconds after the first file, run again, compare; None where the run had ended before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    process = _start(scenario.command(folder), log)
    _wait_for_a_file(process, folder, log)
    try:
        process.wait(seconds)
        return None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    row: dict[str, Any] = {"scenario": scenario.name, "seconds_after_the_first_file": round(seconds, 2)}
    row["files"] = sum(1 for _ in _files(folder))
    row["half"] = half_files(folder)
    row["exit_code"] = _run(scenario.command(folder), log)
    row["half_in_the_end"] = half_files(folder)
    row["equal"] = row["exit_code"] == 0 and scenario.result(folder) == expected
    row["right"] = row["equal"] and not row["half"] and not row["half_in_the_end"]
    if not row["right"]:
        row["said"] = _tail(log)
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON of the rows")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs write")
    parser.add_argument("--trials", type=int, default=50, help="kills in all (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", help="one scenario")
    arguments = parser.parse_args()
    base = arguments.folder.resolve() / "base"
    prepare(base)
    chosen = [scenario for scenario in scenarios(base) if arguments.only in (None, scenario.name)]
    draw = random.Random(arguments.seed)
    shares = sum(scenario.share for scenario in chosen)
    rows: list[dict[str, Any]] = []
    for scenario in chosen:
        seconds, expected = unbroken(scenario, arguments.folder / scenario.name / "unbroken")
        print(f"{scenario.name}: {seconds:.1f} s from the first file to the end", flush=True)
        wanted = round(arguments.trials * scenario.share / shares)
        done = 0
        while done < wanted:
            folder = arguments.folder / scenario.name / str(done)
            row = trial(scenario, folder, draw.uniform(0, seconds), expected)
            if row is None:
                continue
            done += 1
            rows.append(row)
            print(json.dumps(row), flush=True)
            atomic_write_text(arguments.output, json.dumps({"seed": arguments.seed, "rows": rows}, indent=1) + "\n")
            if row["right"]:
                shutil.rmtree(folder)
    right = sum(row["right"] for row in rows)
    print(f"{len(rows)} runs killed and taken up again: {right} right")
    sys.exit(right != len(rows))


if __name__ == "__main__":
    main()
