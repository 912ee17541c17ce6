"""``docs/adding_a_method.md`` and ``adding_a_generator.md``, followed word for word in a copy of the checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BLOCK = re.compile(r"^```\w+ title=\"(?P<title>[^\"]+)\"\n(?P<text>.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_page_adds_a_method(tmp_path: Path) -> None:
    for name in ("vaevq_med", "bundles", "tests", "docs", "preprocessing"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    pages = [(ROOT / "docs" / name).read_text() for name in ("adding_a_method.md", "adding_a_generator.md")]
    blocks = {match["title"]: match["text"] for page in pages for match in BLOCK.finditer(page)}
    assert len(blocks) == 11
    for title, text in blocks.items():
        assert not (tmp_path / title).exists()
        (tmp_path / title).write_text(text)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--timeout=200"]
    chosen = [
        "tests/networks/quantizers/test_quantizer_contract.py",
        "tests/networks/quantizers/test_dot_product.py",
        "tests/training/test_bundle.py",
        "tests/networks/generators/test_independent.py",
        "tests/losses/test_gradient.py",
        "tests/metrics/test_largest_error.py",
        "tests/generation/test_generation_bundles.py",
    ]
    chosen.append("vaevq_med/networks/quantizers/dot_product.py")
    words = "dot_product or every_quantizer_has_a_case or test_independent or (every_overlay_is_read and independent)"
    words += " or ramp_by_hand or largest_error or (every_overlay and gradient)"
    done = subprocess.run(
        [*command, *chosen, "-k", words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = [line.split(" PASSED")[0] for line in done.stdout.splitlines() if " PASSED" in line]
    for test in (
        "tests/networks/quantizers/test_quantizer_contract.py::test_indices_give_the_codes_back[dot_product]",
        "tests/networks/quantizers/test_quantizer_contract.py::test_every_quantizer_has_a_case",
        "tests/networks/quantizers/test_dot_product.py::test_the_product_decides_and_not_the_distance",
        "tests/training/test_bundle.py::test_every_overlay_is_read_by_the_training_bundle[dot_product]",
        "tests/networks/generators/test_independent.py::test_it_learns_the_frequencies",
        "tests/generation/test_generation_bundles.py::test_every_overlay_is_read[independent]",
        "tests/losses/test_gradient.py::test_a_ramp_by_hand",
        "tests/metrics/test_largest_error.py::test_the_largest_error_by_hand",
        "tests/training/test_bundle.py::test_every_overlay_is_read_by_the_training_bundle[gradient]",
        "vaevq_med/networks/quantizers/dot_product.py::vaevq_med.networks.quantizers.dot_product.DotProductVQ",
    ):
        assert test in passed
    program = "import vaevq_med.networks.quantizers.dot_product as q; print(q.__file__, q.DotProductVQ.__name__)"
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(tmp_path) in found.stdout
    for tool in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *tool, *(str(tmp_path / n) for n in blocks if n.endswith(".py"))],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
