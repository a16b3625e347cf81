"""Write safetensors files, byte for byte as the safetensors library and huggingface_hub do.

A file has its tensors by decreasing alignment, then by name, and its header ends at a multiple of 8. So the place of
each tensor is known before the first one comes, in whatever order they come.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import UnsupportedDtypeError, UnsupportedFormatError
from ..files.folder import sync
from ..files.staging import staged_file, staged_folder
from ..format.safetensors.dtypes import KINDS
from .pieces import Bytes
from .targets import WriteTensor
from .tensors import OutputTensor

__all__ = ["USUAL_METADATA", "SafetensorsFile", "remove_old_files", "safetensors_directory", "safetensors_file"]

_INDEX_NAME = "model.safetensors.index.json"
#: The library sorts tensors by these.
_RANKS = {dtype: rank for rank, dtype in enumerate(KINDS)}
_METADATA = "__metadata__"
#: The longest header that the library reads.
_MAX_HEADER_BYTES = 100_000_000
#: The metadata that huggingface_hub writes into each file of a directory. transformers refuses files without it.
USUAL_METADATA = {"format": "pt"}
#: The files of a directory that huggingface_hub replaces.
_USUAL_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class SafetensorsFile:
    """The layout of a file. Nothing is written before `create`.

    Parameters
    ----------
    tensors : sequence of OutputTensor
    metadata : mapping of str to str
        The free-form ``__metadata__``.

    Raises
    ------
    UnsupportedDtypeError
        The format has no name for a dtype.
    UnsupportedFormatError
        A tensor has the name of the metadata, or the header would be longer than readers accept.
    """

    def __init__(self, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> None:
        for tensor in tensors:
            if tensor.stored_dtype not in KINDS:
                raise UnsupportedDtypeError(
                    f"tensor {tensor.name!r} has the dtype {tensor.stored_dtype}, for which safetensors has no name",
                    hint="Leave the tensor out (names=).",
                )
            if tensor.name == _METADATA:
                raise UnsupportedFormatError(f"no tensor of a safetensors file can be called {_METADATA!r}")
        header: dict[str, object] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
        self._offsets: dict[str, int] = {}
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: (-_RANKS[tensor.stored_dtype], tensor.name)):
            start, end = end, end + tensor.nbytes
            self._offsets[tensor.name] = start
            dtype, shape = KINDS[tensor.stored_dtype], list(tensor.shape)
            header[tensor.name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > _MAX_HEADER_BYTES:
            raise UnsupportedFormatError(
                f"the header would have {len(text):,} bytes, and readers accept {_MAX_HEADER_BYTES:,}"
            )
        text += b" " * (-len(text) % 8)
        self._start = len(text).to_bytes(8, "little") + text
        self.nbytes = end

    def create(self, path: Path) -> None:
        """Write the header to a file, which may exist."""
        path.write_bytes(self._start)

    def write(self, path: Path, tensor: OutputTensor, pieces: Iterable[Bytes]) -> None:
        """Write a tensor to its place in the file."""
        # The file is opened for each tensor, so that no exception leaves it open.
        with open(path, "r+b") as file:
            file.seek(len(self._start) + self._offsets[tensor.name])
            for piece in pieces:
                file.write(piece.data)


@contextmanager
def safetensors_file(path: Path, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> Iterator[WriteTensor]:
    """Yield a function that writes a tensor to a new file, which appears at the end of the block."""
    file = SafetensorsFile(tensors, metadata)
    with staged_file(path) as temporary:
        file.create(temporary)
        yield lambda tensor, pieces: file.write(temporary, tensor, pieces)


@contextmanager
def safetensors_directory(
    directory: Path, files: Sequence[Sequence[OutputTensor]], metadata: Mapping[str, str]
) -> Iterator[WriteTensor]:
    """Yield a function that writes a tensor to its file of a directory, with an index; all appear at the end.

    Files of an older model with the usual names are removed.
    """
    count = len(files)
    suffixes = [f"-{number:05d}-of-{count:05d}" for number in range(1, count + 1)] if count > 1 else [""]
    layouts = {
        f"model{suffix}.safetensors": SafetensorsFile(file, dict(metadata) or USUAL_METADATA)
        for suffix, file in zip(suffixes, files or [[]], strict=True)
    }
    weight_map = {tensor.name: name for name, file in zip(layouts, files, strict=False) for tensor in file}
    index = {"metadata": {"total_size": sum(each.nbytes for each in layouts.values())}, "weight_map": weight_map}
    with staged_folder(directory) as staged:
        for name, layout in layouts.items():
            layout.create(staged.work / name)

        def write(tensor: OutputTensor, pieces: Iterable[Bytes]) -> None:
            name = weight_map[tensor.name]
            layouts[name].write(staged.work / name, tensor, pieces)

        yield write
        # Last, so that it never names a missing file.
        (staged.work / _INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="ascii")
        written = {name: staged.work / name for name in (*layouts, _INDEX_NAME)}
        for file in written.values():
            with open(file, "r+b") as opened:
                sync(opened.fileno())
        staged.publish(written)
    remove_old_files(staged.path, written)


def remove_old_files(directory: Path, kept: Collection[str] = ()) -> None:
    """Remove the index and the files of an older model, if they have the usual names, but none of those in `kept`."""
    found = {name for name in os.listdir(directory) if _USUAL_NAME.fullmatch(name)}
    for name in sorted(found - set(kept), key=lambda name: name != _INDEX_NAME):
        (directory / name).unlink(missing_ok=True)
