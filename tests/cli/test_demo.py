"""The demo's own decisions; its steps are tested as the commands that they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vaevq_med.cli import demo as demo_module
from vaevq_med.cli.demo import Demo
from vaevq_med.core.errors import VaevqMedError


class Done:
    returncode = 0


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Records the steps and makes what the demo reads of them."""
    seen: list[list[str]] = []

    def run(command: list[str], **_: object) -> Done:
        seen.append(command)
        if "phantom" in command:
            for number in range(4):
                (Path(command[command.index("phantom") + 1]) / f"BraTS-GLI-9000{number}-100").mkdir(parents=True)
        if "evaluating" in command:
            folder = Path(command[command.index("--output_dir") + 1]) / "evaluation" / "test"
            folder.mkdir(parents=True)
            summary = {"overall": {"psnr": {"value": 20.0, "n": 3}}}
            (folder / "metrics.json").write_text(json.dumps({"summary": summary}))
            (folder / "best_median_worst.png").touch()
        return Done()

    monkeypatch.setattr(demo_module.subprocess, "run", run)
    return seen


def test_demo_runs_the_documented_commands_and_reports(commands: list[list[str]], tmp_path: Path) -> None:
    report = Demo(tmp_path / "demo", epochs=3).run()
    assert [next(w for w in c if w in ("phantom", "slice-extract", "training", "evaluating")) for c in commands] == [
        "phantom",
        "slice-extract",
        "training",
        "evaluating",
    ]
    assert commands[2][-2:] == ["--max_epochs", "3"]
    splits = json.loads((tmp_path / "demo" / "splits.json").read_text())
    assert sorted(splits.values()) == ["test", "training", "training", "validation"]
    assert report.metrics == {"psnr": 20.0}
    assert [path.name for path in report.pictures] == ["best_median_worst.png"]
    assert report.tracking_uri.endswith("/demo/mlflow.db")
    # A second run replaces the first.
    (tmp_path / "demo" / "stale").touch()
    Demo(tmp_path / "demo").run()
    assert not (tmp_path / "demo" / "stale").exists()


def test_demo_leaves_a_foreign_folder_alone(commands: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(VaevqMedError, match="--output"):
        Demo(tmp_path).run()
    assert (tmp_path / "thesis.tex").exists()
    assert commands == []


def test_demo_stops_at_a_step_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Failed:
        returncode = 7

    monkeypatch.setattr(demo_module.subprocess, "run", lambda *_, **__: Failed())
    with pytest.raises(VaevqMedError, match="'Synthetic subjects' ended with exit code 7"):
        Demo(tmp_path / "demo").run()


def test_a_file_is_no_folder_for_the_demo(tmp_path: Path, commands: list[list[str]]) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(VaevqMedError, match="file: found a file, expected a folder"):
        Demo(tmp_path / "file").run()
    assert not commands
