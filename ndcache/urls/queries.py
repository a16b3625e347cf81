"""Tell the parts of a URL's query that choose a file from those that only permit access to it.

Storages sign URLs by parameters that change with every link to one file. These, listed in docs/urls.rst, are no part of
a model's identity; all others are, since ``?model=a`` and ``?model=b`` are two models.
"""

from __future__ import annotations

import hashlib
import re

__all__ = ["identifying_query", "query_digest"]

#: Names of signatures and credentials by themselves.
_SIGNATURE = re.compile(
    r"""
    x-amz-.* | awsaccesskeyid | x-id                                # Amazon S3, Cloudflare R2, MinIO and the like
    | x-goog-.* | googleaccessid                                    # Google
    | key-pair-id                                                   # CloudFront
    | ossaccesskeyid | security-token | auth_key | x-oss-(signature(-version)?|credential|date|expires
        |additional-headers|security-token)                         # Alibaba
    | q-(sign-algorithm|ak|sign-time|key-time|header-list|url-param-list|signature) | x-cos-security-token   # Tencent
    | accesskeyid | x-obs-security-token                            # Huawei
    | hdnea | hdnts | hdntl | __gda__ | __token__                   # Akamai
    | signature | sig | sign | hmac | expires | verify | jwt | auth | authorization | secret | password | passwd
    | token | (access|auth|id|private|job|deploy|sas)_?token | (api|access)[_-]?key
    | response-(cache-control|content-(disposition|encoding|language|type)|expires)     # headers, signed with the rest
    """,
    re.VERBOSE,
)

#: Of short names: beside which parameter they belong to a signature.
_BESIDE = {
    "sig": re.compile(  # Azure
        "s[vrtepis]|spr|sip|srt|sdd|ses|scid|saoid|suoid|skoid|sktid|skt|ske|sks|skv|skdutid|sduoid|rsc[cdelt]"
    ),
    "signature": re.compile("policy|hash-algorithm|keyname|urlprefix"),  # CloudFront, Google's CDN
    "token": re.compile("token_path|token_ver|token_countries"),  # Bunny
}


def identifying_query(query: str) -> str:
    """Return what is part of a model's identity, in one order for all.

    The order is that of the names: between parameters of different names, no server known gives it a meaning. Those of
    one name keep theirs, which may be a list. Nothing is decoded: what is written in two ways at worst is kept twice,
    while what is wrongly taken for the same would give another model's weights.
    """
    pairs = [(pair.partition("=")[0].lower(), pair) for pair in query.split("&") if pair]
    names = {name for name, _ in pairs}
    signatures = [_SIGNATURE, *(others for name, others in _BESIDE.items() if name in names)]
    kept = [pair for name, pair in pairs if not any(kind.fullmatch(name) for kind in signatures)]
    return "&".join(sorted(kept, key=lambda pair: pair.partition("=")[0]))


def query_digest(query: str) -> str:
    """Return a digest of the `identifying_query`, to be shown and kept in its place; empty if there is none."""
    identity = identifying_query(query)
    return hashlib.sha256(identity.encode()).hexdigest()[:16] if identity else ""
