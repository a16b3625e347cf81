"""Bring a model to every node of a Dask cluster, and load it onto the GPU of each worker.

Usage::

    python gpu_of_each_worker.py tcp://scheduler:8786 https://host/model/
    python gpu_of_each_worker.py                         # a small model, and two workers on this machine

There is one worker for each GPU, with its number in the environment: ``GPU=1 dask worker tcp://scheduler:8786``.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from distributed import Client

import ndcache.dask


def load(source: str) -> ndcache.Weights[ndcache.GPUTensor]:
    return ndcache.load(source, device=f"gpu:{os.environ.get('GPU', '0')}", offline=True)


def describe(weights: ndcache.Weights[ndcache.GPUTensor]) -> str:
    return f"{len(weights)} tensors of {weights.nbytes:,} bytes on {type(weights.device).__name__}"


def main(client: Client, source: str) -> None:
    directories = ndcache.dask.fetch(client, source)
    print(f"the model is on {len(directories)} node(s)")
    # The weights stay on their workers; only their descriptions come back. Other tasks may take `on_gpus` as well.
    on_gpus = {worker: client.submit(load, source, workers=[worker], pure=False) for worker in client.nthreads()}
    for worker, weights in on_gpus.items():
        print(client.submit(describe, weights, workers=[worker]).result())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        with Client(sys.argv[1]) as client:
            main(client, sys.argv[2])
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["NDCACHE_HOME"] = f"{folder}/cache"
            ndcache.dump({"weight": np.ones((300, 100), np.float32)}, f"{folder}/model")
            handler = functools.partial(SimpleHTTPRequestHandler, directory=f"{folder}/model")
            with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                with Client(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as client:
                    main(client, f"http://127.0.0.1:{server.server_address[1]}/")
                server.shutdown()
