"""Further words of a row's commands, read as the commands read them, before anything is trained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vaevq_med.core.errors import VaevqMedError

# What is found does not depend on them.
_NOT_SETTINGS = frozenset({"samples", "dataset", "output_dir", "workers", "device", "batch_size", "cache_dir"})


def split_words(option: str, text: str) -> tuple[str, ...]:
    """Words of a shell.

    Raises:
        VaevqMedError: a quotation mark that nothing closes.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise VaevqMedError(f"{option}: found {text!r} ({error}), expected words of a shell") from None


@dataclass(frozen=True)
class Words:
    """A command line of ``vaevq-med``, parsed.

    Attributes:
        values: of every parameter of the command.
        given: names of those that the command line gives.
    """

    values: Mapping[str, Any]
    given: Sequence[str]

    @classmethod
    def of(cls, option: str, line: Sequence[str], words: Sequence[str]) -> Words:
        """Parse without running.

        Args:
            option: which of the comparison's options the words come from.
            line: the command's name and all its words.
            words: those of the option, for messages.

        Raises:
            VaevqMedError: the command would refuse them.
        """
        import typer.main

        from vaevq_med.cli.app import app

        name, *arguments = line
        command: Any = typer.main.get_command(app)
        try:
            context = command.commands[name].make_context(name, arguments)
        except Exception as error:
            if not hasattr(error, "format_message"):  # Typer's or Click's, depending on Typer's version
                raise
            said = " ".join(error.format_message().split())
            raise VaevqMedError(f"{option}: found {shlex.join(words)!r} ({said}), expected options of {name}") from None
        given = [key for key in context.params if context.get_parameter_source(key).name == "COMMANDLINE"]
        return cls(dict(context.params), given)

    def decisive(self) -> dict[str, Any]:
        """What is given and changes figures, as JSON-ready values."""
        chosen = {key: self.values[key] for key in sorted(self.given) if key not in _NOT_SETTINGS}
        return json.loads(json.dumps(chosen, default=str))
