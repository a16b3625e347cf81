"""The tensors of a model as a table for a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..urls.redact import printable
from .words import format_size

if TYPE_CHECKING:
    from ..format.manifest import Manifest

__all__ = ["tensor_table"]

#: A model with more tensors shows this many of its first ones, and a few of its last ones.
_MOST_ROWS = 100
_LAST_ROWS = 5
_COLUMNS = ("name", "shape", "dtype", "size", "shard", "checked by")
_LEFT = ' style="text-align:left;white-space:nowrap"'
#: A long name breaks, so that it does not push the other columns off the page.
_NAME = ' style="text-align:left;overflow-wrap:anywhere;min-width:16em"'


def tensor_table(caption: str, tensors: Mapping[str, Any], manifest: Manifest, checked: Mapping[str, str]) -> str:
    """Return an HTML table with a row for each tensor, or for the first and last ones of a large model.

    Parameters
    ----------
    caption : str
    tensors : mapping of str to tensor
        A tensor without a shape or a dtype has those that the manifest says.
    manifest : Manifest
    checked : mapping of str to str
        How each shard was checked, by its ``dataPath``.
    """
    names, left_out = list(tensors), len(tensors) - _MOST_ROWS
    first, last = (names, []) if left_out <= 0 else (names[: _MOST_ROWS - _LAST_ROWS], names[-_LAST_ROWS:])
    shards = dict(_shards_of({*first, *last}, manifest))
    rows = [_row(name, tensors[name], manifest, shards[name], checked) for name in first]
    if last:
        rows.append(f'<tr><td colspan="{len(_COLUMNS)}"{_LEFT}>… {left_out:,} more …</td></tr>')
        rows += [_row(name, tensors[name], manifest, shards[name], checked) for name in last]
    head = "".join(f"<th{_LEFT}>{column}</th>" for column in _COLUMNS)
    return (
        f'<p>{escape(caption)}</p><div style="max-height:30em;overflow:auto"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _shards_of(names: set[str], manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield each of these names and the ``dataPath`` of its shard."""
    pairs = ((record.name, shard.data_path) for shard in manifest.shards for record in shard.records)
    yield from islice((pair for pair in pairs if pair[0] in names), len(names))


def _row(name: str, tensor: Any, manifest: Manifest, shard: str, checked: Mapping[str, str]) -> str:
    record = manifest[name]
    shape = tuple(getattr(tensor, "shape", record.shape))
    dtype = str(getattr(tensor, "dtype", record.dtype)).removeprefix("torch.")
    size = format_size(getattr(tensor, "nbytes", record.nbytes))
    cells = (" × ".join(map(str, shape)) or "scalar", dtype, size, shard, _check(checked.get(shard)))
    others = "".join(f"<td{_LEFT}>{escape(printable(cell))}</td>" for cell in cells)
    return f"<tr><td{_NAME}>{escape(printable(name))}</td>{others}</tr>"


def _check(kind: str | None) -> str:
    return {None: "", "size": "size alone"}.get(kind, kind or "")
