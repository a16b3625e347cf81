"""The target that the user typed: a file or a directory, and its format."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from ..arguments import check_path
from ..format.safetensors.index import INDEX_SUFFIX, is_safetensors
from ..location import MANIFEST_NAMES
from .pieces import Bytes
from .tensors import OutputTensor

__all__ = ["FORMATS", "Format", "Target", "WriteTensor", "parse_target"]

Format: TypeAlias = Literal["safetensors", "npz", "tensor-cache"]
FORMATS: tuple[Format, ...] = ("safetensors", "npz", "tensor-cache")

#: Write one tensor, from the bytes that it will have there. Tensors come in any order, but each once.
WriteTensor: TypeAlias = Callable[[OutputTensor, Iterable[Bytes]], None]

#: Names of files that nobody means as a directory.
_OTHER_FILES = {
    *(".bin", ".ckpt", ".ggml", ".gguf", ".h5", ".hdf5", ".keras", ".mlmodel", ".msgpack", ".npy", ".onnx", ".params"),
    *(".pb", ".pickle", ".pkl", ".pt", ".pth", ".safetensor", ".tflite"),
    *(".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"),
    *(".csv", ".html", ".json", ".lock", ".log", ".md", ".parquet", ".toml", ".txt", ".xml", ".yaml", ".yml"),
}


@dataclass(frozen=True)
class Target:
    """The place that a model is written to.

    Attributes
    ----------
    path : pathlib.Path
        The file or directory.
    is_file : bool
    format : {"safetensors", "npz", "tensor-cache"} or None
        None for a directory in the format that the source does not have.
    """

    path: Path
    is_file: bool
    format: Format | None

    def format_for(self, manifest_name: str) -> Format:
        """Return the format, for a source whose manifest has this name."""
        return self.format or ("tensor-cache" if is_safetensors(manifest_name) else "safetensors")


def parse_target(target: str | os.PathLike[str], format: Format | None = None) -> Target:
    """Return where a model is to be written, from a path and perhaps a format.

    Raises
    ------
    ValueError
        The format is unknown or does not fit the path's name, or the target is a URL.
    IsADirectoryError, NotADirectoryError
        A directory has the name of a file to write, or the other way round.
    """
    check_path("target", target)
    text = os.fspath(target)
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, not {format!r}")
    path = Path(os.path.abspath(text))
    found, is_file = _kind(path.name)
    if found is not None and text.endswith(("/", os.sep)):
        raise ValueError(f"the target {text!r} names a file, and ends like a directory")
    if format is not None and found not in (None, format):
        raise ValueError(f"the target {text!r} is in the format {found!r}, not {format!r}")
    if found is None and path.suffix.lower() in _OTHER_FILES and not path.is_dir():
        files = "" if format == "tensor-cache" else ", or a file that ends with .safetensors or .npz"
        raise ValueError(f"ndcache writes no {path.suffix} files: the target {text!r} must be a directory{files}")
    if found is not None and not is_file:
        path = path.parent  # that of an index or a manifest
    elif found is None and format == "npz":
        raise ValueError(f"the name of an .npz file must end with .npz, and {text!r} does not")
    if is_file and path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, not a file")
    if not is_file and path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; the name of one to write ends with .safetensors or .npz")
    return Target(path, is_file, found or format)


def _kind(name: str) -> tuple[Format | None, bool]:
    """Return the format that a name stands for, if it does, and whether it is that of a single file."""
    lower = name.lower()
    if lower.endswith(".safetensors"):
        return "safetensors", True
    if lower.endswith(".npz"):
        return "npz", True
    if name == "model" + INDEX_SUFFIX:
        return "safetensors", False
    return ("tensor-cache" if name in MANIFEST_NAMES[:1] else None), False
