"""What a person sees of a model's weights: names, tables, suggestions and short texts."""

from __future__ import annotations

import pickle
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import ndcache

from .helpers import models

Weights: TypeAlias = "ndcache.Weights[np.ndarray[Any, Any]]"

NAMES = ("model.layers.0.q", "model.layers.0.k", "model.layers.10.q", "lm_head")


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    models.write_model(tmp_path, [{name: np.ones((2, 3), np.float32) for name in NAMES}])
    return ndcache.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("lm_haed", "did you mean 'lm_head'?"),
        ("layers.0.q", "did you mean 'model.layers.0.q'?"),
        ("model.layers.0", "2 names begin with it: match('model.layers.0.*')"),
        ("zzz", ""),
    ],
)
def test_a_missing_name_gets_a_suggestion(weights: Weights, name: str, suggestion: str) -> None:
    with pytest.raises(KeyError) as caught:
        weights[name]
    assert str(caught.value) == f"no tensor is called {name!r}" + (f"; {suggestion}" if suggestion else "")
    assert caught.value.args == (name,)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert name not in weights
    assert weights.get(name) is None


def test_match(weights: Weights) -> None:
    assert list(weights.match("model.layers.0.*")) == ["model.layers.0.q", "model.layers.0.k"]
    assert weights.match("lm_head")["lm_head"] is weights["lm_head"]
    assert weights.match("LM_*") == {}
    wrong: Any = ["lm_*"]  # which would match nothing, in silence
    with pytest.raises(TypeError, match=r"pattern must be a text, not \['lm_\*'\]"):
        weights.match(wrong)


def test_names_are_completed(weights: Weights) -> None:
    assert weights._ipython_key_completions_() == list(NAMES)
    weights.close()
    assert weights._ipython_key_completions_() == []


def test_repr_has_the_first_names(weights: Weights) -> None:
    assert repr(weights) == (
        "<Weights: 4 tensors, 96 B, on cpu: 'model.layers.0.q', 'model.layers.0.k', 'model.layers.10.q', …>"
    )


class Cells(HTMLParser):
    """The texts of the rows of a table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1].append(data)


def test_the_table_of_a_notebook(tmp_path: Path) -> None:
    models.write_model(tmp_path, [{"<b>&": np.ones((2, 3), np.float32)}, {"s": np.ones((), np.uint8)}])
    weights = ndcache.load(tmp_path, verify="always")
    assert Cells(weights._repr_html_()).rows == [
        ["name", "shape", "dtype", "size", "shard", "checked by"],
        ["<b>&", "2 × 3", "float32", "24 B", "params_shard_0.bin", "md5"],
        ["s", "scalar", "uint8", "1 B", "params_shard_1.bin", "md5"],
    ]
    weights.close()
    assert "closed" in weights._repr_html_()


def test_names_of_any_kind_can_be_shown(tmp_path: Path) -> None:
    models.write_model(tmp_path, [{"<script>\x1b[31m": np.ones(1, np.uint8), "a" * 500: np.ones(1, np.uint8)}])
    weights = ndcache.load(tmp_path)
    assert len(repr(weights)) < 200
    html = weights._repr_html_()
    assert "<script>" not in html
    assert html.isprintable()


def test_the_table_of_a_huge_model_is_cut(tmp_path: Path) -> None:
    models.write_model(tmp_path, [{f"t{index}": np.ones(1, np.uint8) for index in range(5000)}])
    html = ndcache.load(tmp_path)._repr_html_()
    rows = Cells(html).rows
    assert [row[0] for row in rows[1:3]] == ["t0", "t1"]
    assert [row[0] for row in rows[-6:]] == ["… 4,900 more …", "t4995", "t4996", "t4997", "t4998", "t4999"]
    assert rows[1][-1] == "size alone"
    assert len(html) < 50_000


def test_dir_shows_the_public_names() -> None:
    shown = {name for name in dir(ndcache) if not name.startswith("__")}
    assert {*ndcache.__all__, "errors", "tvm"} - {"__version__"} <= shown
    assert shown <= {*ndcache.__all__, "errors", "tvm", "torch", "dask", "ray", "mlc", "cache"}
    for name in shown:
        getattr(ndcache, name)
