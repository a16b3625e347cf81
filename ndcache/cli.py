"""The command line. Results go to standard output, everything else to standard error.

Exit status: 0, or 1 for an error and for something bad that was found, 2 for wrong usage, 130 after Ctrl-C, 143 after
SIGTERM. An error is one line; ``--verbose`` adds its traceback.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import signal
import sys
import threading
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import unquote

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from ._version import __version__
from .cache import CachedModel, cache_root, models
from .errors import NdcacheError, NoAdapterError, redact
from .loader import Loader
from .locate import locate
from .manifest import Manifest, Record
from .weights import Weights

__all__ = ["main"]

logger = logging.getLogger("ndcache")

Command = TypeVar("Command", bound=Callable[..., Any])

#: What happens to users; anything else is a bug, and shows its traceback.
_EXPECTED = (NdcacheError, KeyError, ValueError, TypeError, OSError, ImportError, MemoryError)
_VERBOSE = "ndcache.verbose"
_PACKAGES = ("requests", "urllib3", "numpy", "ml_dtypes", "wgpu", "platformdirs", "tqdm", "click", "rich")
_OPTIONAL_PACKAGES = ("safetensors",)
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


# --- errors, warnings, signals ------------------------------------------------------------------------


class _Terminated(BaseException):
    """SIGTERM came. Like KeyboardInterrupt, so that everything is stopped and removed on its way up."""


class _Commands(click.Group):
    """The commands, with what is true of them all: how they fail and how they are stopped."""

    def invoke(self, ctx: click.Context) -> Any:
        with _messages(), _sigterm():
            try:
                try:
                    return super().invoke(ctx)
                finally:
                    sys.stdout.flush()  # here, where a broken pipe is caught
            except BrokenPipeError:  # whoever reads has enough, as `head` does
                _drop_stdout()
                ctx.exit(1)
            except KeyboardInterrupt:
                _say("interrupted")
                ctx.exit(130)
            except _Terminated:
                _say("terminated")
                ctx.exit(143)
            except _EXPECTED as error:
                if ctx.meta.get(_VERBOSE):
                    traceback.print_exception(error)
                _say(f"error: {_message(error)}")
                ctx.exit(1)


class _Lines(logging.Handler):
    """A line on standard error for each record."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(f"{record.levelname.lower()}: {_shown(record.getMessage())}")


@contextmanager
def _messages() -> Iterator[None]:
    """Warnings and logs as plain lines, and no character that the terminal's encoding lacks ends a command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            is_utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")
    handler = _Lines()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say(f"warning: {_shown(str(message))}")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@contextmanager
def _sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def terminate(*_: object) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _drop_stdout() -> None:
    """What is still buffered must not fail again when the interpreter ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass  # not a real file


def _message(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])  # its str() has quotes around it
    elif isinstance(error, OSError) and not isinstance(error, NdcacheError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, MemoryError):
        text = "not enough memory. Load a part with --names, or lower --memory-limit-mib."
    else:
        text = str(error) or type(error).__name__
    return _shown(text)


def _shown(text: str) -> str:
    """`text` in one line and without characters that do something to a terminal: names come from anywhere."""
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above the bar, if there is one
    sys.stderr.flush()


# --- options ------------------------------------------------------------------------------------------


def _set_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_VERBOSE] = True
        logger.setLevel(logging.INFO)


def _bytes_of_mib(_: click.Context, __: click.Parameter, value: int | None) -> int | None:
    return None if value is None else value << 20


