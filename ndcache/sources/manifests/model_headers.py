"""Request the headers of all files of a model, and its index."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

from ...errors import ManifestSyntaxError, NdcacheError
from ...format.integrity import check_manifest_digest
from ...format.safetensors.headers import FileHeader, Headers
from ...format.safetensors.index import INDEX_SUFFIX, parse_index
from ...http.retry import RetryPolicy
from ...location import Location
from ...location.hub import branch_url
from ...store.metadata import FileMetadata
from ...workers.outcomes import Outcomes, Task
from ...workers.pool import WorkerPool
from ..client import Client
from .header_request import request_header
from .manifest_request import ManifestBody, NotThereError, refusal_of, request_manifest

__all__ = ["HeadersRequest"]

T = TypeVar("T")


class HeadersRequest:
    """The requests for the headers of one model.

    Parameters
    ----------
    client : Client
    location, source : Location
        Where to request them, and where the model is: the same unless `location` is a mirror.
    name : str
        The name of the index, or of the only file.
    policy : RetryPolicy
    """

    def __init__(self, client: Client, location: Location, source: Location, name: str, policy: RetryPolicy) -> None:
        self._client = client
        self._location = location
        self._source = source
        self._name = name
        self._policy = policy

    def send(self, known: Headers | None) -> Headers | None:
        """Request what is not known or may have changed.

        Parameters
        ----------
        known : Headers or None
            Those that the cache keeps.

        Returns
        -------
        Headers or None
            Not yet parsed. None if nothing has changed.

        Raises
        ------
        NotThereError, TransferError, ManifestError, ChecksumError
        """
        pool, name = self._client.context.pool, self._name
        to_come = None if known is None else len(known.files)
        if not name.endswith(INDEX_SUFFIX):
            old = None if known is None else known.files[0]
            file = pool.run(functools.partial(self._header, name, old), tasks_to_come=to_come)
            return None if file is None else Headers(name, (file,), commit=self._commit)
        old_index = None if known is None else known.index
        index = pool.run(functools.partial(self._index, old_index), tasks_to_come=to_come)
        if index is None:
            assert known is not None
            if known.commit == self._commit:
                return None
            # On Hugging Face, files may have changed with the commit although the index has not.
            index = old_index
        assert index is not None
        parsed = parse_index(
            index.start, name=name, url=self._location.url(name), check=self._client.context.cancellation.poll
        )
        return Headers(name, self._headers(list(parsed.files), known), index, self._commit)

    @property
    def _commit(self) -> str | None:
        """Return the commit of which the server has sent something; None if it names none."""
        branch = branch_url(self._location.url(self._name))
        return None if branch is None else self._client.commits.get(branch)

    def _headers(self, names: Sequence[str], known: Headers | None) -> tuple[FileHeader, ...]:
        """Request the headers of the files of an index, several at once."""
        old = {} if known is None else {file.name: file for file in known.files}

        def request(name: str) -> FileHeader:
            try:
                file = self._header(name, old.get(name))
            except NotThereError as error:
                reason = error.reason
                reason.message += f"; {self._name} names this file"
                reason.shard = name
                raise reason from reason.__cause__
            return old[name] if file is None else file

        return tuple(_run_all(self._client.context.pool, [functools.partial(request, name) for name in names]))

    def _header(self, name: str, known: FileHeader | None) -> FileHeader | None:
        url, source_url = self._location.url(name), self._source.url(name)
        for attempt in self._client.attempts(self._policy):
            with attempt:
                received = request_header(self._client, url, source_url, name, known)
        return received

    def _index(self, known: FileHeader | None) -> FileHeader | None:
        name, context = self._name, self._client.context
        url, source_url = self._location.url(name), self._source.url(name)
        version = None
        if known is not None:
            version = FileMetadata(len(known.start), 0, {}, known.etag, known.last_modified)
        for attempt in self._client.attempts(self._policy):
            with attempt:
                body = request_manifest(self._client, url, source_url, version, parse_index)
                if body is not None and body.is_index:
                    check_manifest_digest(body.data, name, url, context.integrity)
        if body is None:
            return None
        if not body.is_index:
            raise self._refusal(body)
        return FileHeader(name, body.data, len(body.data), None, body.etag, body.last_modified)

    def _refusal(self, body: ManifestBody) -> NdcacheError:
        """Return the error for a body that is no index."""
        try:
            parse_index(body.data, name=self._name, url=self._location.url(self._name))
        except ManifestSyntaxError as error:
            return refusal_of(body, error)
        raise AssertionError("an index has a weight_map")


def _run_all(pool: WorkerPool, work: Sequence[Callable[[], T]]) -> list[T]:
    """Call functions in workers; return their results, or raise the first error."""
    pool.start(len(work))
    outcomes = Outcomes[T](pool.cancellation)
    try:
        for index, each in enumerate(work):
            pool.submit(Task(each, outcomes, index))
        for index in range(len(work)):
            outcomes.wait_for(index, pool.tick)
    except NdcacheError:
        raise  # those that have not begun will not, and the others change nothing
    except BaseException:
        pool.cancellation.set()
        raise
    return [outcomes.take(index) for index in range(len(work))]
