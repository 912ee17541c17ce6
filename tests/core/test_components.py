"""Components that files name: which are trusted, and a quantizer from outside, from training to a pack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BUNDLE
from monai.bundle import run as run_bundle
from torch import nn
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core import components
from vaevq_med.core.components import ComponentError, build, resolve, trust, trusted_packages
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks import LlamaGen

BRATS = BUNDLE
QUANTIZER = '''
"""A quantizer that stands outside of the package, and says so when it is imported."""
import os
from pathlib import Path

import torch
from torch import nn
from torch.nn import Linear

from vaevq_med.networks.quantizers import CodebookQuantizer

Path(os.environ["IMPORTED"]).write_text("yes")


class Mine(CodebookQuantizer):
    def __init__(self, *, size: int, width: int) -> None:
        super().__init__(num_embeddings=size, embedding_dim=width)
        self.embedding = nn.Parameter(torch.randn(size, width))

    def codebook(self):
        return self.embedding


def function(**values):
    return nn.Identity()
'''


@pytest.fixture(autouse=True)
def nothing_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "_named_by_user", set())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module ``outside_quantizers`` on the path; the file ``imported`` stands beside it once it was."""
    (tmp_path / "outside_quantizers.py").write_text(QUANTIZER)
    monkeypatch.setenv("IMPORTED", str(tmp_path / "imported"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "outside_quantizers", raising=False)
    return tmp_path


@pytest.mark.parametrize("target", ["os.system", "torch.nn.Linear", "outside_quantizers.Mine", "Compose", ""])
def test_what_is_not_trusted_is_refused_before_it_is_imported(target: str, package: Path) -> None:
    with pytest.raises(ComponentError, match="expected one of a trusted package"):
        resolve(target, nn.Module)
    assert not (package / "imported").exists()


def test_a_package_that_the_user_trusts_builds(package: Path) -> None:
    trust(["outside_quantizers"])
    built = build({"_target_": "outside_quantizers.Mine", "size": 8, "width": 2, "_notes_": "mine"}, nn.Module)
    assert built.codebook().shape == (8, 2)
    assert (package / "imported").exists()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("outside_quantizers.function", "derived from Module"),
        ("outside_quantizers.Other", "outside_quantizers has no Other"),
        ("outside_quantizers.Mine.codebook", "one of its presets"),
        ("outside_quantizers", "found no such module.*PYTHONPATH"),
        ("vaevq_med.networks.quantizers.missing.Missing", "vaevq_med.networks.quantizers has no missing"),
        ("outside_quantizers.nn.Linear", "derived from Module"),
        ("outside_quantizers.torch.nn.Linear", "derived from Module"),
        ("outside_quantizers.Linear", "derived from Module"),
    ],
)
def test_only_classes_of_the_interface_are_components(target: str, words: str, package: Path) -> None:
    trust(["outside_quantizers"])
    with pytest.raises(ComponentError, match=words):
        resolve(target, nn.Module)


def test_a_module_that_fails_is_named_in_one_line(package: Path) -> None:
    (package / "outside_quantizers.py").write_text("import a_module_that_is_not_there\n")
    trust(["outside_quantizers"])
    with pytest.raises(ComponentError, match="'a_module_that_is_not_there', which it needs"):
        resolve("outside_quantizers.Mine", nn.Module)


@pytest.mark.parametrize(
    "target", ["vaevq_med.networks.quantizers.nearest_codeword", "vaevq_med.networks.vqgan_preset"]
)
def test_functions_of_this_package_are_no_components(target: str) -> None:
    with pytest.raises(ComponentError, match="derived from Module"):
        resolve(target, nn.Module, own="vaevq_med.networks")


def test_components_of_other_rooms_are_not_asked_for() -> None:
    with pytest.raises(ComponentError, match=r"expected one of vaevq_med\.networks"):
        resolve("vaevq_med.losses.KLLoss", nn.Module, own="vaevq_med.networks")


def test_a_preset_is_a_component() -> None:
    definition = {"_target_": "vaevq_med.networks.LlamaGen.preset", "name": "S", "num_embeddings": 8, "grid_size": 2}
    with torch.device("meta"):
        assert isinstance(build(definition, nn.Module, own="vaevq_med.networks"), LlamaGen)