_verbose = click.option(
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_set_verbose,
    help="Show what is logged, and the traceback of an error.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
_names = click.option(
    "--names", metavar="PATTERN", multiple=True, help="Only these tensors: names or glob patterns. May be repeated."
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
_REQUEST_OPTIONS = (*_CACHE_OPTIONS, "timeout", "retries", "offline")


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


# --- output -------------------------------------------------------------------------------------------


def _print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print labels and values in two columns; a pair of empty ones is an empty line."""
    facts = list(facts)
    width = max((len(label) for label, _ in facts), default=0)
    for label, value in facts:
        click.echo(f"{label:<{width}}  {_shown(value)}".rstrip())


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table. Columns whose names end in a space are numbers, and set to the right."""
    # Without a terminal a row is a line, whatever its length.
    is_terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, highlight=False, width=None if is_terminal else 1 << 20)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: Any = "right" if column.endswith(" ") else "left"
        table.add_column(column.strip(), justify=justify, overflow="fold", no_wrap=not is_terminal)
    for row in rows:
        table.add_row(*(Text(_shown(cell)) for cell in row))
    if is_terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        click.echo(line.rstrip())


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def _size(nbytes: int) -> str:
    if nbytes < 1 << 10:
        return f"{nbytes} B"
    unit, name = next((unit, name) for unit, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if nbytes >= 1 << unit)
    return f"{nbytes / (1 << unit):,.1f} {name}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _checks(integrity: Iterable[tuple[str, int]]) -> str:
    """How many shards were held to which check, in words."""
    words = [f"{number:,} by {'size alone' if check == 'size' else check}" for check, number in integrity]
    return ", ".join(words) or "nothing"


def _device_words(device: Any) -> str:
    """A `Weights.device`: the CPU, or the adapter's name, kind and backend."""
    return "cpu" if device == "cpu" else ", ".join(_adapter_words(device.adapter))


def _adapter_words(adapter: Any) -> tuple[str, str, str]:
    from .devices.gpu import is_software

    info = adapter.info
    return info["device"], "software" if is_software(adapter) else info["adapter_type"], info["backend_type"]


def _quiet_gpu_drivers() -> None:
    """Before wgpu is loaded: libwayland, asked for a display while adapters are enumerated, prints a line each time
    that XDG_RUNTIME_DIR is not set. It takes any absolute path, and in this one nobody can have put a socket.
    """
    if sys.platform == "linux":
        os.environ.setdefault("XDG_RUNTIME_DIR", os.devnull)


# --- commands -----------------------------------------------------------------------------------------


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ndcache")
@_verbose
def main() -> None:
    """Load model weights in the MLC / TVM NDArray cache format.

    SOURCE is an http(s) URL of a model directory or of its manifest, hf://owner/name[@revision], file:// or a local
    directory.
    """


@main.command()
@click.argument("source")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|gpu|gpu:N|auto", help="Where tensors go.")
@_names
@click.option("--no-decode", is_flag=True, help="Leave float32 that is stored as bfloat16 as it is stored.")
@_quiet
@_options()
def load(source: str, device: str, names: tuple[str, ...], no_decode: bool, quiet: bool, **options: Any) -> None:
    """Load a model, say what that took, and let go of it."""
    if device != "cpu":
        _quiet_gpu_drivers()
    with (
        _loader(options) as loader,
        loader.load(source, device, names=names or None, decode=not no_decode, progress=not quiet) as weights,
    ):
        _print_facts(_load_facts(source, device, weights))


@main.command()
@click.argument("source")
@_names
@_quiet
@_options()
def fetch(source: str, names: tuple[str, ...], quiet: bool, **options: Any) -> None:
    """Bring a model into the cache and print its directory."""
    with _loader(options) as loader:
        click.echo(loader.fetch(source, names=names or None, progress=not quiet))


@main.command()
@click.argument("source")
@_json
@_options(*_REQUEST_OPTIONS)
def inspect(source: str, as_json: bool, **options: Any) -> None:
    """Show a model's manifest: its shards, tensors and dtypes."""
    with _loader(options) as loader:
        manifest = loader.read_manifest(source)
    if as_json:
        _print_json(_manifest_json(str(locate(source)), manifest))
        return
    _print_table(
        ("shard", "size ", "tensors ", "digest"),
        (
            (s.data_path, _size(s.nbytes), f"{len(s.records):,}", "none" if s.integrity == "size" else s.integrity)
            for s in manifest.shards
        ),
    )
    click.echo()
    _print_table(
        ("tensor", "shape", "dtype", "size ", "shard"),
        (
            (r.name, str(list(r.shape)), _dtype_words(r), _size(r.nbytes), s.data_path)
            for s in manifest.shards
            for r in s.records
        ),
    )
    click.echo()
    _print_table(
        ("dtype", "tensors ", "size "),
        [(dtype, f"{number:,}", _size(nbytes)) for dtype, (number, nbytes) in _by_dtype(manifest).items()],
    )
    click.echo(
        f"\n{_count(len(manifest), 'tensor')}, {_size(manifest.nbytes)}, {_count(len(manifest.shards), 'shard')}"
    )


@main.command()
@_json
@_options(*_CACHE_OPTIONS)
def ls(as_json: bool, cache_dir: str | None, scope: str | None) -> None:
    """List the models in the cache."""
    root = _root(cache_dir)
    found = [model for model in models(root) if scope in (None, unquote(model.scope))]
    if as_json:
        _print_json([_model_json(model) for model in found])
    elif not found:
        _say(f"no model in {root}" + (f" under the scope {scope!r}" if scope else ""))
    else:
        rows = [(unquote(model.scope), model.source, _size(model.nbytes), str(model.path)) for model in found]
        _print_table(("scope", "source", "size ", "path"), rows)


@main.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@_options(*_CACHE_OPTIONS)
@click.pass_context
def rm(ctx: click.Context, /, sources: tuple[str, ...], **options: Any) -> None:
    """Remove models from the cache.

    Nothing is asked. SOURCE may also be a path that ls shows.
    """
    failed = False
    with _loader(options) as loader:
        for source in sources:
            try:
                freed, shown = loader.delete(source), _shown(str(locate(source)))
            except NdcacheError as error:
                _say(f"error: {_message(error)}")
                failed = True  # and the others are removed all the same
            else:
                click.echo(f"{shown}: {_size(freed)} freed" if freed else f"{shown}: was not cached")
    if failed:
        ctx.exit(1)


@main.command()
@click.argument("source")
@_options(*_CACHE_OPTIONS)
@click.pass_context
def verify(ctx: click.Context, /, source: str, **options: Any) -> None:
    """Compare what is cached of a model with its digests.

    Every byte is read again. The exit status is 1 if something is bad.
    """
    with _loader(options) as loader:
        report = loader.verify(source)
    checked = Counter(report.checked.values())
    facts = [("good", f"{_count(len(report.checked), 'shard')}, {_size(report.nbytes)}: {_checks(checked.items())}")]
    facts += [("bad", name) for name in report.bad]
    if report.missing:
        facts.append(("missing", f"{_count(len(report.missing), 'shard')}, not fetched so far"))
    _print_facts(facts)
    if not report.ok:
        remedy = "set aside: the next load fetches them anew" if locate(source).is_remote else "copy them again"
        _say(f"error: {_count(len(report.bad), 'shard')} bad; {remedy}")
        ctx.exit(1)


@main.command()
@click.argument("input_", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--encode",
    type=click.Choice(["raw", "f32-to-bf16"]),
    default="f32-to-bf16",
    show_default=True,
    help="How float32 is stored.",
)
@click.option("--shard-mib", type=click.IntRange(1), default=32, show_default=True, help="Size of the shards.")
@_verbose
def dump(input_: Path, directory: Path, encode: Any, shard_mib: int) -> None:
    """Make a model directory of a .safetensors or .npz file.

    An older model in DIRECTORY is replaced.
    """
    from .dump import dump

    manifest = dump(_read_tensors(input_), directory, encode=encode, shard_bytes=shard_mib << 20)
    shards = _count(len(manifest.shards), "shard")
    click.echo(f"{_shown(str(directory))}: {_count(len(manifest), 'tensor')}, {_size(manifest.nbytes)}, {shards}")


@main.command()
@click.option("--cache-dir", metavar="DIR", help="The cache. [default: NDCACHE_HOME, or the system's]")
@_verbose
def doctor(cache_dir: str | None) -> None:
    """Show versions, GPUs, the cache and the environment."""
    _quiet_gpu_drivers()
    _print_facts(
        [
            ("ndcache", __version__),
            ("Python", f"{platform.python_version()}, {platform.platform()}"),
            *((name, _version(name)) for name in (*_PACKAGES, *_OPTIONAL_PACKAGES)),
            ("", ""),
            *_adapter_facts(),
            ("", ""),
            *_cache_facts(_root(cache_dir)),
            ("", ""),
            *_environment_facts(),
        ]
    )


@main.command()
@click.option("--device", default="auto", show_default=True, metavar="cpu|gpu|gpu:N|auto", help="Where tensors go.")
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

    _quiet_gpu_drivers()
    report = run_demo(
        device,
        size_mib=size_mib,
        rate_mib=rate_mib,
        progress=not quiet,
        say=_say if not quiet else lambda line: None,
        describe=lambda found: (
            "the CPU: there is no GPU that is hardware" if (device, found) == ("auto", "cpu") else _device_words(found)
        ),
    )
    nbytes, first = report.manifest.nbytes, report.loads[0].seconds
    _print_table(
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
        _say(f"error: {_count(len(wrong), 'tensor')} not as generated: {_shown(', '.join(wrong[:5]))}")
        ctx.exit(1)
    click.echo(f"\nEvery value of {_count(len(report.manifest), 'tensor')} is as generated, in each of the loads.")


# --- what the commands show ---------------------------------------------------------------------------


def _load_facts(source: str, device: str, weights: Weights) -> Iterator[tuple[str, str]]:
    stats, where, location = weights.stats, _device_words(weights.device), locate(source)
    yield "source", str(location)
    yield "device", f"{where} (there is no GPU that is hardware)" if (device, where) == ("auto", "cpu") else where
    yield "tensors", f"{len(weights):,}, {_size(weights.nbytes)}"
    yield "time", f"{stats.seconds['total']:.2f} s, {stats.gb_per_second:.2f} GB/s"
    if location.is_remote:
        again = f", {stats.retries:,} of them again" if stats.retries else ""
        yield "from network", f"{_size(stats.network_bytes)} in {_count(stats.requests, 'request')}{again}"
    yield "from cache" if location.is_remote else "in place", _size(stats.cache_bytes)
    yield "checked", f"{_count(stats.shards, 'shard')}: {_checks(stats.integrity.most_common())}"


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
        "scope": unquote(model.scope),
        "source": model.source,
        "nbytes": model.nbytes,
        "path": str(model.path),
    }


def _root(cache_dir: str | None) -> Path:
    return cache_root(cache_dir, os.environ.get("NDCACHE_HOME"))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _adapter_facts() -> list[tuple[str, str]]:
    from .devices.gpu import adapters

    try:
        found = adapters()
    except NoAdapterError as error:
        return [("gpu", f"none: {error}")]
    except Exception as error:  # of wgpu or a driver: to tell it is what this command is for
        return [("gpu", f"none: the adapters cannot be listed: {type(error).__name__}: {error}")]
    facts = [(f"gpu:{index}", ", ".join(_adapter_words(adapter))) for index, adapter in enumerate(found)]
    return facts or [("gpu", "none: wgpu finds no adapter; device='cpu' works")]


def _cache_facts(root: Path) -> list[tuple[str, str]]:
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    found = list(models(root))
    return [
        ("cache", str(root) if existing == root else f"{root} (not made yet)"),
        ("models", f"{len(found):,}, {_size(sum(model.nbytes for model in found))}"),
        ("disk", f"{_size(shutil.disk_usage(existing).free)} free"),
    ]


def _environment_facts() -> list[tuple[str, str]]:
    environ = os.environ
    facts = [(name, environ[name]) for name in ("NDCACHE_HOME", "NDCACHE_OFFLINE", "HF_HUB_OFFLINE") if name in environ]
    if environ.get("HF_TOKEN"):
        facts.append(("HF_TOKEN", "set"))
    if "HF_ENDPOINT" in environ:
        facts.append(("HF_ENDPOINT", redact(environ["HF_ENDPOINT"])))
    # On Windows the two spellings are one variable.
    proxies = {name: environ[name] for upper in _PROXIES for name in (upper, upper.lower()) if name in environ}
    facts += [(name, value if name.upper() == "NO_PROXY" else _proxy(value)) for name, value in proxies.items()]
    return facts or [("environment", "none of the variables that ndcache looks at is set")]


def _proxy(value: str) -> str:
    """A proxy's address without its user and password, however badly they are written."""
    scheme, _, rest = value.rpartition("://")
    address = redact("//" + rest.rpartition("@")[2]).removeprefix("//")
    return f"{scheme}://{address}" if scheme else address


def _read_tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """The tensors of a file, one after another."""
    kind = path.suffix.lower()
    if kind == ".npz":
        return _read_npz(path)
    if kind == ".safetensors":
        return _read_safetensors(path)
    raise ValueError(f"{path} is neither .safetensors nor .npz")


def _read_npz(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is not an .npz file, or damaged")
        with np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                try:
                    array = arrays[name]
                except ValueError as error:
                    raise ValueError(f"array {name!r} of {path} cannot be read: {error}") from error
                yield name, array


def _read_safetensors(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError('reading .safetensors takes another package: pip install "ndcache[safetensors]"') from error
    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a .safetensors file, or damaged: {error}") from error
        for name in file.keys():  # noqa: SIM118 - not a mapping
            try:
                tensor = file.get_tensor(name)
            except (AttributeError, TypeError) as error:
                dtype = file.get_slice(name).get_dtype()
                raise ValueError(f"tensor {name!r} of {path} is of the kind {dtype}, which NumPy lacks") from error
            yield name, tensor
