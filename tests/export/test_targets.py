"""Tests of a target's path and format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ndcache.export.targets import Target, parse_target


@pytest.mark.parametrize(
    ("text", "format", "path", "is_file", "found"),
    [
        ("a.safetensors", None, "a.safetensors", True, "safetensors"),
        ("A.SafeTensors", "safetensors", "A.SafeTensors", True, "safetensors"),
        ("a.npz", None, "a.npz", True, "npz"),
        ("folder", None, "folder", False, None),
        ("folder/", "tensor-cache", "folder", False, "tensor-cache"),
        ("Llama-3.1-8B", "safetensors", "Llama-3.1-8B", False, "safetensors"),
        ("folder/model.safetensors.index.json", None, "folder", False, "safetensors"),
        ("folder/tensor-cache.json", None, "folder", False, "tensor-cache"),
        ("model.gguf", None, "model.gguf", False, None),  # a directory that is there
    ],
)
def test_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, format: Any, path: str, is_file: bool, found: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").mkdir()
    assert parse_target(text, format) == parse_target(Path(text), format) == Target(tmp_path / path, is_file, found)


@pytest.mark.parametrize(
    ("text", "format", "error", "message"),
    [
        ("https://host/a.npz", None, ValueError, "path on this machine"),
        ("s3://bucket/folder", None, ValueError, "path on this machine"),
        ("", None, ValueError, "empty"),
        ("a.npz/", None, ValueError, "ends like a directory"),
        ("a.npz", "safetensors", ValueError, "in the format 'npz', not 'safetensors'"),
        ("folder/tensor-cache.json", "safetensors", ValueError, "in the format 'tensor-cache'"),
        ("folder", "npz", ValueError, r"must end with \.npz"),
        ("folder", "gguf", ValueError, "format must be one of 'safetensors'"),
        ("a.bin", None, ValueError, "writes no .bin files: .* must be a directory, or a file that ends with"),
        ("a.safetensor", "safetensors", ValueError, "writes no .safetensor files"),
        ("a.tar.gz", None, ValueError, "writes no .gz files"),
        ("a.TXT", "tensor-cache", ValueError, r"writes no .TXT files: the target 'a.TXT' must be a directory$"),
        ("ndarray-cache.json", None, ValueError, "must be a directory"),
        ("folder.npz", None, IsADirectoryError, "is a directory"),
        ("file", None, NotADirectoryError, "is a file"),
        ("file/model.safetensors.index.json", None, NotADirectoryError, "is a file"),
    ],
)
def test_targets_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, format: Any, error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(error, match=message):
        parse_target(text, format)
