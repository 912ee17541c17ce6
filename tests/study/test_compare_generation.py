"""``vaevq-med compare-generation`` at toy size; the rows run the real commands in this process, or stand-ins."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BUNDLE, OVERLAYS
from helpers.bundles import TOY, flags
from helpers.stores import write_checkpoint
from helpers.study_makers import make
from monai.bundle import ConfigWorkflow
from PIL import Image
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.study import rows as rows_module
from vaevq_med.study.command import RunStudy
from vaevq_med.study.published import load_published
from vaevq_med.trained.file import read_checkpoint
from vaevq_med.trained.network import StoredTokenizer

VQ = {"_target_": "vaevq_med.networks.quantizers.VectorQuantizer", "num_embeddings": 32, "embedding_dim": 4}
SOFTVQ = {"_target_": "vaevq_med.networks.quantizers.SoftVQ", "num_embeddings": 32, "embedding_dim": 4}
ENCODE = "--workers 0 --device cpu --no-flip"
TOY_OF = {"llamagen": "autoregressive", "maskgit": "autoregressive", "ldm": "diffusion", "flow": "diffusion"}
"""The key of :data:`TOY` of each generator that trains at toy size."""
GFID = {"vqgan_llamagen": 40.0, "vaevq_llamagen": 30.0, "vqgan_ldm": 20.0, "vaevq_ldm": 10.0}


def tiny(*generators: str) -> list[str]:
    """Overrides of toy size."""
    small = {"batch_size": 4, "micro_batch_size": "auto", "num_workers": 0, "precision": "fp32", "device": "cpu"}
    widths = [f"{name}:{key}={value}" for name in generators for key, value in TOY[TOY_OF[name]].items()]
    return [*(f"{key}={value}" for key, value in small.items()), *widths]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("tokenizers")
    vqgan, vaevq = write_checkpoint(root / "vqgan.pt", VQ), write_checkpoint(root / "vaevq.pt")
    return f"vqgan={vqgan},vaevq={vaevq}"


def step_of(command: list[str]) -> str:
    """The command's own name: ``encode-tokens``, ``training``, ``generating`` or ``evaluate-samples``."""
    return command[command.index("run") + 1] if "run" in command else command[3]


def row_of(command: list[str]) -> str:
    """Method and seed that a command of a row names."""
    if step_of(command) == "token-bits":
        return "/".join(Path(command[6]).parts[-3:-1])
    folder = Path(flags(command)["output_dir"]) if "run" in command else Path(command[4]).parent
    return "/".join(folder.parts[-2:])


