"""A tensor in a GPU buffer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...caller import public
from .layout import round_up
from .shield import nothing_to_undo, shielded
from .translate import translated_errors

if TYPE_CHECKING:
    import wgpu

__all__ = ["GPUTensor"]


class GPUTensor:
    """A tensor in a GPU buffer.

    Attributes
    ----------
    buffer : wgpu.GPUBuffer
        Usage STORAGE | COPY_SRC | COPY_DST. Its size is `nbytes` rounded up to a multiple of 4, at least 4; the bytes
        beyond `nbytes` are 0. Do not read the tensor after you have destroyed its buffer: wgpu would end the process.
    shape : tuple of int
    ndim : int
    size : int
        The number of elements.
    dtype : numpy.dtype
        For bfloat16 and float8, a dtype of ml_dtypes.
    nbytes : int
        The tensor's size in bytes.
    device : wgpu.GPUDevice
        The device that the buffer belongs to.
    """

    __slots__ = ("_released", "buffer", "device", "dtype", "nbytes", "shape")

    def __init__(
        self,
        buffer: wgpu.GPUBuffer,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        device: wgpu.GPUDevice,
    ) -> None:
        self.buffer = buffer
        self.shape = shape
        self.dtype = dtype
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.device = device
        self._released = False

    @property
    def ndim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        """Return the size of the first dimension; a scalar has none."""
        if not self.shape:
            raise TypeError("len() of a scalar")
        return self.shape[0]

    def __bool__(self) -> bool:
        """Return True: a tensor is there, whatever its values and its length are."""
        return True

    @public
    def numpy(self) -> npt.NDArray[Any]:
        """Wait for the GPU and return a copy of the tensor in the CPU's memory.

        Raises
        ------
        ValueError
            The weights that the tensor belongs to are closed.
        DeviceError
        """
        if self._released:
            raise ValueError("the weights of this tensor are closed")  # wgpu would end the process
        if self.nbytes == 0:
            return np.empty(self.shape, self.dtype)
        with translated_errors():
            data = shielded(
                lambda: self.device.queue.read_buffer(self.buffer, 0, round_up(self.nbytes)), undo=nothing_to_undo
            )
        return np.frombuffer(data, np.uint8)[: self.nbytes].view(self.dtype).reshape(self.shape)

    def _release(self) -> None:
        self._released = True
        self.buffer.destroy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("a GPU buffer cannot become an array without a copy")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"GPUTensor(shape={self.shape}, dtype={self.dtype.name}, nbytes={self.nbytes})"
