"""A replacement for the download of mlc_llm: parallel, verified and resumable, and without git.

``ndcache.mlc.download_and_cache_mlc_weights`` takes the arguments of the function of this name in
``mlc_llm.support.download_cache``, keeps to its environment variables, and puts the model where mlc_llm looks for it::

    import mlc_llm.support.download_cache
    import ndcache.mlc

    mlc_llm.support.download_cache.download_and_cache_mlc_weights = ndcache.mlc.download_and_cache_mlc_weights
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from .api import fetch
from .caller import public
from .errors import CacheUnavailableError, DiskFullError, NdcacheError
from .files.folder import sync
from .format.paths import STATE_DIRECTORY
from .store.housekeeping.sizes import disk_bytes
from .store.lock import acquire_or_wait

__all__ = ["download_and_cache_mlc_weights"]

_POLICIES = ("ON", "OFF", "REDO", "READONLY")
_URL = re.compile(r"(?:HF://|https://huggingface\.co/)([^/]+)/([^/]+)")

logger = logging.getLogger("ndcache")


@public
def download_and_cache_mlc_weights(model_url: str, num_processes: int = 4, force_redo: bool | None = None) -> Path:
    """Return the directory of a model of mlc_llm, after downloading the model unless it is there.

    It is ``model_weights/hf/<user>/<repository>`` in MLC_LLM_HOME, or in mlc_llm's place for caches. It gets this name
    when it is complete. An interrupted download lies beside it, or in MLC_TEMP_DIR, and the next call resumes it.

    Parameters
    ----------
    model_url : str
        ``HF://user/repository`` or ``https://huggingface.co/user/repository``. HF_ENDPOINT may name another server.
    num_processes : int, default 4
        How many files to download at once.
    force_redo : bool, optional
        Download the model again even if it is there, and replace it when the new one is complete. Default: whether
        MLC_DOWNLOAD_CACHE_POLICY is REDO.

    Returns
    -------
    pathlib.Path
        The directory in a cache of MLC_LLM_READONLY_WEIGHT_CACHE that has the model, else the one in MLC_LLM_HOME.

    Raises
    ------
    RuntimeError
        MLC_DOWNLOAD_CACHE_POLICY is OFF, or it is READONLY and the model is not there.
    ValueError
        `model_url` or MLC_DOWNLOAD_CACHE_POLICY has another form.
    NdcacheError
        The model cannot be downloaded; see `ndcache.fetch`.

    Examples
    --------
    >>> directory = download_and_cache_mlc_weights("HF://mlc-ai/Llama-3.2-1B-Instruct-q4f16_1-MLC")
    """
    policy = os.environ.get("MLC_DOWNLOAD_CACHE_POLICY", "ON")
    if policy not in _POLICIES:
        raise ValueError(f"MLC_DOWNLOAD_CACHE_POLICY must be one of {', '.join(_POLICIES)}, not {policy!r}")
    if policy == "OFF":
        raise RuntimeError(f"Cannot download {model_url} as MLC_DOWNLOAD_CACHE_POLICY=OFF")
    match = _URL.fullmatch(model_url)
    if match is None or {".", ".."} & set(match.groups()):
        raise ValueError(f"Invalid model URL: {model_url}")
    user, repository = match.groups()
    candidates = [base / "hf" / user / repository for base in _readonly_caches(os.environ)]
    for directory in candidates:
        if (directory / "mlc-chat-config.json").is_file():
            logger.info("the model is in the read-only cache: %s", directory)
            return directory
    directory = _home(os.environ) / "model_weights" / "hf" / user / repository
    is_redone = policy == "REDO" if force_redo is None else force_redo
    if directory.exists() and not is_redone:
        logger.info("the model was downloaded before: %s", directory)
        return directory
    if policy == "READONLY":
        raise RuntimeError(
            f"Cannot find cache for {model_url}, cannot proceed to download as MLC_DOWNLOAD_CACHE_POLICY=READONLY, "
            "please check settings MLC_LLM_READONLY_WEIGHT_CACHE, "
            f"local path candidates: {[str(path) for path in (*candidates, directory)]}"
        )
    _download(f"hf://{user}/{repository}", directory, num_processes, is_redone)
    return directory


def _download(source: str, directory: Path, num_processes: int, is_redone: bool) -> None:
    """Download a model beside its directory, and give that its name."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    work, temporary = directory.with_name(f".{directory.name}.download"), os.environ.get("MLC_TEMP_DIR")
    if temporary:
        work = Path(temporary, f"{directory.parent.name}--{directory.name}.download")
    before = directory.stat().st_ino if directory.exists() else None

    def is_there() -> bool:
        with contextlib.suppress(OSError):
            return directory.stat().st_ino != before
        return False

    lock = directory.with_name(f".{directory.name}.lock")
    with acquire_or_wait(lock, is_there=is_there, progress=lambda: disk_bytes(work), sleep=time.sleep) as held:
        if held is None or is_there():
            return  # another process has downloaded it
        try:
            # An absolute path: mlc_llm takes "~" in its variables for the name of a directory.
            fetch(source, local_dir=os.path.abspath(work), max_workers=max(1, num_processes), force=is_redone)
            shutil.rmtree(work / STATE_DIRECTORY)
            _move(work, directory)
        except (NdcacheError, OSError) as error:
            if is_there():
                return  # another process was faster, where locks do not work
            if isinstance(error, (DiskFullError, CacheUnavailableError)):
                error.hint = "Free some space, or choose another place by MLC_LLM_HOME or MLC_TEMP_DIR."
            raise


def _move(work: Path, directory: Path) -> None:
    """Rename `work` to `directory`, in the place of an older one; from another disk, by way of a copy beside it."""
    copy = directory.with_name(f".{directory.name}.copy")
    shutil.rmtree(copy, ignore_errors=True)
    staged = work
    if work.stat().st_dev != directory.parent.stat().st_dev:
        try:
            staged = shutil.copytree(work, copy, copy_function=_copy_to_disk)
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise
    old = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.deleted")
    with contextlib.suppress(FileNotFoundError):
        os.rename(directory, old)
    try:
        os.rename(staged, directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rename(old, directory)
        raise
    for leftover in (work, *directory.parent.glob(f".{glob.escape(directory.name)}.*.deleted")):
        shutil.rmtree(leftover, ignore_errors=True)


def _copy_to_disk(source: str, target: str) -> None:
    """Copy a file, and force it to disk: a model that has its name is never looked at again."""
    shutil.copyfile(source, target)
    with open(target, "r+b") as file:
        sync(file.fileno())


def _home(environ: Mapping[str, str]) -> Path:
    """Return mlc_llm's own directory."""
    if "MLC_LLM_HOME" in environ:
        return Path(environ["MLC_LLM_HOME"])
    if sys.platform == "win32":
        return Path(environ["LOCALAPPDATA"], "mlc_llm")
    return Path(environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mlc_llm")


def _readonly_caches(environ: Mapping[str, str]) -> list[Path]:
    text = environ.get("MLC_LLM_READONLY_WEIGHT_CACHE")
    return [] if text is None else [Path(part) for part in text.split(os.pathsep)]
