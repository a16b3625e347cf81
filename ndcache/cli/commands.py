"""The command line. Results go to standard output, everything else to standard error.

Exit status: 0, or 1 for an error and for something bad that was found, 2 for wrong usage, 130 after Ctrl-C, 143 after
SIGTERM. An error is one line; ``--verbose`` adds its traceback.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from .._version import __version__
from ..devices import is_device_name
from ..errors import NdcacheError
from ..format.integrity import parse_sri
from ..format.manifest import Manifest, Record
from ..loader import Loader
from ..location.locate import locate
from ..store.inventory import CachedModel, cache_root, models
from ..weights import Weights
from .doctor import adapter_words, facts
from .output import (
    VERBOSE,
    Commands,
    format_checks,
    format_count,
    format_size,
    message,
    print_facts,
    print_json,
    print_table,
    say,
    shown,
)

__all__ = ["main"]

logger = logging.getLogger("ndcache")

Command = TypeVar("Command", bound=Callable[..., Any])


# --- options ------------------------------------------------------------------------------------------


def _set_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[VERBOSE] = True
        logger.setLevel(logging.INFO)


def _check_device(_: click.Context, __: click.Parameter, value: str) -> str:
    if not is_device_name(value):
        raise click.BadParameter("it is cpu, gpu, gpu:N or auto.")
    return value


def _bytes_of_mib(_: click.Context, __: click.Parameter, value: int | None) -> int | None:
    return None if value is None else value << 20


def _pairs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    for value in values:
        name, _equals, digest = value.partition("=")
        try:
            parse_sri(digest)
        except ValueError as error:
            raise click.BadParameter(f"{error}. It is FILE=sha256-….") from error
        if not name:
            raise click.BadParameter("it is FILE=sha256-….")
    return {name: digest for name, _, digest in (value.partition("=") for value in values)} or None


_verbose = click.option(
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_set_verbose,
    help="Show what is logged, and the traceback of an error.",
)
_device = functools.partial(
    click.option,
    "--device",
    metavar="cpu|gpu|gpu:N|auto",
    callback=_check_device,
    show_default=True,
    help="Where tensors go.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
_names = click.option(
    "--names", metavar="PATTERN", multiple=True, help="Only these tensors: names or glob patterns. May be repeated."
)
_trace = click.option(
    "--trace",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Write what was done when, for https://ui.perfetto.dev.",
)
_quiet = click.option("--quiet", "-q", is_flag=True, help="No progress bar.")

#: The options of `Loader`, by their names there.
_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "cache_dir": click.option("--cache-dir", metavar="DIR", help="The cache. [default: NDCACHE_HOME, or the system's]"),
    "scope": click.option("--scope", metavar="NAME", help="A part of the cache of its own. [default: default]"),
    "max_workers": click.option(
        "--max-workers", type=click.IntRange(1), metavar="N", help="Shards fetched at once. [default: 8]"
    ),
    "timeout": click.option(
        "--timeout",
        type=click.FloatRange(0, min_open=True),
        metavar="SECONDS",
        help="To connect, and to wait for the next bytes. [default: 10, 30]",
    ),
    "retries": click.option(
        "--retries", type=click.IntRange(0), metavar="N", help="Tries after a failed one. [default: 6]"
    ),
    "verify": click.option(
        "--verify",
        type=click.Choice(["download", "always", "never"]),
        help="When digests are compared. [default: download]",
    ),
    "offline": click.option("--offline", is_flag=True, help="Make no request: use what is cached."),
    "mirrors": click.option(
        "--mirror", "mirrors", metavar="SOURCE", multiple=True, help="Has the same files. May be repeated."
    ),
    "integrity": click.option(
        "--integrity",
        metavar="FILE=DIGEST",
        multiple=True,
        callback=_pairs,
        help="What this file must be: tensor-cache.json=sha256-…, the digest in base64. May be repeated.",
    ),
    "memory_limit": click.option(
        "--memory-limit-mib",
        "memory_limit",
        type=click.IntRange(1),
        metavar="MIB",
        callback=_bytes_of_mib,
        help="Shards under way at once. [default: 512]",
    ),
}
_CACHE_OPTIONS = ("cache_dir", "scope")
_REQUEST_OPTIONS = (*_CACHE_OPTIONS, "timeout", "retries", "offline", "integrity")


def _options(*names: str) -> Callable[[Command], Command]:
    """Give a command the `Loader` options `names` (all of them if none is named) and ``--verbose``."""

    def decorate(command: Command) -> Command:
        command = _verbose(command)
        for name in reversed(names or tuple(_OPTIONS)):
            command = _OPTIONS[name](command)
        return command

    return decorate


def _loader(options: dict[str, Any]) -> Loader:
    """A loader with the options that were given; the others are its own business."""
    return Loader(**{name: value for name, value in options.items() if value is not None and value != ()})


# --- commands -----------------------------------------------------------------------------------------


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ndcache")
@_verbose
def main() -> None:
    """Load model weights in the MLC / TVM NDArray cache format.

    SOURCE is an http(s) URL of a model directory or of its manifest, hf://owner/name[@revision][/folder], file:// or a
    local path.
    """


@main.command()
@click.argument("source")
@_device(default="cpu")
@_names
@click.option("--no-decode", is_flag=True, help="Leave float32 that is stored as bfloat16 as it is stored.")
@_quiet
@_trace
@_options()
def load(
    source: str,
    device: str,
    names: tuple[str, ...],
    no_decode: bool,
    quiet: bool,
    trace: str | None,
    **options: Any,
) -> None:
    """Load a model, say what that took, and let go of it."""
    with (
        _loader(options) as loader,
        loader.load(
            source, device, names=names or None, decode=not no_decode, progress=not quiet, trace=trace
        ) as weights,
    ):
        print_facts(_load_facts(source, device, weights))


@main.command()
@click.argument("source")
@_names
@_quiet
@_trace
@_options()
def fetch(source: str, names: tuple[str, ...], quiet: bool, trace: str | None, **options: Any) -> None:
    """Bring a model into the cache and print its directory."""
    with _loader(options) as loader:
        click.echo(loader.fetch(source, names=names or None, progress=not quiet, trace=trace))


@main.command()
@click.argument("source")
@_json
@_options(*_REQUEST_OPTIONS)
def inspect(source: str, as_json: bool, **options: Any) -> None:
    """Show a model's manifest: its shards, tensors and dtypes."""
    with _loader(options) as loader:
        manifest = loader.read_manifest(source)
    if as_json:
        print_json(_manifest_json(str(locate(source)), manifest))
        return
    print_table(
        ("shard", "size ", "tensors ", "digest"),
        (
            (
                s.data_path,
                format_size(s.nbytes),
                f"{len(s.records):,}",
                "none" if s.integrity == "size" else s.integrity,
            )
            for s in manifest.shards
        ),
    )
    click.echo()
    print_table(
        ("tensor", "shape", "dtype", "size ", "shard"),
        (
            (r.name, str(list(r.shape)), _dtype_words(r), format_size(r.nbytes), s.data_path)
            for s in manifest.shards
            for r in s.records
        ),
    )
    click.echo()
    print_table(
        ("dtype", "tensors ", "size "),
        [(dtype, f"{number:,}", format_size(nbytes)) for dtype, (number, nbytes) in _by_dtype(manifest).items()],
    )
    totals = (format_count(len(manifest), "tensor"), format_size(manifest.nbytes))
    click.echo(f"\n{', '.join(totals)}, {format_count(len(manifest.shards), 'shard')}")


