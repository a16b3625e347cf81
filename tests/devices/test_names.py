"""The names and types that the ``device`` option accepts."""

from __future__ import annotations

import pytest

from ndcache.devices import open_device


@pytest.mark.parametrize("device", ["gpuu", "GPU", "gpu:", "gpu:-1", "cuda:", "mps", "", "cpu:0"])
def test_an_unknown_device_name_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="device must be 'cpu', 'gpu', 'gpu:N', 'cuda', 'cuda:N' or 'auto'"):
        open_device(device)


@pytest.mark.parametrize("device", [None, 0, object()])
def test_a_device_of_an_unknown_type_is_refused(device: object) -> None:
    with pytest.raises(TypeError, match="device must be a string"):
        open_device(device)
