"""The commands. Results go to standard output, everything else to standard error.

The exit status is 0; 1 for an error, or if a check finds something bad; 2 for wrong usage; 130 after Ctrl-C; 143 after
SIGTERM. An error is one line, and ``--verbose`` adds its traceback. A bug always shows its traceback.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .._version import __version__
from ..errors import NdcacheError
from ..location import locate
from ..store.inventory import cache_root, models
from ..urls.redact import printable
from .describe import (
    demo_rows,
    device_words,
    dtype_rows,
    format_count,
    format_size,
    load_facts,
    manifest_json,
    model_json,
    shard_rows,
    tensor_rows,
    verify_error,
    verify_facts,
)
from .doctor import facts
from .group import CommandGroup, UserError, argument_errors, one_line
from .options import (
    CACHE_OPTIONS,
    REQUEST_OPTIONS,
    cache_dir_option,
    check_finite,
    device_option,
    json_option,
    loader_options,
    make_loader,
    names_option,
    quiet_option,
    trace_option,
    verbose_option,
)
from .output import print_facts, print_json, print_table, say

if TYPE_CHECKING:
    from ..format.shard_writer import Encoding

__all__ = ["main"]


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ndcache")
@verbose_option
def main() -> None:
    """Load model weights in the MLC / TVM NDArray cache format.

    SOURCE is the http(s) URL of a model directory or of its manifest, hf://owner/name[@revision][/folder], file://, or
    a local path.
    """


@main.command()
@click.argument("source")
@device_option(default="cpu")
@names_option
@click.option("--no-decode", is_flag=True, help="Keep bfloat16 as it is stored, instead of expanding it to float32.")
@quiet_option
@trace_option
@loader_options()
def load(
    source: str,
    device: str,
    names: tuple[str, ...],
    no_decode: bool,
    quiet: bool,
    trace: str | None,
    **options: Any,
) -> None:
    """Load a model and report time and bytes."""
    with (
        make_loader(options, source) as loader,
        loader.load(
            source, device, names=names or None, decode=not no_decode, progress=not quiet, trace=trace
        ) as weights,
    ):
        print_facts(load_facts(source, device, weights))


@main.command()
@click.argument("source")
@names_option
@quiet_option
@trace_option
@loader_options()
def fetch(source: str, names: tuple[str, ...], quiet: bool, trace: str | None, **options: Any) -> None:
    """Download a model into the cache and print its directory."""
    with make_loader(options, source) as loader:
        click.echo(loader.fetch(source, names=names or None, progress=not quiet, trace=trace))


@main.command()
@click.argument("source")
@json_option
@loader_options(*REQUEST_OPTIONS)
def inspect(source: str, as_json: bool, **options: Any) -> None:
    """Show the shards, tensors and dtypes of a model."""
    with make_loader(options, source) as loader:
        manifest = loader.read_manifest(source)
    if as_json:
        print_json(manifest_json(str(locate(source)), manifest))
        return
    print_table(("shard", "size ", "tensors ", "digest"), shard_rows(manifest))
    click.echo()
    print_table(("tensor", "shape", "dtype", "size ", "shard"), tensor_rows(manifest))
    click.echo()
    print_table(("dtype", "tensors ", "size "), dtype_rows(manifest))
    totals = (format_count(len(manifest), "tensor"), format_size(manifest.nbytes))
    click.echo(f"\n{', '.join(totals)}, {format_count(len(manifest.shards), 'shard')}")


@main.command()
@json_option
@loader_options(*CACHE_OPTIONS)
def ls(as_json: bool, cache_dir: str | None, scope: str | None) -> None:
    """List the models in the cache."""
    root = _root(cache_dir)
    found = [model for model in models(root) if scope in (None, model.scope)]
    if as_json:
        print_json([model_json(model) for model in found])
    elif not found:
        say(f"no model in {printable(str(root))}" + (f" in the scope {scope!r}" if scope else ""))
    else:
        rows = [(model.scope, model.source, format_size(model.nbytes), str(model.path)) for model in found]
        print_table(("scope", "source", "size ", "path"), rows)


@main.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@loader_options(*CACHE_OPTIONS)
@click.pass_context
def rm(ctx: click.Context, /, sources: tuple[str, ...], **options: Any) -> None:
    """Remove models from the cache, without asking.

    SOURCE may also be a path that ls shows.
    """
    failed = False
    with make_loader(options) as loader:
        for source in sources:
            try:
                with argument_errors():
                    where = printable(str(locate(source)))
                freed = loader.delete(source)
            except (NdcacheError, UserError) as error:
                say(f"error: {one_line(error)}")
                failed = True  # go on with the others
            else:
                click.echo(f"{where}: {format_size(freed)} freed" if freed else f"{where}: was not cached")
    if failed:
        ctx.exit(1)


@main.command()
@click.argument("source")
@loader_options(*CACHE_OPTIONS, "integrity")
@click.pass_context
def verify(ctx: click.Context, /, source: str, **options: Any) -> None:
    """Compare a model on disk with its digests.

    Reads every byte again. The exit status is 1 if a shard is bad.
    """
    with make_loader(options, source) as loader:
        report = loader.verify(source)
    is_remote = locate(source).is_remote
    print_facts(verify_facts(report, is_remote=is_remote))
    if (error := verify_error(report, is_remote=is_remote)) is not None:
        say(f"error: {error}")
        ctx.exit(1)


@main.command()
@click.argument("input_", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--encode",
    type=click.Choice(["raw", "f32-to-bf16"]),
    default="f32-to-bf16",
    show_default=True,
    help="How to store float32: f32-to-bf16 halves the size and loses precision, raw keeps every bit.",
)
@click.option(
    "--shard-mib", type=click.IntRange(1), metavar="MIB", default=32, show_default=True, help="Size of a shard."
)
@verbose_option
def dump(input_: Path, directory: Path, encode: Encoding, shard_mib: int) -> None:
    """Convert a .safetensors or .npz file to a model directory.

    Replaces an older model in DIRECTORY.
    """
    from ..format.writer import dump
    from .tensor_files import TensorFileError, read_tensors

    try:
        manifest = dump(read_tensors(input_), directory, encode=encode, shard_bytes=shard_mib << 20)
    except TensorFileError as error:
        raise UserError(str(error)) from error
    totals = (format_count(len(manifest), "tensor"), format_size(manifest.nbytes))
    click.echo(f"{printable(str(directory))}: {', '.join(totals)}, {format_count(len(manifest.shards), 'shard')}")


@main.command()
@cache_dir_option
@verbose_option
def doctor(cache_dir: str | None) -> None:
    """Show versions, GPUs, the cache and the environment."""
    print_facts(facts(functools.partial(_root, cache_dir)))


@main.command()
@device_option(default="auto")
@click.option(
    "--size-mib", type=click.IntRange(1), metavar="MIB", default=40, show_default=True, help="Size of the model."
)
@click.option(
    "--rate-mib",
    type=click.FloatRange(0, min_open=True),
    metavar="MIB/S",
    callback=check_finite,
    default=8.0,
    show_default=True,
    help="How fast the server sends over each connection.",
)
@quiet_option
@verbose_option
@click.pass_context
def demo(ctx: click.Context, /, device: str, size_mib: int, rate_mib: float, quiet: bool) -> None:
    """Load a small model from a slow local server in three ways.

    It is loaded with one worker, with eight, and from the cache. No network is needed: the model is generated and
    served on this machine. Every loaded value is compared with the generated one; the exit status is 1 if one differs.
    """
    from .demo import run_demo

    report = run_demo(
        device,
        size_mib=size_mib,
        rate_mib=rate_mib,
        progress=not quiet,
        say=say if not quiet else lambda line: None,
        describe=lambda found: (
            "the CPU (no hardware GPU was found)" if (device, found) == ("auto", "cpu") else device_words(found)
        ),
    )
    print_table(("loaded", "workers ", "seconds ", "MiB/s ", "speed-up "), demo_rows(report))
    if wrong := sorted({name for load in report.loads for name in load.wrong}):
        say(f"error: {format_count(len(wrong), 'tensor')} not as generated: {printable(', '.join(wrong[:5]))}")
        ctx.exit(1)
    click.echo(f"\nEvery value of {format_count(len(report.manifest), 'tensor')} was as generated, in all three loads.")


def _root(cache_dir: str | None) -> Path:
    return cache_root(cache_dir, os.environ.get("NDCACHE_HOME"))
