"""A TCP connection to whichever of a host's addresses answers first ("Happy Eyeballs", RFC 8305).

An address that does not answer costs a quarter of a second, not the time allowed for connecting, and only once: which
one answered in its place is remembered, and tried first from then on.
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

__all__ = ["Address", "Routes", "connect_to_first", "look_up"]

#: Seconds after which the next address is tried as well (RFC 8305, section 5).
_STAGGER = 0.25
#: What a connect that does not wait answers when it has begun.
_HAS_BEGUN = {0, errno.EINPROGRESS, errno.EINTR, getattr(errno, "WSAEWOULDBLOCK", errno.EINPROGRESS)}
#: Of the failures of several addresses, the first of these kinds tells most.
_TELLING = (ConnectionRefusedError, TimeoutError, OSError)
# Needs no descriptor of its own, unlike epoll and kqueue, and knows descriptors over 1,023, unlike select.
_Selector: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.SelectSelector)


class Address(NamedTuple):
    """One line of what `socket.getaddrinfo` answers."""

    family: int
    kind: int
    protocol: int
    name: str
    where: tuple[str | int, ...]


class Routes:
    """Remember which address of a host answered when its first one did not. Safe to share between threads and forks."""

    def __init__(self) -> None:
        # Without a lock, which another thread could hold at the moment of a fork: each use is a single operation.
        self._known: dict[tuple[str, int], Address] = {}

    def order(self, host: str, port: int, addresses: Sequence[Address]) -> list[Address]:
        """Put the address that answered last in front, and those of its family behind it."""
        known = self._known.get((host, port))
        if known is None:
            return list(addresses)
        return sorted(addresses, key=lambda address: (address != known, address.family != known.family))

    def remember(self, host: str, port: int, winner: Address | None) -> None:
        """Note the address to begin with from now on, or that none answers any more (None)."""
        if winner is None:
            self._known.pop((host, port), None)
        else:
            self._known[host, port] = winner


def look_up(host: str, port: int) -> list[Address]:
    """Return the addresses of a host, those of IPv6 and IPv4 in turn.

    Raises
    ------
    urllib3.exceptions.LocationParseError
        No host can have this name.
    socket.gaierror
        The system does not know it.
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
    """Connect to the first address that answers; each is tried when the one before has failed, or kept silent.

    Parameters
    ----------
    addresses : sequence of Address
    timeout : float or None
        Seconds for all of it. None is without a limit.
    open_socket : callable
        Returns a socket for an address that does not block.
    is_cancelled : callable
        Asked whenever one of the sockets reports something, as it does when another thread shuts it.

    Raises
    ------
    OSError
        The most telling failure of the addresses.
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
    """The addresses that are being tried."""

    def __init__(
        self, waiting: deque[Address], timeout: float | None, open_socket: Callable[[Address], socket.socket]
    ) -> None:
        self._waiting = waiting
        self._open_socket = open_socket
        self._failures: list[OSError] = []
        self._selector = _Selector()
        self._next_start = time.monotonic()
        self._deadline = float("inf") if timeout is None else self._next_start + timeout
        # Each gets its chance, however short the time.
        self._stagger = _STAGGER if timeout is None else min(_STAGGER, timeout / max(len(waiting), 1))

    def step(self) -> tuple[socket.socket, Address] | None:
        """Try one more address if it is time, wait for news, and return the socket that is connected, if one is."""
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
        self._next_start = now + self._stagger
        sock = None
        try:
            sock = self._open_socket(address)
            status = sock.connect_ex(address.where)
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
        self._next_start = 0.0  # the next one need not wait any longer

    def _fail(self) -> None:
        failures, self._failures = self._failures, []  # or they would hold this frame, and it them
        try:
            raise next((e for kind in _TELLING for e in failures if isinstance(e, kind)), OSError("no address"))
        finally:
            del failures
