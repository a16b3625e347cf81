"""Memory of the caller's that receives tensors (``into=``): the checks that all devices share.

::

    {name: memory} ─ Device.check_into ─> {name: Destination} ─ Device.open_upload(into=…) ─> Upload.place
                     before any request                                                       yields `owner`
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ..errors import DeviceError
from ..format.manifest import Record, Shard

__all__ = ["Destination", "LentMemory", "check_fit", "find_destinations", "foreign_memory", "misfit"]

if TYPE_CHECKING:
    from .base import Device

T = TypeVar("T")
_Tensors: TypeAlias = Generator[tuple[str, T], None, None]

#: Attributes by which memory of other kinds is known: NumPy's, `GPUTensor`, CUDA's, most libraries', a wgpu buffer.
_MEMORY_ATTRIBUTES = ("__array_interface__", "__array__", "__cuda_array_interface__", "__dlpack__", "map_state")


@dataclass(frozen=True, slots=True)
class Destination:
    """A range of the caller's memory that receives one tensor.

    Attributes
    ----------
    owner : object
        The caller's object, which the load returns.
    memory : Any
        The memory, in the form in which the device's upload writes to it.
    space : hashable
        What `start` counts in, such as one buffer: only ranges of equal spaces can overlap.
    start, nbytes : int
        The range, in bytes. Nothing outside it is written.
    takes_parts : bool
        Whether the device writes a large tensor in parts, from several segments, also if it does not cut other records.
    """

    owner: Any
    memory: Any
    space: Hashable
    start: int
    nbytes: int
    takes_parts: bool = False


class LentMemory:
    """The ``into`` option of one load. As a context manager, it names the tensors that a failure leaves undefined.

    Attributes
    ----------
    objects : dict of str to object
        What the caller gave, by the names of tensors.
    destinations : dict of str to Destination
        Where these tensors go, once `check` has found it.
    in_parts : set of str
        Those of them that take parts of tensors; see `Destination.takes_parts`.
    written : set of str
        The tensors that are complete in memory of the caller's.

    Raises
    ------
    TypeError
        The option is no mapping.
    """

    def __init__(self, into: Mapping[str, Any] | None) -> None:
        if into is not None and not isinstance(into, Mapping):
            raise TypeError(f"into must be a mapping from tensor names to memory, not {type(into).__name__}")
        self.objects: dict[str, Any] = dict(into or {})  # copied, as the caller's own may change during the load
        self.destinations: dict[str, Destination] = {}
        self.in_parts: set[str] = set()
        self.written: set[str] = set()

    def check(self, device: Device[Any], shards: Sequence[Shard], *, decode: bool) -> None:
        """Check what the caller gave, and what the device must hold besides, before anything is fetched."""
        self.destinations = device.check_into(self.objects, shards, decode=decode)
        self.in_parts = {name for name, each in self.destinations.items() if each.takes_parts}
        device.check_limits(_without(shards, self.destinations), decode=decode)

    def tracked(self, tensors: _Tensors[T], *, completes_late: bool) -> _Tensors[T]:
        """Yield names and tensors, and keep account of the caller's; see `Device.completes_late`."""
        return self._track(tensors, completes_late) if self.objects else tensors

    def _track(self, tensors: _Tensors[T], completes_late: bool) -> _Tensors[T]:
        with closing(tensors):
            for name, tensor in tensors:
                if not completes_late and name in self.objects:
                    self.written.add(name)
                yield name, tensor
        self.written.update(self.objects)

    def __enter__(self) -> LentMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or not self.objects:
            return
        if isinstance(error, DeviceError):  # it may have failed before it made the copies that it was asked for
            self.written.clear()
        with suppress(Exception):  # an exception may refuse attributes
            error.undefined = tuple(  # type: ignore[attr-defined]
                name for name in self.objects if name not in self.written
            )


def find_destinations(
    into: Mapping[str, Any], shards: Sequence[Shard], find: Callable[[Record, Any], Destination]
) -> dict[str, Destination]:
    """Find the place of each tensor in the memory that the caller gave for it.

    Parameters
    ----------
    into : mapping of str to object
    shards : sequence of Shard
        With the records that are loaded.
    find : callable
        Returns the destination of a record in an object of the caller's; raises ValueError or TypeError if there is
        none.

    Raises
    ------
    ValueError
        No tensor of a name is loaded, memory does not fit, or ranges overlap.
    TypeError
        A name or an object has the wrong type.
    """
    if not into:
        return {}
    records = {record.name: record for shard in shards for record in shard.records}
    for name in into:
        if not isinstance(name, str):
            raise TypeError(f"the names of into must be strings, not {name!r}")
        if name not in records:
            close = difflib.get_close_matches(name, records, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"into[{name!r}] is for a tensor that is not loaded{hint}")
    found = {name: find(records[name], memory) for name, memory in into.items()}
    _check_overlaps(found)
    return found


def _check_overlaps(destinations: Mapping[str, Destination]) -> None:
    spaces: dict[Hashable, list[tuple[int, int, str]]] = {}
    for name, each in destinations.items():
        if each.nbytes:
            spaces.setdefault(each.space, []).append((each.start, each.start + each.nbytes, name))
    for ranges in spaces.values():
        # If any two ranges overlap, two neighbours do.
        for (_, end, name), (start, _, other) in pairwise(sorted(ranges)):
            if start < end:
                raise ValueError(f"into[{name!r}] and into[{other!r}] overlap")


def check_fit(record: Record, shape: Sequence[int], dtype: str, *, decode: bool) -> None:
    """Raise ValueError unless memory has the shape and dtype of a record's tensor.

    Parameters
    ----------
    record : Record
    shape, dtype
        Those of the memory; the dtype by its name in manifests, or any text if it has none.
    decode : bool
        Whether float32 stored as bfloat16 is expanded.
    """
    if tuple(shape) != record.shape:
        raise misfit(record, f"has the shape {tuple(shape)}, but the tensor has {record.shape}")
    wanted = record.dtype if decode else record.stored_dtype
    if dtype != wanted:
        other = f" (with decode={not decode}: {record.stored_dtype if decode else record.dtype})"
        raise misfit(
            record, f"has the dtype {dtype}, but the tensor has {wanted}{other if record.is_bf16_encoded else ''}"
        )


def misfit(record: Record, problem: str) -> ValueError:
    """Return the error for memory that cannot receive a record's tensor; `problem` is a predicate, "is read-only"."""
    return ValueError(f"into[{record.name!r}] {problem}")


def foreign_memory(record: Record, memory: object, wanted: str) -> ValueError | TypeError:
    """Return the error for an object that is no memory of this device, or no memory at all."""
    text = f"into[{record.name!r}] is a {type(memory).__name__}, but this device loads into {wanted}"
    if isinstance(memory, tuple) and [type(each) for each in memory[1:]] == [int]:
        is_memory = hasattr(memory[0], "map_state")  # a wgpu buffer and an offset
    else:
        is_memory = any(hasattr(memory, attribute) for attribute in _MEMORY_ATTRIBUTES)
    return ValueError(text) if is_memory else TypeError(text)


def _without(shards: Sequence[Shard], names: Mapping[str, object]) -> Sequence[Shard]:
    """Return the shards without the records of these names."""
    if not names:
        return shards
    return [
        replace(shard, records=tuple(record for record in shard.records if record.name not in names))
        for shard in shards
    ]
