"""Two processes of torchrun against one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from conftest import BUNDLE, OVERLAYS

SCRIPT = Path(__file__).with_name("ddp_gradients.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gradients(
    processes: int, overrides: dict[str, Any], overlays: list[str], output: Path, *, file: str = "train.json"
) -> dict[str, Any]:
    files = [str(BUNDLE / file), *(str(OVERLAYS / f"{name}.json") for name in overlays)]
    command = [sys.executable, str(SCRIPT), json.dumps([files, overrides, str(output)])]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
        command[1:1] = launcher
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # A thread of gloo's that outlives the interpreter aborts the process now and then.
    left = [Path(f"{output}.threads_of_{rank}").read_text().split("\n") for rank in range(processes)]
    assert [name for names in left for name in names if "gloo" in name] == []
    return torch.load(output, weights_only=True)


def run_in_two(script: ModuleType, folder: Path, *words: str) -> tuple[Any, Any]:
    """What each of two processes of a script saves in the folder."""
    command = [sys.executable, str(script.__file__)]
    running = [
        subprocess.Popen([*command, str(rank), str(folder), *words], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second
