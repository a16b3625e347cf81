"""Bring a model to every node of a Ray cluster, and load it in actors onto the GPUs that Ray gives them.

Usage::

    python gpu_of_each_actor.py https://host/model/     # on a machine of the cluster
    python gpu_of_each_actor.py                         # a small model, and a cluster of this machine alone

Ray and ndcache number the GPUs of a machine alike if they are of one kind, and CUDA_DEVICE_ORDER is PCI_BUS_ID.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import ray

import ndcache.ray


@ray.remote(num_gpus=1)
class Model:
    """The weights on one GPU, for as long as the actor lives."""

    def __init__(self, source: str) -> None:
        (number,) = ray.get_gpu_ids()
        self.weights = ndcache.load(source, device=f"gpu:{number}", offline=True)

    def describe(self) -> str:
        return f"{len(self.weights)} tensors of {self.weights.nbytes:,} bytes on {type(self.weights.device).__name__}"


def main(source: str) -> None:
    directories = ndcache.ray.fetch(source)
    print(f"the model is on {len(directories)} node(s)")
    models = [Model.remote(source) for _ in range(int(ray.cluster_resources()["GPU"]))]
    for description in ray.get([model.describe.remote() for model in models]):
        print(description)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        ray.init(address="auto")
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["NDCACHE_HOME"] = f"{folder}/cache"
            ndcache.dump({"weight": np.ones((300, 100), np.float32)}, f"{folder}/model")
            handler = functools.partial(SimpleHTTPRequestHandler, directory=f"{folder}/model")
            with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                ray.init(num_cpus=1, num_gpus=1, include_dashboard=False)
                main(f"http://127.0.0.1:{server.server_address[1]}/")
                ray.shutdown()
                server.shutdown()
