"""Other libraries take tensors of PyTorch without a copy, through DLPack."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ndcache.torch

from ...helpers import models
from ...helpers.requirements import need_module

pytestmark = pytest.mark.torch


@pytest.fixture
def tensor(tmp_path: Path) -> Any:
    need_module("torch")
    models.simple_model(tmp_path, shards=1)
    return ndcache.torch.load(tmp_path)["layer.0"]


#: JAX is no dependency of the tests.
LIBRARIES = ["numpy", "tvm.runtime", *(["jax.dlpack"] if importlib.util.find_spec("jax") is not None else [])]


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_memory_is_shared(tensor: Any, library: str) -> None:
    array = need_module(library).from_dlpack(tensor)
    tensor[3] = 17
    values = array.numpy() if library == "tvm.runtime" else np.asarray(array)
    assert values[3] == 17
    assert (values == tensor.numpy()).all()
