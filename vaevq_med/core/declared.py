"""Options that are declared once, in a dataclass: a command's flags, and what a study file may say of the command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, field, fields
from typing import Any


def option(default: Any = MISSING, help: str = "", *, flag: str = "", **further: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value where it is not given.
        help: what it is, in a sentence.
        flag: its name on the command line, where that is not the field's.
        **further: what else the command line says of it: ``metavar``, ``min``.
    """
    return field(default=default, metadata={"help": help, "flag": flag, **further})


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
