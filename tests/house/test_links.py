"""The pages of the documentation lead to one another."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("[bdp]*/**/*.md")])


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_of_the_documentation_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target
