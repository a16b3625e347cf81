"""``python -m benchmarks.peers NAME JSON``: run one contender in this process and print what it took, as JSON.

Time starts when modules are imported and, on a GPU, the device is open; it ends when the bytes are where they belong.
Each contender returns the number of bytes that it loaded or wrote, which the harness compares.
"""

from __future__ import annotations

import json
import sys

# No more than this is imported here, nor at the top of the contenders' modules: `import_ndcache` times imports.
from . import clusters, downloaders, limits, loaders, ndcache_itself, onto_cuda, published, timing
from .machine import Unavailable, peak_bytes


def main() -> None:
    name, given = sys.argv[1], json.loads(sys.argv[2])
    timing.memory_bytes, timing.sampling = given.get("memory", 0), given.get("profile", False)
    modules = (ndcache_itself, limits, downloaders, loaders, onto_cuda, clusters, published)
    module = next(each for each in modules if hasattr(each, name))
    try:
        seconds, nbytes = getattr(module, name)(given)
    except Unavailable as error:
        print(json.dumps({"unavailable": str(error).splitlines()[0]}), flush=True)
        return
    measured = {"seconds": seconds, "bytes": nbytes, "peak": peak_bytes(), "profile": timing.profile, **timing.figures}
    print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
