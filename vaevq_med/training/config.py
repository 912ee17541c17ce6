"""What a bundle's configuration may say: no misspelt id, argument or component, and values of the type they have to be.

MONAI merges overrides into a configuration without looking whether anything reads them, so ``--lsst 9`` would
train for an hour with the default.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pydoc import ErrorDuringImport, locate
from typing import Any

from monai.bundle.properties import InferProperties, MetaProperties, TrainProperties

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.names import did_you_mean

ENTRY_POINTS = frozenset(
    {
        "imports",
        "initialize",
        "run",
        "training",
        "evaluating",
        "generating",
        "finalize",
        "_meta_",
        "_mode_",
        "_notes_",
        "_title_",
    }
)
_REFERENCE = re.compile(r"@(\w+)")
_SCALARS = {"int": (int,), "float": (int, float), "bool": (bool,)}
_WORDS = {"int": "a whole number", "float": "a number", "bool": "True or False", "None": "null"}


class ConfigError(VaevqMedError):
    """A configuration has an id or an argument that nothing reads."""


def _strings(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        for value in config.values():
            yield from _strings(value)
    elif isinstance(config, list):
        for value in config:
            yield from _strings(value)
    elif isinstance(config, str):
        yield config


def _components(config: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(config, Mapping):
        if "_target_" in config:
            yield path, config
        for key, value in config.items():
            yield from _components(value, f"{path}#{key}" if path else str(key))
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from _components(value, f"{path}#{number}")


def _suggestion(name: str, valid: set[str]) -> str:
    return did_you_mean(name, valid, f"valid names: {', '.join(sorted(valid))}", cutoff=0.5)


def _check_type(name: str, value: Any, annotation: Any, config: Mapping[str, Any]) -> None:
    """Refuse a plain value of another type than the argument's, where that is of numbers and truth values."""
    kinds = {kind.strip() for kind in str(annotation).split("|")}
    if not kinds <= {*_SCALARS, "None"}:
        return
    for _ in config:  # at most, where references go in a circle
        if isinstance(value, str) and value[:1] == "@" and value[1:] in config:
            name, value = value[1:], config[value[1:]]
    if isinstance(value, str) and value[:1] in ("@", "$", "%"):
        return
    if not any(kind == "None" if value is None else type(value) in _SCALARS.get(kind, ()) for kind in kinds):
        words = " or ".join(_WORDS[kind] for kind in _WORDS if kind in kinds)
        raise ConfigError(f"{name}: found {value!r}, expected {words}")


def _located(path: str, target: str) -> Any:
    """What a dotted name stands for.

    Raises:
        ConfigError: there is no such module, or it has no such name.
    """
    try:
        found = locate(target)
    except ErrorDuringImport as error:
        raise ConfigError(f"{path}: {target!r} fails to import ({error.value})") from error
    if found is not None:
        return found
    module, _, name = target.rpartition(".")
    owner = locate(module)
    otherwise = f"Python finds no {module}" if owner is None else f"{module} has no {name}"
    if owner is None and locate(module.partition(".")[0]) is None:
        otherwise += "; install its package, or name the folder that holds it in PYTHONPATH"
    hint = did_you_mean(name, [] if owner is None else dir(owner), otherwise)
    raise ConfigError(f"{path}: found {target!r}, expected a class or a function: {hint}")


def check_targets(config: Mapping[str, Any]) -> None:
    """Refuse a ``_target_`` that stands for nothing.

    Raises:
        ConfigError: naming the nearest name of its module.
    """
    for path, component in _components(config):
        if _is_dotted(component["_target_"]):
            _located(path, component["_target_"])


def _is_dotted(target: Any) -> bool:
    """Whether it is a full name, neither one of MONAI's own nor an expression."""
    return isinstance(target, str) and "." in target and target[:1] not in ("$", "@", "%")


def check_config(config: Mapping[str, Any], own_ids: Iterable[str] = ()) -> None:
    """Refuse top-level ids that nothing refers to, and arguments that a ``_target_`` does not take.

    Arguments of this package's components that are numbers or truth values have to be such.

    Args:
        config: the merged, unresolved configuration.
        own_ids: ids that the bundle's own file has, which stay legal where an override replaced what referred to them.

    Raises:
        ConfigError: naming the nearest valid name, or what the value has to be; or a ``_target_`` is not found.
    """
    properties: dict[str, Any] = {**TrainProperties, **InferProperties, **MetaProperties}
    # Where a run's folder is named by its parts, nothing may refer to output_dir.
    used = {str(prop["id"]).split("::")[0] for prop in properties.values()} | ENTRY_POINTS | {"output_dir"}
    for text in _strings({key: value for key, value in config.items() if key != "_meta_"}):
        used.update(_REFERENCE.findall(text))
    known = {key for key in config if key in used}
    for key in config:
        if key not in used and key not in own_ids:
            raise ConfigError(
                f"found the unknown id {key!r}, expected one that the bundle uses: {_suggestion(key, known)}"
            )
    for path, component in _components(config):
        target = component["_target_"]
        if not _is_dotted(target):
            continue
        found = _located(path, target)
        try:
            parameters = inspect.signature(found).parameters
        except (TypeError, ValueError):
            continue
        if target.startswith("vaevq_med."):
            for key in (key for key in component if key in parameters):
                _check_type(f"{path}#{key}", component[key], parameters[key].annotation, config)
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            continue
        for key in component:
            if not key.startswith("_") and key not in parameters:
                raise ConfigError(
                    f"found the unknown argument {key!r} at {path!r}, expected one of {target}: "
                    f"{_suggestion(key, set(parameters))}"
                )
