"""Write .npz files, byte for byte as `numpy.savez` does."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np

from ..errors import UnsupportedDtypeError, UnsupportedFormatError
from ..files.staging import staged_file
from .pieces import Bytes
from .targets import WriteTensor
from .tensors import OutputTensor

__all__ = ["npz_file"]

#: The longest name of a file in a zip archive, in bytes.
_MAX_NAME_BYTES = 65_535


@contextmanager
def npz_file(path: Path, tensors: Sequence[OutputTensor]) -> Iterator[WriteTensor]:
    """Yield a function that writes the next tensor to a new file, which appears at the end of the block.

    Raises
    ------
    UnsupportedDtypeError
        NumPy itself does not have the dtype, so that the file would not say what its bytes mean.
    UnsupportedFormatError
        No file in an archive can have a tensor's name.
    """
    for tensor in tensors:
        _check(tensor)
    with staged_file(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:

        def write(tensor: OutputTensor, pieces: Iterable[Bytes]) -> None:
            descr = np.lib.format.dtype_to_descr(np.dtype(tensor.stored_dtype).newbyteorder("<"))
            with archive.open(f"{tensor.name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": descr, "fortran_order": False, "shape": tensor.shape}
                )
                for piece in pieces:
                    file.write(piece.data)

        yield write


def _check(tensor: OutputTensor) -> None:
    if hasattr(ml_dtypes, tensor.stored_dtype):
        becomes = "would become" if tensor.is_halved else "has the dtype"
        raise UnsupportedDtypeError(
            f"tensor {tensor.name!r} {becomes} {tensor.stored_dtype}, for which .npz has no name",
            hint="Write a .safetensors file.",
        )
    if "\0" in tensor.name or len(tensor.name.encode()) + len(".npy") > _MAX_NAME_BYTES:
        raise UnsupportedFormatError(
            f"no array of an .npz file can be called {tensor.name[:80]!r}", hint="Write a .safetensors file."
        )
