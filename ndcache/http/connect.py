"""TCP connections to whichever of a host's addresses answers first ("Happy Eyeballs", RFC 8305).

An address that does not answer costs a quarter of a second, not the whole timeout, and only once: from then on, the
address that answered instead is tried first.
"""

from __future__ import annotations

import errno
import itertools
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from urllib3.exceptions import LocationParseError
from urllib3.util.connection import allowed_gai_family

__all__ = ["Address", "Routes", "connect_to_first", "resolve"]

#: Seconds after which the next address is tried as well (RFC 8305, section 5: "connection attempt delay").
_ATTEMPT_DELAY = 0.25
#: The results of a non-blocking connect that has begun.
_HAS_BEGUN = {0, errno.EINPROGRESS, errno.EINTR, getattr(errno, "WSAEWOULDBLOCK", errno.EINPROGRESS)}
#: Kinds of failures, the most useful first: of several addresses' failures, the first in this order is raised.
_MOST_USEFUL = (ConnectionRefusedError, TimeoutError, OSError)
# Unlike epoll and kqueue, poll needs no descriptor of its own; unlike select, it accepts descriptors over 1,023.
_Selector: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.SelectSelector)


class Address(NamedTuple):
    """One result of `socket.getaddrinfo`."""

    family: int
    type: int
    proto: int
    canonname: str
    sockaddr: tuple[str | int, ...]


class Routes:
    """The addresses that answered when the first one of their host did not. Safe to share between threads and forks."""

    def __init__(self) -> None:
        # Without a lock, which another thread could hold at the moment of a fork: each access is a single operation.
        self._known: dict[tuple[str, int], Address] = {}

    def order(self, host: str, port: int, addresses: Sequence[Address]) -> list[Address]:
        """Return the addresses with the one that answered last in front, followed by the others of its family."""
        known = self._known.get((host, port))
        if known is None:
            return list(addresses)
        return sorted(addresses, key=lambda address: (address != known, address.family != known.family))

    def remember(self, host: str, port: int, winner: Address | None) -> None:
        """Try `winner` first from now on; None means that no address answers any more."""
        if winner is None:
            self._known.pop((host, port), None)
        else:
            self._known[host, port] = winner


def resolve(host: str, port: int) -> list[Address]:
    """Return the addresses of a host, alternating between IPv6 and IPv4.

    Raises
    ------
    urllib3.exceptions.LocationParseError
        No host can have this name.
    socket.gaierror
        The system does not know the host.
    """
    try:
        host.encode("idna")
    except UnicodeError:
        raise LocationParseError(f"{host!r}, label empty or too long") from None
    found = socket.getaddrinfo(host, port, allowed_gai_family(), socket.SOCK_STREAM)
    by_family: dict[int, list[Address]] = {}
    for address in dict.fromkeys(Address(*item) for item in found):
        by_family.setdefault(address.family, []).append(address)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_family.values()))
    return [address for address in in_turn if address is not None]


def connect_to_first(
    addresses: Sequence[Address],
    timeout: float | None,
    open_socket: Callable[[Address], socket.socket],
    is_cancelled: Callable[[], bool],
) -> tuple[socket.socket, Address]:
    """Connect to the first address that answers; try the next one as soon as one fails, or stays silent.

    Parameters
    ----------
    addresses : sequence of Address
    timeout : float or None
        Seconds for all addresses together, or None for no limit.
    open_socket : callable
        Return a non-blocking socket for an address.
    is_cancelled : callable
        Called whenever one of the sockets reports something, as it does when another thread shuts it.

    Raises
    ------
    OSError
        The most useful of the addresses' failures.
    """
    race = _Race(deque(addresses), timeout, open_socket)
    try:
        while (winner := race.step()) is None:
            if is_cancelled():
                raise ConnectionAbortedError(errno.ECONNABORTED, "cancelled")
        return winner
    finally:
        race.close()


class _Race:
    """The state of the connection attempts to a host's addresses."""

    def __init__(
        self, waiting: deque[Address], timeout: float | None, open_socket: Callable[[Address], socket.socket]
    ) -> None:
        self._waiting = waiting
        self._open_socket = open_socket
        self._failures: list[OSError] = []
        self._selector = _Selector()
        self._next_start = time.monotonic()
        self._deadline = float("inf") if timeout is None else self._next_start + timeout
        # Each address gets its chance, however short the timeout.
        self._delay = _ATTEMPT_DELAY if timeout is None else min(_ATTEMPT_DELAY, timeout / max(len(waiting), 1))

    def step(self) -> tuple[socket.socket, Address] | None:
        """Try one more address if it is time, wait for events, and return the connected socket if there is one."""
        now = time.monotonic()
        if self._waiting and now >= self._next_start:
            self._start(self._waiting.popleft(), now)
        pending = bool(self._selector.get_map())
        if now >= self._deadline:
            self._failures.append(TimeoutError(errno.ETIMEDOUT, "no answer in time"))
        if now >= self._deadline or not (pending or self._waiting):
            self._fail()
        until = min(self._next_start if self._waiting else float("inf"), self._deadline)
        wait = None if until == float("inf") else max(until - time.monotonic(), 0.0)
        for key, _ in self._selector.select(wait):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            self._selector.unregister(sock)
            status = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if status == 0:
                return sock, key.data
            sock.close()
            self._note(OSError(status, os.strerror(status)))
        return None

    def close(self) -> None:
        """Close the sockets that did not win."""
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _start(self, address: Address, now: float) -> None:
        self._next_start = now + self._delay
        sock = None
        try:
            sock = self._open_socket(address)
            status = sock.connect_ex(address.sockaddr)
            if status not in _HAS_BEGUN:
                raise OSError(status, os.strerror(status))
            self._selector.register(sock, selectors.EVENT_WRITE, address)
        except OSError as error:
            if sock is not None:
                sock.close()
            self._note(error)
        except BaseException:
            if sock is not None:
                sock.close()
            raise

    def _note(self, failure: OSError) -> None:
        self._failures.append(failure)
        self._next_start = 0.0  # the next address need not wait any longer

    def _fail(self) -> None:
        failures, self._failures = self._failures, []  # else the failures and this frame would refer to each other
        try:
            raise next((e for kind in _MOST_USEFUL for e in failures if isinstance(e, kind)), OSError("no address"))
        finally:
            del failures
