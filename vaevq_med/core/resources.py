"""Where the bundles, overlays, studies and recipes are: inside an installed package, or at the top of a checkout."""

from __future__ import annotations

import json
from pathlib import Path

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.names import did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]
# What names the resources of a folder: a bundle is a folder with metadata.json, a recipe a file.
_KNOWN_BY = {"bundles": "*/metadata.json", "bundles/studies": "*.yaml", "preprocessing": "*/*.json"}


def _find(folder: str, name: str) -> Path:
    for root in (_PACKAGE, _PACKAGE.parent):
        path = root / folder / name
        if path.exists():
            return path
    found = (
        path.relative_to(root / folder)
        for root in (_PACKAGE, _PACKAGE.parent)
        for path in (root / folder).glob(_KNOWN_BY[folder])
    )
    choices = {(path.parent if folder == "bundles" else path.with_suffix("")).as_posix() for path in found}
    known = ", ".join(sorted(choices)) or "an installed package"
    raise VaevqMedError(f"found no {folder}/{name}, expected one of {known}")


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
    if path.is_file():
        raise VaevqMedError(f"{path}: found the suffix {path.suffix!r}, expected .yaml, .yml or .json of a study")
    return _find("bundles/studies", f"{name}.yaml")


def recipe_path(name: str) -> Path:
    """File of a preprocessing recipe, e.g. ``brats24/axial_256``.

    Raises:
        VaevqMedError: there is no such recipe; the message names those there are.
    """
    return _find("preprocessing", f"{name}.json")


def overlay_files(bundle: Path, kind: str = "") -> dict[str, Path]:
    """The overlays for a bundle by their names: the shared ones of ``bundles/overlays``, and the bundle's own.

    Args:
        bundle: its folder; an overlay of its own ``overlays/`` goes before a shared one of that name.
        kind: ``generation`` for those of the generators, which stand in a folder of that name.
    """
    folders = (_find("bundles", "overlays"), bundle / "overlays")
    found = {path.stem: path for folder in folders for path in (folder / kind).glob("*.json")}
    return dict(sorted(found.items()))


def overlays_that_fit(bundle: Path, kind: str = "") -> dict[str, Path]:
    """Of :func:`overlay_files` the bundle's own, and the shared ones where it trains what they are about.

    Those of ``bundles/overlays`` are about a network with a quantizer in ``train.json``, those of the generators about
    ``train_autoregressive.json`` and ``train_diffusion.json``. A file that cannot be read takes none.
    """
    own = bundle / "overlays" / kind
    if kind:
        shared = any(bundle.glob("train_*.json"))
    else:
        try:
            config = json.loads((bundle / "train.json").read_text(encoding="utf-8"))
            shared = config["network_def"]["quantizer"] is not None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            shared = False
    return {name: path for name, path in overlay_files(bundle, kind).items() if shared or path.parent == own}


def overlay_path(name: str, bundle: Path, kind: str = "") -> Path:
    """File of an overlay, by its path or by its name; see :func:`overlay_files`.

    Raises:
        VaevqMedError: there is none of that name; the message names the nearest.
    """
    if name.endswith(".json") and Path(name).is_file():
        return Path(name)
    known = overlay_files(bundle, kind)
    if name in known:
        return known[name]
    hint = did_you_mean(name, known, f"there are {', '.join(known)}")
    where = Path("overlays", kind).as_posix()
    raise VaevqMedError(f"bundle {bundle.name}: found no overlay {name!r}, expected a file of {where}/; {hint}")


def overlay_title(path: Path) -> str:
    """What tables call the method that an overlay makes: its ``_title_``, or its file's name where it has none."""
    return overlay_text(path, "_title_", path.stem)


def overlay_text(path: Path, key: str, otherwise: str) -> str:
    """What an overlay says of itself under ``_title_`` or ``_notes_``; something else where it cannot be read."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return otherwise
