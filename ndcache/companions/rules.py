"""The rules for companion files: the ones that a model has, and the names that are refused.

A model of mlc_llm has a configuration, which lists the files of its tokenizer. The configuration's name is in a package
manifest, if there is one: https://llm.mlc.ai/docs/deploy/model_artifact_manifest.html. A model in safetensors files has
the files that transformers reads.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import ManifestSyntaxError, NotFoundError, UnsafePathError
from ..format.integrity import is_manifest_name
from ..format.paths import check_path, collision_key

__all__ = [
    "CHAT_CONFIG",
    "MAX_FILE_BYTES",
    "MAX_INCLUDED_BYTES",
    "PACKAGE_MANIFEST",
    "TRANSFORMERS_FILES",
    "NoListingError",
    "check_name",
    "choose",
    "config_name",
    "is_pattern",
    "is_refused",
    "is_usual",
    "matches",
    "tokenizer_files",
]

#: The configuration of a model of mlc_llm.
CHAT_CONFIG = "mlc-chat-config.json"
#: The file that may name the configuration.
PACKAGE_MANIFEST = "mlc-model-manifest.json"
#: The files of a model that transformers reads, for servers without a listing.
TRANSFORMERS_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
#: The limit of one file, and that of a file which the caller asks for.
MAX_FILE_BYTES, MAX_INCLUDED_BYTES = 64 << 20, 64 << 30

_USUAL = ("*.json", "*.txt", "*.model", "*.jinja")
#: Code, archives, and weights in other formats, some of which run code when they are loaded.
_REFUSED = re.compile(
    r".*\.(py[a-z]?|so|dll|dylib|sh|exe|pkl|pickle|joblib|dill|pt|pth|ckpt|bin|npy|npz|h5|hdf5|keras|msgpack|onnx"
    r"|onnx_data|pb|tflite|gguf|ggml|safetensors|mlmodel|ot|params|nemo|llamafile|zip|tar|gz|tgz|bz2|xz|7z|whl)",
    re.IGNORECASE | re.DOTALL,
)
#: The most files that a configuration may list; real ones list up to ten.
_MAX_LISTED = 256


class NoListingError(ValueError):
    """No listing of a model's files exists to match a pattern with."""


def is_refused(name: str) -> bool:
    """Return whether a file is fetched only if the caller names it, or its suffix: code, pickles and other weights."""
    return _REFUSED.fullmatch(name) is not None


def is_usual(name: str) -> bool:
    """Return whether a file of a listing is a companion by its name: it lies beside the weights, and is a text."""
    # The manifest of another model, without its weights, would keep the directory from being loaded.
    return "/" not in name and matches(name, _USUAL) and not (is_refused(name) or is_manifest_name(name))


def is_pattern(text: str) -> bool:
    """Return whether a text is a glob pattern, and not the name of one file."""
    return any(character in text for character in "*?[")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name is one of the `patterns`, or matches one."""
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def choose(text: str, names: Iterable[str]) -> list[str]:
    """Return which of the names a text of `include` stands for; those that `is_refused` only if it has their suffix.

    Raises
    ------
    NotFoundError
        It matches none.
    UnsafePathError
        It matches only such as `is_refused`.
    """
    found = [name for name in names if matches(name, [text])]
    if not found:
        raise NotFoundError(f"include={text!r} matches no file of the model", shard=text)
    chosen = [name for name in found if is_refused(text) or not is_refused(name)]
    if not chosen:
        raise UnsafePathError(
            f"include={text!r} matches only files that may hold code or other weights, such as {found[0]!a}",
            shard=text,
            hint="Name such a file in include, or its suffix, to fetch it.",
        )
    return chosen


def config_name(package_manifest: bytes) -> str:
    """Return the name of the configuration, from the content of a package manifest.

    Raises
    ------
    ManifestSyntaxError
    """
    name = _read(package_manifest, PACKAGE_MANIFEST).get("chat_config", CHAT_CONFIG)
    if not isinstance(name, str):
        raise ManifestSyntaxError(f"'chat_config' of {PACKAGE_MANIFEST} is not a string", shard=PACKAGE_MANIFEST)
    return name


def tokenizer_files(config: bytes, name: str) -> Sequence[str]:
    """Return the files of the tokenizer, from the content of the configuration `name`.

    Raises
    ------
    ManifestSyntaxError
    """
    files = _read(config, name).get("tokenizer_files") or []
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ManifestSyntaxError(f"'tokenizer_files' of {name} is not an array of strings", shard=name)
    if len(files) > _MAX_LISTED:
        raise ManifestSyntaxError(f"'tokenizer_files' of {name} lists {len(files):,} files", shard=name)
    return list(dict.fromkeys(files))


def check_name(name: str, taken: Iterable[str]) -> None:
    """Check that a companion may have this name.

    Parameters
    ----------
    name : str
    taken : iterable of str
        The paths of the manifest and the shards.

    Raises
    ------
    UnsafePathError
        It leaves the model's directory, or would take the place of another file or folder of the model.
    """
    try:
        check_path(name)
    except UnsafePathError as error:
        raise UnsafePathError(
            error.message.replace("the shard path", "the path"), shard=name, hint="It was not requested."
        ) from None
    key = collision_key(name)
    for other in map(collision_key, taken):
        if key == other or key.startswith(f"{other}/") or other.startswith(f"{key}/"):
            raise UnsafePathError(
                f"{name!a} would take the place of another file of the model",
                shard=name,
                hint="It was not requested.",
            )


def _read(data: bytes, name: str) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestSyntaxError(f"{name} is not JSON", shard=name) from error
    if not isinstance(value, dict):
        raise ManifestSyntaxError(f"{name} is not a JSON object", shard=name)
    return value