class Real:
    """Runs the commands of rows in this process, and notes them."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], log: Path, on_line: Any) -> int:
        self.commands.append(command)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = self.execute(command)
        log.write_text(f"$ {shlex.join(command)}\n{said.getvalue()}done\n")
        return code

    def execute(self, command: list[str]) -> int:
        if "run" not in command:
            done = CliRunner().invoke(app, command[3:])
            if isinstance(done.exception, VaevqMedError):
                sys.stderr.write(f"vaevq-med: {done.exception}\n")
                return 2
            return done.exit_code
        values, run_id = flags(command), step_of(command)
        files = values.pop("config_file")
        kind = "train" if run_id == "training" else "infer"
        workflow = ConfigWorkflow(config_file=files, run_id=run_id, workflow_type=kind, **values)
        try:
            workflow.initialize()
            workflow.run()
        except SystemExit as stopped:
            return int(stopped.code or 0)
        workflow.finalize()
        return 0

    def steps(self) -> list[str]:
        return [step_of(command) for command in self.commands]


class Faked(Real):
    """Encodes; trains, draws and evaluates by writing what the commands write. A seed adds its number to gFID."""

    fail = ""
    interrupt_at = 0

    def execute(self, command: list[str]) -> int:
        if len(self.commands) == self.interrupt_at:
            raise KeyboardInterrupt
        step = step_of(command)
        if step == "encode-tokens":
            return super().execute(command)
        method, _, seed = row_of(command).partition("/seed_")
        if step == "training":
            folder = Path(flags(command)["output_dir"])
            if self.fail == method:
                sys.stderr.write("vaevq-med: iteration 3: found loss = nan, expected finite numbers\n")
                return 2
            (folder / "run.json").write_text('{"parameters": 2500000, "images_per_second": 8, "device": "cpu"}')
            (folder / "checkpoints").mkdir(exist_ok=True)
            (folder / "checkpoints" / "best.pt").touch()
        elif step == "generating":
            folder = Path(flags(command)["output_dir"]) / "generated"
            folder.mkdir(exist_ok=True)
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "000000.png")
            (folder / "samples.csv").write_text("file,number,label,name\n000000.png,0,1,t1c\n")
        elif step == "token-bits":
            Path(command[6]).write_text(json.dumps({"held_out_bits": 2.5 + int(seed), "likelihood": "bound"}))
        else:
            evaluation = Path(command[command.index("--output-dir") + 1])
            evaluation.mkdir(exist_ok=True)
            figures = {"gfid": {"value": GFID.get(method, 1.0) + int(seed)}, "precision": {"value": 0.5}}
            record = {
                "summary": {"overall": figures},
                "memorization": {"feature": {"share": 0.25}, "pixel": {"median": 0.1}},
                "provenance": {"n": 7, "n_reference": 16, "split": "training"},
                "conventions": {"gfid": "Frechet distance; biased upward at few images", "memorization": "near"},
            }
            (evaluation / "metrics.json").write_text(json.dumps(record))
        return 0


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Faked:
    runner = Faked()
    monkeypatch.setattr(rows_module, "call", runner)
    return runner


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Real:
    runner = Real()
    monkeypatch.setattr(rows_module, "call", runner)
    return runner


@pytest.fixture
def command(tokenizers: str, slice_dataset: Path, tmp_path: Path) -> Callable[..., RunStudy]:
    """A comparison at toy size, untracked."""

    def run(**options: Any) -> RunStudy:
        generators = options.get("generators", "llamagen,ldm").split(",")
        names = [name for name in TOY_OF if name in generators]
        stepped = [name for name in names if name != "llamagen"]
        chosen: dict[str, Any] = {
            "output": tmp_path / "out",
            "tokenizers": "" if "source" in options else tokenizers,
            "dataset_dir": slice_dataset,
            "tracking_uri": "none",
            "steps": 2,
            "num_samples": 8,
            "encode": (ENCODE,),
            "evaluate": "--workers 0 --device cpu",
            "assignments": tiny(*names),
            "generate_set": ("device=cpu", *(f"{name}:num_steps=2" for name in stepped)),
            "pictures": 4,
        }
        return make("compare-generation", **{**chosen, **options})

    return run


def table_of(output: Path) -> dict[str, dict[str, str]]:
    with (output / "table.csv").open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def check_measured(cells: dict[str, str], folder: Path, kind: str) -> None:
    """A method's cells of the table are what its only row of 8 samples wrote into its folder."""
    record = json.loads((folder / "evaluation/metrics.json").read_text())
    for metric in ("gfid", "precision", "recall"):
        assert float(cells[metric]) == pytest.approx(record["summary"]["overall"][metric]["value"]), metric
    for space in ("feature", "pixel"):
        assert float(cells[f"memorized_{space}"]) == record["memorization"][space]["share"]
    assert float(cells["n"]) == 8
    drawing = json.loads((folder / "generated/drawing.json").read_text())
    for name in ("network_calls", "seconds_per_image"):
        assert float(cells[name]) == pytest.approx(drawing[name]) != 0, name
    if kind == "latents":
        assert not (folder / "token_bits.json").exists()
        assert cells["held_out_bits"] == ""
    else:
        bits = json.loads((folder / "token_bits.json").read_text())
        assert bits["provenance"]["split"] == "test"
        assert float(cells["held_out_bits"]) == bits["held_out_bits"]
        # K is 32, and two steps have hardly taught anything.
        assert bits["held_out_bits"] == pytest.approx(5, abs=0.6 if bits["likelihood"] == "bound" else 0.3)
    assert read_checkpoint(folder / "checkpoints" / "best.pt")["data"]["tokens"]["kind"] == kind
    assert len(list((folder / "generated").glob("0*.png"))) == 8


