"""Flags of a command from the dataclass that declares its options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
import typer.main


def with_flags(kind: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the fields of a dataclass as flags; it takes them as ``options``, after its own parameters.

    Args:
        kind: dataclass whose fields are made by :func:`vaevq_med.core.declared.option`.
    """
    names = [entry.name for entry in fields(kind)]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]

        @functools.wraps(command)
        def run(**values: Any) -> Any:
            options = kind(**{name: _value(values.pop(name)) for name in names})
            return command(**values, options=options)

        run.__signature__ = inspect.Signature([*own, *_parameters(kind)])  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return decorate


def _parameters(kind: type) -> list[inspect.Parameter]:
    hints = get_type_hints(kind)
    found = []
    for entry in fields(kind):
        metadata = dict(entry.metadata)
        # A switch that is off by default has no opposite.
        switch = f"--{entry.name.replace('_', '-')}" if hints[entry.name] is bool and entry.default is False else ""
        flag = metadata.pop("flag") or switch
        hint: Any = _listed(hints[entry.name])
        annotation = Annotated[hint, typer.Option(*([flag] if flag else []), **metadata)]
        default = inspect.Parameter.empty if entry.default is MISSING else entry.default
        found.append(
            inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return found


_enumeration: Any = StrEnum


def _listed(hint: Any) -> Any:
    """A list of literals as one of an enumeration, since Typer knows no other."""
    for part in get_args(hint):
        items = get_args(part)
        if get_origin(part) is list and get_origin(items[0]) is Literal:
            several: Any = list
            return several[_enumeration("Choice", [(value, value) for value in get_args(items[0])])] | None
    return hint


def parse_flags(kind: type, words: Sequence[str]) -> dict[str, Any]:
    """The options that words of a command line give, as a study file has them.

    Raises:
        ValueError: a word is no flag of these, or no value of one.
    """
    app = typer.Typer(add_completion=False, context_settings={"help_option_names": []})
    app.command()(with_flags(kind)(lambda options: None))
    command: Any = typer.main.get_command(app)
    try:
        context = command.make_context("", [*words])
    except Exception as error:
        if not hasattr(error, "format_message"):  # Typer's or Click's, depending on Typer's version
            raise
        raise ValueError(" ".join(error.format_message().split())) from None
    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
    values = {name: _value(context.params[name]) for name in given}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _value(value: Any) -> Any:
    """A value of Typer's as the dataclass declares it: no enumeration, and None in place of an empty list."""
    if isinstance(value, list | tuple):
        return [_value(item) for item in value] or None
    return value.value if isinstance(value, Enum) else value
