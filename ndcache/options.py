"""The options of a loader: the default, the meaning and the check of each, in one place.

The functions of `ndcache.api` and `Loader` repeat the options in their signatures, for readers, editors and type
checkers. A test compares each signature with `LoaderOptions`; `document_options` puts the meanings into docstrings.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import textwrap
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, Protocol, TypeAlias, TypeVar

import requests

from .arguments import is_url
from .caller import PublicFrame, name_in_tracebacks
from .context import VerifyMode
from .http.retry import RetryPolicy
from .store.housekeeping.quantities import parse_rate

__all__ = [
    "OPTION_NAMES",
    "CUDAName",
    "GPUDeviceLike",
    "GPUName",
    "LoaderOptions",
    "Source",
    "TorchDeviceLike",
    "are_headers",
    "check_keywords",
    "document_options",
    "hide_keywords",
    "suggest_keywords",
]

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

#: The type of the source of a model.
Source: TypeAlias = str | os.PathLike[str]
#: Devices that type checkers know to be GPUs; every other string may also be the CPU.
GPUName: TypeAlias = Literal["gpu", "gpu:0", "gpu:1", "gpu:2", "gpu:3", "gpu:4", "gpu:5", "gpu:6", "gpu:7"]

#: Names of devices with tensors of PyTorch, whatever is installed.
CUDAName: TypeAlias = Literal["cuda", "cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:4", "cuda:5", "cuda:6", "cuda:7"]


class GPUDeviceLike(Protocol):
    """A `wgpu.GPUDevice`, in types that need no wgpu, which has none of its own."""

    @property
    def create_buffer(self) -> Callable[..., Any]:
        """Return the method that makes a buffer."""
        ...


class TorchDeviceLike(Protocol):
    """A `torch.device`, in types that need no PyTorch."""

    @property
    def type(self) -> str:
        """Return the kind of device: ``"cuda"``."""
        ...

    @property
    def index(self) -> int | None:
        """Return its number."""
        ...


_NoneType = type(None)
#: Headers that the requests themselves need, in lower case.
_OWN_HEADERS = frozenset(
    {
        *("accept-encoding", "connection", "content-length", "expect", "host", "if-match", "if-modified-since"),
        *("if-none-match", "if-range", "if-unmodified-since", "keep-alive", "proxy-authorization", "proxy-connection"),
        *("range", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)


def _describe(
    kind: str,
    meaning: str,
    *,
    types: tuple[type, ...] = (object, bool),
    must_be: str = "",
    is_valid: Callable[[Any], bool] = lambda value: True,
    is_secret: bool = False,
) -> dict[str, Any]:
    """Return the metadata of an option.

    Parameters
    ----------
    kind : str
        The type, as docstrings give it.
    meaning : str
        The description for docstrings, which wrap its lines anew.
    types : tuple of type
        What a value may be an instance of. A bool counts as an int only if bool is listed.
    must_be : str
        What a value must be, for error messages. That it may be None is added where that helps.
    is_valid : callable
        Whether a value of one of these types is allowed.
    is_secret : bool
        Whether error messages must not show a value.
    """
    return {
        "kind": kind,
        "meaning": meaning,
        "types": types,
        "must_be": must_be,
        "is_valid": is_valid,
        "is_secret": is_secret,
    }


def _are_seconds(value: Any) -> bool:
    both = value if isinstance(value, tuple) else (value, value)
    return len(both) == 2 and all(isinstance(part, (int, float)) and 0 < part < math.inf for part in both)


def _is_positive(value: float | None) -> bool:
    return value is None or 0 < value < math.inf


def _is_rate(value: float | str | None) -> bool:
    try:
        return value is None or parse_rate(value) > 0
    except ValueError:
        return False


def _is_token(value: str | None) -> bool:
    return value is None or re.fullmatch(r"[!-~]+", value) is not None


def are_headers(value: Mapping[Any, Any] | None) -> bool:
    """Return whether these are names and values that HTTP allows, none of which the requests of ndcache set."""
    return _are_texts(value) and all(
        re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name)
        and name.lower() not in _OWN_HEADERS
        and re.fullmatch(r"([!-~\x80-\xff]([\t -~\x80-\xff]*[!-~\x80-\xff])?)?", text)
        for name, text in (value or {}).items()
    )


def _are_texts(value: Mapping[Any, Any] | None) -> bool:
    return all(isinstance(item, str) for pair in (value or {}).items() for item in pair)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Hold the options of a `Loader`, checked.

    Raises
    ------
    TypeError, ValueError
        An option has a type or a value that it must not have. It is better to find out now than at the first failure.
    """

    max_workers: int = dataclasses.field(
        default=8,
        metadata=_describe(
            "int",
            """Threads that fetch shards, and so the most requests at once. Two more threads write what has come. Fewer
            threads are used where file descriptors are scarce. Onto CUDA, half as many threads again read files
            on disk: 12 in place of 8, and no more than 12 or the number of cores.""",
            types=(int,),
            must_be="a number of at least 1",
            is_valid=lambda value: value >= 1,
        ),
    )
    processes: int | Literal["auto"] = dataclasses.field(
        default=1,
        metadata=_describe(
            'int or "auto"',
            """Processes that download, this one included, each with `max_workers` threads, for `load`, `stream` and
            `fetch`. Python's interpreter lock limits what one process receives over HTTPS; its helpers put what they
            download into the cache. ``"auto"`` decides by cores and missing bytes. There are no helpers with a
            `session`.""",
            types=(int, str),
            must_be="a number of at least 1, or 'auto'",
            is_valid=lambda value: value == "auto" if isinstance(value, str) else value >= 1,
        ),
    )
    cache_dir: str | os.PathLike[str] | None = dataclasses.field(
        default=None,
        metadata=_describe(
            "path-like, optional",
            """The cache's top directory. Default: NDCACHE_HOME, else the system's place for caches. If it cannot be
            written, `load` and `stream` hold what comes from a server in memory, with a RuntimeWarning.""",
            types=(str, os.PathLike, _NoneType),
            must_be="a path on this machine",
            is_valid=lambda value: value != "" and not is_url(value),
        ),
    )
    scope: str = dataclasses.field(
        default="default",
        metadata=_describe(
            "str",
            "A separate part of the cache, such as one application's.",
            types=(str,),
            must_be="a name that does not begin with a dot",
            is_valid=lambda value: value[:1] not in ("", "."),
        ),
    )
    timeout: float | tuple[float, float] = dataclasses.field(
        default=(10.0, 30.0),
        metadata=_describe(
            "float or tuple of float",
            "Seconds to connect, and seconds to wait for the next bytes.",
            types=(int, float, tuple),
            must_be="seconds, or (seconds to connect, seconds to wait for bytes)",
            is_valid=_are_seconds,
        ),
    )
    retries: int | RetryPolicy = dataclasses.field(
        default=6,
        metadata=_describe(
            "int or RetryPolicy",
            "How often a failed request is made again, after growing random waits.",
            types=(int, RetryPolicy),
            must_be="a number of at least 0, or a RetryPolicy",
            is_valid=lambda value: isinstance(value, RetryPolicy) or value >= 0,
        ),
    )
    verify: VerifyMode = dataclasses.field(
        default="download",
        metadata=_describe(
            '{"download", "always", "never"}',
            """When a shard's digest is computed and compared: when the shard is downloaded, also each time it is loaded
            from disk, or never. Sizes are always compared.""",
            types=(str,),
            must_be="'download', 'always' or 'never'",
            is_valid=lambda value: value in ("download", "always", "never"),
        ),
    )
    offline: bool = dataclasses.field(
        default=False,
        metadata=_describe(
            "bool",
            """Make no request; a missing file raises `OfflineError`. NDCACHE_OFFLINE=1 or HF_HUB_OFFLINE=1 do the
            same.""",
            types=(bool,),
            must_be="True or False",
        ),
    )
    session: requests.Session | None = dataclasses.field(
        default=None,
        metadata=_describe(
            "requests.Session, optional",
            """Makes the requests, with its proxies, auth and headers. Its secrets go to the source's origin only.
            Retries of its adapters come on top of `retries`. If it has adapters or proxies of its own, stopping a call
            does not cut short the wait for the headers of a response.""",
            types=(requests.Session, _NoneType),
            must_be="a requests.Session",
        ),
    )
    token: str | None = dataclasses.field(
        default=None,
        repr=False,
        metadata=_describe(
            "str, optional",
            """Sent to the source's server as ``Authorization: Bearer …``, and to no other one: not to mirrors, nor
            where redirects lead. For ``hf://``, it takes the place of the environment's HF_TOKEN, which is the better
            way to give one there.""",
            types=(str, _NoneType),
            must_be="a text without spaces or control characters",
            is_valid=_is_token,
            is_secret=True,
        ),
    )
    headers: Mapping[str, str] | None = dataclasses.field(
        default=None,
        repr=False,
        metadata=_describe(
            "mapping of str to str, optional",
            """More headers for requests to the source's server, and to no other one, such as
            ``{"X-Api-Key": key}``.""",
            types=(Mapping, _NoneType),
            must_be="a mapping of names to values that HTTP allows, without those of ndcache, such as Range",
            is_valid=are_headers,
            is_secret=True,
        ),
    )
    revision: str | None = dataclasses.field(
        default=None,
        metadata=_describe(
            "str, optional",
            """The branch, tag or commit of a repository on Hugging Face, as in ``hf://owner/name@revision``.""",
            types=(str, _NoneType),
            must_be="a branch, a tag or a commit",
            is_valid=lambda value: value != "",
        ),
    )
    mirrors: Sequence[str] = dataclasses.field(
        default=(),
        metadata=_describe(
            "sequence of str",
            "Sources with the same files, tried in this order for a shard that the first source does not give.",
        ),
    )
    integrity: Mapping[str, str] | str | os.PathLike[str] | None = dataclasses.field(
        default=None,
        metadata=_describe(
            "mapping of str to str, or path-like, optional",
            """Digests that you require, by file name, in the form of Subresource Integrity (sha256, sha384 or sha512, a
            hyphen, base64): ``{"tensor-cache.json": "sha256-…"}``. Name the manifest, shards by their ``dataPath``,
            companion files, or all of them. A manifest with a required digest vouches for the shards whose digests it
            has, and may also come from a mirror. In a local directory, such files are compared at each load. Or the
            path of a lock file, see `ndcache.Loader.lock`, which names every file: others are refused.""",
            types=(Mapping, str, os.PathLike, _NoneType),
            must_be="a mapping from file names to digests such as 'sha256-…', or the path of a lock file",
            is_valid=lambda value: _are_texts(value) if isinstance(value, Mapping) else value != "",
        ),
    )
    limit_rate: float | str | None = dataclasses.field(
        default=None,
        metadata=_describe(
            "float or str, optional",
            """The most bytes per second that a call receives, over all its workers and processes: a number, or a text
            such as ``"10MB/s"``. Default: no limit.""",
            types=(int, float, str, _NoneType),
            must_be="bytes per second, such as 10e6 or '10MB/s'",
            is_valid=_is_rate,
        ),
    )
    memory_limit: int = dataclasses.field(
        default=512 << 20,
        metadata=_describe(
            "int",
            """Bytes of shards that may be on their way or waiting for the device at once. A large file counts by
            segments of up to 64 MiB; a larger tensor on the CPU, and a file that the cache cannot keep, count as a
            whole. Default 512 MiB.""",
            types=(int,),
            must_be="a positive number of bytes",
            is_valid=lambda value: value > 0,
        ),
    )
    progress_interval: float | None = dataclasses.field(
        default=None,
        metadata=_describe(
            "float, optional",
            """Seconds between reports to ``progress``, beside those that tell of shards. Default: only those.""",
            types=(int, float, _NoneType),
            must_be="a positive number of seconds",
            is_valid=_is_positive,
        ),
    )
    cancel: threading.Event | None = dataclasses.field(
        default=None,
        metadata=_describe(
            "threading.Event, optional",
            "Set it from another thread to stop a call with `CancelledError`.",
            types=(object,),
            must_be="a threading.Event",
            is_valid=lambda value: value is None or callable(getattr(value, "is_set", None)),
        ),
    )

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value, types, must_be = getattr(self, option.name), option.metadata["types"], option.metadata["must_be"]
            shown = "" if option.metadata["is_secret"] else f", not {value!r}"
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise TypeError(f"{option.name} must be {must_be}{', or None' * (_NoneType in types)}{shown}")
            if not option.metadata["is_valid"](value):
                raise ValueError(f"{option.name} must be {must_be}{shown}")


