"""``vaevq-med weights``: what is here, what is missing, and what is another file."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vaevq_med.cli.app import app


def test_weights_says_where_missing_files_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    output = CliRunner().invoke(app, ["weights"]).output
    assert "missing vgg16-397923af.pth" in output
    assert str(tmp_path / ".cache/vaevq_med/weights") in output
    assert "efficientnet-lite0: the default" in output


def test_a_file_of_another_hash_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / ".cache/vaevq_med/weights/vgg16-397923af.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"something else")
    output = CliRunner().invoke(app, ["weights"]).output.replace("\n", "")
    assert f"found {file}, whose SHA-256 does not start with 397923af" in output
