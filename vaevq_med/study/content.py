"""What a study's file holds before it is a study: plain values, changed by their places, and complaints in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.study.part import named


class _Loader(yaml.SafeLoader):
    """Plain values, each key of a mapping once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True) if isinstance(key, yaml.ScalarNode) else key.value
            line = key.start_mark.line + 1
            if not isinstance(name, str | int | float | bool):
                raise yaml.YAMLError(f"line {line} has {key.value}; expected a name")
            if key.tag != "tag:yaml.org,2002:merge" and name in seen:
                raise yaml.YAMLError(f"line {line} repeats {key.value}; expected each name once")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _parse(path: Path) -> Any:
    text = path.read_text(encoding="utf-8-sig")
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except (TypeError, KeyError, AttributeError) as error:  # of a tag that does not fit its value
        raise yaml.YAMLError(f"found a value that is none of its kind ({error})") from None
    except RecursionError:
        raise yaml.YAMLError("found lists too deep to read") from None


def read_content(path: Path) -> Any:
    """The plain values of a ``.json`` file, or of a YAML file of any other name.

    Raises:
        VaevqMedError: it cannot be read, or holds no such values; one line that names the file and the place.
    """
    try:
        return _parse(path)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1} " if error.problem_mark else ""
        raise VaevqMedError(f"{path}: {line}is no YAML ({error.problem}); expected a study") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise VaevqMedError(f"{path}: {' '.join(str(error).split())}") from None


def assign(content: Any, text: str) -> None:
    """Change a field of plain values.

    Args:
        content: a study's, changed in place.
        text: ``FIELD=VALUE``, the field as a path with dots and the value in YAML.

    Raises:
        VaevqMedError: there is no such field, or no value.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise VaevqMedError(f"set is {text!r}; expected FIELD=VALUE, e.g. budget.steps=100")
    *way, last = key.strip().split(".")
    for number, name in enumerate(way):
        if name in ("set", "sample"):  # what follows is an id, whatever is in it
            way, last = way[: number + 1], ".".join([*way[number + 1 :], last])
            break
    try:
        for name in way:
            if isinstance(content, list):
                content[int(name)] = named(content[int(name)])
            content = content[int(name)] if isinstance(content, list) else content.setdefault(name, {})
        content[int(last) if isinstance(content, list) else last] = yaml.load(value, _Loader)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError):
        raise VaevqMedError(f"set is {text!r}; expected a field of the study and a value in YAML") from None


_PLAIN = {
    **{"Input should be ": "", "List should have ": "", "a valid integer": "a whole number", "an object": "a mapping"},
    **{
        "a valid array": "a list",
        "a valid list": "a list",
        "a valid string": "a text",
        "a valid boolean": "true or false",
    },
    **{"greater than or equal to 1": "1 or more", "greater than or equal to": "at least"},
}


def complaint(error: ValidationError) -> str:
    """The first of them in one line: place, what it is, what is expected."""
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    said = first["msg"]
    if first["type"] == "name":
        return f"{place}{'.' if place else ''}{said}"
    if first["type"] == "said":
        return f"{place} is {said}"
    if first["type"] == "missing":
        return f"{place} is missing; expected it"
    found = json.dumps(first["input"], default=str)
    found = found if len(found) <= 60 else f"{found[:57]}..."
    if first["type"] == "string_pattern_mismatch":
        said = "letters, digits, '_', '-' and '.'"
    for words, plain in _PLAIN.items():
        said = said.replace(words, plain)
    return f"{place} is {found}; expected {said.split(' after validation')[0]}"
