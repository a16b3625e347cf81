"""Single requests, and certificates for servers."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

import trustme

from ndcache.http.response import Response
from ndcache.http.transport import Transport
from ndcache.workers.cancellation import Cancellation


def get(
    transport: Transport, url: str, cancellation: Cancellation | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    return transport.get(url, headers or {}, cancellation or Cancellation())


def body(transport: Transport, url: str, **options: Any) -> bytes:
    with get(transport, url, **options) as response:
        return response.read(1 << 20)


def with_name(authority: trustme.CA, name: str, **options: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, **options).configure_cert(context)
    return context
