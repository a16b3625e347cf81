"""Test the suggestion for names and patterns that match nothing."""

from __future__ import annotations

import pytest

from ndcache.format.suggestion import suggest

NAMES = [f"model.layers.{layer}.{kind}.weight" for layer in range(12) for kind in ("q", "k")]
NAMES += ["model.embed", "strange[0].bias"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("model.layers", "'model.layers.*' (24 tensors)"),
        ("model.layers.", "'model.layers.*' (24 tensors)"),
        ("model.layers.1", "'model.layers.1.*' (2 tensors)"),
        ("model.lay", "'model.lay*' (24 tensors)"),
        ("q.weight", "'*.q.weight' (12 tensors)"),
        ("layers", "'*.layers.*' (24 tensors)"),
        ("eight", "'*eight*' (24 tensors)"),
        ("modell.layers.3", "'model.layers.3.*' (2 tensors)"),
        ("model.layer.3.*", "'model.layers.3.*' (2 tensors)"),
        ("model.layers.1.q.wieght", "'model.layers.1.q.weight'"),
        ("model.embde", "'model.embed'"),
        ("strange[0].bais", "'strange[0].bias'"),
    ],
)
def test_what_is_meant(typed: str, meant: str) -> None:
    assert suggest(typed, NAMES) == f"; did you mean {meant}?"


@pytest.mark.parametrize("typed", ["", "*", "zzz", "?"])
def test_nothing_is_close(typed: str) -> None:
    assert suggest(typed, NAMES) == ""


def test_where_only_a_name_can_be_meant() -> None:
    assert suggest("model.layers.1.q", NAMES, may_be_pattern=False) == "; did you mean 'model.layers.1.q.weight'?"


@pytest.mark.once
def test_a_suggestion_for_very_many_names_comes_at_once() -> None:
    names = [f"model.layers.{layer}.weight" for layer in range(100_000)]
    assert suggest("model.layers", names) == "; did you mean 'model.layers.*' (100,000 tensors)?"
    assert suggest("modle.layers.1.weight", names) == "; did you mean 'model.layers.1.weight'?"
