"""What every generator has unless it says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators.base import Generator


class Unlabeled(Generator):
    """One that says nothing of classes."""

    kind = "indices"
    settings = MappingProxyType({})

    def sizes(self, tokens: Mapping[str, Any], where: str) -> dict[str, tuple[Any, Any]]:
        return {}

    def draws(self, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError


def test_a_generator_that_names_no_classes_has_none() -> None:
    Unlabeled().check_fit({"kind": "indices", "label": {"names": []}}, "store")
    with pytest.raises(VaevqMedError, match="num_classes 2, expected num_classes 0"):
        Unlabeled().check_fit({"kind": "indices", "label": {"names": ["t1c", "t2f"]}}, "store")
    assert Unlabeled().null_class == 0
