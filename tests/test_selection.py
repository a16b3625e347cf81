"""The environments of tox, each with tests of its own choice, leave no test out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

_SELECTIONS = re.findall(r'pytest .*-m "(.*?)"', (Path(__file__).parent.parent / "tox.ini").read_text("utf-8"))


@pytest.mark.parametrize(("torch", "once"), [(False, False), (False, True), (True, False), (True, True)])
def test_every_test_is_selected_by_an_environment(torch: bool, once: bool) -> None:
    marks = {"cuda": False, "torch": torch, "once": once}
    assert len(_SELECTIONS) == 4
    assert any(eval(selection, {}, marks) for selection in _SELECTIONS)
