"""Fixtures for tests of requests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trustme

from ndcache.http.transport import Transport

from ..helpers.servers import ScriptedServer
from ..helpers.transport import with_name


@pytest.fixture
def transport() -> Iterator[Transport]:
    made = Transport()
    yield made
    made.close()


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secure(scripted: ScriptedServer, authority: trustme.CA) -> ScriptedServer:
    """Let the scripted server speak TLS with a certificate of `authority`."""
    scripted.wrap(with_name(authority, "127.0.0.1"))
    return scripted
