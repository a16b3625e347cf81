"""An opened manifest, and the bytes that it comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urljoin

from ...context import LoadContext
from ...errors import OfflineError
from ...format.integrity import Integrity, check_manifest_digest, verify_and_parse
from ...format.manifest import Manifest
from ...format.safetensors.headers import Headers, kept_as
from ...format.safetensors.index import is_safetensors
from ...location import Location
from ...urls.url import quoted

__all__ = ["OpenedManifest", "offline_error", "open_manifest", "parse_kept"]


@dataclass(frozen=True)
class OpenedManifest:
    """A manifest, and the SHA-256 of its bytes: of the manifest file, or of the headers of safetensors files.

    Attributes
    ----------
    manifest : Manifest
    digest : str
    data : bytes
        The bytes, for other processes; empty if none will need them.
    """

    manifest: Manifest
    digest: str
    data: bytes = field(default=b"", repr=False)

    @property
    def published(self) -> dict[str, str]:
        """Return the files that come with the manifest, and their SHA-256: the index, and that of the bytes."""
        files = {self.file: self.digest}
        if is_safetensors(self.manifest.name) and (index := Headers.decode(self.data).index) is not None:
            files[index.name] = hashlib.sha256(index.start).hexdigest()
        return files

    @property
    def file(self) -> str:
        """Return the file in the cache that has these bytes."""
        return kept_as(self.manifest.name)


def parse_kept(
    data: bytes, name: str, url: str, integrity: Integrity, check: Callable[[], None] = lambda: None
) -> Manifest:
    """Parse the bytes that the cache keeps of a manifest, and check them and the digests that the caller requires.

    Raises
    ------
    ManifestError, UnsupportedDtypeError, ChecksumError, CancelledError
    """
    if not is_safetensors(name):
        return verify_and_parse(data, name=name, url=url, integrity=integrity, check=check)
    headers = Headers.decode(data)
    if headers.index is not None:
        check_manifest_digest(headers.index.start, name, url, integrity)
    return headers.manifest(lambda file: urljoin(url, quoted(file)), integrity, check)


def open_manifest(data: bytes, name: str, url: str, context: LoadContext) -> OpenedManifest:
    """Open the bytes that the cache keeps of a manifest; see `parse_kept`."""
    manifest = parse_kept(data, name, url, context.integrity, context.cancellation.poll)
    return OpenedManifest(manifest, hashlib.sha256(data).hexdigest(), data)


def offline_error(location: Location, missing: list[str]) -> OfflineError:
    """Return the error for files that are not in the cache and must not be fetched."""
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    error = OfflineError(
        f"offline, and not in the cache: {shown} of {location}",
        hint="Run once with the network: not offline, and NDCACHE_OFFLINE and HF_HUB_OFFLINE unset.",
    )
    error.missing = tuple(missing)
    return error
