"""The rooms of the package: who may import whom (contracts in pyproject.toml), and who may touch the outside world."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

OUTSIDE = {"sys.argv", "sys.stdout", "os.environ", "os.getenv", "os.putenv"}
MAY_TOUCH_OUTSIDE = {"cli", "study", "training", "trained"}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = "import sys; from importlinter.cli import lint_imports_command as run; run(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False
    )


def test_every_room_keeps_to_its_contracts() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " 0 broken" in done.stdout


PLANTED = {
    "images/splits.py": "def f():\n    from vaevq_med.networks import encoder",
    "losses/kl.py": "from .. import metrics",
    "tokens/items.py": "from vaevq_med.engines import rank",
    "networks/posterior.py": "import mlflow.pytorch",
    "metrics/codebook.py": "def f():\n    import monai.losses",
    "core/errors.py": "from vaevq_med.core import resources",
    "extras/__init__.py": "",
}


def test_the_contracts_find_what_is_planted(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "vaevq_med", tmp_path / "vaevq_med", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, line in PLANTED.items():
        path = tmp_path / "vaevq_med" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{path.read_text() if path.is_file() else ''}\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert " 5 broken" in said
    for complaint in (
        "vaevq_med.images.splits -> vaevq_med.networks",
        "vaevq_med.losses.kl -> vaevq_med.metrics",
        "vaevq_med.tokens.items -> vaevq_med.engines",
        "vaevq_med.networks.posterior -> mlflow",
        "vaevq_med.metrics.codebook -> monai",
        "No cycles are allowed in vaevq_med.core",
        "extras",
    ):
        assert complaint in said


def outside_uses(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every use of the command line, the environment or stdout, under any alias."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update((alias.asname or alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                (node.lineno, f"{node.module}.{alias.name}")
                for alias in node.names
                if f"{node.module}.{alias.name}" in OUTSIDE
            )
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            full = f"{names.get(node.value.id, node.value.id)}.{node.attr}"
            if full in OUTSIDE:
                yield node.lineno, full
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno, "print"


def test_library_rooms_leave_the_outside_world_alone() -> None:
    package = ROOT / "vaevq_med"
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    assert rooms > MAY_TOUCH_OUTSIDE
    found = [
        f"{path.relative_to(package)}:{line}: {name}"
        for room in sorted(rooms - MAY_TOUCH_OUTSIDE)
        for path in sorted((package / room).rglob("*.py"))
        for line, name in outside_uses(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import os\nhome = os.environ['HOME']", [(2, "os.environ")]),
        ("import os as o\nhome = o.getenv('HOME')", [(2, "os.getenv")]),
        ("from os import environ", [(1, "os.environ")]),
        ("import sys\nname = sys.argv[1]", [(2, "sys.argv")]),
        ("def f(x):\n    print(x)", [(2, "print")]),
        ('"""Say print(x) and os.environ."""\nimport os\nos.replace("a", "b")', []),
    ],
)
def test_the_check_finds_what_is_planted(source: str, found: list[tuple[int, str]]) -> None:
    assert list(outside_uses(source)) == found


def test_the_command_line_loads_nothing_heavy() -> None:
    heavy = ("torch", "monai", "mlflow", "nilearn", "SimpleITK", "matplotlib", "scipy", "skimage")
    heavy += ("pydantic", "yaml", "pandas")
    program = (
        "import sys, vaevq_med.cli.app as cli\n"
        f"print(*[name for name in {heavy!r} if name in sys.modules])\n"
        "assert cli.app.registered_commands\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


LIBRARY = (
    *("networks.encoder", "networks.tokenizer", "networks.quantizers", "networks.generators.llamagen"),
    *("networks.generators.base", "losses.objective", "losses.kl", "trained.network", "trained.file", "metrics"),
    *("images.reading", "prepare.pictures.source"),
)


def test_networks_losses_checkpoints_and_pictures_load_neither_monai_nor_the_compiler() -> None:
    """``import monai`` takes some ten seconds, the compiler of PyTorch two."""
    program = (
        "import sys, torch\n"
        + "".join(f"import vaevq_med.{module}\n" for module in LIBRARY)
        + "print(*[name for name in ('monai', 'torch._dynamo', 'sympy', 'torchmetrics') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_no_test_imports_another() -> None:
    files = [path for path in (ROOT / "tests").rglob("*.py") if "fixtures" not in path.parts]
    assert len(files) > 60
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found += [f"{path.name}: {name}" for name in names if name.startswith("test_")]
    assert found == []
