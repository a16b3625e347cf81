"""The result of a load."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from .caller import PublicFrame, render_in_ipython
from .devices.base import Device
from .devices.into import Destination
from .format.manifest import Manifest
from .report.table import tensor_table
from .report.words import format_count, format_size
from .stats import LoadStats
from .store.housekeeping.usage import Use

__all__ = ["NoTensorError", "Weights", "collected"]

T = TypeVar("T")
Tensor = TypeVar("Tensor", covariant=True)

_NAMES_IN_REPR = 3
_short = reprlib.Repr()
_short.maxstring = 80
#: With more tensors, only the first ones are compared with a name that is not there.
_MOST_COMPARED = 20_000


class NoTensorError(KeyError):
    """Error for a name that no tensor has. The suggestion is looked for when the message is shown.

    Many of these errors are never shown: `Mapping.get` catches them.
    """

    def __init__(self, name: object, names: tuple[str, ...] = ()) -> None:
        super().__init__(name)
        self._names = names

    _render_traceback_ = render_in_ipython

    def __str__(self) -> str:
        name = self.args[0]
        return f"no tensor is called {name!r}{_suggestion(str(name), self._names)}"


def _suggestion(name: str, names: Sequence[str]) -> str:
    """Return what may have been meant: a name with a prefix, a prefix of names, or a similar name."""
    if ends := [each for each in names if each.endswith(f".{name}")]:
        return f"; did you mean {ends[0]!r}?"
    if within := sum(each.startswith(f"{name}.") for each in names):
        return f"; {format_count(within, 'name')} {'begins' if within == 1 else 'begin'} with it: match('{name}.*')"
    # Comparing takes 60 µs a name.
    similar = difflib.get_close_matches(name, names[:_MOST_COMPARED], n=1)
    return f"; did you mean {similar[0]!r}?" if similar else ""


class Weights(Mapping[str, Tensor]):
    """A read-only mapping from tensor names to tensors, in manifest order. Also a context manager.

    On the CPU the tensors are `numpy.ndarray`: read-only views of the mapped shard file where the stored bytes are the
    values, and arrays with memory of their own where float32 was stored as bfloat16. On a GPU they are `GPUTensor`; on
    CUDA, and with `ndcache.torch`, they are `torch.Tensor`. Type checkers know which: ``Weights[numpy.ndarray]`` or
    ``Weights[GPUTensor]``. A tensor that was loaded into memory of the caller's (``into``) is the caller's own object.

    Attributes
    ----------
    metadata : mapping
        The manifest's ``metadata``.
    manifest : Manifest
    device : "cpu", wgpu.GPUDevice or torch.device
        Where the tensors are.
    nbytes : int
        Bytes of all tensors as they are in memory now, including the caller's.
    stats : LoadStats
        What the load cost.

    Raises
    ------
    KeyError
        There is no tensor of this name. The message suggests another one.
    ValueError
        The weights were closed.

    Examples
    --------
    >>> with ndcache.load("https://host/model/") as weights:
    ...     total = sum(array.size for array in weights.values())
    ...     first = weights.match("layer.0*")
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        manifest: Manifest,
        device: Device[Tensor],
        stats: LoadStats,
        into: Mapping[str, Destination],
        use: Use | None = None,
    ) -> None:
        self._tensors: dict[str, Tensor] | None = dict(tensors)
        self._device = device
        self.manifest = manifest
        self.metadata = manifest.metadata
        self.device: Any = device.handle
        self.stats = stats
        self._lent = frozenset(into)
        self._use = use  # as long as arrays may be views of its files, the model stays in the cache
        sized: dict[str, Any] = {**self._tensors, **into}  # a buffer of the caller's may be larger than its tensor
        self.nbytes: int = sum(each.nbytes for each in sized.values())

    def __getitem__(self, name: str) -> Tensor:
        # `PublicFrame` would take longer than the rest.
        if (tensors := self._tensors) is not None and name in tensors:
            return tensors[name]
        with PublicFrame() as __tracebackhide__:
            raise NoTensorError(name, tuple(self._open()))

    def __contains__(self, name: object) -> bool:
        with PublicFrame() as __tracebackhide__:
            return name in self._open()

    def __iter__(self) -> Iterator[str]:
        with PublicFrame() as __tracebackhide__:
            return iter(self._open())

    def __len__(self) -> int:
        with PublicFrame() as __tracebackhide__:
            return len(self._open())

    def match(self, pattern: str) -> dict[str, Tensor]:
        """Return the tensors whose names match a glob pattern, in manifest order.

        Parameters
        ----------
        pattern : str
            Such as ``"model.layers.0.*"``, as in the ``names`` of `load`. Case matters.

        Returns
        -------
        dict of str to tensor
            Empty if nothing matches.

        Raises
        ------
        TypeError
            `pattern` is no text, such as a list of patterns.
        """
        with PublicFrame() as __tracebackhide__:
            if not isinstance(pattern, str):
                raise TypeError(f"pattern must be a text, not {pattern!r}")
            matches = re.compile(fnmatch.translate(pattern)).match
            return {name: tensor for name, tensor in self._open().items() if name == pattern or matches(name)}

    def close(self) -> None:
        """Release the tensors. On a GPU, destroy their buffers, and the device unless the caller opened it.

        Arrays on the CPU stay valid as long as something refers to them. The caller's own memory, of the ``into``
        argument, is left alone. A second call does nothing.
        """
        if self._tensors is not None:
            tensors, self._tensors = self._tensors, None
            _discard(self._device, tensors, self._lent)
        if self._use is not None:
            self._use.end()

    def __enter__(self) -> Weights[Tensor]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._tensors is None:
            return "<Weights: closed>"
        names = ", ".join(map(_short.repr, itertools.islice(self._tensors, _NAMES_IN_REPR)))
        more = ", …" if len(self) > _NAMES_IN_REPR else ""
        return f"<Weights: {self._summary()}{': ' if names else ''}{names}{more}>"

    def _repr_html_(self) -> str:
        """Return a table of the tensors, for notebooks."""
        if self._tensors is None:
            return "<p>Weights: closed</p>"
        return tensor_table(f"Weights: {self._summary()}", self._tensors, self.manifest, self.stats.checked)

    def _ipython_key_completions_(self) -> list[str]:
        """Return the names, for Tab after ``weights["``."""
        return list(self._tensors or ())

    def _summary(self) -> str:
        return f"{format_count(len(self), 'tensor')}, {format_size(self.nbytes)}, on {self._device.name}"

    # Not Mapping's, which would compare arrays and has no hash.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __reduce__(self) -> NoReturn:
        raise TypeError("weights are not pickled: load them in each process, which reads the cached files in place")

    def _open(self) -> dict[str, Tensor]:
        if self._tensors is None:
            raise ValueError("these weights are closed")
        return self._tensors


@contextmanager
def collected(device: Device[T], lent: Collection[str]) -> Iterator[dict[str, T]]:
    """Yield a dict for the device's tensors. If the block fails, free them, but not `lent` ones, and the device too."""
    tensors: dict[str, T] = {}
    try:
        yield tensors
    except BaseException:
        _discard(device, tensors, lent)
        raise


def _discard(device: Device[T], tensors: dict[str, T], lent: Collection[str]) -> None:
    for name in lent:
        tensors.pop(name, None)
    device.discard(tensors)
