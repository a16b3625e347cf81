"""Commands that write a model in another format: ``convert`` and ``dump``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from ...export.targets import parse_target
from ...report.words import format_count, format_size
from ...urls.redact import printable
from ..group import argument_errors
from ..options import (
    json_option,
    loader_options,
    make_loader,
    names_option,
    quiet_option,
    report_option,
    source_argument,
    trace_option,
)
from ..output import print_json
from ..show.exports import convert_lines, halved_lines
from ..show.json_values import convert_json, dump_json
from ..values import PLACE, SOURCE, WholeNumber

if TYPE_CHECKING:
    from ...format.shard_writer import Encoding

__all__ = ["convert", "dump"]


@click.command()
@source_argument
@click.argument("target", type=PLACE)
@click.option("--format", type=click.Choice(["safetensors", "tensor-cache"]), help="The format of a directory.")
@names_option
@click.option(
    "--encode",
    type=click.Choice(["raw", "f32-to-bf16"]),
    default="raw",
    show_default=True,
    help="How to store float32: f32-to-bf16 halves the size and loses precision, raw keeps every bit.",
)
@click.option("--no-decode", is_flag=True, help="Keep bfloat16 as it is stored, instead of expanding it to float32.")
@click.option(
    "--shard-mib", type=WholeNumber(1), metavar="MIB", help="Size of a directory's files. [default: 4768, or 32]"
)
@json_option
@quiet_option
@trace_option
@report_option
@loader_options()
def convert(
    source: str,
    target: str,
    format: Literal["safetensors", "tensor-cache"] | None,
    names: tuple[str, ...],
    encode: Encoding,
    no_decode: bool,
    shard_mib: int | None,
    as_json: bool,
    quiet: bool,
    trace: str | None,
    report: str | None,
    **options: Any,
) -> None:
    """Write a model to another format.

    TARGET is a file, *.safetensors or *.npz, or a directory: of safetensors files with an index, or an NDArray cache if
    SOURCE is in safetensors files. Values never change, unless --encode says so. Replaces what is there.
    """
    with argument_errors():
        parse_target(target, format)
    with make_loader(options, source) as loader:
        written = loader.convert(
            source,
            target,
            format=format,
            names=names or None,
            encode=encode,
            decode=not no_decode,
            shard_bytes=None if shard_mib is None else shard_mib << 20,
            progress=not quiet,
            trace=trace,
            report=report,
        )
    if as_json:
        print_json(convert_json(written))
        return
    for line in convert_lines(written):
        click.echo(line)


@click.command()
@click.argument("input_", metavar="INPUT", type=SOURCE)
@click.argument("directory", type=PLACE)
@click.option(
    "--encode",
    type=click.Choice(["raw", "f32-to-bf16"]),
    default="f32-to-bf16",
    show_default=True,
    help="How to store float32: f32-to-bf16 halves the size and loses precision, raw keeps every bit.",
)
@click.option("--shard-mib", type=WholeNumber(1), metavar="MIB", default=32, show_default=True, help="Size of a shard.")
@json_option
@quiet_option
@loader_options()
def dump(
    input_: str, directory: str, encode: Encoding, shard_mib: int, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Write tensors as an NDArray cache.

    INPUT is a .safetensors or .npz file, or a model from any SOURCE: a directory, an index, a URL. Replaces an older
    model in DIRECTORY.
    """
    from ..dumping import dump_input

    place, manifest, halved = dump_input(input_, directory, options, encode, shard_mib << 20, progress=not quiet)
    if as_json:
        print_json(dump_json(place, manifest, halved))
        return
    totals = (format_count(len(manifest), "tensor"), format_size(manifest.nbytes))
    click.echo(f"{printable(str(place))}: {', '.join(totals)}, {format_count(len(manifest.shards), 'shard')}")
    for line in halved_lines(halved):
        click.echo(line)
