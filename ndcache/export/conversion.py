"""The way of a conversion, from an open model to a target.

::

    names, encode ─ plan_tensors ─> the tensors, with their dtypes and sizes ─> the layout of the target    before any
    target ─ open_writer ─> a function that writes a tensor                                                shard comes
    shards ─ place_tensors, onto the `PieceDevice` ─> pieces of bytes, in manifest order
           ─ OutputTensor.encode ─> write ─> the files, under temporary names ─> renamed at the end
"""

from __future__ import annotations

import itertools
import json
import logging
import operator
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import check_mapping, check_positive
from ..companions import Companions
from ..context import LoadContext
from ..devices.into import LentMemory
from ..files.full_disk import disk_full, names_full_disk
from ..format.manifest import NameFilter
from ..format.safetensors.index import INDEX_SUFFIX, is_safetensors
from ..format.shard_writer import Encoding
from ..format.writer import encoding_by_name, remove_old_dump
from ..pipeline import place_tensors
from ..processes.beside import HelperProcesses
from ..progress import Progress
from ..sources.model import Model
from .npz import npz_file
from .pieces import PieceDevice
from .safetensors_files import USUAL_METADATA, remove_old_files, safetensors_directory, safetensors_file
from .split import is_well_split, split_as_hub
from .targets import Format, Target, WriteTensor
from .tensor_cache import tensor_cache
from .tensors import OutputTensor, plan_tensors

__all__ = ["ConvertReport", "check_options", "convert_model"]

logger = logging.getLogger("ndcache")

#: The usual limit of a file: TVM's and huggingface_hub's.
_SHARD_BYTES: dict[Format, int] = {"tensor-cache": 32 << 20, "safetensors": 5_000_000_000}


@dataclass(frozen=True)
class ConvertReport:
    """The result of `convert`.

    Attributes
    ----------
    path : pathlib.Path
        The file or directory that was written.
    format : str
        ``"safetensors"``, ``"npz"`` or ``"tensor-cache"``.
    tensors : tuple of str
        The tensors that were written.
    nbytes : int
        Their bytes.
    halved : tuple of str
        Those whose float32 was rounded to bfloat16, because of ``encode``. The values of all others are as they were.
    """

    path: Path
    format: Format
    tensors: tuple[str, ...] = field(repr=False)
    nbytes: int
    halved: tuple[str, ...] = field(repr=False)


def check_options(
    encode: Encoding | Mapping[str, Encoding], shard_bytes: int | None, metadata: Mapping[str, Any] | None
) -> None:
    """Check the options of a conversion, as far as this needs no manifest.

    Raises
    ------
    ValueError, TypeError
    """
    encoding_by_name(encode)
    if shard_bytes is not None:
        check_positive("shard_bytes", shard_bytes, "bytes")
    if metadata is not None:
        check_mapping("metadata", metadata)
        json.dumps(dict(metadata))


def convert_model(
    model: Model,
    context: LoadContext,
    target: Target,
    names: NameFilter,
    progress: Progress,
    helpers: HelperProcesses,
    *,
    encode: Encoding | Mapping[str, Encoding],
    decode: bool,
    shard_bytes: int | None,
    metadata: Mapping[str, Any] | None,
    memory_limit: int,
) -> ConvertReport:
    """Write a model to a target; see `ndcache.convert`."""
    shards = plan_tensors(model.manifest.select(names), encoding_by_name(encode), decode=decode)
    tensors = {tensor.name: tensor for shard in shards for tensor in shard}
    with (
        names_full_disk(target.path),
        _open_writer(model, target, shards, shard_bytes, metadata) as write,
        closing(
            place_tensors(
                model,
                context,
                PieceDevice(),
                # A predicate, or an iterator, is asked once. What it chose are exact names.
                names if names is None or isinstance(names, Mapping) else list(tensors),
                LentMemory(None),
                progress,
                helpers,
                Companions(files=False),
                decode=False,
                copy=False,
                memory_limit=memory_limit,
            )
        ) as placed,
    ):
        for name, pieces in itertools.groupby(placed, key=operator.itemgetter(0)):
            tensor = tensors[name]
            write(tensor, tensor.encode(piece for _, piece in pieces))
    _remove_other_format(model, target)
    return _report(model, target, tensors.values())


def _remove_other_format(model: Model, target: Target) -> None:
    """Remove an older model in the other format, which a load could take for the new one, unless it is the source."""
    if target.is_file or os.path.realpath(model.directory) == os.path.realpath(target.path):
        return
    if target.format_for(model.manifest.name) == "tensor-cache":
        remove_old_files(target.path)
    else:
        remove_old_dump(target.path)


def _report(model: Model, target: Target, tensors: Iterator[OutputTensor] | Any) -> ConvertReport:
    written = list(tensors)
    return ConvertReport(
        target.path,
        target.format_for(model.manifest.name),
        tuple(tensor.name for tensor in written),
        sum(tensor.nbytes for tensor in written),
        tuple(tensor.name for tensor in written if tensor.is_halved and not tensor.record.is_bf16_encoded),
    )


def _open_writer(
    model: Model,
    target: Target,
    shards: Sequence[Sequence[OutputTensor]],
    shard_bytes: int | None,
    metadata: Mapping[str, Any] | None,
) -> AbstractContextManager[WriteTensor]:
    """Return the context in which tensors are written."""
    name = model.manifest.name
    format = target.format_for(name)
    tensors = [tensor for shard in shards for tensor in shard]
    _check_free_space(target.path, sum(tensor.nbytes for tensor in tensors))
    if format == "npz":
        return npz_file(target.path, tensors)
    wanted = model.manifest.metadata if metadata is None else metadata
    limit = shard_bytes or _SHARD_BYTES[format]
    if format == "tensor-cache":
        is_kept = not is_safetensors(name) and is_well_split(shards, limit - 1, -(-limit // 2))
        return tensor_cache(target.path, shards, wanted, None if is_kept else limit)
    texts = _texts(wanted, demanded=metadata is not None)
    if target.is_file:
        # An index does not have the metadata of its files.
        return safetensors_file(target.path, tensors, texts or (USUAL_METADATA if name.endswith(INDEX_SUFFIX) else {}))
    order = _index_order(model)
    files = [sorted(shard, key=lambda tensor: order.get(tensor.name, 0)) for shard in shards]
    if not (is_safetensors(name) and is_well_split(files, limit, limit + 1)):
        files = split_as_hub(itertools.chain.from_iterable(files), limit)
    return safetensors_directory(target.path, files, texts)


def _index_order(model: Model) -> dict[str, int]:
    """Return the place of each tensor in the index that a model was read from; empty if there is none."""
    if not model.manifest.name.endswith(INDEX_SUFFIX):
        return {}
    try:
        weight_map = json.loads((model.directory / model.manifest.name).read_bytes())["weight_map"]
        return {name: place for place, name in enumerate(weight_map)}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def _texts(metadata: Mapping[str, Any], *, demanded: bool) -> dict[str, str]:
    """Return the texts of the metadata, as a safetensors file has no other values."""
    for key, value in metadata.items() if demanded else ():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata[{key!r}] must be a string, as the metadata of safetensors files is text")
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def _check_free_space(path: Path, needed: int) -> None:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise disk_full(path, needed, free)