#: The names of the options, in their order.
OPTION_NAMES = tuple(option.name for option in dataclasses.fields(LoaderOptions))
#: Where a docstring has this line, `document_options` puts the options. Python 3.13 removes the indentation.
_PLACE = re.compile(r"^( *)\{options\}$", re.MULTILINE)


def document_options(target: F) -> F:
    """Put the meanings of all options into the docstring of a function or class."""
    if target.__doc__ is not None:  # as with python -OO
        target.__doc__ = _PLACE.sub(lambda place: textwrap.indent(_options_as_text(), place[1]), target.__doc__)
    return target


def hide_keywords(function: F) -> F:
    """Give a function that ends in ``**options`` or ``**unknown`` the signature that its overloads have.

    Type checkers see the overloads only; this is for `help` and `inspect.signature`. The function must pass the
    keywords to `check_keywords`. A decorator that wraps it would add a frame to every traceback.
    """
    signature = inspect.signature(function)
    shown = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    if "options" in signature.parameters:
        shown += inspect.signature(LoaderOptions).parameters.values()
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return document_options(function)


def suggest_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Have unknown keyword arguments of a function raise a TypeError that suggests the right name.

    Python itself suggests one only from 3.13 on.
    """
    known = inspect.signature(function).parameters.keys()

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        with PublicFrame() as __tracebackhide__:
            check_keywords(function, kwargs.keys() - known)
            return function(*args, **kwargs)

    name_in_tracebacks(checked, function.__name__)
    return checked


def check_keywords(function: Callable[..., Any], unknown: Iterable[str]) -> None:
    """Raise a TypeError that names the first unknown keyword argument of a function, if there is one."""
    for name in sorted(unknown):
        # Methods are of classes that `Loader` is made of.
        is_method, called = "." in function.__qualname__, function.__name__
        close = difflib.get_close_matches(name, inspect.signature(function).parameters, n=1)
        suggestion = f". Did you mean {close[0]!r}?" if close else ""
        if is_method and name in OPTION_NAMES:
            suggestion = f". It is an option of Loader: Loader({name}=…).{called}(…)"
        raise TypeError(f"{'Loader.' * is_method}{called}() got an unexpected keyword argument {name!r}{suggestion}")


@functools.cache
def _options_as_text() -> str:
    """Return the options as entries of a numpydoc section."""
    lines = []
    for option in dataclasses.fields(LoaderOptions):
        kind, meaning = option.metadata["kind"], " ".join(option.metadata["meaning"].split())
        is_told = option.default in (None, ()) or "Default" in meaning
        default = "" if is_told else f", default {option.default!r}"
        lines += [f"{option.name} : {kind}{default}", textwrap.indent(textwrap.fill(meaning, 108), "    ")]
    return "\n".join(lines)
