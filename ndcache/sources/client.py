"""The requests of one load, which are counted, keep to the servers' limits, and stay at one commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from ..context import LoadContext
from ..errors import NdcacheError, redact
from ..http.limits.origin import Permit
from ..http.limits.rate_limits import OriginActivity, is_refusal, origin_of
from ..http.response import Response
from ..http.retry import Attempt, RetryPolicy, attempts
from ..http.transport import RedirectTarget
from ..location.hub import at_commit, branch_url
from ..workers.cancellation import Cancellation

__all__ = ["Client"]


class Client:
    """Make the requests of one load.

    Parameters
    ----------
    context : LoadContext

    Attributes
    ----------
    context : LoadContext
    commits : dict of str to str
        The commits of branches on Hugging Face, at which this load stays, by `branch_url`.
    """

    def __init__(self, context: LoadContext) -> None:
        self.context = context
        self.commits: dict[str, str] = {}
        self._activity = OriginActivity(context.limits)

    def get(
        self,
        url: str,
        source_url: str,
        headers: Mapping[str, str],
        *,
        cancellation: Cancellation | None = None,
        redirects: dict[str, RedirectTarget] | None = None,
        may_be_encoded: bool = False,
        waiting: Callable[[], None] = lambda: None,
    ) -> Response:
        """Call `Transport.get` when the server's limits allow it, and count the request.

        A branch stays at the commit that it had at the first request. `waiting` is called again and again until the
        limits allow the request. A turn of this thread ends, see `Turns`.
        """
        context, name, turns = self.context, branch_url(url), self.context.pool.turns
        cancellation = cancellation or context.cancellation
        commit = self.commits.get(name) if name else None
        context.stats.count(requests=1)
        with context.stats.timed("request", url=redact(url), range=headers.get("Range")) as others:

            def acquire(url: str) -> Permit:
                begun, limit = time.perf_counter(), context.limits.of(url)
                if limit.state.is_limited:
                    turns.release()  # there may be a wait
                try:
                    return limit.acquire(cancellation, waiting)
                finally:
                    others["rate_limit"] = others.get("rate_limit", 0.0) + time.perf_counter() - begun

            try:
                response = context.transport.get(
                    url,
                    headers,
                    cancellation,
                    source_url=source_url,
                    redirects=redirects,
                    acquire=acquire,
                    may_be_encoded=may_be_encoded,
                    start=at_commit(url, commit) if commit else None,
                    before_wait=turns.release,
                )
            finally:
                turns.release()
        if name and response.commit:
            self.commits.setdefault(name, response.commit)
        self._activity.record(origin_of(response.url))
        if response.url != url:
            self._activity.record(origin_of(url))  # a redirect is an answer, too
        return response

    def attempts(
        self,
        policy: RetryPolicy | None = None,
        progress: Callable[[], int] = lambda: 0,
        waiting: Callable[[], None] | None = None,
    ) -> Iterator[Attempt]:
        """Yield attempts at some work, as `http.retry.attempts` does, by the load's policy unless another is given."""
        context = self.context
        return attempts(
            policy or context.policy, context.cancellation, context.stats, self._activity, progress, waiting
        )

    def count_received(self, origin: str, nbytes: int) -> None:
        """Count bytes of a body, and note that its server is active."""
        self.context.stats.count(network_bytes=nbytes)
        self._activity.record(origin)

    def note_refusal(self, error: NdcacheError) -> None:
        """Log that a server limits requests, if `error` says so and the request is not attempted again."""
        if is_refusal(error):
            self._activity.warn_of_limit(error)
