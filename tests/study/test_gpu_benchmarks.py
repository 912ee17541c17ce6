"""``benchmarks/gpu`` on a CPU: what it measures, and that nothing of it is lost when it is cut off."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

FOLDER = ROOT / "benchmarks" / "gpu"
MISSING = ("mlflow", "SimpleITK", "nilearn")
BLOCK = f"""
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a machine that lacks what training, evaluating and encoding do not need."""
    block = tmp_path / "block"
    block.mkdir()
    (block / "sitecustomize.py").write_text(BLOCK)
    return {**os.environ, "PYTHONPATH": str(block), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of the folder as its neighbours do."""
    for folder in (FOLDER.parent, FOLDER):
        monkeypatch.syspath_prepend(str(folder))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(FOLDER / "check.py"), "--small", "--device", "cpu", *map(str, arguments)]


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {line["part"]: line for line in json.loads((folder / "check.json").read_text())["lines"]}


@pytest.mark.slow
def test_the_job_runs_on_slices_without_what_it_does_not_need(tmp_path: Path, environment: dict[str, str]) -> None:
    """Trains, resumes, evaluates, encodes, trains both generators and samples; and it knows its figures."""
    images = np.random.default_rng(0).integers(0, 256, (8, 1, 64, 64), dtype=np.uint8)
    names = {f"training_{key}": np.array(["a"] * 8) for key in ("modality", "patient")}
    np.savez_compressed(tmp_path / "slices.npz", training=images, **names)
    wanted = ("--only", "machine", "job", "step", "--data", tmp_path / "slices.npz", "--output", tmp_path)
    run = subprocess.run(command(*wanted), env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    lines = lines_of(tmp_path)
    assert not {name: line["error"] for name, line in lines.items() if "error" in line}
    # On a CPU a resumed run goes on to the bit.
    assert lines["job: resume"]["losses"] == lines["job: train"]["losses"][2:]
    assert lines["job: resume"]["largest_relative_difference"] == 0
    assert len(set(lines["job: train"]["losses"])) == 4
    assert lines["job: encode indices"]["shape"] == [16, 16, 1]
    assert lines["job: encode latents"]["shape"] == [16, 16, 16]
    for name in ("LlamaGen-B", "LDM-4"):
        assert len(lines[f"job: train {name}"]["losses"]) == 3
        assert lines[f"job: sample {name}"]["finite"]
    assert 0 < lines["job: evaluate"]["psnr"] < 100
    parts = [line for name, line in lines.items() if "share_of_step" in line]
    assert sum(line["share_of_step"] for line in parts) == pytest.approx(1)
    # Nothing but the search's own path for the CPU.
    waits = lines["step: synchronizations"]["lines"]
    assert all(line.startswith("networks/quantizers/nearest.py:") for line in waits), waits
    assert "| step: encoder |" in run.stdout
    assert "not judged" in run.stdout
    assert " met |" not in run.stdout


def test_a_killed_run_leaves_what_it_had(tmp_path: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(command("--output", tmp_path), env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert first.startswith("machine: ")
    record = json.loads((tmp_path / "check.json").read_text())
    assert [line["part"] for line in record["lines"]] == ["machine"]
    assert record["small"]


def test_no_part_starts_when_the_time_is_up(tmp_path: Path, environment: dict[str, str]) -> None:
    run = subprocess.run(
        command("--seconds", 1, "--output", tmp_path), env=environment, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    lines = lines_of(tmp_path)
    assert set(lines) == {*"machine job training step search sampling evaluation compiled end".split()}
    assert all(line["skipped"] == "the time is up" for name, line in lines.items() if name != "end")


def test_an_error_and_a_part_that_takes_too_long_are_lines(tmp_path: Path, module: Any) -> None:
    """And the parts after them run."""
    record_module = module("_record")
    record = record_module.Record(tmp_path / "r.json", record_module.process_age() + 600, {})

    def fails() -> None:
        raise RuntimeError("CUDA error:\n  an illegal memory access")

    def hangs() -> None:
        try:
            time.sleep(200)
        except Exception:  # as a library might
            time.sleep(200)

    # Somebody else's alarm, such as that of pytest-timeout, is still there afterwards.
    before, alarm = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    signal.setitimer(signal.ITIMER_REAL, alarm or 200)
    started = time.monotonic()
    assert not record.run("fails", fails, at_most=50, needs=0)
    assert not record.run("hangs", hangs, at_most=0.2, needs=0)
    assert not record.run("late", fails, at_most=5, needs=10**6)
    assert record.run("works", lambda: record.say("works", figure=1.5), at_most=50, needs=0)
    assert time.monotonic() - started < 100
    stored = {line["part"]: line for line in json.loads((tmp_path / "r.json").read_text())["lines"]}
    assert stored["fails"]["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert "in fails" in stored["fails"]["traceback"]
    assert stored["hangs"]["error"] == "cut off after 0 s"
    assert "it takes 1000000" in stored["late"]["skipped"]
    assert stored["works"]["figure"] == 1.5
    assert signal.getsignal(signal.SIGALRM) is before
    assert (alarm or 200) - 100 < signal.setitimer(signal.ITIMER_REAL, alarm)[0] <= (alarm or 200)


def test_goals_are_judged_on_a_gpu_alone(tmp_path: Path, module: Any) -> None:
    record_module, check = module("_record"), module("check")
    record = record_module.Record(tmp_path / "r.json", 10**6, {})
    record.say("training: default", images_a_second=90.0, share_of_bf16_rate=0.36)
    record.say("training: the authors' way, fp32", images_a_second=31.0, peak_gib=40.0)
    record.say("training: bf16, 8 at once", images_a_second=80.0, peak_gib=10.0)
    record.say("evaluation: bf16, batch 32", images_a_second=300.0)
    record.say("evaluation: bf16, batch 64", images_a_second=410.0)
    record.say("step: synchronizations", count=3)
    states = {line["part"]: (line["found"], line["state"]) for line in check.goals(record, judged=True)}
    assert states["training step of the default, share of the bf16 rate"] == (0.36, "met")
    assert states["evaluation, images/s"] == (410.0, "met")
    assert states["training, images/s over the authors' way"] == (pytest.approx(90 / 31), "not met")
    assert states["training, 8 at once, memory over the authors' way"] == (0.25, "met")
    assert states["synchronizations in a step"] == (3, "not met")
    assert states["LlamaGen-B at batch 1, share of the memory's bound"] == (None, "not measured")
    assert not any(line["state"] in ("met", "not met") for line in check.goals(record, judged=False))


def test_what_waits_for_a_gpu_is_counted_with_its_line(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU by the calls, on a GPU by torch's warnings; what does not wait is not counted."""
    step = module("_step")
    monkeypatch.setattr(step, "_PACKAGE", str(Path(__file__).parent))
    here = Path(__file__).name
    x = torch.ones(3)
    lines: Counter[str] = Counter()
    with step._counted(SimpleNamespace(on_gpu=False), lines):
        x.sum().item()
        x[x > 0]
        x[1:], x[torch.tensor([0])], x.add(1).relu()
    assert sum(lines.values()) == 2
    assert all(line.startswith(f"{here}:") for line in lines)

    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    lines.clear()
    with step._counted(SimpleNamespace(on_gpu=True), lines):
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert list(lines.values()) == [2]
    assert next(iter(lines)).startswith(f"{here}:")
    assert modes == ["warn", "default"]


def test_rows_of_a_study_have_the_steps_that_the_time_holds(module: Any) -> None:
    study = module("tokenizer_study")
    slow, fast = ({"setup": 5.0, "step": step, "evaluation": 5.0} for step in (0.5, 0.1))
    steps = study.steps_within([slow, fast], rows=5, parallel=2, seconds=300.0)
    waves = 3
    assert waves * (10 + 0.5 * steps) <= 0.9 * 300 < waves * (10 + 0.5 * (steps + 1))
    assert study.steps_within([slow], rows=5, parallel=1, seconds=20.0) == 0


def test_the_archives_stay_small(tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package without its tests, and an error in place of more than the limit."""
    packing = module("_pack")
    monkeypatch.setattr(packing, "PACKAGES", ("termcolor",))
    monkeypatch.setattr(packing, "LIMIT", 1)
    with pytest.raises(SystemExit, match="expected at most"):
        packing.pack(tmp_path)
    monkeypatch.setattr(packing, "PACKAGES", ("no-such-package",))
    with pytest.raises(SystemExit, match="no-such-package"):
        packing.pack(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seconds", 0), "--seconds: found 0, expected more than 0"),
        (("--data", "nowhere.npz"), "--data: found no file nowhere.npz"),
        (("--only", "everything"), "invalid choice"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: tuple[object, ...],
    message: str,
    module: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check = module("check")
    monkeypatch.setattr(sys, "argv", ["check.py", *map(str, arguments)])
    with pytest.raises(SystemExit):
        check.arguments_of()
    assert message in capsys.readouterr().err
