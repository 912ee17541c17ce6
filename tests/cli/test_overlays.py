"""``vaevq-med overlays``: each bundle lists what it can be trained with."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import ROOT
from typer.testing import CliRunner

from vaevq_med.cli.app import app

OVERLAYS = ROOT / "bundles" / "overlays"


def listed(bundle: str) -> dict[str, Path]:
    done = CliRunner().invoke(app, ["overlays", "--bundle", bundle, "--json"])
    assert done.exit_code == 0, done.output
    return {row["name"]: Path(row["file"]) for row in json.loads(done.stdout)}


def names(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.json")}


def test_bundles_of_tokenizers_list_every_shared_overlay_and_their_own() -> None:
    shared = names(OVERLAYS) | names(OVERLAYS / "generation")
    assert set(listed("brats")) == shared
    assert set(listed("imagenet")) == shared | names(ROOT / "bundles" / "imagenet" / "overlays")


def test_the_bundle_of_segmentation_lists_its_own_alone() -> None:
    own = ROOT / "bundles" / "segmentation" / "overlays"
    found = listed("segmentation")
    assert set(found) == names(own)
    assert {path.parent for path in found.values()} == {own}


def test_a_bundle_without_a_readable_training_file_lists_its_own(tmp_path: Path) -> None:
    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays" / "mine.json").write_text("{}")
    (tmp_path / "metadata.json").write_text("{}")
    (tmp_path / "evaluate.json").write_text("{}")
    (tmp_path / "train.json").write_text("[")
    assert set(listed(str(tmp_path))) == {"mine"}
