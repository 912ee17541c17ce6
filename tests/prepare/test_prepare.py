"""A source of one's own: found by its entry point, run by the same job as volumes and pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vaevq_med.cli.app import app
from vaevq_med.core.errors import DataError
from vaevq_med.core.folder import OutputFolder
from vaevq_med.images.manifest import SPLITS, load_manifest, split_hash
from vaevq_med.prepare import job
from vaevq_med.prepare.job import DataSet, Estimate, Prepare, Record, Search, Source, Unit, published
from vaevq_med.prepare.recipes import AnyRecipe


class Shades(AnyRecipe):
    """Which shade is black."""

    black: int = 0

    def summary(self) -> str:
        return f"{self.name} from {self.black}"

    @property
    def image_hash(self) -> str:
        return hashlib.sha256(f"{self.black}".encode()).hexdigest()


@dataclass(frozen=True)
class ShadeSource(Source[Unit, Record]):
    """A text file with a number is an image of that shade."""

    recipes: ClassVar[type[AnyRecipe]] = Shades
    unit: ClassVar[str] = "shade"
    item: ClassVar[str] = "shade"
    nothing: ClassVar[str] = "found no shade ({} skipped), expected some"
    packages: ClassVar[tuple[str, ...]] = ("pillow",)

    input: Path
    recipe: Shades

    def folder(self, output: Path) -> OutputFolder:
        return OutputFolder(output, ".shades", "prepare shades", "shades")

    def find(self, output: Path) -> Search[Unit]:
        return Search([Unit(path.stem) for path in sorted(self.input.glob("*.txt"))])

    def fingerprint(self, unit: Unit) -> str:
        return (self.input / f"{unit.name}.txt").read_text() + self.recipe.image_hash

    def record(self, unit: Unit, folder: OutputFolder) -> Record | None:
        values = folder.record(unit.name)
        return Record(**values) if values and (folder.path / f"images/{unit.name}.png").is_file() else None

    def write(self, unit: Unit, folder: OutputFolder) -> Record:
        text = (self.input / f"{unit.name}.txt").read_text()
        if not text.isdecimal():
            raise DataError(f"found {text!r}, expected a shade")
        with folder.unit(unit.name) as partial:
            Image.fromarray(np.full((8, 8), self.recipe.black + int(text), np.uint8)).save(partial / "image.png")
            record = Record(self.fingerprint(unit), text)
            folder.commit(unit.name, asdict(record), {"image.png": f"images/{unit.name}.png"})
        return record

    def estimate(self, search: Search[Unit], todo: Sequence[Unit], folder: OutputFolder) -> Estimate:
        return Estimate(len(todo), 99 * len(todo))

    def describe(self, search: Search[Unit], records: Iterator[tuple[Unit, Record]], folder: OutputFolder) -> DataSet:
        images = [{"image": f"images/{unit.name}.png"} for unit, _ in records]
        entries = {split: images if split == "training" else [] for split in SPLITS}
        return DataSet({}, entries, split_hash(entries), len(images), {"shades": len(images)})


@pytest.fixture
def shades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three shades, of which one is none; the source is installed."""
    entry = EntryPoint("shades", f"{__name__}:ShadeSource", job.GROUP)
    monkeypatch.setattr(job, "entry_points", lambda group: [entry])
    (tmp_path / "in").mkdir()
    for name, text in (("a", "10"), ("b", "20"), ("c", "red")):
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    (tmp_path / "dark.json").write_text('{"name": "dark"}')
    return tmp_path


def prepare(shades: Path, *options: str) -> tuple[int, str]:
    command = ["prepare", "shades", str(shades / "in"), str(shades / "out"), "--workers", "1", *options]
    done = CliRunner().invoke(app, command if "--recipe" in options else [*command, "--recipe", f"{shades}/dark.json"])
    return done.exit_code, f"{done.output}{done.exception}"


def test_a_source_of_an_installed_package_makes_a_data_set_that_goes_on(shades: Path) -> None:
    code, said = prepare(shades, "--dry-run")
    assert (code, "would write 3 of shade; 0 are done already" in said) == (0, True)
    assert not (shades / "out").exists()
    code, said = prepare(shades)
    assert (code, "2 written, 0 were done, 1 skipped" in said) == (1, True)
    assert "shade c: found 'red', expected a shade; skipped" in said
    manifest = load_manifest(shades / "out")
    assert [entry["image"] for entry in manifest.entries("training")] == ["images/a.png", "images/b.png"]
    assert manifest.content["recipe"] == {"name": "dark", "description": "", "black": 0}
    report = json.loads((shades / "out/report.json").read_text())
    assert report == {"shades": 2, "skipped": [{"shade": "c", "reason": "found 'red', expected a shade"}], "notes": []}
    (shades / "in/c.txt").write_text("30")
    (shades / "out/images/a.png").unlink()
    code, said = prepare(shades)
    assert (code, "2 written, 1 were done, 0 skipped" in said) == (0, True)


def test_another_recipe_of_a_source_needs_overwrite(shades: Path) -> None:
    prepare(shades)
    (shades / "light.json").write_text('{"name": "light", "black": 100}')
    command = Prepare(ShadeSource(shades / "in", Shades.load(shades / "light.json")), shades / "out")
    said = r"found shades made by another recipe \(black 0, expected 100\), expected those of light from 100"
    with pytest.raises(DataError, match=said):
        command.run()
    (shades / "out/recipe.json").write_text("{")
    with pytest.raises(DataError, match="found shades made by another recipe, expected those of light"):
        command.plan()
    (shades / "out/dataset.json").unlink()
    with pytest.raises(DataError, match="found shades made by another recipe, expected those of light"):
        command.plan()
    code, _ = prepare(shades, "--overwrite", "--recipe", f"{shades}/light.json")
    assert code == 1
    assert np.asarray(Image.open(shades / "out/images/a.png"))[0, 0] == 110


def test_an_unknown_source_is_refused_with_those_there_are(shades: Path) -> None:
    with pytest.raises(DataError, match=r"found 'shade', expected one .* vaevq_med\.sources \(shades\)"):
        published("shade")


def test_a_source_that_leaves_nothing_is_refused(shades: Path) -> None:
    for name in "ab":
        (shades / f"in/{name}.txt").unlink()
    code, said = prepare(shades)
    assert (code, "found no shade (1 skipped), expected some" in said) == (1, True)
    assert not (shades / "out/dataset.json").exists()
