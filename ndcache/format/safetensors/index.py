"""The index of a model in several safetensors files, ``*.safetensors.index.json``.

::

    {"metadata": {...}, "weight_map": {tensor: file, ...}}

Source: ``save_pretrained`` of transformers, and ``huggingface_hub.serialization``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ManifestError, ManifestLimitError, ManifestSyntaxError, UnsafePathError, redact
from ..json_reader import JsonReader
from ..parse import check_metadata
from ..paths import check_path
from ..strict_json import MAX_RECORDS, MAX_SHARDS, get_field, has_surrogate, json_type, quote

__all__ = ["FILE_SUFFIX", "INDEX_SUFFIX", "Index", "is_safetensors", "parse_index"]

FILE_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Index:
    """A checked index.

    Attributes
    ----------
    metadata : mapping
        Its free-form ``metadata``.
    files : mapping of str to set of str
        The names of the tensors of each file, by its path, in the order of the paths.
    """

    metadata: Mapping[str, Any]
    files: Mapping[str, set[str]]


def is_safetensors(name: str) -> bool:
    """Return whether a file has the name of a safetensors file, or of an index of some."""
    return name.endswith((FILE_SUFFIX, INDEX_SUFFIX))


def parse_index(data: bytes, *, name: str, url: str | None = None, check: Callable[[], None] = lambda: None) -> Index:
    """Parse and check an index.

    Parameters
    ----------
    data : bytes
    name : str
        The name of the index.
    url : str, optional
        Where it came from, for messages.
    check : callable
        Called now and then; may raise to cancel.

    Raises
    ------
    ManifestError
        It cannot be used; one of the subclasses says why.
    """
    try:
        return _parse(data, check)
    except ManifestError as error:
        error.message = error.message.replace("the manifest", "the index")  # the JSON reader's word
        error.shard, error.url = name, None if url is None else redact(url)
        raise


def _parse(data: bytes, check: Callable[[], None]) -> Index:
    reader = JsonReader(data, check)
    value = reader.value()
    reader.end()
    if type(value) is not dict:
        raise ManifestSyntaxError(f"the index is {json_type(value)}, not an object")
    metadata = get_field(value, "metadata", dict, "the index", None) or {}
    check_metadata(metadata)
    files = dict[str, set[str]]()
    weight_map = get_field(value, "weight_map", dict, "the index")
    if len(weight_map) > MAX_RECORDS:
        raise ManifestLimitError(f"the index has more than {MAX_RECORDS} tensors")
    for tensor, file in weight_map.items():
        if type(file) is not str:
            raise ManifestSyntaxError(f"the file of tensor {quote(tensor)} in the index is {json_type(file)}")
        if has_surrogate(tensor):
            raise ManifestSyntaxError(f"the index has the name {quote(tensor)}, which is not Unicode text")
        files.setdefault(file, set()).add(tensor)
    if len(files) > MAX_SHARDS:
        raise ManifestLimitError(f"the index has more than {MAX_SHARDS} files")
    for file in files:
        check_path(file)
        if not file.endswith(FILE_SUFFIX):
            raise UnsafePathError(
                f"the index names the file {quote(file)}, which is not a safetensors file",
                hint="Only files whose names end in .safetensors are read.",
            )
    return Index(metadata, {file: files[file] for file in sorted(files)})
