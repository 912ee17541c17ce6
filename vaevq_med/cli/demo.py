"""``vaevq-med demo``: synthetic subjects to an evaluated tokenizer, by the commands that a user would type."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.resources import bundle_path, overlay_path

_MARK = ".vaevq_med_demo"
_SHAPE = ("--shape", "91,109,91")
_SMALL = ("--batch_size", "16", "--num_workers", "0")


@dataclass(frozen=True)
class DemoReport:
    """What the demo ends with.

    Attributes:
        metrics: name to value, over the test split.
        pictures: grids of reconstructions.
        tracking_uri: where the MLflow run is.
    """

    metrics: dict[str, float]
    pictures: list[Path]
    tracking_uri: str


@dataclass(frozen=True)
class Demo:
    """Synthetic subjects, slices, training, evaluation; each a subprocess running the documented command.

    Args:
        output: folder of everything that the demo writes; a folder of an earlier demo is replaced.
        subjects: synthetic subjects.
        epochs: epochs to train; None takes the overlay's.
        seed: seed of the subjects and of the training.
        announce: called with each step's title and command line.
    """

    output: Path
    subjects: int = 6
    epochs: int | None = None
    seed: int = 0
    announce: Callable[[str, str], None] = field(default=lambda title, command: None)

    def run(self) -> DemoReport:
        """Run the steps."""
        self._make_output()
        volumes, slices, trained = self.output / "volumes", self.output / "slices", self.output / "run"
        tracking_uri = f"sqlite:///{(self.output / 'mlflow.db').as_posix()}"
        root = bundle_path("brats")
        tool = [sys.executable, "-m", "vaevq_med.cli.app"]
        bundle = [sys.executable, "-m", "monai.bundle", "run"]
        shared = ["--dataset_dir", str(slices), "--output_dir", str(trained), "--tracking_uri", tracking_uri]
        seed, subjects, epochs = str(self.seed), str(self.subjects), self.epochs
        self._call("Synthetic subjects", *tool, "phantom", volumes, "--subjects", subjects, "--seed", seed, *_SHAPE)
        splits = self.output / "splits.json"
        splits.write_text(json.dumps(self._splits(volumes), indent=2) + "\n")
        self._call("Slices", *tool, "slice-extract", volumes, slices, "--size", "64", "--split-file", splits)
        config = f"['{root / 'train.json'}','{overlay_path('demo', root)}']"
        length = [] if epochs is None else ["--max_epochs", epochs]
        self._call("Training", *bundle, "training", "--config_file", config, *shared, "--seed", seed, *length)
        self._call("Evaluation", *bundle, "evaluating", "--config_file", root / "evaluate.json", *shared, *_SMALL)
        folder = trained / "evaluation" / "test"
        overall = json.loads((folder / "metrics.json").read_text())["summary"]["overall"]
        metrics = {name: float(value["value"]) for name, value in overall.items()}
        return DemoReport(metrics, sorted(folder.glob("*.png")), tracking_uri)

    def _make_output(self) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise VaevqMedError(f"{self.output}: found a file, expected a folder; name another with --output")
        if self.output.exists() and any(self.output.iterdir()):
            if not (self.output / _MARK).is_file():
                raise VaevqMedError(
                    f"{self.output}: found a folder that the demo did not make, expected none, an empty one, or "
                    "that of an earlier demo; name another with --output"
                )
            shutil.rmtree(self.output)
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / _MARK).touch()

    @staticmethod
    def _splits(volumes: Path) -> dict[str, str]:
        """The last patient for test, the one before for validation, the others for training."""
        patients = sorted({folder.name.rsplit("-", 1)[0] for folder in volumes.iterdir() if folder.is_dir()})
        if len(patients) < 3:
            raise VaevqMedError(f"found {len(patients)} synthetic patients, expected at least 3")
        splits = dict.fromkeys(patients, "training")
        splits[patients[-1]], splits[patients[-2]] = "test", "validation"
        return splits

    def _call(self, title: str, *words: object) -> None:
        command = [str(word) for word in words]
        self.announce(title, shlex.join([Path(command[0]).name, *command[1:]]))
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
        status = subprocess.run(command, env=environment, check=False).returncode
        if status != 0:
            raise VaevqMedError(f"the step {title!r} ended with exit code {status}, expected 0; see its output above")


def demo(
    output: Annotated[Path, typer.Option(help="Folder of everything that the demo writes.")] = Path("demo"),
    subjects: Annotated[int, typer.Option(min=3, help="Synthetic subjects to make.")] = 6,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs to train; by default the overlay's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the subjects and of the training.")] = 0,
) -> None:
    """Make synthetic brains, extract slices, train and evaluate a small VAEVQ: some minutes, no GPU."""
    from rich.console import Console

    console = Console(highlight=False)

    def announce(title: str, command: str) -> None:
        console.print(f"\n[bold]{title}[/bold]\n  $ {command}", soft_wrap=True)

    report = Demo(output, subjects=subjects, epochs=epochs, seed=seed, announce=announce).run()
    console.print("\n[bold]Over the test subject[/bold]")
    for name, value in report.metrics.items():
        console.print(f"  {name:<28}{value:10.4f}")
    for picture in report.pictures:
        console.print(f"  picture: {picture}", soft_wrap=True)
    console.print("\nBrowse the run with:")
    console.print(f"  mlflow ui --backend-store-uri {report.tracking_uri}", soft_wrap=True)