def test_a_comparison_from_tokenizers_to_the_table(
    real: Real, command: Callable[..., RunStudy], tokenizers: str, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    vaevq = tokenizers.split(",")[1]
    comparison = command(tokenizers=vaevq, tracking_uri=uri, published=True)
    report = comparison.run()
    assert [(state.row.label, state.status, state.detail) for state in report.states] == [
        ("vaevq_llamagen seed 0", "finished", ""),
        ("vaevq_ldm seed 0", "finished", ""),
    ]
    each = ["encode-tokens", "training", "generating", "evaluate-samples"]
    assert real.steps() == [*each, "token-bits", *each]
    out = tmp_path / "out"
    assert {path.name for path in report.files} == {
        *("table.md", "table.csv", "table.tex", "results.json", "samples.png")
    }
    table = table_of(out)
    assert [row["title"] for row in table.values()] == ["LlamaGen, VAEVQ", "LDM, VAEVQ"]
    for name, paper, kind in (("vaevq_llamagen", "4.42", "indices"), ("vaevq_ldm", "3.11", "latents")):
        check_measured(table[name], out / name / "seed_0", kind)
        assert table[name]["gfid_paper"] == paper
        assert float(table[name]["images_per_second"]) > 0
    assert "N = 8 samples of each, against 16 images of split training" in report.table
    assert "strongly biased" in report.table
    with Image.open(out / "samples.png") as picture:
        assert picture.size[0] > picture.size[1]  # two rows of four
    client = MlflowClient(uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == "vaevq_med brats generation")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("compare-generation vaevq_llamagen, vaevq_ldm")
    assert parent.data.metrics["vaevq_ldm/gfid"] == pytest.approx(float(table["vaevq_ldm"]["gfid"]))
    assert set(runs) == {"vaevq_llamagen seed 0", "vaevq_ldm seed 0"}
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    for name, row in table.items():
        for metric in ("gfid", "memorized_pixel"):
            logged = runs[f"{name} seed 0"].data.metrics[f"samples/{metric}"]
            assert logged == pytest.approx(float(row[metric])), metric
    # More samples are drawn beside those that are there; with other settings all are drawn again.
    folders = {name: out / name / "seed_0" / "generated" for name in table}
    before = {name: (folder / "000000.png").stat().st_mtime_ns for name, folder in folders.items()}
    real.commands.clear()
    sampling = ("device=cpu", "ldm:num_steps=3")
    again = command(tokenizers=vaevq, tracking_uri=uri, num_samples=10, generate_set=sampling).run()
    assert again.failed == []
    assert real.steps() == ["generating", "evaluate-samples", "token-bits", "generating", "evaluate-samples"]
    after = {name: (folder / "000000.png").stat().st_mtime_ns for name, folder in folders.items()}
    assert after["vaevq_llamagen"] == before["vaevq_llamagen"]
    assert after["vaevq_ldm"] > before["vaevq_ldm"]
    assert {len(list(folder.glob("0*.png"))) for folder in folders.values()} == {10}
    assert {row["n"] for row in table_of(out).values()} == {"10.0"}


def test_generators_of_overlays_are_drawn_and_measured(
    real: Real, command: Callable[..., RunStudy], tokenizers: str, tmp_path: Path
) -> None:
    report = command(tokenizers=tokenizers.split(",")[1], generators="maskgit,flow", pictures=0).run()
    assert report.failed == []
    each = ["encode-tokens", "training", "generating", "evaluate-samples"]
    assert real.steps() == [*each, "token-bits", *each]
    table = table_of(tmp_path / "out")
    assert [row["title"] for row in table.values()] == ["MaskGIT, VAEVQ", "Flow, VAEVQ"]
    for name, kind in (("vaevq_maskgit", "indices"), ("vaevq_flow", "latents")):
        check_measured(table[name], tmp_path / "out" / name / "seed_0", kind)
        assert float(table[name]["network_calls"]) == 2


def test_finished_rows_are_kept_and_a_failing_one_does_not_stop_the_others(
    faked: Faked, command: Callable[..., RunStudy], tmp_path: Path
) -> None:
    faked.fail = "vqgan_llamagen"
    report = command(seeds="0,1").run()
    status = {state.row.label: state.status for state in report.states}
    assert [label for label, found in status.items() if found == "failed"] == [
        "vqgan_llamagen seed 0",
        "vqgan_llamagen seed 1",
    ]
    assert [state.row.label for state in report.states][:4] == [f"{name} seed 0" for name in GFID]
    assert report.failed[0].detail == (
        "training ended with exit code 2: iteration 3: found loss = nan, expected finite numbers"
    )
    assert "Missing: vqgan_llamagen seed 0, vqgan_llamagen seed 1." in report.table.replace("\\_", "_")
    # Both generators over both tokenizers: four token stores, whatever the seeds.
    assert faked.steps().count("encode-tokens") == 4
    root = tmp_path / "out" / "tokens"
    stores = [path.parent.relative_to(root).as_posix() for path in root.rglob("tokens.json")]
    assert sorted(store.split("_")[0] for store in stores) == [
        f"{name}/{kind}" for name in ("vaevq", "vqgan") for kind in ("indices", "latents")
    ]

    faked.fail = ""
    faked.commands.clear()
    report = command(seeds="0,1").run()
    assert {row_of(line) for line in faked.commands} == {"vqgan_llamagen/seed_0", "vqgan_llamagen/seed_1"}
    assert faked.steps() == ["training", "generating", "evaluate-samples", "token-bits"] * 2
    # 40 and 41: mean 40.5, sample standard deviation sqrt(0.5).
    table = table_of(tmp_path / "out")
    assert float(table["vqgan_llamagen"]["gfid"]) == 40.5
    assert float(table["vqgan_llamagen"]["gfid_std"]) == pytest.approx(0.5**0.5)
    assert (table["vqgan_llamagen"]["held_out_bits"], table["vqgan_ldm"]["held_out_bits"]) == ("3.0", "")
    assert (table["vaevq_ldm"]["memorized_feature"], table["vaevq_ldm"]["parameters"]) == ("0.25", "2500000.0")
    assert "memorized_pixel" not in table["vaevq_ldm"]
    # The best of each generator is bold, and no other.
    assert [line.split("|")[2].strip() for line in report.table.splitlines()[2:6]] == [
        *("40.50 ± 0.71", "**30.50 ± 0.71**", "20.50 ± 0.71", "**10.50 ± 0.71**")
    ]
    at_most = "Bits per token: an upper bound of LlamaGen, VQGAN, LlamaGen, VAEVQ."
    for words in (at_most, "One tokenizer serves all seeds", "biased upward", "Bold: the best of each generator"):
        assert words in report.table
    assert "- Drawn with num_steps = 2 (LDM, VQGAN; LDM, VAEVQ)." in report.table.replace("\\_", "_")
    faked.commands.clear()
    assert {state.status for state in command(seeds="0,1").run().states} == {"kept"}
    assert faked.commands == []
    for changed, said in (
        ({"encode": ()}, "a row with encode.flip False, expected unset"),
        ({"assignments": [*tiny("llamagen", "ldm"), "max_grad_norm=2"]}, "set.max_grad_norm unset, expected 2"),
        ({"steps": 3}, "2 steps, expected 3 steps"),
    ):
        with pytest.raises(VaevqMedError, match=said) as refused:
            command(seeds="0,1", **changed).run()
        assert "\n" not in str(refused.value)


def test_other_samples_or_figures_need_no_other_training(
    faked: Faked, command: Callable[..., RunStudy], tmp_path: Path
) -> None:
    def steps(**options: Any) -> list[str]:
        faked.commands.clear()
        report = command(generators="llamagen", pictures=0, **options).run()
        assert report.failed == []
        return faked.steps()

    drawn, evaluated = ["generating", "evaluate-samples", "token-bits"], ["evaluate-samples", "token-bits"]
    faked.interrupt_at = 4  # encode, train, draw; evaluate
    with pytest.raises(KeyboardInterrupt):
        steps(evaluate="--neighbors 5")
    faked.interrupt_at = 0
    assert steps() == [*evaluated, "encode-tokens", "training", *drawn]
    assert steps(num_samples=9) == drawn * 2
    assert {flags(line)["overwrite"] for line in faked.commands if step_of(line) == "generating"} == {True}
    assert steps(num_samples=9, generate_set=("vaevq:top_k=5",)) == drawn
    assert steps(num_samples=9, generate_set=("device=cpu", "vaevq:top_k=5")) == []
    own = {"num_samples": 9, "generate_set": ("vaevq:top_k=5",)}
    assert steps(**own, evaluate="--neighbors 2 --workers 0") == evaluated * 2
    assert steps(**own, evaluate="--workers 2 --device cpu --batch-size 8 --neighbors 2") == []
    row = tmp_path / "out/vqgan_llamagen/seed_0"
    shutil.rmtree(row / "evaluation")
    assert steps(**own, evaluate="--neighbors 2") == evaluated
    # A checkpoint that is gone is trained again, with all that follows from it.
    (row / "checkpoints/best.pt").unlink()
    shutil.rmtree(row / "evaluation")
    assert steps(**own, evaluate="--neighbors 2") == ["training", *drawn]
    record = json.loads((tmp_path / "out/comparison.json").read_text())["shared"]
    assert (record["num_samples"], record["evaluate"]) == (9, {"neighbors": 2})
    with pytest.raises(VaevqMedError, match="max_grad_norm unset, expected 2"):
        steps(**own, assignments=[*tiny("llamagen"), "max_grad_norm=2"])
    assert faked.commands == []


def test_the_reason_of_a_failure_is_not_the_frame_around_it(tmp_path: Path) -> None:
    log = tmp_path / "evaluating.log"
    done = CliRunner().invoke(app, ["evaluate-samples", "a", "b", "--output-dir", "c", "--bogus"])
    assert done.exit_code == 2
    log.write_text(f"$ vaevq-med evaluate-samples\n{done.output}")
    assert rows_module.error_line(log) == "No such option: --bogus"
    log.write_text("╭─ Error ─╮\n│ No such option: --bogus │\n╰─────────╯\n")
    assert rows_module.error_line(log) == "No such option: --bogus"


def test_a_tokenizer_that_rows_cannot_use_is_found_before_they_are_trained(
    command: Callable[..., RunStudy], tmp_path: Path
) -> None:
    def said(path: Path) -> str:
        with pytest.raises(VaevqMedError) as refused:
            command(tokenizers=f"a={path}").dry_run()
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    text = tmp_path / "text.pt"
    text.write_text("no checkpoint")
    assert "expected a checkpoint" in said(text)
    generator = read_checkpoint(write_checkpoint(tmp_path / "generator.pt"))
    generator["config"] = json.dumps({"network_def": {"_target_": "vaevq_med.networks.LlamaGen"}, "in_channels": 1})
    torch.save(generator, tmp_path / "generator.pt")
    assert "found a checkpoint of vaevq_med.networks.LlamaGen" in said(tmp_path / "generator.pt")
    stacked = write_checkpoint(tmp_path / "stacked.pt", in_channels=3, stack_modalities=True)
    assert "found a tokenizer of 3 stacked contrasts" in said(stacked)
    assert "found a tokenizer of 2 stacked contrasts" in said(write_checkpoint(tmp_path / "two.pt", in_channels=2))


def test_an_interrupted_comparison_goes_on(faked: Faked, command: Callable[..., RunStudy]) -> None:
    comparison = command(generators="llamagen")
    faked.interrupt_at = 7  # encode, train, draw, evaluate, count; encode, train
    with pytest.raises(KeyboardInterrupt):
        comparison.run()
    faked.interrupt_at = 0
    faked.commands.clear()
    assert [state.status for state in comparison.run().states] == ["kept", "finished"]
    assert faked.steps() == ["training", "generating", "evaluate-samples", "token-bits"]


def test_what_cannot_be_trained_is_a_reason_and_the_other_rows_go_on(
    real: Real, command: Callable[..., RunStudy], tmp_path: Path
) -> None:
    soft = write_checkpoint(tmp_path / "soft.pt", SOFTVQ)
    # 8 x 8 latents cannot be halved four times.
    deep = ("ldm:network_def#channel_mult=[1, 1, 1, 1, 1]",)
    comparison = command(tokenizers=f"soft={soft}", assignments=[*tiny("llamagen", "ldm"), *deep])
    indices, latents = comparison.run().failed
    assert indices.detail.startswith(f"encoding ended with exit code 2: {soft}: found SoftVQ with read-out 'soft'")
    assert latents.detail.startswith("training ended with exit code 2: ")
    assert "8x8" in latents.detail.replace(" ", "")
    assert real.steps() == ["encode-tokens", "encode-tokens", "training"]


def test_a_hard_read_out_for_one_tokenizer_makes_its_indices(
    faked: Faked, command: Callable[..., RunStudy], tokenizers: str, tmp_path: Path
) -> None:
    soft = write_checkpoint(tmp_path / "soft.pt", SOFTVQ)
    encode = (ENCODE, "soft: --readout hard")
    comparison = command(
        tokenizers=f"soft={soft},{tokenizers.split(',')[0]}", generators="llamagen", seeds="0,1", encode=encode
    )
    assert comparison.run().failed == []
    assert faked.steps().count("encode-tokens") == 2


def test_another_tokenizer_in_the_same_place_is_refused(
    faked: Faked, command: Callable[..., RunStudy], tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "a.pt")
    comparison = command(tokenizers=f"a={path}", generators="llamagen", pictures=0)
    assert comparison.run().failed == []
    before, after = StoredTokenizer(path).content_hash, StoredTokenizer(write_checkpoint(path, VQ)).content_hash
    with pytest.raises(VaevqMedError, match=f"found a row with tokenizer {before[:20]}") as refused:
        command(tokenizers=f"a={path}", generators="llamagen", pictures=0).run()
    assert after[:20] in str(refused.value)


def test_a_comparison_of_tokenizers_gives_each_seed_its_own(
    faked: Faked, command: Callable[..., RunStudy], tokenizers: str, tmp_path: Path
) -> None:
    source = tmp_path / "compared"
    sources = dict(part.split("=") for part in tokenizers.split(","))
    for seed, original in enumerate(("vqgan", "vaevq")):
        folder = source / "vqgan" / f"seed_{seed}" / "checkpoints"
        folder.mkdir(parents=True)
        shutil.copy(sources[original], folder / "last.pt")
    (source / "comparison.json").write_text('{"shared": {"checkpoint": "last"}}')
    comparison = command(source=source, methods="vqgan", generators="ldm", seeds="0,1", encode=())
    report = comparison.run()
    assert report.failed == []
    out = tmp_path / "out"
    for seed, original in enumerate(("vqgan", "vaevq")):
        header = json.loads((out / f"tokens/vqgan/seed_{seed}/latents/tokens.json").read_text())
        assert header["tokenizer"]["content_hash"] == StoredTokenizer(sources[original]).content_hash
    draws = [flags(line)["tokenizer_path"] for line in faked.commands if step_of(line) == "generating"]
    assert draws == [str(source / f"vqgan/seed_{seed}/checkpoints/last.pt") for seed in (0, 1)]
    assert "Each seed has a tokenizer of its own" in report.table
    with pytest.raises(VaevqMedError, match=r"tokenizer vqgan, seed 2: found no checkpoint"):
        command(source=source, methods="vqgan", seeds="2").dry_run()
    with pytest.raises(VaevqMedError, match="found no comparison in"):
        command(source=out / "tokens").dry_run()


def test_commands_are_those_of_the_documentation(
    command: Callable[..., RunStudy], tokenizers: str, tmp_path: Path
) -> None:
    options = {"launch": "torchrun --nproc_per_node=2", "checkpoint": "last", "overlays": ("small_cpu",)}
    sampling = ("device=cpu", "llamagen:top_k=5", "vqgan:guidance_scale=3")
    encode = ("--workers 0", "vaevq: --dtype float32", "llamagen:--ten-crop")
    comparison = command(**options, generate_set=sampling, seeds="3,4", encode=encode)
    rows = {row.label: row.commands("parent") for row in comparison.plan.rows()}
    commands = rows["vqgan_llamagen seed 3"]
    assert list(commands) == ["encoding", "training", "generating", "evaluating", "counting"]
    assert list(rows["vqgan_ldm seed 3"]) == ["encoding", "training", "generating", "evaluating"]
    row = tmp_path / "out/vqgan_llamagen/seed_3"
    assert commands["counting"][3:] == [
        *("token-bits", str(row / "checkpoints/last.pt"), commands["encoding"][6], str(row / "token_bits.json")),
        *("--overwrite", "--device", "cpu"),
    ]
    training = commands["training"]
    assert training[:2] == ["torchrun", "--nproc_per_node=2"]
    files = [str(BUNDLE / "train_autoregressive.json")]
    files += [str(OVERLAYS / f"generation/{n}.json") for n in ("autoregressive_small_cpu", "generator_multi_gpu")]
    values = flags(training)
    assert values["config_file"] == files
    assert (values["seed"], values["parent_run_id"], values["run_name"]) == (3, "parent", "vqgan_llamagen seed 3")
    assert values["network_def#width"] == 32
    assert "network_def#num_channels" not in values
    assert commands["generating"][:2] == [sys.executable, "-m"]
    drawing = flags(commands["generating"])
    assert (drawing["top_k"], drawing["guidance_scale"], drawing["num_samples"]) == (5, 3, 8)
    assert drawing["checkpoint_path"].endswith("/checkpoints/last.pt'")
    other = flags(rows["vaevq_ldm seed 4"]["generating"])
    assert "top_k" not in other
    assert "guidance_scale" not in other
    assert any("diffusion_small_cpu" in file for file in flags(rows["vaevq_ldm seed 4"]["training"])["config_file"])
    plain = rows["vqgan_ldm seed 3"]["encoding"]
    assert plain[3:] == [
        *("encode-tokens", tokenizers.split(",")[0].removeprefix("vqgan=")),
        *(str(comparison.study.dataset_dir), plain[6], "--kind", "latents", "--workers", "0"),
    ]
    assert commands["encoding"][-3:] == ["--ten-crop", "--workers", "0"]
    assert rows["vaevq_ldm seed 4"]["encoding"][-4:] == ["--dtype", "float32", "--workers", "0"]
    assert (
        plain[6] == rows["vqgan_ldm seed 4"]["encoding"][6] == flags(rows["vqgan_ldm seed 3"]["training"])["tokens_dir"]
    )
    # Stores of options that change what is stored are others.
    assert plain[6] == str(tmp_path / "out/tokens/vqgan/latents")
    assert commands["encoding"][6].startswith(str(tmp_path / "out/tokens/vqgan/indices_"))
    # The file that says it is this comparison.
    file = tmp_path / "study.yaml"
    file.write_text(comparison.study.text())
    done = CliRunner().invoke(app, ["study", str(file), "--dry-run"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line for line in lines if line.startswith("#")] == [f"# {label}" for label in rows]
    assert sum(" encode-tokens " in line for line in lines) == 4
    assert len(lines) == 8 + 4 + 3 * 8 + 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("encode", "counted"), [("--split training", False), ("--split test", True), ("", True)])
def test_bits_are_counted_where_test_images_are_encoded(
    command: Callable[..., RunStudy], slice_dataset: Path, tmp_path: Path, encode: str, counted: bool
) -> None:
    chosen = {"generators": "llamagen", "encode": (encode,)}
    rows = command(**chosen, generate_set=("weights=network", "device=cpu", "batch_size=4")).plan.rows()
    assert [("counting" in row.commands(), "counting" in row.outputs()) for row in rows] == [(counted, counted)] * 2
    if counted:
        told = ["--weights", "network", "--device", "cpu", "--batch-size", "4"]
        assert rows[0].commands()["counting"][-6:] == told
    without = tmp_path / "without"
    without.mkdir()
    content = json.loads((slice_dataset / "dataset.json").read_text())
    (without / "dataset.json").write_text(json.dumps({**content, "test": []}))
    for dataset, expected in ((without, False), (tmp_path / "not there yet", counted)):
        rows = command(**chosen, dataset_dir=dataset).plan.rows()
        assert {"counting" in row.commands() for row in rows} == {expected}


def test_a_value_may_name_the_tokenizer_and_the_seed_of_its_row(command: Callable[..., RunStudy]) -> None:
    assignments = ("coarse_to_fine:clusters=clusters/{tokenizer}_{seed}.npz", "num_clusters=8", "max_grad_norm=2")
    generators = {"generators": "llamagen,coarse_to_fine", "generate_set": (), "seeds": "3,4"}
    rows = command(**generators, assignments=assignments).plan.rows()
    found = {row.label: flags(row.commands()["training"]).get("clusters") for row in rows}
    assert found == {
        **{f"{name}_llamagen seed {seed}": None for name in ("vqgan", "vaevq") for seed in (3, 4)},
        **{
            f"{name}_coarse_to_fine seed {seed}": f"clusters/{name}_{seed}.npz"
            for name in ("vqgan", "vaevq")
            for seed in (3, 4)
        },
    }
    (one,) = {json.dumps(row.settings()["train"]).count("clusters/vaevq_4.npz") for row in rows[-1:]}
    assert one == 1


def test_any_generator_of_an_overlay_is_named(command: Callable[..., RunStudy]) -> None:
    """Those over latents are trained by the file of latents, without a list that says so."""
    overlaid = {
        path.stem: json.loads(path.read_text())
        for path in (OVERLAYS / "generation").glob("*.json")
        if "_title_" in json.loads(path.read_text())
    }
    of_tokens = {"absorbing", "maskgit", "vq_diffusion", "vq_ddm", "coarse_first", "coarse_to_fine"}
    assert of_tokens | {"flow", "flow_transformer"} <= set(overlaid)
    comparison = command(generators=",".join(["ldm", *overlaid]), assignments=(), generate_set=())
    parts = {part.name: part for part in comparison.study.generators}  # type: ignore[attr-defined]
    for name, content in overlaid.items():
        over_latents = name.startswith("flow")
        file = f"train_{'diffusion' if over_latents else 'autoregressive'}.json"
        assert (parts[name].title, parts[name].config, parts[name].overlays) == (content["_title_"], file, [name])
    kinds = {method.group: method.kind for method in comparison.plan.methods}  # type: ignore[attr-defined]
    assert kinds == {name: "latents" if name in ("ldm", "flow", "flow_transformer") else "indices" for name in parts}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokenizers": ""}, "found neither of --tokenizers and --from"),
        ({"source": Path("a"), "tokenizers": "a=b"}, "found both of --tokenizers and --from"),
        ({"methods": "vqgan"}, "methods: found it with --tokenizers"),
        ({"tokenizers": "vqgan"}, "found 'vqgan', expected NAME=CHECKPOINT"),
        ({"tokenizers": "a=nowhere.pt"}, "tokenizer a, seed 0: found no checkpoint nowhere.pt"),
        ({"tokenizers": "../a=b"}, 'name is "../a"; expected letters'),
        ({"tokenizers": "ldm=b"}, "tokenizers has ldm, which is a generator's name"),
        ({"generators": "llamagem"}, "generators: found 'llamagem', expected llamagen, ldm"),
        ({"assignments": ("learning_rat=1",)}, "did you mean 'learning_rate'"),
        ({"assignments": ("llamagen:label_dropout=1",)}, "unknown id 'label_dropout'"),
        ({"assignments": ("network_def#a#b=1",)}, "found 'network_def#a#b', which neither"),
        ({"assignments": ("seed=1",)}, "found 'seed', which the comparison sets itself"),
        ({"assignments": ("gan:seed=1",)}, "for the method 'gan'"),
        ({"generate_set": ("top_q=1",)}, "sample: found the unknown id 'top_q', expected one of generate.json"),
        ({"generate_set": ("num_samples=1",)}, "sample: found 'num_samples', which the comparison sets itself"),
        ({"generate_set": ("seven",)}, "generate-set: found 'seven'"),
        ({"overlays": ("small_gpu",)}, "found no overlay 'small_gpu'"),
        ({"overlays": ("diffusion_small_cpu",), "generators": "llamagen"}, "one of a generator that is compared"),
        ({"encode": ("--kind latents",)}, "encode: found '--kind latents' (No such option: --kind)"),
        ({"encode": ("ldn: --no-flip",)}, "encode: found 'ldn: --no-flip' for 'ldn', expected one of llamagen"),
        ({"evaluate": "--output-dir=a"}, "(No such option: --output-dir)"),
        ({"evaluate": "'"}, "expected words of a shell"),
        ({"evaluate": "--bogus x"}, "evaluate: found '--bogus x' (No such option: --bogus)"),
        ({"evaluate": "--neighbors two"}, "expected further options"),
        ({"evaluate": "--help"}, "(No such option: --help)"),
        ({"evaluate": "--neighbors -1"}, "--neighbors: found -1, expected 1 or more"),
        ({"evaluate": "--feature-threshold nan"}, "--feature-threshold: found nan"),
        ({"encode": ("--batch-size -1",)}, "--batch-size: found -1, expected 1 or more"),
        ({"evaluate": "--feature-network inceptoin"}, "feature network: found 'inceptoin'"),
        ({"encode": ("--bogus",)}, "encode: found '--bogus' (No such option: --bogus)"),
        ({"encode": ("llamagen:--ten-crops",)}, "No such option: --ten-crops"),
        ({"generate_set": ("ldm:top_k=5",)}, "sample: found top_k for vqgan_ldm"),
        ({"generate_set": ("num_steps=5",)}, "num_steps for vqgan_llamagen, expected guidance_scale, temperature"),
        ({"num_samples": 3}, "samples: found 3 to evaluate, expected at least 4 for precision"),
        ({"evaluate": "--max-items 3"}, "samples: found 3 to evaluate"),
        ({"evaluate": "--fid-infinity"}, "samples: found 8 to evaluate, expected at least"),
        ({"checkpoint": "first"}, "expected 'best' or 'last'"),
        ({"num_samples": 0}, "samples is 0; expected 1 or more"),
        ({"seeds": "x"}, "seeds: found 'x'"),
    ],
)
def test_bad_options_are_one_line(
    options: dict[str, Any], said: str, command: Callable[..., RunStudy], tmp_path: Path
) -> None:
    with pytest.raises(VaevqMedError) as refused:
        command(**options).dry_run()
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_rows_of_different_feature_networks_share_no_table(
    faked: Faked, command: Callable[..., RunStudy], tmp_path: Path
) -> None:
    comparison = command(generators="llamagen", pictures=0)
    comparison.run()
    path = tmp_path / "out/vqgan_llamagen/seed_0/evaluation/metrics.json"
    record = json.loads(path.read_text())
    record["provenance"]["feature_weights_sha256"] = "cd" * 32
    path.write_text(json.dumps(record))
    with pytest.raises(VaevqMedError, match="different feature_weights_sha256"):
        comparison.run()
    path.write_text("{")
    with pytest.raises(VaevqMedError, match="vqgan_llamagen seed 0: found a damaged evaluation"):
        comparison.run()


def test_published_figures_are_those_of_the_text() -> None:
    brats, imagenet = load_published("brats", "generation"), load_published("imagenet", "generation")
    names = ("vqgan_llamagen", "vaevq_llamagen", "vqgan_ldm", "vaevq_ldm")
    assert [brats.figures[name]["gfid"] for name in names] == ["7.54", "4.42", "6.85", "3.11"]
    assert [imagenet.figures[name]["gfid"] for name in names] == ["5.43", "4.68", "3.60", "2.98"]
    assert any("may be quoted" in note for note in imagenet.notes)
