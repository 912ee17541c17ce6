"""Options that are declared once, in a dataclass: a command's flags, and what a study file may say of the command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, field, fields
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


def option(default: Any = MISSING, help: str = "", *, flag: str = "", **further: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value where it is not given.
        help: what it is, in a sentence.
        flag: its name on the command line, where that is not the field's.
        **further: what else the command line says of it: ``metavar``, ``min``.
    """
    return field(default=default, metadata={"help": help, "flag": flag, **further})


def takes_list(annotation: Any) -> bool:
    """Whether a field holds a list, or a tuple of any length.

    >>> takes_list(list[str] | None), takes_list(tuple[int, ...]), takes_list(tuple[int, int]), takes_list(str)
    (True, True, False, False)
    """
    kinds = (annotation, *get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = tuple(kind.__origin__ if get_origin(kind) is Annotated else kind for kind in kinds)
    return any(
        get_origin(kind) is list or (get_origin(kind) is tuple and get_args(kind)[1:] == (...,)) for kind in kinds
    )


def with_lists(values: Any, annotations: Mapping[str, Any]) -> Any:
    """Values by name, one item in a list where a list is expected; what is no mapping as it is.

    >>> with_lists({"split": "test", "seed": 1}, {"split": list[str] | None, "seed": int})
    {'split': ['test'], 'seed': 1}
    """
    if not isinstance(values, Mapping):
        return values
    items = (str, int, float)
    return {
        name: [value] if isinstance(value, items) and takes_list(annotations.get(name)) else value
        for name, value in values.items()
    }


class Declared:
    """A dataclass of options that takes one item where it has a list."""

    def __post_init__(self) -> None:
        """Put it in a list."""
        given: Any = vars(self)
        for name, value in with_lists(given, get_type_hints(type(self))).items():
            if value is not given[name]:
                object.__setattr__(self, name, value)


def as_words(kind: type, given: Mapping[str, Any]) -> list[str]:
    """Values of a dataclass of options as words of the command line.

    Args:
        kind: the dataclass.
        given: some of its fields; None, and False where that is the default, need no word.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Options:
        ...     max_items: int = option(3, "Items.")
        ...     flip: bool = option(True, "In mirror image too.")
        >>> as_words(Options, {"max_items": 5, "flip": False})
        ['--max-items', '5', '--no-flip']
    """
    words = []
    for entry in fields(kind):
        flag, value = entry.metadata["flag"] or f"--{entry.name.replace('_', '-')}", given.get(entry.name)
        if isinstance(value, bool):
            if value or entry.default is not False:
                words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            words += [word for item in (value if isinstance(value, list) else [value]) for word in (flag, str(item))]
    return words
