"""The parts of a URL's query that identify a file, as opposed to those that only permit access to it.

Storages sign URLs with parameters that change with every link to the same file. These parameters, listed in
docs/urls.rst, are not part of a model's identity. All others are: ``?model=a`` and ``?model=b`` are two models.
"""

from __future__ import annotations

import hashlib
import re

__all__ = ["identifying_query", "query_digest"]

#: Names that always belong to signatures and credentials.
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

#: Shorter names that belong to a signature only if the parameter that is the key here is there, too.
_BESIDE = {
    "sig": re.compile(  # Azure
        "s[vrtepis]|spr|sip|srt|sdd|ses|scid|saoid|suoid|skoid|sktid|skt|ske|sks|skv|skdutid|sduoid|rsc[cdelt]"
    ),
    "signature": re.compile("policy|hash-algorithm|keyname|urlprefix"),  # CloudFront, Google's CDN
    "token": re.compile("token_path|token_ver|token_countries"),  # Bunny
}


def identifying_query(query: str) -> str:
    """Return the parameters that are part of a model's identity, sorted by name.

    No known server gives a meaning to the order of parameters with different names. Parameters with the same name may
    be a list, and keep their order. Nothing is decoded: at worst, a model whose query is written in two ways is cached
    twice. To take two different queries for the same would be worse, as it gives the weights of another model.
    """
    pairs = [(pair.partition("=")[0].lower(), pair) for pair in query.split("&") if pair]
    names = {name for name, _ in pairs}
    signatures = [_SIGNATURE, *(others for name, others in _BESIDE.items() if name in names)]
    kept = [pair for name, pair in pairs if not any(kind.fullmatch(name) for kind in signatures)]
    return "&".join(sorted(kept, key=lambda pair: pair.partition("=")[0]))


def query_digest(query: str) -> str:
    """Return a digest of the `identifying_query`, which is shown and stored instead of it, or an empty string."""
    identity = identifying_query(query)
    return hashlib.sha256(identity.encode()).hexdigest()[:16] if identity else ""
