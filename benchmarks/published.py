"""Models in safetensors files with an index, as they are published: ndcache beside Hugging Face's own libraries."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from . import choices, inputs, servers
from .harness import Result, Settings, Target, maker, rounds

_FILES = 16
_TENSOR_BYTES = 8 << 20
_HUB, _LOAD, _COPY = "snapshot_download + load_file", "ndcache load", "ndcache load, copies"


def cold(settings: Settings) -> Result:
    """Download from nginx on loopback to an empty directory, and load."""
    return _compare("safetensors-cold", settings, is_warm=False, targets=[(_LOAD, 2.0), (_COPY, 2.0)])


def warm(settings: Settings) -> Result:
    """Load what an earlier load has downloaded; both ask the server whether it has changed."""
    return _compare("safetensors-warm", settings, is_warm=True, targets=[(_COPY, 1.0)])


def _compare(name: str, settings: Settings, *, is_warm: bool, targets: list[tuple[str, float]]) -> Result:
    with inputs.working_folder(settings) as folder:
        model = _write(folder / "model", settings.bytes_or(1 << 30))
        with servers.nginx(folder / "model") as (url, _):
            make = maker({**model, "url": url, "is_warm": is_warm}, model)
            result = Result(
                name,
                [
                    make(_LOAD, "published_ndcache", loaded=True),
                    make(_COPY, "published_ndcache", loaded=True, copy=True),
                    make(_HUB, "published_hub", loaded=True, settings=choices.HUGGINGFACE_HUB),
                ],
                targets=[Target(f"{_HUB} / {label}", _HUB, label, ">=", ratio) for label, ratio in targets],
            )
            return rounds(result, settings, folder)


def _write(directory: Path, nbytes: int) -> dict[str, Any]:
    """Write the files and the index, and the listings of a server; return their description."""
    directory.mkdir()
    size = max(4, nbytes // _FILES & ~3)
    tensor_bytes = min(_TENSOR_BYTES, size)
    random, names, weight_map = np.random.default_rng(0), [], {}
    for number in range(_FILES):
        name, header = f"model-{number + 1:05}-of-{_FILES:05}.safetensors", {}
        for index, start in enumerate(range(0, size, tensor_bytes)):
            end = min(size, start + tensor_bytes)
            key = f"layers.{number}.{index}.weight"
            header[key] = {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
            weight_map[key] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = directory / name
        path.write_bytes(len(text).to_bytes(8, "little") + text + random.bytes(size))
        os.utime(path, (number, number))  # or nginx gives all the same ETag, and huggingface_hub fetches only one
        names.append(name)
    index_name = "model.safetensors.index.json"
    (directory / index_name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sizes = [(directory / name).stat().st_size for name in names]
    _write_listings(directory, [*names, index_name])
    return {
        "directory": str(directory),
        "shards": names,
        "sizes": sizes,
        "stored": sum(sizes),
        "loaded": size * _FILES,
        "tensors": len(weight_map),
    }


def _write_listings(directory: Path, names: list[str]) -> None:
    """Write the listings that huggingface_hub asks for; which of them depends on its version."""
    siblings = [{"rfilename": name} for name in names]
    listing = {"id": "bench/model", "sha": servers.COMMIT, "siblings": siblings}
    (directory / "revision.json").write_text(json.dumps(listing))
    tree = [
        {"type": "file", "path": name, "size": (directory / name).stat().st_size, "oid": servers.COMMIT}
        for name in names
    ]
    (directory / "tree.json").write_text(json.dumps(tree))
