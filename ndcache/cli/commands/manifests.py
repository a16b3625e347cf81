"""Commands that show the files of a model: ``inspect`` and ``lock``."""

from __future__ import annotations

from typing import Any

import click

from ...format.manifest import Manifest
from ...report.words import format_count, format_size
from ..options import REQUEST_OPTIONS, json_option, loader_options, make_loader, quiet_option, source_argument
from ..output import print_json, print_lines, print_table
from ..show.manifests import dtype_rows, manifest_json, shard_rows, tensor_rows
from ..values import FILE, locate_source, location_words

__all__ = ["inspect", "lock"]


@click.command()
@source_argument
@click.option("--summary", is_flag=True, help="Show only the dtypes and the totals.")
@click.option("--names", "only_names", is_flag=True, help="Print only the names of the tensors, one a line.")
@json_option
@quiet_option
@loader_options(*REQUEST_OPTIONS)
def inspect(source: str, summary: bool, only_names: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Show the shards, tensors and dtypes of a model."""
    if summary and only_names:
        raise click.UsageError("Give --summary or --names, not both.")
    with make_loader(options, source) as loader:
        manifest = loader.read_manifest(source)
    if as_json:
        value = manifest_json(location_words(locate_source(source)), manifest, has_shards=not (summary or only_names))
        print_json(list(manifest) if only_names else value)
    elif only_names:
        print_lines(manifest)
    else:
        _show(manifest, has_tensors=not summary)


def _show(manifest: Manifest, *, has_tensors: bool) -> None:
    if has_tensors:
        print_table(("shard", "size ", "tensors ", "digest"), shard_rows(manifest))
        click.echo()
        print_table(("tensor", "shape", "dtype", "size ", "shard"), tensor_rows(manifest))
        click.echo()
    print_table(("dtype", "tensors ", "size "), dtype_rows(manifest))
    totals = (format_count(len(manifest), "tensor"), format_size(manifest.nbytes))
    click.echo(f"\n{', '.join(totals)}, {format_count(len(manifest.shards), 'shard')}")


@click.command()
@source_argument
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    type=FILE,
    help="Write it to FILE instead.",
)
@json_option
@quiet_option
@loader_options()
def lock(source: str, output: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Print the SHA-256 of every file of a model, as JSON, for --lock.

    The model is downloaded into the cache first. Nothing is printed unless that succeeds. --output FILE keeps an older
    FILE until then, which > FILE does not.
    """
    with make_loader(options, source) as loader:
        value = loader.lock(source, output, progress=not quiet)
    if output is None or as_json:
        print_json(value)
