"""What a bundle does before it runs: find its own configuration, refuse misspelt ids, report errors in a line.

MONAI merges overrides into a configuration without looking whether anything reads them, so ``--lsst 9`` would
train for an hour with the default. :func:`initialize` is called by every bundle's ``initialize`` section.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from types import FrameType
from typing import Any

import torch
from monai.bundle import BundleWorkflow, ConfigParser
from monai.bundle.properties import InferProperties, MetaProperties, TrainProperties
from monai.data import set_track_meta
from monai.utils import ensure_tuple, set_determinism

from vaevq_med.core.components import trust
from vaevq_med.core.errors import VaevqMedError, root_cause
from vaevq_med.core.names import did_you_mean
from vaevq_med.core.options import expect, is_int
from vaevq_med.images.manifest import load_manifest
from vaevq_med.trained.device import named_device
from vaevq_med.training import distributed

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


def _callers() -> Iterator[FrameType]:
    """The frames of the call stack, the nearest first."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def running_parser() -> ConfigParser | None:
    """The parser of the MONAI bundle workflow that is running, found on the call stack."""
    for frame in _callers():
        owner = frame.f_locals.get("self")
        if isinstance(owner, BundleWorkflow) and hasattr(owner, "parser"):
            return owner.parser
    return None


def _own_ids() -> frozenset[str]:
    """The ids of the running bundle's own file, the first one that MONAI was given; none outside one.

    An override may replace a part of the configuration by one that no longer refers to an id, which is then no
    misspelling.
    """
    for frame in _callers():
        files = frame.f_locals.get("config_file")
        if files and frame.f_globals.get("__name__") == "monai.bundle.scripts":
            return frozenset(map(str, ConfigParser.load_config_file(ensure_tuple(files)[0])))
    return frozenset()


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


def shared(component: Any) -> Any:
    """A component defined elsewhere in the configuration, as an entry of a list.

    MONAI's ``check_properties`` reads every entry of ``train#handlers`` as a mapping with a ``_target_``, so a plain
    reference cannot stand there.

    Args:
        component: a reference such as ``@tracker``.
    """
    return component


def plain_config(parser: ConfigParser) -> dict[str, Any]:
    """The merged configuration without MONAI's metadata, as JSON-ready values."""
    config = {key: value for key, value in parser.get().items() if key != "_meta_"}
    return json.loads(json.dumps(config, default=str))


def current_config(**values: Any) -> dict[str, Any]:
    """The configuration of the running bundle; empty outside one.

    Args:
        **values: what stands in place of the expressions of those ids, so that a checkpoint holds plain values.
    """
    parser = running_parser()
    return {} if parser is None else {**plain_config(parser), **json.loads(json.dumps(values))}


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """End the program with one line on standard error: after an expected error with 2, after Ctrl-C with 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("vaevq-med: interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        cause = root_cause(error)
        if not isinstance(cause, VaevqMedError):
            raise
        print(f"vaevq-med: {cause}", file=sys.stderr)
        raise SystemExit(2) from error


def run(engine: Any) -> None:
    """Run an engine; an expected error ends the program with one line on standard error and exit code 2.

    A run that Ctrl-C stopped ends it with exit code 130: training with its checkpoint written.

    Args:
        engine: trainer or evaluator.
    """
    # ignite logs every exception that it passes on, which would stand above the one line, or twice with a traceback.
    engine.logger.addFilter(lambda record: "terminating due to exception" not in record.getMessage())
    with _in_one_line():
        engine.run()
    if getattr(engine.state, "interrupted", False):
        print(
            f"vaevq-med: interrupted at iteration {engine.state.iteration}; the same command goes on", file=sys.stderr
        )
        raise SystemExit(130)


def initialize(
    *,
    seed: int,
    build: str,
    dataset_dir: str | None = None,
    device: str | torch.device | None = None,
    deterministic: bool = False,
    tf32: bool = True,
    trusted: Any = (),
    config: Mapping[str, Any] | None = None,
) -> None:
    """Check the configuration, set seeds and the process group, and build the engine.

    What goes wrong ends the program with one line on standard error and exit code 2.

    Args:
        seed: seed of the initialization and the noise; further processes draw noise of their own.
        build: id of the engine to build now, e.g. ``train#trainer``, so that its errors are one line too.
        dataset_dir: slice data set that has to exist.
        device: device that has to exist.
        deterministic: ask PyTorch for deterministic algorithms.
        tf32: allow TF32 in matrix products and convolutions on GPUs that have it.
        trusted: packages whose components a checkpoint may name, beside this one and those that are published to it.
        config: configuration to check; by default the running bundle's.
    """
    parser = running_parser()
    with _in_one_line():
        trust(trusted)
        check_config(parser.get() if parser is not None and config is None else config or {}, _own_ids())
        expect(is_int(seed, 0, 2**63 - 1), "seed", seed, "a whole number from 0")
        named_device(device)
        if dataset_dir is not None:
            load_manifest(Path(dataset_dir))
        distributed.start_process_group()
        set_track_meta(False)
        set_determinism(seed=None)
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not deterministic
        if parser is not None:
            engine = parser.get_parsed_content(build)
            if distributed.rank() > 0:
                # The networks were made alike; the noise of each process is its own, also after a resume.
                torch.manual_seed(seed + 1_000_003 * distributed.rank() + engine.state.iteration)
