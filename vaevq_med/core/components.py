"""Which classes a file may name, and how they are found and built: what comes from a file runs nothing unasked.

A name is imported only where its first package is trusted: this package, one that an installed distribution publishes
in the entry-point group ``vaevq_med.components``, or one that the user names. A checkpoint cannot add to them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.names import in_one_line, listed

GROUP = "vaevq_med.components"
OWN = "vaevq_med"

_named_by_user: set[str] = set()


class ComponentError(VaevqMedError):
    """A file names a component that is not trusted, does not exist, or is of another kind."""


def trust(packages: object) -> None:
    """Let files name components of these packages, in this process.

    Args:
        packages: names of top-level packages, such as ``my_quantizers``, or one of them.

    Raises:
        ComponentError: they are no list, or one is no name of a top-level package.
    """
    if isinstance(packages, str):
        packages = listed(packages)
    if not isinstance(packages, Iterable):
        raise ComponentError(f"trusted is {packages!r}; expected a list of the names of packages")
    for name in packages:
        if not isinstance(name, str) or not name.isidentifier():
            raise ComponentError(
                f"trusted is {name!r}; expected the name of a top-level package, such as my_quantizers"
            )
        _named_by_user.add(name)


def trusted_packages() -> frozenset[str]:
    """The packages whose components a file may name."""
    return frozenset({OWN, *_published(), *_named_by_user})


def named_by_user() -> list[str]:
    """The packages that were named to :func:`trust`, which the commands of a study are told in turn."""
    return sorted(_named_by_user)


@cache
def _published() -> frozenset[str]:
    """The packages that installed distributions publish."""
    return frozenset(entry.value.split(":")[0].split(".")[0] for entry in entry_points(group=GROUP))


def resolve(target: str, base: type, *, own: str = OWN) -> Callable[..., Any]:
    """The class of a dotted name, or a preset of one, as a file gives it.

    A preset is a class method that its class lists in ``presets``.

    Args:
        target: the dotted name, e.g. ``my_quantizers.cosine.CosineVQ``.
        base: what the class must derive from.
        own: the part of this package that the name may lie in.

    Raises:
        ComponentError: the package is not trusted, the module cannot be imported, or the name is of something else.
    """
    first = str(target).split(".")[0]
    if first not in trusted_packages():
        known = ", ".join(sorted(trusted_packages()))
        raise ComponentError(
            f"found the component {target!r}, expected one of a trusted package ({known}); where you know what {first} "
            f"runs, trust it: --trusted \"['{first}']\" after a bundle, vaevq-med --trusted {first} before a command"
        )
    if first == OWN and not target.startswith(f"{own}."):
        raise ComponentError(f"found the component {target!r}, expected one of {own}")
    found, method = _find(target)
    if found is None or not issubclass(found, base):
        raise ComponentError(f"found the component {target!r}, expected a class derived from {base.__name__}")
    if method is None:
        return found
    if method not in getattr(found, "presets", ()):
        raise ComponentError(f"found the component {target!r}, expected a class, or one of its presets")
    preset: Callable[..., Any] = getattr(found, method)
    return preset


def _find(target: str) -> tuple[type | None, str | None]:
    """The class that the name stands for, or None, and the name of its attribute where that is what is named."""
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:end])
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
                continue
            raise ComponentError(f"component {target!r}: found no module {error.name!r}, which it needs") from error
        except Exception as error:
            raise ComponentError(f"component {target!r}: its module fails to import ({error})") from error
        name, *rest = parts[end:]
        if not hasattr(module, name):
            raise ComponentError(
                f"component {target!r}: {module_name} has no {name}, expected the name of a class in it"
            )
        kind = getattr(module, name)
        # What a module merely imports is not its own, such as a module of PyTorch.
        if not isinstance(kind, type) or kind.__module__.split(".")[0] not in trusted_packages() or len(rest) > 1:
            return None, None
        return kind, rest[0] if rest else None
    raise ComponentError(
        f"component {target!r}: found no such module, expected one of an installed package or of a folder in PYTHONPATH"
    )


def build(definition: Any, base: type, *, own: str = OWN) -> Any:
    """Build what a definition of plain values describes, the inner components first.

    Args:
        definition: mappings with ``_target_`` and the arguments, ``_notes_`` left out; lists; plain values.
        base: what each component must derive from.
        own: the part of this package that they may lie in.

    Raises:
        ComponentError: see :func:`resolve` and :func:`constructed`.
    """
    if isinstance(definition, Mapping):
        built = {key: build(value, base, own=own) for key, value in definition.items() if key != "_notes_"}
        target = built.pop("_target_", None)
        return built if target is None else constructed(resolve(target, base, own=own), built, f"component {target}")
    if isinstance(definition, list):
        return [build(value, base, own=own) for value in definition]
    return definition


def constructed(kind: Callable[..., Any], arguments: Any, what: str) -> Any:
    """What a class makes of the arguments that a file gives, which may be of any names, types and sizes.

    Args:
        kind: the class.
        arguments: by name.
        what: what messages call the class.

    Raises:
        ComponentError: the class takes others; the line has what it said.
    """
    try:
        return kind(**arguments)
    except VaevqMedError:
        raise
    except Exception as error:  # whatever a class raises of values that it does not check
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ComponentError(
            f"{what}: found arguments that it does not take ({in_one_line(said)[:200]}), expected those of its own file"
        ) from error
