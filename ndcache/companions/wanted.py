"""A companion file that is asked for, and the check of a response before its body is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import ProtocolError, SizeMismatchError
from ..format.strict_json import WEB_PAGE_HINT
from ..http.response import Response
from ..http.retry import RetryPolicy
from ..sources.downloads.shard_request import unexpected_status

__all__ = ["WantedFile", "check_headers"]

_WEB_PAGES = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True)
class WantedFile:
    """A companion file that is asked for, and what is known of it before.

    Attributes
    ----------
    name : str
        Its path in the model's directory.
    limit : int
        The most bytes that it may have.
    nbytes : int or None
        Its size, if a listing gives it.
    digests : mapping of str to str
        The digests that it must have, by algorithm.
    policy : RetryPolicy or None
        How often to try; None for the load's own policy.
    is_optional : bool
        Whether the model may do without it. Then a web page in its place says that there is none.
    """

    name: str
    limit: int
    nbytes: int | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    policy: RetryPolicy | None = None
    is_optional: bool = False

    @property
    def most(self) -> int:
        """Return the most bytes to receive."""
        return self.limit if self.nbytes is None else self.nbytes


def check_headers(response: Response, wanted: WantedFile, url: str, start: int = 0) -> int | None:
    """Check the headers of a response that has the file from byte `start` on.

    Returns
    -------
    int or None
        The size of the whole file, from the response or else from a listing; None if neither tells it.

    Raises
    ------
    TransferError, SizeMismatchError
        The response is of no use.
    """
    if response.status != (206 if start else 200):
        raise unexpected_status(response)
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in _WEB_PAGES and not wanted.name.lower().endswith((".html", ".htm")):
        raise ProtocolError(
            "the server sent a web page in place of the file",
            url=url,
            shard=wanted.name,
            hint=WEB_PAGE_HINT,
            retryable=not wanted.is_optional,
        )
    length = response.content_length
    if length is None:
        return wanted.nbytes
    length += start
    if length > wanted.limit:
        raise SizeMismatchError(
            f"the file has {length:,} bytes, and may have {wanted.limit:,}",
            url=url,
            shard=wanted.name,
            expected=wanted.limit,
            received=length,
            hint="Leave it out (exclude), or name it (include) if you want it nevertheless.",
            retryable=False,
        )
    if wanted.nbytes is not None and length != wanted.nbytes:
        raise SizeMismatchError(
            "the file does not have the size that the listing gives",
            url=url,
            shard=wanted.name,
            expected=wanted.nbytes,
            received=length,
        )
    return length
