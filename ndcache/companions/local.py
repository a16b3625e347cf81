"""Find the companion files of a model in a local directory, by the same rules as on a server."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from ..errors import NotFoundError, UnsafePathError
from ..files.descriptors import check_shortage
from ..format.paths import STATE_DIRECTORY
from ..format.safetensors.index import is_safetensors
from ..sources.local import LocalModel
from .rules import (
    CHAT_CONFIG,
    MAX_FILE_BYTES,
    PACKAGE_MANIFEST,
    check_name,
    choose,
    config_name,
    is_pattern,
    is_refused,
    is_usual,
    matches,
    tokenizer_files,
)

__all__ = ["find_companions", "listed_companions"]


def find_companions(model: LocalModel, include: Sequence[str] = (), exclude: Iterable[str] = ()) -> list[str]:
    """Return the names of a model's companion files, and of those that the caller includes.

    Raises
    ------
    NotFoundError
        A file that the configuration lists, or that the caller includes, is not there.
    ManifestSyntaxError
        The configuration cannot be understood.
    UnsafePathError
        It lists a file that must not be copied.
    """
    taken = {model.manifest.name, *(shard.data_path for shard in model.manifest.shards)}
    listed = listed_companions(model)
    every = _walk(model) if any(map(is_pattern, include)) else []
    included = [name for text in include for name in (choose(text, every) if is_pattern(text) else [text])]
    found: list[str] = []
    for name in dict.fromkeys([*listed, *included]):
        if name in taken or matches(name, exclude):
            continue
        check_name(name, taken)
        if is_refused(name) and name not in included:
            raise UnsafePathError(
                f"{name!a} may hold code or other weights",
                shard=name,
                hint="It was not copied. Name it in include to copy it, or in exclude to do without it.",
            )
        if not os.path.isfile(model.path(name)):
            raise NotFoundError(
                f"there is no file {model.path(name)}", shard=name, hint="Name it in exclude to do without it."
            )
        found.append(name)
    return found


def listed_companions(model: LocalModel) -> list[str]:
    """Return the names of the files that the model lists, or that lie beside it if it is in safetensors files.

    Raises
    ------
    NotFoundError, ManifestSyntaxError, UnsafePathError
    """
    return list(_of_safetensors(model) if is_safetensors(model.manifest.name) else _of_mlc(model))


def _of_mlc(model: LocalModel) -> Iterator[str]:
    config = CHAT_CONFIG
    if (data := _read(model, PACKAGE_MANIFEST)) is not None:
        yield PACKAGE_MANIFEST
        check_name(config := config_name(data), ())
    if (data := _read(model, config)) is not None:
        yield config
        yield from tokenizer_files(data, config)


def _of_safetensors(model: LocalModel) -> Iterator[str]:
    for entry in sorted(os.scandir(model.directory), key=lambda entry: entry.name):
        if is_usual(entry.name) and entry.is_file() and entry.stat().st_size <= MAX_FILE_BYTES:
            yield entry.name


def _walk(model: LocalModel) -> list[str]:
    """Return the paths of all files below the directory, without ndcache's own."""
    found: list[str] = []
    for folder, folders, files in os.walk(model.directory):
        where = os.path.relpath(folder, model.directory).replace(os.sep, "/")
        folders[:] = sorted(each for each in folders if (where, each) != (".", STATE_DIRECTORY))
        found += [name if where == "." else f"{where}/{name}" for name in sorted(files)]
    return found


def _read(model: LocalModel, name: str) -> bytes | None:
    try:
        with open(model.path(name), "rb") as file:
            return file.read(MAX_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        check_shortage(error)
        raise NotFoundError(f"{model.path(name)} cannot be read: {error.strerror}", shard=name) from error
