"""A bundle's files composed with overlays and overrides, and what of them decides a row's figures."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaevq_med.core.components import named_by_user
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.folder import difference
from vaevq_med.core.names import did_you_mean
from vaevq_med.core.resources import bundle_path, overlay_files, overlay_path, overlay_title

# Where and under what name a run is tracked, on what device it runs and what may be read change no figure.
_NOT_SETTINGS = frozenset(
    {
        *("_notes_", "_title_", "_meta_", "imports", "bundle_root", "dataset_dir", "output_dir", "device"),
        *("num_workers", "tracking_uri", "experiment", "run_name", "parent_run_id", "checkpoint_interval", "resume"),
        "trusted",
    }
)


@dataclass(frozen=True)
class Bundle:
    """A MONAI bundle with ``train.json`` and ``evaluate.json``.

    Attributes:
        name: its folder's name.
        path: the folder.
    """

    name: str
    path: Path

    @classmethod
    def find(cls, name: str) -> Bundle:
        """A bundle by the name of an installed one, or by its folder."""
        path = Path(name) if (Path(name) / "train.json").is_file() else bundle_path(name)
        for file in ("train.json", "evaluate.json"):
            if not (path / file).is_file():
                raise VaevqMedError(f"{path}: found no {file}, expected a bundle that trains and evaluates")
        return cls(path.resolve().name, path)

    def overlay(self, name: str, kind: str = "") -> Path:
        """File of an overlay, ``generation`` for those of the generators."""
        return overlay_path(name, self.path, kind)

    def title(self, name: str) -> str:
        """What the overlay of a name calls itself; the name where there is none."""
        return overlay_title(overlay_files(self.path).get(name, Path(name)))

    def read(self, file: str, overlays: Sequence[str] = (), kind: str = "") -> dict[str, Any]:
        """A configuration merged with overlays, unresolved."""
        from monai.bundle import ConfigParser

        paths = [self.path / file, *(self.overlay(name, kind) for name in overlays)]
        for path in paths:
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise VaevqMedError(f"{path}: found an unreadable file ({error}), expected a configuration") from None
            if not isinstance(content, dict):
                raise VaevqMedError(f"{path}: found {type(content).__name__}, expected a mapping of ids")
        parser = ConfigParser()
        try:
            parser.read_config([str(path) for path in paths])
        except Exception as error:  # MONAI's merging stumbles in several ways over ids without a place
            names = ", ".join(path.name for path in paths)
            raise VaevqMedError(f"{names}: found what cannot be merged ({error}), expected overlays of ids") from error
        return parser.get()


def check_ids(
    option: str,
    chosen: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    own: Collection[str],
    files: Sequence[str],
) -> None:
    """Refuse overrides that no configuration has a place for.

    Args:
        option: what the study calls them.
        chosen: ids, and the configurations of which one has to have it.
        own: top-level ids that the study's other fields set.
        files: names of the configurations.

    Raises:
        VaevqMedError: naming the first such id, and the nearest known one.
    """
    known = sorted({name for _, places in chosen for config in places for name in config})
    for key, places in chosen:
        root = key.split("#")[0].split("::")[0]
        if root in own:
            raise VaevqMedError(f"{option}: found {root!r}, which the comparison sets itself; expected its own option")
        if root not in known:
            hint = did_you_mean(root, known, "no file has it")
            expected = f"expected one of {' or '.join(files)}"
            raise VaevqMedError(f"{option}: found the unknown id {root!r}, {expected}; {hint}")
        if not any(has_id(config, key) for config in places):
            where = f"neither {' nor '.join(files)} has" if len(files) > 1 else f"{files[0]} does not have"
            raise VaevqMedError(f"{option}: found {key!r}, which {where} a place for")


def check_components(label: str, config: Mapping[str, Any]) -> None:
    """Refuse a component that is not there, before anything is trained.

    Raises:
        VaevqMedError: naming the row and the component.
    """
    from vaevq_med.training.config import ConfigError, check_targets

    try:
        check_targets(config)
    except ConfigError as error:
        raise VaevqMedError(f"{label}: {error}") from None


def has_id(config: Mapping[str, Any], key: str) -> bool:
    """Whether a configuration has a place for an override: its top-level id, and mappings or lists on the way down."""
    first, *others = key.replace("::", "#").split("#")
    if first not in config:
        return False
    found: Any = config[first]
    for name in others:
        if isinstance(found, Mapping):
            found = found.get(name)
        elif isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        else:
            return False
    return True


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Overrides as MONAI's command line has them: a text is read there, and other values are written as Python does.

    None is written as an expression, since MONAI leaves out what is None there.
    """
    written = {key: value if isinstance(value, str) else repr(value) for key, value in values.items()}
    return {key: "$None" if value == "None" else value for key, value in written.items()}


def literal(text: str) -> Any:
    """An override as MONAI's command line reads it: a literal, or else a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def tool_words() -> list[str]:
    """``vaevq-med`` as words, with the packages that are trusted here."""
    trusted = [word for name in named_by_user() for word in ("--trusted", name)]
    return [sys.executable, "-m", "vaevq_med.cli.app", *trusted]


def trusting(config: Mapping[str, Any]) -> dict[str, str]:
    """The override that hands a bundle's configuration the packages that are trusted here."""
    return {"trusted": repr(named_by_user())} if "trusted" in config and named_by_user() else {}


def flags(overrides: Mapping[str, str]) -> list[str]:
    """Overrides as words of MONAI's command line."""
    return [word for key, value in overrides.items() for word in (f"--{key}", value)]


def decisive(config: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """A configuration's values that change figures, with the overrides beside them."""
    kept = {key: value for key, value in config.items() if key not in _NOT_SETTINGS}
    return {
        **json.loads(json.dumps(kept, default=str)),
        "overrides": {key: value for key, value in overrides.items() if key.split("#")[0] not in _NOT_SETTINGS},
    }


def settings_hash(settings: Mapping[str, Any]) -> str:
    """SHA-256 over sorted JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def first_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first setting of two rows that differs, in words; None where all are alike.

    An override says it best; the rest follows from it.
    """
    before, after = (_without_empty({"overrides": _overrides(row), **row}) for row in (found, expected))
    words = difference(before, after)
    return words and re.sub(r"\b(overrides|train|evaluate)\.", "", words)


def _overrides(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: part["overrides"] for key, part in row.items() if isinstance(part, Mapping) and "overrides" in part}


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without mappings that hold nothing."""
    kept = {key: _without_empty(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value != {}}
