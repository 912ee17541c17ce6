"""Where the bundles and recipes are: inside an installed package, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

from vaevq_med.core.errors import VaevqMedError

_PACKAGE = Path(__file__).resolve().parents[1]


def _find(folder: str, name: str) -> Path:
    for root in (_PACKAGE, _PACKAGE.parent):
        path = root / folder / name
        if path.exists():
            return path
    choices = sorted(
        {
            path.relative_to(root / folder).with_suffix("").as_posix()
            for root in (_PACKAGE, _PACKAGE.parent)
            for path in (root / folder).glob("*/*.json" if folder == "preprocessing" else "*")
            if path.name[0] not in "._"
        }
    )
    raise VaevqMedError(f"found no {folder}/{name}, expected one of {', '.join(choices) or 'an installed package'}")


def bundle_path(name: str) -> Path:
    """Folder of a bundle, e.g. ``brats``.

    Raises:
        VaevqMedError: there is no such bundle; the message names those there are.
    """
    return _find("bundles", name)


def recipe_path(name: str) -> Path:
    """File of a preprocessing recipe, e.g. ``brats24/axial_256``.

    Raises:
        VaevqMedError: there is no such recipe; the message names those there are.
    """
    return _find("preprocessing", f"{name}.json")
