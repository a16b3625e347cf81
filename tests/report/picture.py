"""Make the picture of docs/guide/progress.rst: python -m tests.report.picture docs/guide/report.png."""

from __future__ import annotations

import base64
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np

import ndcache

from ..helpers import models
from ..helpers.browser import open_browser
from ..helpers.servers import FileServer

SHARDS = 24


def draw(target: Path) -> None:
    """Load a model from a slow server on this machine, and write a picture of the load's page."""
    with tempfile.TemporaryDirectory() as name:
        folder, random = Path(name), np.random.default_rng(0)
        shards = [
            {f"model.layers.{index}.mlp.weight": random.standard_normal((512, 1024), dtype=np.float32)}
            for index in range(SHARDS)
        ]
        models.write_model(folder / "model", shards)
        with closing(FileServer(folder / "model", rate=4 << 20)) as server:
            ndcache.load(server.url, cache_dir=folder / "cache", report=folder / "load.html")
        with open_browser() as browser:
            browser.resize(900, 1060)
            browser.open(folder / "load.html")
            clip = {"x": 0, "y": 0, "width": 900, "height": 1060, "scale": 1}
            found = browser.devtools("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
    target.write_bytes(base64.b64decode(found["data"]))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