def test_installed_distributions_publish_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    def published(group: str) -> list[EntryPoint]:
        assert group == "vaevq_med.components"
        return [EntryPoint("theirs", "their_package.quantizers:Theirs", group)]

    monkeypatch.setattr(components, "entry_points", published)
    components._published.cache_clear()
    assert trusted_packages() == {"vaevq_med", "their_package"}
    components._published.cache_clear()


def test_what_is_no_list_of_packages_is_refused() -> None:
    with pytest.raises(ComponentError, match="expected a list"):
        trust(3)
    trust("one_package")
    assert "one_package" in trusted_packages()


@pytest.mark.parametrize("name", ["two words", "a.b", "", 3])
def test_what_is_no_package_cannot_be_trusted(name: Any) -> None:
    with pytest.raises(ComponentError, match="expected the name of a top-level package"):
        trust([name])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_quantizer_from_outside_is_trained_evaluated_encoded_and_packed(
    toy_overrides: dict[str, Any], package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its sizes are literal, so that nothing refers to the id ``embedding_dim`` any more.

    What a process has to say by itself, whom it trusts, is run as a command; the rest in this process.
    """
    overlay = package / "mine.json"
    quantizer = {"_target_": "outside_quantizers.Mine", "size": 32, "width": 4}
    overlay.write_text(json.dumps({"network_def#quantizer": quantizer}))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(BRATS.parents[1])])}

    def run(*words: str) -> None:
        done = subprocess.run(
            [sys.executable, *words], cwd=package, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]

    def refused(run_id: str, files: list[Path], **values: Any) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_bundle(run_id, config_file=[str(file) for file in files], **values)
        assert stopped.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vaevq-med:")]
        return line

    values = {**toy_overrides, "max_epochs": 1}
    assert "unknown id 'num_embedings'" in refused(
        "training", [BRATS / "train.json", overlay], **values, num_embedings=3
    )
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    files = str([str(BRATS / "train.json"), str(overlay)])
    run("-m", "monai.bundle", "run", "training", "--config_file", files, *words)

    given = {name: toy_overrides[name] for name in ("dataset_dir", "output_dir", "tracking_uri", "device")}
    given |= {"num_workers": 0, "fid_network": None, "lpips_network": None}
    assert "found the component 'outside_quantizers.Mine'" in refused("evaluating", [BRATS / "evaluate.json"], **given)
    checkpoint = Path(toy_overrides["output_dir"]) / "checkpoints/best.pt"
    commands = (
        ["encode-tokens", str(checkpoint), str(toy_overrides["dataset_dir"]), str(package / "tokens")],
        ["bundle", "pack", "brats", str(package / "packed"), "--checkpoint", str(checkpoint)],
    )
    for command in commands:
        error = CliRunner().invoke(app, command).exception
        assert isinstance(error, VaevqMedError), command
        assert "--trusted outside_quantizers" in str(error)
    assert not (package / "tokens").exists()
    for command in commands:
        done = CliRunner().invoke(app, ["--trusted", "outside_quantizers", *command])
        assert done.exit_code == 0, done.output
    run_bundle("evaluating", config_file=str(BRATS / "evaluate.json"), trusted=["outside_quantizers"], **given)

    # A study hands on whom the user trusts, to its rows and to its own pictures.
    kept = {"dataset_dir", "output_dir", "tracking_uri", "device", "max_epochs"}
    study = {
        **{"study": "tokenizers", "output": str(package / "study"), "dataset_dir": str(values["dataset_dir"])},
        **{"budget": {"max_epochs": 1}, "tracking_uri": "none", "report": {"pictures": 2}},
        "set": {key: value for key, value in values.items() if key not in kept}
        | {"fid_network": "$None", "lpips_network": "$None"},
        "methods": [{"name": "mine", "overlays": [str(overlay)]}],
    }
    (package / "study.json").write_text(json.dumps(study))
    run("-m", "vaevq_med.cli.app", "--trusted", "outside_quantizers", "study", str(package / "study.json"))
    assert (package / "study/reconstructions.png").is_file()
