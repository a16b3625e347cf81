"""Load model weights published in the MLC / TVM NDArray cache format into NumPy arrays or GPU buffers.

>>> import ndcache
>>> weights = ndcache.load("https://host/model/", device="gpu")

What is here is imported when the first of it is used: see `ndcache.public`.
"""

from __future__ import annotations

import importlib
import sys
import typing

from ._version import __version__ as __version__

if typing.TYPE_CHECKING:
    from . import errors as errors
    from . import tvm as tvm
    from .public import *  # noqa: F403
    from .public import __all__ as __all__
else:

    def __getattr__(name: str) -> typing.Any:
        if not name.startswith("__") or name == "__all__":
            try:
                public = importlib.import_module(".public", __name__)
            except RuntimeError as error:
                # Some libraries register what is to be done when the main thread ends.
                if "after shutdown" not in str(error):
                    raise
                raise importlib.import_module(".errors", __name__).NdcacheError(
                    "ndcache cannot be imported any more, as Python is shutting down",
                    hint="What `import ndcache` gives is imported when the first of it is used: use some of it before.",
                ) from error
            globals().update({each: getattr(public, each) for each in public.__all__}, __all__=public.__all__)
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module(".public", __name__).__all__})
