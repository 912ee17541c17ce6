"""The layers of the package: who may import whom, and who may touch the outside world."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = "vaevq_med"
LAYERS = (
    ("core",),
    ("images", "networks"),
    ("trained", "losses", "metrics"),
    ("tokens", "prepare"),
    ("training",),
    ("evaluation", "generation"),
    ("study",),
    ("cli",),
)
RANKS = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
ADDRESSES = {"errors", "outputs", "resources", "data", "engines", "inferers"}
"""What users import from, and the package itself does not: it may import everything."""
OUTSIDE_PACKAGES = {"mlflow", "typer", "rich", "argparse"}
OUTSIDE_NAMES = {"sys.argv", "sys.stdout", "os.environ", "os.getenv", "os.putenv"}
MAY_TOUCH_OUTSIDE = {"cli", "study", "training", "trained"}


def package_folder() -> Path:
    spec = importlib.util.find_spec(ROOT)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def module_name(path: Path, folder: Path) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join((ROOT, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def layer(module: str) -> str:
    """The room that a module stands in; "" for the root."""
    parts = module.split(".")
    return "" if len(parts) == 1 else parts[1]


def rank(module: str) -> int | None:
    """The rank of a module's room; None where it has none."""
    return -1 if layer(module) == "" else RANKS.get(layer(module))


def imported(tree: ast.AST, module: str, is_package: bool, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, wherever it stands, relative and by ``import_module`` too.

    ``from package import module`` gives the module, ``from module import name`` the module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in modules else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def outside_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every use of the command line, the environment or stdout, under any alias."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update((alias.asname or alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in OUTSIDE_NAMES:
                    yield node.lineno, full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            full = f"{names.get(node.value.id, node.value.id)}.{node.attr}"
            if full in OUTSIDE_NAMES:
                yield node.lineno, full
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno, "print"


def violations(source: str, module: str, *, is_package: bool, modules: set[str]) -> list[str]:
    """What a module does against the layers, one line each."""
    tree = ast.parse(source)
    own = rank(module)
    if own is None:
        return [f"{module}: belongs to no layer; the layers are {', '.join(RANKS)}"]
    found = []
    for line, target in imported(tree, module, is_package, modules):
        top = target.split(".")[0]
        if top == ROOT:
            other = rank(target)
            if other is None:
                found.append(f"{module}:{line}: imports {target}, which belongs to no layer")
            elif layer(target) != layer(module) and other >= own:
                found.append(f"{module}:{line}: rank {own} imports {target} of rank {other}")
        elif top in OUTSIDE_PACKAGES and layer(module) not in MAY_TOUCH_OUTSIDE:
            found.append(f"{module}:{line}: imports {top}, which its room may not")
    if layer(module) not in MAY_TOUCH_OUTSIDE:
        found += [f"{module}:{line}: uses {name}, which its room may not" for line, name in outside_uses(tree)]
    return found


def test_every_module_keeps_to_the_layers() -> None:
    folder = package_folder()
    paths = sorted(
        path
        for path in folder.rglob("*.py")
        if path.relative_to(folder).with_suffix("").parts[0] not in ADDRESSES | {"bundles", "preprocessing"}
    )
    modules = {module_name(path, folder) for path in paths}
    assert {"vaevq_med.networks.outputs", "vaevq_med.prepare.phantom.subjects", "vaevq_med.cli.app"} <= modules
    found = [
        line
        for path in paths
        for line in violations(
            path.read_text(encoding="utf-8"),
            module_name(path, folder),
            is_package=path.name == "__init__.py",
            modules=modules,
        )
    ]
    assert found == []


MODULES = {
    f"{ROOT}.{name}"
    for name in (
        *("core", "core.errors", "images", "images.splits", "networks", "networks.encoder", "losses", "losses.kl"),
        *("metrics", "prepare", "prepare.volumes.slices", "training", "training.tokenizer", "cli", "cli.app"),
    )
}


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("images.splits", "from vaevq_med.networks.encoder import E", "rank 1 imports vaevq_med.networks.encoder"),
        ("images.splits", "import vaevq_med.cli.app as c", "rank 1 imports vaevq_med.cli.app"),
        ("images.splits", "def f():\n    from vaevq_med.losses import kl", ":2: rank 1 imports vaevq_med.losses.kl"),
        ("images.splits", "from vaevq_med import training", "rank 1 imports vaevq_med.training"),
        ("images.splits", "from vaevq_med.engines import rank", "imports vaevq_med.engines, which belongs to no layer"),
        ("images.splits", "from ..networks import encoder", "rank 1 imports vaevq_med.networks.encoder"),
        ("images.splits", "import importlib\nimportlib.import_module('vaevq_med.training.ema')", "rank 1 imports"),
        ("losses.kl", "import vaevq_med.metrics", "rank 2 imports vaevq_med.metrics of rank 2"),
        ("core.errors", "from vaevq_med.prepare.volumes.slices import r", "rank 0 imports vaevq_med.prepare.volumes"),
        ("extras.tool", "x = 1", "belongs to no layer"),
        ("losses.kl", "from vaevq_med.extras import tool", "belongs to no layer"),
        ("networks.encoder", "import mlflow.pytorch", "imports mlflow"),
        ("networks.encoder", "def f():\n    from rich.console import Console", ":2: imports rich"),
        ("images.splits", "import typer", "imports typer"),
        ("images.splits", "import os\nhome = os.environ['HOME']", ":2: uses os.environ"),
        ("images.splits", "import os as o\nhome = o.getenv('HOME')", ":2: uses os.getenv"),
        ("images.splits", "from os import environ", "uses os.environ"),
        ("images.splits", "import sys\nname = sys.argv[1]", ":2: uses sys.argv"),
        ("losses.kl", "def f(x):\n    print(x)", ":2: uses print"),
    ],
)
def test_the_check_finds_what_is_planted(module: str, source: str, complaint: str) -> None:
    found = violations(source, f"{ROOT}.{module}", is_package=False, modules=MODULES)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("images.splits", False, "import numpy\nfrom vaevq_med.core.errors import DataError"),
        ("prepare", True, "from . import volumes\nfrom .volumes.slices import read"),
        ("losses.kl", False, "from . import base\nfrom ..networks.encoder import Encoder"),
        ("core.errors", False, "from vaevq_med import __version__"),
        ("training.tokenizer", False, "import mlflow, os, sys\nfrom vaevq_med.losses import kl\nprint(os.environ)"),
        ("cli.app", False, "import typer\nfrom vaevq_med.training.tokenizer import T\nprint(T)"),
        ("images.splits", False, '"""Say print(x) and os.environ."""\nimport os\nos.replace("a", "b")'),
    ],
)
def test_the_check_leaves_the_rest_alone(module: str, is_package: bool, source: str) -> None:
    assert violations(source, f"{ROOT}.{module}", is_package=is_package, modules=MODULES) == []


def test_the_command_line_loads_nothing_heavy() -> None:
    heavy = ("torch", "monai", "mlflow", "nilearn", "SimpleITK", "matplotlib", "scipy", "skimage")
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
)


def test_networks_losses_and_checkpoints_load_neither_monai_nor_the_compiler() -> None:
    """``import monai`` takes some ten seconds, the compiler of PyTorch two."""
    program = (
        "import sys, torch\n"
        + "".join(f"import vaevq_med.{module}\n" for module in LIBRARY)
        + "print(*[name for name in ('monai', 'torch._dynamo', 'sympy', 'torchmetrics') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