@main.command()
@_json
@_options(*_CACHE_OPTIONS)
def ls(as_json: bool, cache_dir: str | None, scope: str | None) -> None:
    """List the models in the cache."""
    root = _root(cache_dir)
    found = [model for model in models(root) if scope in (None, model.scope)]
    if as_json:
        print_json([_model_json(model) for model in found])
    elif not found:
        say(f"no model in {root}" + (f" under the scope {scope!r}" if scope else ""))
    else:
        rows = [(model.scope, model.source, format_size(model.nbytes), str(model.path)) for model in found]
        print_table(("scope", "source", "size ", "path"), rows)


@main.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@_options(*_CACHE_OPTIONS)
@click.pass_context
def rm(ctx: click.Context, /, sources: tuple[str, ...], **options: Any) -> None:
    """Remove models from the cache.

    They are removed without a question. SOURCE may also be a path that ls shows.
    """
    failed = False
    with _loader(options) as loader:
        for source in sources:
            try:
                freed, where = loader.delete(source), shown(str(locate(source)))
            except (NdcacheError, ValueError) as error:
                say(f"error: {message(error)}")
                failed = True  # and the others are removed all the same
            else:
                click.echo(f"{where}: {format_size(freed)} freed" if freed else f"{where}: was not cached")
    if failed:
        ctx.exit(1)


