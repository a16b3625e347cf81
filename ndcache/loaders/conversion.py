"""The method of a loader that writes a model to another format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..arguments import check_flags
from ..export.conversion import ConvertReport, check_options, convert_model
from ..export.targets import Format, parse_target
from ..format.manifest import NameFilter
from ..format.shard_writer import Encoding
from ..format.slices import check_slices
from ..options import Source, suggest_keywords
from ..progress import Progress, callbacks_of
from ..trace import tracing
from ..workers.stop_iteration import unwrap_stop_iteration
from .base import LoaderBase

__all__ = ["ConvertLoader"]


class ConvertLoader(LoaderBase):
    """Convert models."""

    @suggest_keywords
    def convert(
        self,
        source: Source,
        target: str | os.PathLike[str],
        *,
        format: Format | None = None,
        names: NameFilter = None,
        encode: Encoding | Mapping[str, Encoding] = "raw",
        decode: bool = True,
        shard_bytes: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        progress: Progress = None,
        trace: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> ConvertReport:
        """Write a model to another format, piece by piece: see `ndcache.convert`."""
        parsed = parse_target(target, format)
        check_flags(decode=decode)
        check_slices(names)
        check_options(encode, shard_bytes, metadata)
        progress = callbacks_of(progress)
        with (
            tracing(source, trace, report) as events,
            unwrap_stop_iteration(),
            self._resources.open_model(source, trace=events, is_use=True, bars=progress) as (model, context),
        ):
            return convert_model(
                model,
                context,
                parsed,
                names,
                progress,
                self._helpers(source),
                encode=encode,
                decode=decode,
                shard_bytes=shard_bytes,
                metadata=metadata,
                memory_limit=self._options.memory_limit,
            )
