"""Addresses for the objects of buckets: signed and renewed in time, or without a signature where none is needed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import NamedTuple, TypeVar

from ..errors import AuthError
from ..urls.url import OBJECT_SCHEMES, Url, parse
from ..workers.cancellation import Cancellation
from . import credentials
from .refusals import Refusal, Refused
from .stores import Store, open_store, unsigned_address

__all__ = ["Address", "ObjectStorage"]

Response = TypeVar("Response")

#: How long a signature is valid. It is renewed after half of that.
_VALID = timedelta(hours=1)
#: The most addresses that are tried for one request: another region, with credentials, renewed.
_MAX_TRIES = 4
_PREFIXES = tuple(f"{scheme}://" for scheme in OBJECT_SCHEMES)
#: Without a version, Azure answers as it did in 2009, with ETags that are not quoted.
_AZURE_HEADERS = {"x-ms-version": "2021-12-02"}


class Address(NamedTuple):
    """The address of an object for the next request.

    Attributes
    ----------
    url : str
        An http(s) URL; its signature is a secret.
    headers : mapping of str to str
        To be sent with the request.
    is_signed : bool
    made : float
        When it was made, in seconds since 1970.
    generation : int
        How often the credentials of its bucket had been read.
    """

    url: str
    headers: Mapping[str, str]
    is_signed: bool
    made: float
    generation: int


class ObjectStorage:
    """The buckets that one load reads. Safe to share between threads.

    Parameters
    ----------
    environ : mapping
        The environment.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ
        # Without a lock, which the main thread could leave locked: each access is a single operation.
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    @staticmethod
    def has(url: str) -> bool:
        """Return whether a URL names an object of a bucket."""
        return url.startswith(_PREFIXES)

    def get(self, url: str, send: Callable[[Address], Response], cancellation: Cancellation) -> Response:
        """Request an object, again with another address if that may help.

        Parameters
        ----------
        url : str
            ``s3://bucket/key``, ``gs://bucket/key`` or ``az://container/key``.
        send : callable
            Send the request to an address; raise `Refused` if the storage refuses it.
        cancellation : Cancellation
            Ends the wait for credentials.

        Raises
        ------
        AuthError
            There are no credentials that can sign, or the storage refuses them.
        TransferError
        """
        wanted = parse(url)
        bucket, begun, is_renewed = self._bucket(wanted), time.time(), False
        address = bucket.address(wanted, cancellation)
        for _ in range(_MAX_TRIES):
            try:
                return send(address)
            except Refused as refused:
                refusal, given = refused.refusal, refused.given
            following = bucket.in_its_region(address, refusal, wanted, cancellation)
            if following is None:
                following = bucket.with_credentials(address, refusal, wanted, cancellation)
            if following is None and not is_renewed and (refusal.says_expired or address.made < begun):
                is_renewed, following = True, bucket.renewed(address, wanted, cancellation)
            if following is None:
                break
            address = following
        raise refusal.error(wanted, given, is_signed=address.is_signed) from bucket.why_unsigned

    def list(self, url: str, cancellation: Cancellation) -> dict[str, int]:
        """Return the sizes of all objects below a folder, by their paths in it: ``{"model.safetensors": 90868376}``.

        This is the listing for sources that must know which files there are. It makes one request for 1,000 objects.

        Parameters
        ----------
        url : str
            Such as ``s3://bucket/folder/``; `Location.base`.
        cancellation : Cancellation
            Ends the wait.

        Raises
        ------
        AuthError
            The bucket may not be listed. Many that may be read may not be listed.
        TransferError
        """
        folder = parse(url)
        return self._bucket(folder).list(folder, cancellation)

    def _bucket(self, url: Url) -> _Bucket:
        key = url.scheme, url.host
        found = self._buckets.get(key)
        return found if found is not None else self._buckets.setdefault(key, _Bucket(url, self._environ))


class _Bucket:
    """One bucket: whether its addresses are signed, and those that are valid now.

    Threads may do the same work at the same time; the last one's result is kept.

    Attributes
    ----------
    why_unsigned : AuthError or None
        Why no address could be signed, after a request without signature was refused.
    """

    why_unsigned: AuthError | None = None

    def __init__(self, url: Url, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._is_public = credentials.is_unsigned(url.scheme, environ)
        self._signs = not self._is_public and credentials.has_credentials(url.scheme, environ)
        self._region: str | None = None
        self._generation = 0
        self._store: Store | None = None
        self._addresses: dict[str, Address] = {}

    def address(self, url: Url, cancellation: Cancellation) -> Address:
        """Return an address that is valid for a while."""
        known = self._addresses.get(url.path)
        if known is not None and (not known.is_signed or 0 <= time.time() - known.made < _VALID.total_seconds() / 2):
            return known
        return self._signed(url, cancellation) if self._signs else self._unsigned(url)

    def in_its_region(self, address: Address, refusal: Refusal, url: Url, cancellation: Cancellation) -> Address | None:
        """Return an address in the region that the storage has named; None if it has named no other one."""
        if url.scheme != "s3" or refusal.region in (None, self._region) or refusal.status == 404:
            return None
        self._region = refusal.region
        return self.renewed(address, url, cancellation)

    def with_credentials(
        self, address: Address, refusal: Refusal, url: Url, cancellation: Cancellation
    ) -> Address | None:
        """Return a signed address, if there was no signature and there can be one; else None."""
        if address.is_signed or self._is_public or self.why_unsigned or not refusal.may_need_credentials(url.scheme):
            return None
        try:
            signed = self._signed(url, cancellation)
        except AuthError as error:
            self.why_unsigned = error.with_traceback(None)
            return None
        self._signs = True
        return signed

    def renewed(self, address: Address, url: Url, cancellation: Cancellation) -> Address:
        """Return a new address, by credentials that are found anew, unless another thread has just done so."""
        if address.generation == self._generation:
            self._generation += 1
            self._addresses, self._store = {}, None
        return self.address(url, cancellation)

    def list(self, folder: Url, cancellation: Cancellation) -> dict[str, int]:
        """Return the sizes of the objects below a folder, by their paths in it."""
        if self._signs:
            return self._open_for(folder).list(folder, cancellation)
        try:
            return open_store(folder, self._environ, region=self._region, signs=False).list(folder, cancellation)
        except AuthError:
            if self._is_public or self.why_unsigned:
                raise
            return self._open_for(folder).list(folder, cancellation)

    def _signed(self, url: Url, cancellation: Cancellation) -> Address:
        addresses, generation, now = self._addresses, self._generation, time.time()
        token = credentials.sas_token(self._environ) if url.scheme == "az" else None
        if token is not None:
            text = f"{unsigned_address(url, self._environ)}?{token}"
        else:
            text = self._open_for(url).sign(url, _VALID, cancellation)
        found = addresses[url.path] = Address(text, {}, True, now, generation)
        return found

    def _unsigned(self, url: Url) -> Address:
        addresses, generation = self._addresses, self._generation
        headers = _AZURE_HEADERS if url.scheme == "az" else {}
        text = unsigned_address(url, self._environ, region=self._region)
        found = addresses[url.path] = Address(text, headers, False, time.time(), generation)
        return found

    def _open_for(self, url: Url) -> Store:
        store = self._store
        if store is None:
            store = self._store = open_store(url, self._environ, region=self._region)
        return store
