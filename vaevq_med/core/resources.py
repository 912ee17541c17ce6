"""Where the bundles, studies and recipes are: inside an installed package, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

from vaevq_med.core.errors import VaevqMedError

_PACKAGE = Path(__file__).resolve().parents[1]
_CHOICES = {"bundles": "*/train.json", "bundles/studies": "*.yaml", "preprocessing": "*/*.json"}


def _find(folder: str, name: str) -> Path:
    roots = [root / folder for root in (_PACKAGE, _PACKAGE.parent)]
    for root in roots:
        if (root / name).exists():
            return root / name
    found = {path.relative_to(root) for root in roots for path in root.glob(_CHOICES[folder])}
    names = sorted((path.parent if folder == "bundles" else path.with_suffix("")).as_posix() for path in found)
    raise VaevqMedError(f"found no {folder}/{name}, expected one of {', '.join(names) or 'an installed package'}")


def bundle_path(name: str) -> Path:
    """Folder of a bundle, e.g. ``brats``.

    Raises:
        VaevqMedError: there is no such bundle; the message names those there are.
    """
    return _find("bundles", name)


def study_path(name: str) -> Path:
    """File of a study: one of ``bundles/studies/`` by its name, e.g. ``table1``, or any by its path.

    Raises:
        VaevqMedError: there is no such file; the message names the studies there are.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json"):
        if not path.is_file():
            raise VaevqMedError(f"found no file {path}, expected a study")
        return path
    return _find("bundles/studies", f"{name}.yaml")


def recipe_path(name: str) -> Path:
    """File of a preprocessing recipe, e.g. ``brats24/axial_256``.

    Raises:
        VaevqMedError: there is no such recipe; the message names those there are.
    """
    return _find("preprocessing", f"{name}.json")
