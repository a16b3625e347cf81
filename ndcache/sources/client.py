"""The requests of one load, which are counted, keep to the servers' limits, and stay at one commit."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping

from ..cloud.refusals import Refused
from ..cloud.storage import Address
from ..context import LoadContext
from ..errors import NdcacheError, redact
from ..http.limits.origin import Permit
from ..http.limits.rate_limits import OriginActivity, is_refusal, origin_of, refusal_reason
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
        with context.stats.timed("request", url=redact(url), range=headers.get("Range")) as others:
            acquire = functools.partial(self._acquire, cancellation, waiting, others)
            try:
                if context.storage.has(url):
                    response = self._get_object(url, headers, cancellation, acquire, may_be_encoded=may_be_encoded)
                else:
                    context.stats.count(requests=1)
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
                        bucket=context.bucket,
                    )
            finally:
                turns.release()
        if name and response.commit:
            self.commits.setdefault(name, response.commit)
        self._activity.record(origin_of(response.url))
        if response.url != url:
            self._activity.record(origin_of(url))  # a redirect is an answer, too
        return response

    def _acquire(
        self, cancellation: Cancellation, waiting: Callable[[], None], seconds: dict[str, float], url: str
    ) -> Permit:
        """Wait until the limits of a server allow a request, and add the time to ``seconds["rate_limit"]``."""
        context, begun, limit, key = self.context, time.perf_counter(), self.context.limits.of(url), object()
        if limit.state.is_limited:
            context.pool.turns.release()  # there may be a wait
            reason = refusal_reason(limit.state.pause_until - time.monotonic())
            context.arrivals.pause(key, reason, is_wanted=True)
        try:
            return limit.acquire(cancellation, waiting)
        finally:
            context.arrivals.go_on(key)
            seconds["rate_limit"] = seconds.get("rate_limit", 0.0) + time.perf_counter() - begun

    def _get_object(
        self,
        url: str,
        headers: Mapping[str, str],
        cancellation: Cancellation,
        acquire: Callable[[str], Permit],
        *,
        may_be_encoded: bool,
    ) -> Response:
        """Get an object of a bucket by an address that its storage accepts."""
        context, before_wait = self.context, self.context.pool.turns.release

        def send(address: Address) -> Response:
            context.stats.count(requests=1)
            return context.transport.get(
                url,
                {**address.headers, **headers},
                cancellation,
                acquire=acquire,
                may_be_encoded=may_be_encoded,
                start=address.url,
                before_wait=before_wait,
                refused=Refused,
                bucket=context.bucket,
            )

        before_wait()  # credentials may have to be fetched
        return context.storage.get(url, send, cancellation)

    def attempts(
        self,
        policy: RetryPolicy | None = None,
        progress: Callable[[], int] = lambda: 0,
        waiting: Callable[[], None] | None = None,
    ) -> Iterator[Attempt]:
        """Yield attempts at some work, as `http.retry.attempts` does, by the load's policy unless another is given."""
        context = self.context
        return attempts(
            policy or context.policy,
            context.cancellation,
            context.stats,
            self._activity,
            progress,
            waiting,
            context.arrivals,
        )

    def count_received(self, origin: str, nbytes: int) -> None:
        """Count bytes of a body, and note that its server is active."""
        self.context.stats.count(network_bytes=nbytes)
        self._activity.record(origin)

    def note_refusal(self, error: NdcacheError) -> None:
        """Log that a server limits requests, if `error` says so and the request is not attempted again."""
        if is_refusal(error):
            self._activity.warn_of_limit(error)