@main.command()
@click.argument("source")
@_options(*_CACHE_OPTIONS, "integrity")
@click.pass_context
def verify(ctx: click.Context, /, source: str, **options: Any) -> None:
    """Compare what is cached of a model with its digests.

    Every byte is read again. The exit status is 1 if something is bad.
    """
    with _loader(options) as loader:
        report = loader.verify(source)
    checked = Counter(report.checked.values())
    good = f"{format_count(len(report.checked), 'shard')}, {format_size(report.nbytes)}"
    found = [("good", f"{good}: {format_checks(checked.items())}")]
    found += [("bad", name) for name in report.bad]
    is_remote = locate(source).is_remote
    if report.missing and is_remote:
        found.append(("missing", f"{format_count(len(report.missing), 'shard')}, not fetched so far"))
    elif report.missing:
        found += [("missing", name) for name in report.missing]
    print_facts(found)
    if not report.ok or (report.missing and not is_remote):
        wrong = format_count(len(report.bad) + (0 if is_remote else len(report.missing)), "shard")
        remedy = "set aside: the next load fetches them anew" if is_remote else "copy them again"
        if report.kept:
            remedy = f"{len(report.kept):,} could not be set aside: load with --verify always, or from another cache"
        say(f"error: {wrong} bad; {remedy}")
        ctx.exit(1)


@main.command()
@click.argument("input_", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--encode",
    type=click.Choice(["raw", "f32-to-bf16"]),
    default="f32-to-bf16",
    show_default=True,
    help="How float32 is stored. f32-to-bf16 halves the size and loses precision, raw keeps every bit.",
)
@click.option("--shard-mib", type=click.IntRange(1), default=32, show_default=True, help="Size of the shards.")
@_verbose
def dump(input_: Path, directory: Path, encode: Any, shard_mib: int) -> None:
    """Make a model directory of a .safetensors or .npz file.

    An older model in DIRECTORY is replaced.
    """
    from ..format.writer import dump
    from .tensor_files import read_tensors

    manifest = dump(read_tensors(input_), directory, encode=encode, shard_bytes=shard_mib << 20)
    shards = format_count(len(manifest.shards), "shard")
    click.echo(
        f"{shown(str(directory))}: {format_count(len(manifest), 'tensor')}, {format_size(manifest.nbytes)}, {shards}"
    )


@main.command()
@click.option("--cache-dir", metavar="DIR", help="The cache. [default: NDCACHE_HOME, or the system's]")
@_verbose
def doctor(cache_dir: str | None) -> None:
    """Show versions, GPUs, the cache and the environment."""
    print_facts(facts(functools.partial(_root, cache_dir)))


@main.command()
@_device(default="auto")
@click.option("--size-mib", type=click.IntRange(1), default=40, show_default=True, help="Size of the model.")
@click.option(
    "--rate-mib",
    type=click.FloatRange(0, min_open=True),
    default=8.0,
    show_default=True,
    help="MiB/s that the server gives each connection.",
)
@_quiet
@_verbose
@click.pass_context
def demo(ctx: click.Context, /, device: str, size_mib: int, rate_mib: float, quiet: bool) -> None:
    """Load a small model from a slow server, three ways.

    The model is made here and the server runs on loopback, so no network is needed: with one worker, with eight, and
    from the cache. Every value is compared with what was generated; the exit status is 1 if one differs.
    """
    from .demo import run_demo

    report = run_demo(
        device,
        size_mib=size_mib,
        rate_mib=rate_mib,
        progress=not quiet,
        say=say if not quiet else lambda line: None,
        describe=lambda found: (
            "the CPU: there is no hardware GPU" if (device, found) == ("auto", "cpu") else _device_words(found)
        ),
    )
    nbytes, first = report.manifest.nbytes, report.loads[0].seconds
    print_table(
        ("loaded", "workers ", "seconds ", "MiB/s ", "speed-up "),
        (
            (
                load.title,
                str(load.workers),
                f"{load.seconds:.2f}",
                f"{nbytes / 2**20 / load.seconds:,.1f}",
                f"{first / load.seconds:.1f}x",
            )
            for load in report.loads
        ),
    )
    wrong = sorted({name for load in report.loads for name in load.wrong})
    if wrong:
        say(f"error: {format_count(len(wrong), 'tensor')} not as generated: {shown(', '.join(wrong[:5]))}")
        ctx.exit(1)
    click.echo(
        f"\nEvery value of {format_count(len(report.manifest), 'tensor')} is as generated, in each of the loads."
    )


