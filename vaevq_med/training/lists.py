"""A word where a list is expected: ``--modalities t1n`` is one contrast, in any id of a bundle that takes a list."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pydoc import ErrorDuringImport, locate
from typing import Any

from monai.bundle import ConfigParser

from vaevq_med.core.names import listed

_LIST = re.compile(r"(?:typing\.|collections\.abc\.)?(?:Sequence|Collection|[Ll]ist|[Tt]uple)\[(.*)\]", re.DOTALL)
_ITEMS: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool}


def _union(annotation: Any) -> list[str]:
    """The members of a union, as it is written."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    members, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "|" and depth == 0:
            members.append("")
        else:
            members[-1] += letter
    return [member.strip() for member in members]


def _takes_only_lists_of(annotation: Any, value: Any) -> bool:
    """Whether an argument takes a list of any length, and not such an item by itself."""
    members = _union(annotation)
    matches = [match for member in members if (match := _LIST.fullmatch(member))]
    lists = [match for match in matches if "uple" not in match[0][:13] or match[1].endswith("...")]
    alone = any(isinstance(value, kind) for name, kind in _ITEMS.items() if name in members)
    return bool(lists) and not alone and not {"Any", "object"} & set(members)


def _is_item(value: Any) -> bool:
    """Whether it is one item of a list, or a tuple, as MONAI's command line has ``t1n,t2f``."""
    if isinstance(value, str):
        return not value.startswith(("@", "$", "%"))
    return isinstance(value, bool | int | float | tuple) or (isinstance(value, Mapping) and "_target_" in value)


def _at(config: Any, name: str) -> Any:
    for part in re.split("::|#", name):
        if isinstance(config, Mapping):
            config = config.get(part)
        else:
            config = config[int(part)] if isinstance(config, list) and part.isdecimal() else None
    return config


def _followed(config: Mapping[str, Any], name: str) -> str:
    """The id that a reference leads to in the end."""
    for _ in config:
        value = _at(config, name)
        if not isinstance(value, str) or not value.startswith("@"):
            break
        name = value[1:]
    return name.replace("::", "#")


def _arguments(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Ids of what is given to components, and what each is declared to be."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _arguments(value, f"{path}#{key}" if path else str(key))
        target = config.get("_target_")
        if isinstance(target, str) and "." in target and target[0] not in "$@%":
            try:
                parameters = inspect.signature(locate(target)).parameters  # type: ignore[arg-type]
            except (TypeError, ValueError, ErrorDuringImport):
                return
            yield from ((f"{path}#{key}", parameters[key].annotation) for key in config if key in parameters)
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from _arguments(value, f"{path}#{number}")


def as_lists(config: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> dict[str, list[Any]]:
    """The lists for ids that have one item, or a tuple, where a list is expected.

    One is expected where a component's argument is declared as one, and at the top where the bundle's own file has one.

    Args:
        config: the merged configuration, unresolved.
        own: the content of the bundle's own file.

    Examples:
        >>> as_lists({"write": "png", "seed": 3}, {"write": ["png", "npz"], "seed": 0})
        {'write': ['png']}
    """
    found = {}
    for name, annotation in _arguments(config):
        place = _followed(config, name)
        value = _at(config, place)
        if _is_item(value) and _takes_only_lists_of(annotation, value):
            found[place] = listed(value)
    for name, value in (own or {}).items():
        if isinstance(value, list) and _is_item(config.get(name)):
            found[name] = listed(config[name])
    return found


def put_lists(parser: ConfigParser, own: Mapping[str, Any] | None = None) -> None:
    """Put lists where one item stands and a list is expected, into a configuration that is being evaluated.

    Args:
        parser: of the running bundle.
        own: the content of the bundle's own file.
    """
    lists = as_lists(parser.get(), own)
    if not lists:
        return
    evaluated = dict(parser.ref_resolver.resolved_content)
    for name, items in lists.items():
        parser[name] = items
    # What has been evaluated before stays; MONAI forgets it with each change.
    parser.parse()
    changed = {parser.ref_resolver.normalize_id(name) for name in lists}
    parser.ref_resolver.resolved_content.update({name: one for name, one in evaluated.items() if name not in changed})
