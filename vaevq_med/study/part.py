"""What the parts of every study file are made of: fields that are known, names, counts and lists without repeats."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from vaevq_med.core.declared import with_lists
from vaevq_med.core.names import in_one_line, nearest


def refuse(message: str, kind: str = "said") -> PydanticCustomError:
    """An error of a field, in this toolkit's words.

    Args:
        message: what stands after "FIELD is", or, of the kind ``name``, after "FIELD.".
        kind: ``said`` or ``name``.
    """
    return PydanticCustomError(kind, "{said}", {"said": message})


def check_names(found: object, known: Collection[str]) -> None:
    """Refuse a mapping with a name that is not known, in words that have the nearest one."""
    for name in found if isinstance(found, Mapping) else ():
        if name not in known:
            expected = nearest(name, known) or f"one of {', '.join(known)}"
            raise refuse(f"{in_one_line(str(name))} is unknown; expected {expected}", "name")


_OWN_FILES = re.compile(r"(study|results|comparison|table|run|samples)\.\w+|.*\.(png|log)", re.IGNORECASE)
"""Names that a study's output has for something else."""


def _free(name: str) -> str:
    if _OWN_FILES.fullmatch(name):
        raise refuse(f"{name}, which the output folder has for something else; expected another name")
    return name


def each_once(values: list[Any]) -> list[Any]:
    """A list in which nothing stands twice."""
    repeated = next((value for value in values if values.count(value) > 1), None)
    if repeated is not None:
        raise refuse(f"{json.dumps(values)}; expected {repeated} once")
    return values


def named(value: Any) -> Any:
    """``vqgan`` as ``{name: vqgan}``."""
    return {"name": value} if isinstance(value, str) else value


def by_name(items: list[Any]) -> list[Any]:
    """A list of named parts, each name once."""
    names = [item.name for item in items]
    for name in names:
        if names.count(name) > 1:
            raise refuse(f"a list with {name} more than once; expected each name once")
    return items


Name = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$", max_length=100), AfterValidator(_free)]
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """A mapping of a study file; an unknown field is refused, and one item stands for a list of one."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        check_names(value, [entry.alias or name for name, entry in cls.model_fields.items()])
        return with_lists(value, {name: entry.annotation for name, entry in cls.model_fields.items()})


class AnyStudy(Part):
    """What every study says.

    Attributes:
        study: its kind.
        name: what messages and records call it; what it does where empty.
    """

    study: str
    name: Name = ""

    def text(self) -> str:
        """As a file that says the same."""
        content = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        content |= {"report": content.pop("report")} if "report" in content else {}  # last, as what is made last
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
