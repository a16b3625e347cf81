"""Test reading .npz files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from ndcache.cli.npz_files import NpzError, read_npz


@pytest.mark.parametrize("damage", ["compressed bytes", "directory", "header"])
def test_a_damaged_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "in.npz"
    np.savez_compressed(path, a=np.arange(1000), b=np.arange(1000))
    data = bytearray(path.read_bytes())
    where = {"compressed bytes": 100, "directory": data.rindex(b"PK\x01\x02"), "header": 0}[damage]
    data[where : where + 4] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(NpzError, match=r"in\.npz"):
        list(read_npz(path))


def test_two_arrays_of_one_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "a.npy")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.write(tmp_path / "a.npy", "a.npy")
    with pytest.raises(NpzError, match=r"in\.npz has more than one array 'a'"):
        list(read_npz(tmp_path / "in.npz"))
