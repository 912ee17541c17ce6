"""The configuration of the bundle that is running, found on the call stack, for what it names to ask."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from monai.bundle import BundleWorkflow, ConfigParser
from monai.utils import ensure_tuple


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


def own_config() -> dict[str, Any]:
    """The content of the running bundle's own file, the first one that MONAI was given; empty outside one.

    An override may replace a part of the configuration by one that no longer refers to one of its ids, which is then no
    misspelling.
    """
    for frame in _callers():
        files = frame.f_locals.get("config_file")
        if files and frame.f_globals.get("__name__") == "monai.bundle.scripts":
            return ConfigParser.load_config_file(ensure_tuple(files)[0])
    return {}


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


def known_values(ids: Iterable[str]) -> dict[str, Any]:
    """What expressions of the running bundle came to, where they have been evaluated, to a plain value.

    Args:
        ids: of the expressions, with ``#`` between the parts.
    """
    parser = running_parser()
    if parser is None:
        return {}
    resolver, found = parser.ref_resolver, {}
    for name in ids:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            found[name] = json.loads(json.dumps(resolver.resolved_content[resolver.normalize_id(name)]))
    return found


def shared(component: Any) -> Any:
    """A component defined elsewhere in the configuration, as an entry of a list.

    MONAI's ``check_properties`` reads every entry of ``train#handlers`` as a mapping with a ``_target_``, so a plain
    reference cannot stand there.

    Args:
        component: a reference such as ``@tracker``.
    """
    return component
