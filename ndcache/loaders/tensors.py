"""The methods of a loader that give tensors."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal, overload

from ..arguments import check_flags
from ..caller import PublicFrame
from ..companions import Companions
from ..devices.cpu import Array
from ..devices.gpu.tensor import GPUTensor
from ..devices.into import LentMemory
from ..format.manifest import NameFilter
from ..format.slices import check_slices
from ..options import (
    CUDAName,
    GPUDeviceLike,
    GPUName,
    Source,
    TorchDeviceLike,
    check_keywords,
    hide_keywords,
)
from ..pipeline import place_tensors
from ..progress import Progress, ProgressCallback, callbacks_of
from ..trace import tracing
from ..weights import Weights, collected
from ..workers.stop_iteration import WrappedStopIteration, unwrap_stop_iteration
from .base import LoaderBase

if TYPE_CHECKING:
    import torch

__all__ = ["TensorLoader"]


class TensorLoader(LoaderBase):
    """Load tensors onto a device."""

    @overload
    def load(
        self,
        source: Source,
        device: Literal["cpu"] = "cpu",
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, Array] | None = None,
        files: bool = True,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> Weights[Array]: ...

    @overload
    def load(
        self,
        source: Source,
        device: GPUName | GPUDeviceLike,
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        files: bool = True,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> Weights[GPUTensor]: ...

    @overload
    def load(
        self,
        source: Source,
        device: CUDAName | TorchDeviceLike,
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, torch.Tensor] | None = None,
        files: bool = True,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> Weights[torch.Tensor]: ...

    @overload
    def load(
        self,
        source: Source,
        device: str | GPUDeviceLike | TorchDeviceLike,
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, Any] | None = None,
        files: bool = True,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> Weights[Any]: ...

    @hide_keywords
    def load(
        self,
        source: Source,
        device: Any = "cpu",
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, Any] | None = None,
        files: bool = True,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
        **unknown: Any,
    ) -> Weights[Any]:
        """Load a model's weights, downloading what is not cached: see `ndcache.load`."""
        with PublicFrame() as __tracebackhide__:
            check_keywords(TensorLoader.load, unknown)
            check_flags(decode=decode, copy=copy, files=files)
            check_slices(names)
            progress = callbacks_of(progress)
        with (
            PublicFrame() as __tracebackhide__,
            LentMemory(into) as lent,
            tracing(source, trace, report) as events,
            unwrap_stop_iteration(),
            collected(target := self._resources.open_device(device, events), lent.objects) as tensors,
            self._resources.open_model(source, device=target, trace=events, is_use=True, bars=progress) as opened,
        ):
            model, context = opened
            placed = place_tensors(
                model,
                context,
                target,
                names,
                lent,
                progress,
                self._helpers(source),
                Companions(files=files),
                decode=decode,
                copy=copy,
                memory_limit=self._options.memory_limit,
                keeps_all=True,
            )
            with closing(placed):
                for name, tensor in placed:
                    tensors[name] = tensor
            use = model.take_use() if target.maps_files and not copy else None
        return Weights(
            tensors, manifest=model.manifest, device=target, stats=context.stats, into=lent.destinations, use=use
        )

    @overload
    def stream(
        self,
        source: Source,
        device: Literal["cpu"] = "cpu",
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, Array] | None = None,
        files: bool = True,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> Iterator[tuple[str, Array]]: ...

    @overload
    def stream(
        self,
        source: Source,
        device: GPUName | GPUDeviceLike,
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        files: bool = True,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> Iterator[tuple[str, GPUTensor]]: ...

    @overload
    def stream(
        self,
        source: Source,
        device: CUDAName | TorchDeviceLike,
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, torch.Tensor] | None = None,
        files: bool = True,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]: ...

    @overload
    def stream(
        self,
        source: Source,
        device: str | GPUDeviceLike | TorchDeviceLike,
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, Any] | None = None,
        files: bool = True,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> Iterator[tuple[str, Any]]: ...

    @hide_keywords
    def stream(
        self,
        source: Source,
        device: Any = "cpu",
        *,
        names: NameFilter = None,
        decode: bool = True,
        copy: bool = False,
        into: Mapping[str, Any] | None = None,
        files: bool = True,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
        **unknown: Any,
    ) -> Iterator[tuple[str, Any]]:
        """Load a model, and yield each tensor as soon as it is there: see `ndcache.stream`."""
        with PublicFrame() as __tracebackhide__, unwrap_stop_iteration():
            check_keywords(TensorLoader.stream, unknown)
            check_flags(decode=decode, copy=copy, files=files)
            check_slices(names)
            lent = LentMemory(into)
            progress = callbacks_of(progress)
            arriving = self._stream(source, device, names, decode, copy, lent, files, progress, trace, report)
            next(arriving)  # raises here what is wrong with the model or the arguments
        return arriving

    def _stream(
        self,
        source: Source,
        device: str | GPUDeviceLike | TorchDeviceLike,
        names: NameFilter,
        decode: bool,
        copy: bool,
        lent: LentMemory,
        files: bool,
        progress: Sequence[ProgressCallback],
        trace: str | os.PathLike[str] | None,
        report: str | os.PathLike[str] | None,
    ) -> Generator[tuple[str, Any], None, None]:
        """Yield once when the model is open, so that closing the generator closes it; then yield the tensors."""
        with PublicFrame() as __tracebackhide__, lent, tracing(source, trace, report) as events:
            target = self._resources.open_device(device, events)
            is_open = False
            try:
                with self._resources.open_model(source, device=target, trace=events, is_use=True, bars=progress) as (
                    model,
                    context,
                ):
                    placed = place_tensors(
                        model,
                        context,
                        target,
                        names,
                        lent,
                        progress,
                        self._helpers(source),
                        Companions(files=files),
                        decode=decode,
                        copy=copy,
                        memory_limit=self._options.memory_limit,
                    )
                    is_open = True
                    yield "", None
                    yield from placed
            except BaseException as error:
                if not is_open:
                    target.discard({})
                elif isinstance(error, WrappedStopIteration):
                    # It becomes a RuntimeError, as in any generator, and so does not end the caller's loop silently.
                    raise error.error from None
                raise
