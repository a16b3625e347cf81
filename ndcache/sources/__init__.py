"""Sources of shards: a local directory, or a server and its cache."""

from __future__ import annotations

from ..context import LoadContext
from ..location import Location
from .local import open_local_model
from .model import Model
from .remote import open_remote_model

__all__ = ["open_model"]


def open_model(location: Location, context: LoadContext) -> Model:
    """Open a model: read its manifest, or fetch it, and check it.

    Parameters
    ----------
    location : Location
    context : LoadContext

    Raises
    ------
    NotFoundError, ManifestError, ChecksumError
        There is no manifest, or it cannot be used.
    TransferError, OfflineError, CacheError
    """
    opener = open_remote_model if location.is_remote else open_local_model
    return opener(location, context)