# --- what the commands show ---------------------------------------------------------------------------


def _load_facts(source: str, device: str, weights: Weights) -> Iterator[tuple[str, str]]:
    stats, where, location = weights.stats, _device_words(weights.device), locate(source)
    yield "source", str(location)
    yield "device", f"{where} (there is no hardware GPU)" if (device, where) == ("auto", "cpu") else where
    yield "tensors", f"{len(weights):,}, {format_size(weights.nbytes)}"
    rate = stats.gb_per_second * 1e9 / 2**20
    yield "time", f"{stats.seconds['total']:.2f} s, {rate:,.1f} MiB/s"
    if location.is_remote:
        again = f", {stats.retries:,} of them again" if stats.retries else ""
        yield "from network", f"{format_size(stats.network_bytes)} in {format_count(stats.requests, 'request')}{again}"
    if stats.resumed_bytes:
        yield "left over", f"{format_size(stats.resumed_bytes)} of shards that had come in part"
    yield "from cache" if location.is_remote else "in place", format_size(stats.cache_bytes)
    checks = f"{format_count(stats.shards, 'shard')}: {format_checks(stats.integrity.most_common())}"
    # A file that is as it was when it was checked is not read again for that.
    was_checked_before = location.is_remote and stats.cache_bytes and not stats.seconds["hash"]
    yield "checked", f"{checks}, those from the cache when they were fetched" if was_checked_before else checks


def _device_words(device: Any) -> str:
    """A `Weights.device`: the CPU, or the adapter's name, kind and backend."""
    return "cpu" if device == "cpu" else ", ".join(adapter_words(device.adapter))


def _dtype_words(record: Record) -> str:
    return f"{record.dtype} as {record.stored_dtype}" if record.is_bf16_encoded else record.dtype


def _by_dtype(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Tensors and stored bytes of each dtype, the largest first."""
    numbers, nbytes = Counter[str](), Counter[str]()
    for record in manifest.records:
        numbers[_dtype_words(record)] += 1
        nbytes[_dtype_words(record)] += record.nbytes
    return {dtype: (numbers[dtype], size) for dtype, size in nbytes.most_common()}


def _manifest_json(source: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "source": source,
        "manifest": manifest.name,
        "metadata": dict(manifest.metadata),
        "nbytes": manifest.nbytes,
        "tensors": len(manifest),
        "dtypes": {
            dtype: {"tensors": number, "nbytes": nbytes} for dtype, (number, nbytes) in _by_dtype(manifest).items()
        },
        "shards": [
            {
                "path": shard.data_path,
                "nbytes": shard.nbytes,
                "md5": shard.md5sum,
                "sha256": shard.sha256sum,
                "tensors": [
                    {
                        "name": record.name,
                        "shape": list(record.shape),
                        "dtype": record.dtype,
                        "stored_dtype": record.stored_dtype,
                        "offset": record.byte_offset,
                        "nbytes": record.nbytes,
                    }
                    for record in shard.records
                ],
            }
            for shard in manifest.shards
        ],
    }


def _model_json(model: CachedModel) -> dict[str, Any]:
    return {
        "scope": model.scope,
        "source": model.source,
        "nbytes": model.nbytes,
        "path": str(model.path),
    }


def _root(cache_dir: str | None) -> Path:
    return cache_root(cache_dir, os.environ.get("NDCACHE_HOME"))
