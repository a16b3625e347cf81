"""Buffers of the caller's that receive tensors: check them, and keep the bytes beside the tensors."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...format.manifest import Record
from ..into import Destination, check_fit, foreign_memory, misfit
from .buffers import tensor_nbytes
from .layout import WORD, round_up
from .tensor import GPUTensor

if TYPE_CHECKING:
    import wgpu

__all__ = ["check_alive", "find_destination", "read_bytes_beside"]

#: The most buffers that are checked with one call.
_CHECKED_AT_ONCE = 64


def find_destination(device: wgpu.GPUDevice, record: Record, memory: object, *, decode: bool) -> Destination:
    """Return the range of a `GPUTensor`, of a buffer, or of a tuple of buffer and offset that receives a tensor.

    Raises
    ------
    ValueError, TypeError
        See `Device.find_destination`.
    """
    import wgpu

    buffer: object
    offset: int | None
    if isinstance(memory, GPUTensor):
        check_fit(record, memory.shape, memory.dtype.name, decode=decode)
        if memory._released:
            raise misfit(record, "belongs to weights that are closed")
        buffer, offset = memory.buffer, 0
    else:
        buffer, offset = _as_range(memory)
        if not isinstance(buffer, wgpu.GPUBuffer) or offset is None:
            raise foreign_memory(record, memory, "GPU buffers, and tuples of buffer and offset")
    if getattr(buffer, "_device", device) is not device:
        raise misfit(record, "belongs to another device: pass its wgpu.GPUDevice as the device to load to")
    nbytes = tensor_nbytes(record, decode=decode)
    if problem := _find_problem(buffer, offset, nbytes, wgpu.BufferUsage):
        raise misfit(record, problem)
    return Destination(memory, buffer, buffer, offset, nbytes)


def _as_range(memory: object) -> tuple[object, int | None]:
    if not isinstance(memory, tuple):
        return memory, 0
    if len(memory) != 2 or isinstance(memory[1], bool) or not hasattr(memory[1], "__index__"):
        return memory, None
    return memory[0], operator.index(memory[1])


def _find_problem(buffer: wgpu.GPUBuffer, offset: int, nbytes: int, usages: type[wgpu.BufferUsage]) -> str | None:
    """Return why a range of a buffer cannot receive `nbytes`, or None if it can."""
    if not buffer.usage & usages.COPY_DST:
        return "lacks the usage COPY_DST"
    if buffer.map_state != "unmapped":
        return "is mapped"
    if offset < 0 or offset % WORD:
        return f"begins at byte {offset}, which is no multiple of {WORD}"
    if nbytes and offset + round_up(nbytes) > buffer.size:
        rounded = f" (copied as {round_up(nbytes):,})" if nbytes % WORD else ""
        return f"has {max(buffer.size - offset, 0):,} bytes, but the tensor has {nbytes:,}{rounded}"
    if nbytes % WORD and not buffer.usage & usages.COPY_SRC:
        return f"lacks the usage COPY_SRC, which keeps the bytes after a tensor of {nbytes:,}, no multiple of {WORD}"
    return None


def check_alive(device: wgpu.GPUDevice, destinations: Mapping[str, Destination]) -> None:
    """Check that no buffer was destroyed, because wgpu would end the process when it is written.

    This finds out by binding them, so buffers without the usage STORAGE are not checked. Call this through `shielded`.

    Raises
    ------
    ValueError
        A buffer was destroyed.
    """
    import wgpu

    names = {
        each.memory: name
        for name, each in destinations.items()
        if each.memory.usage & wgpu.BufferUsage.STORAGE and each.nbytes
    }
    buffers, step = list(names), min(device.limits["max-storage-buffers-per-shader-stage"], _CHECKED_AT_ONCE)
    for first in range(0, len(buffers), step):
        some = buffers[first : first + step]
        if _find_error(device, some) is not None:
            for buffer in some:
                if (error := _find_error(device, [buffer])) is not None:
                    raise ValueError(f"into[{names[buffer]!r}] cannot be used: {error}") from error


def _find_error(device: wgpu.GPUDevice, buffers: Sequence[wgpu.GPUBuffer]) -> wgpu.GPUValidationError | None:
    """Bind buffers and return the error that this raises, or None."""
    import wgpu

    kind = {"visibility": wgpu.ShaderStage.COMPUTE, "buffer": {"type": "read-only-storage"}}
    layout = device.create_bind_group_layout(entries=[{"binding": n, **kind} for n in range(len(buffers))])
    resources = [{"buffer": buffer, "offset": 0, "size": WORD} for buffer in buffers]
    entries = [{"binding": n, "resource": resource} for n, resource in enumerate(resources)]
    try:
        device.create_bind_group(layout=layout, entries=entries)
    except wgpu.GPUValidationError as error:
        return error
    return None


def read_bytes_beside(device: wgpu.GPUDevice, destinations: Mapping[str, Destination]) -> dict[str, bytes]:
    """Return, for each tensor that ends within a word of its buffer, the rest of that word.

    Copies have whole words, so these bytes are written, too, and must not change. Call this through `shielded`.
    """
    import wgpu

    ends = {name: each.start + each.nbytes for name, each in destinations.items() if each.nbytes % WORD}
    if not ends:
        return {}
    usage = wgpu.BufferUsage
    words = device.create_buffer(size=WORD * len(ends), usage=usage.COPY_DST | usage.COPY_SRC)
    try:
        encoder = device.create_command_encoder()
        for index, (name, end) in enumerate(ends.items()):
            encoder.copy_buffer_to_buffer(destinations[name].memory, end & -WORD, words, WORD * index, WORD)
        device.queue.submit([encoder.finish()])
        data = bytes(device.queue.read_buffer(words))
    finally:
        words.destroy()
    return {
        name: data[WORD * index + end % WORD : WORD * (index + 1)] for index, (name, end) in enumerate(ends.items())
    }
