"""The requests for one shard: what is wanted of it and from where, each request, and checks of its response."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import NdcacheError, ProtocolError, RangeError, SizeMismatchError, TransferError
from ...format.manifest import Shard
from ...format.strict_json import WEB_PAGE_HINT
from ...http.response import Response
from ...http.retry import RetryPolicy
from ...store.metadata import FileMetadata, may_blame_condition
from ...store.partials.growing import GrowingFile
from ...store.partials.ranges import ByteRange, ByteRanges
from .range_queue import RangeTask

__all__ = ["DownloadPlan", "Request", "check_length", "plan_ranges", "unexpected_status"]

#: A gap of up to this many bytes between two wanted tensors is fetched with them, as another request would cost about
#: as much. For the same reason, fetching less than the whole shard must save at least this many bytes.
_GAP = 1 << 20
#: The same for slices, between which there may be many gaps. Whoever asks for a slice wants no more than that.
_SLICE_GAP = 1 << 14


@dataclass(frozen=True)
class DownloadPlan:
    """The bytes to download of one shard, and the places that have them.

    Attributes
    ----------
    shard : Shard
    urls : tuple of str
        The source's URL, then those of mirrors.
    content_id : str
        Identifies the shard's content; see `FileMetadata.compare_content`.
    cached : FileMetadata or None
        The metadata of a cached file that may still be right: the source is asked whether it has changed.
    ranges : ByteRanges or None
        The wanted ranges; None for the whole shard.
    policy : RetryPolicy or None
        How often to try at each URL; None for the load's own policy.
    growing : GrowingFile or None
        Lets tasks read the file while it is downloaded, if there is no digest to compare.
    """

    shard: Shard
    urls: tuple[str, ...]
    content_id: str
    cached: FileMetadata | None = None
    ranges: ByteRanges | None = None
    policy: RetryPolicy | None = None
    growing: GrowingFile | None = None


@dataclass(frozen=True)
class Request:
    """One request for a shard.

    Attributes
    ----------
    headers : dict of str to str
    task : RangeTask or None
        The requested range; None for the whole file.
    continues : bool
        Whether the range must be of the same version as the bytes received before.
    """

    headers: dict[str, str]
    task: RangeTask | None = None
    continues: bool = False

    @property
    def range(self) -> ByteRange | None:
        """Return the requested range, or None for the whole file."""
        return None if self.task is None else self.task.missing

    @property
    def is_conditional(self) -> bool:
        """Return whether the server need not send a file that has not changed."""
        return "If-None-Match" in self.headers

    def may_have_caused(self, error: NdcacheError) -> bool:
        """Return whether the request's condition may have made the server fail."""
        if not (self.is_conditional and isinstance(error, TransferError)):
            return False
        return error.status == 304 or may_blame_condition(error.status)


def plan_ranges(shard: Shard, *, has_slices: bool = False) -> ByteRanges | None:
    """Return the byte ranges that cover the requested tensors, or None for the whole shard.

    Parameters
    ----------
    shard : Shard
        With the records of the requested tensors only.
    has_slices : bool
        Whether some of them are slices of tensors. Then no more is fetched, however little that saves.
    """
    tensors = [(record.byte_offset, record.byte_offset + record.nbytes) for record in shard.records]
    if shard.header is not None:
        tensors.insert(0, (0, shard.header[0]))  # it tells whether the file is of the right version
    # All tensors may be empty, but no request can ask for nothing.
    wanted = ByteRanges(tensors, gap=_SLICE_GAP if has_slices else _GAP) or ByteRanges([(0, 1)])
    saved = shard.nbytes - wanted.nbytes
    is_enough = saved > 0 if has_slices else saved >= max(_GAP, wanted.nbytes)
    return wanted if is_enough else None


def unexpected_status(response: Response) -> TransferError:
    """Return the error for a status that does not answer a request for a whole file."""
    kind = RangeError if response.status in (206, 416) else ProtocolError
    return kind(
        f"the server answered a plain request with status {response.status}", url=response.url, status=response.status
    )


def check_length(response: Response, shard: Shard) -> None:
    """Check that the announced length is the manifest's, before the body is read."""
    length = response.content_length
    if length is None or length == shard.nbytes:
        return
    raise SizeMismatchError(
        f"the server has {length:,} bytes where the manifest says {shard.nbytes:,}",
        url=response.url,
        shard=shard.data_path,
        expected=shard.nbytes,
        received=length,
        hint=_guess_content(response, length),
    )


def _guess_content(response: Response, length: int) -> str:
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        return WEB_PAGE_HINT
    if length < 512 and response.read(512).startswith(b"version https://git-lfs"):
        return "It is a git-lfs pointer, not the file: serve the file itself (git lfs pull)."
    return "The manifest and the shard are of different versions, or the upload is not complete."
