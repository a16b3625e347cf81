"""The only module that calls obstore: it signs addresses, lists folders, and finds credentials."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote

from ..errors import AuthError, ConnectError, NotFoundError, TransferError, redact
from ..urls.url import Url
from ..workers.cancellation import Cancellation
from . import credentials
from .waiting import wait_for

__all__ = ["Store", "open_store", "unsigned_address"]

#: For the requests that obstore makes itself: for credentials, and for listings.
_CLIENT = {"allow_http": True, "connect_timeout": "5s", "timeout": "20s"}
_RETRIES = {"max_retries": 2, "retry_timeout": timedelta(seconds=20)}
_NAMES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
#: Credentials that nobody has. obstore signs with them an address whose signature is then dropped.
_NOBODY = {
    "s3": {"access_key_id": "nobody", "secret_access_key": "nobody", "skip_signature": False},
    "az": {"account_key": base64.b64encode(b"nobody").decode(), "skip_signature": False},
}
_GOOGLE = "https://storage.googleapis.com"

#: The process that used obstore first. Its threads do not survive a fork, and requests would wait for them forever.
_first_pid: list[int] = []


class Store:
    """One bucket, as obstore sees it with the credentials that it has found.

    Parameters
    ----------
    store : obstore.store.S3Store, obstore.store.GCSStore or obstore.store.AzureStore
    folder : Url
        Any URL in the bucket, for error messages.
    environ : mapping
        The environment.
    """

    def __init__(self, store: Any, folder: Url, environ: Mapping[str, str]) -> None:
        self._store = store
        self._folder = folder
        self._environ = environ

    def sign(self, url: Url, valid: timedelta, cancellation: Cancellation) -> str:
        """Return the address of an object, with a signature for a GET.

        Raises
        ------
        AuthError
            There are no credentials, or they cannot sign.
        """
        obstore = _obstore()
        with _translated(url, self._environ, self._cannot_sign):
            if credentials.has_fixed_key(url.scheme, self._environ):
                self._check_fork(needs_request=False)
                address: str = obstore.sign(self._store, "GET", _key(url), valid)
            else:
                self._check_fork(needs_request=True)
                address = wait_for(lambda: obstore.sign_async(self._store, "GET", _key(url), valid), cancellation)
        return address

    def list(self, folder: Url, cancellation: Cancellation) -> dict[str, int]:
        """Return the sizes of the objects below a folder, by their paths in it.

        Raises
        ------
        AuthError
            The bucket may not be listed.
        TransferError
        """
        obstore, prefix = _obstore(), _key(folder).strip("/")

        async def pages() -> dict[str, int]:
            return {
                item["path"]: item["size"] async for page in obstore.list(self._store, prefix or None) for item in page
            }

        with _translated(folder, self._environ, _cannot_list):
            self._check_fork(needs_request=True)
            found = wait_for(pages, cancellation)
        start = f"{prefix}/" if prefix else ""
        return {path[len(start) :]: size for path, size in found.items() if path.startswith(start)}

    def _check_fork(self, *, needs_request: bool) -> None:
        if not _first_pid:
            _first_pid.append(os.getpid())
        if needs_request and os.getpid() not in _first_pid:
            raise AuthError(
                "object storage that needs requests for credentials cannot be used after a fork",
                url=str(self._folder),
                hint='Start processes by "spawn" or "forkserver": multiprocessing.set_start_method("spawn").',
            )

    def _cannot_sign(self, reason: str, url: Url) -> TransferError:
        return AuthError(
            f"no address in {url.scheme}://{url.host} can be signed: {reason}",
            url=str(url),
            hint=credentials.advice(url.scheme),
        )


def open_store(url: Url, environ: Mapping[str, str], *, region: str | None = None, signs: bool = True) -> Store:
    """Open the bucket of a URL, without any request.

    Parameters
    ----------
    url : Url
    environ : mapping
        The environment, for messages; obstore reads that of the process.
    region : str, optional
        The region of a bucket in S3, if it is not the one in the environment.
    signs : bool
        Whether to use credentials. Default True.

    Raises
    ------
    AuthError
        The settings in the environment cannot be used.
    ConnectError
        obstore is not installed.
    """
    obstore = _obstore()
    config: dict[str, Any] = {} if region is None else {"region": region}
    if not signs:
        config["skip_signature"] = True
    with _translated(url, environ, _cannot_open):
        kind = getattr(obstore.store, _NAMES[url.scheme])
        store = kind(url.host, config=config, client_options=_CLIENT, retry_config=_RETRIES)
    return Store(store, url, environ)


def unsigned_address(url: Url, environ: Mapping[str, str], *, region: str | None = None) -> str:
    """Return the address of an object without a signature.

    Raises
    ------
    AuthError, ConnectError
        See `open_store`.
    """
    obstore = _obstore()
    if url.scheme == "gs":
        return f"{environ.get('GOOGLE_BASE_URL') or _GOOGLE}/{url.host}/{quote(_key(url))}"
    config = {**_NOBODY[url.scheme], **({} if region is None else {"region": region})}
    with _translated(url, environ, _cannot_open):
        kind = getattr(obstore.store, _NAMES[url.scheme])
        signed: str = obstore.sign(kind(url.host, config=config), "GET", _key(url), timedelta(minutes=1))
    return signed.partition("?")[0]


def _key(url: Url) -> str:
    """Return the name of an object in its bucket."""
    return unquote(url.path).lstrip("/")


def _obstore() -> ModuleType:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "obstore"
        missing = "s3://, gs:// and az:// need obstore, which is not installed"
        failure = ConnectError(
            missing if is_missing else f"obstore cannot be imported: {error}",
            hint="Install it: pip install obstore.",
        )
        failure.retryable = False
        raise failure from error
    return obstore


def _cannot_open(reason: str, url: Url) -> TransferError:
    return AuthError(
        f"the settings for {url.scheme}:// cannot be used: {reason}",
        url=str(url),
        hint=f"Check the environment variables of this storage. {credentials.advice(url.scheme)}",
    )


def _cannot_list(reason: str, url: Url) -> TransferError:
    return ConnectError(f"{url.scheme}://{url.host} cannot be listed: {reason}", url=str(url))


@contextmanager
def _translated(url: Url, environ: Mapping[str, str], failure: Callable[[str, Url], TransferError]) -> Iterator[None]:
    """Turn the errors of obstore into those of `ndcache.errors`. Their texts may have secrets, and are not chained."""
    exceptions = _obstore().exceptions
    try:
        yield
        return
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        found: TransferError = AuthError(
            f"the storage refuses access to {url.scheme}://{url.host}: {_reason(error, environ)}",
            url=str(url),
            hint=credentials.advice(url.scheme),
        )
    except exceptions.NotFoundError:
        found = NotFoundError(f"there is no {url.scheme}://{url.host}", url=str(url))
    except exceptions.BaseError as error:
        found = failure(_reason(error, environ), url)
    try:
        raise found
    finally:
        found.__context__ = None  # `from None` would only hide it from tracebacks


def _reason(error: Exception, environ: Mapping[str, str]) -> str:
    """Return the first line of an error's text, without secrets and without bodies of responses."""
    line = re.split(r"\n|: [{<]", str(error))[0]
    line = re.sub(r"https?://[^\s\"')]+", lambda match: redact(match[0]), line)
    return type(error).__name__ if credentials.shows_secret(line, environ) else line[:300]
